"""Accumulation: a window of batches is one large batch, whatever their sizes, masks and weights; and when it closes."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kerastorch as kt
from tests import reference

sgd = partial(torch.optim.SGD, lr=0.5)
closely = partial(pytest.approx, rel=1e-12, abs=1e-12)
MASKED = -100


@pytest.fixture
def batches(digits):
    """7 batches of 20 in float64, the precision most of these tests compare in."""
    return reference.cut(digits[0][:140].double(), digits[1][:140], 20)


@pytest.fixture
def uneven(digits):
    """Batches of 5, 40, 17 and 2."""
    return [*zip(digits[0][:64].double().split([5, 40, 17, 2]), digits[1][:64].split([5, 40, 17, 2]), strict=True)]


class Steps(kt.Callback):
    """Counts optimizer steps, and copies the gradients that each was about to take."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        parameters = self.model.module.parameters()
        self.gradients.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])


def fit(net, data, loss="cross_entropy", *, epochs=2, optimizer=sgd, callbacks=(), clip=None, **options):
    """A copy of `net` in float64, trained on batches in their order, its history and its `Steps`."""
    steps = Steps()
    model = kt.Model(copy.deepcopy(net), backend="cpu").compile(optimizer, loss, precision="64", clip=clip)
    history = model.fit(data, epochs=epochs, callbacks=[steps, *callbacks], verbose=0, **options).history
    return model.module, history, steps


def large(net, data, size, loss=F.cross_entropy, epochs=2, optimizer=sgd):
    """The same with one large batch for each window."""
    windows = [reference.joined(window) for window in reference.windows(data, size)]
    return reference.train(copy.deepcopy(net).double(), lambda epoch: windows, optimizer, loss, epochs)[0]


def large_gradients(net, loss):
    """Gradients of `loss(net)`, a mean over everything at once."""
    net = copy.deepcopy(net).double()
    return torch.autograd.grad(loss(net), list(net.parameters()))


def assert_close(gradients, expected):
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


# A window is one large batch.


@pytest.mark.parametrize("size", range(1, 9))
def test_every_remainder_of_a_short_last_window_weighs_by_samples(classifier, batches, size):
    net, _, steps = fit(classifier, batches, accumulate=size)
    assert reference.distance(net, large(classifier, batches, size)) < 1e-12
    assert len(steps.gradients) == 2 * -(-7 // size)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_in_float32_it_is_equal_to_1e_6(classifier, digits, size):
    expected, _ = reference.train(
        classifier, lambda epoch: reference.cut(*digits, 20 * size), sgd, F.cross_entropy, epochs=2
    )
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy")
    model.fit(*digits, batch_size=20, accumulate=size, epochs=2, shuffle=False, verbose=0)
    assert reference.distance(classifier, expected) < 1e-6


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_regular_windows_are_bit_equal_to_the_loop_that_divides_by_their_size(
    classifier, regressor, digits, diabetes, name, size
):
    net, (x, y) = (classifier, digits) if name == "cross_entropy" else (regressor, diabetes)
    loss = F.cross_entropy if name == "cross_entropy" else F.mse_loss
    # Views, as in `fit`: in a copy the rows could be aligned otherwise, and then be summed in another order.
    data = [*zip(x[:140].split(5), y[:140].split(5), strict=True)]
    expected = copy.deepcopy(net)
    optimizer = torch.optim.Adam(expected.parameters(), fused=True)
    for _ in range(2):
        for window in reference.windows(data, size):
            for part_x, part_y in window:
                (loss(expected(part_x), part_y) / size).backward()
            optimizer.step()
            optimizer.zero_grad()
    model = kt.Model(net, backend="cpu").compile("adam", name)
    model.fit(x[:140], y[:140], epochs=2, batch_size=5, accumulate=size, shuffle=False, verbose=0)
    assert reference.same_weights(net, expected)


@pytest.mark.parametrize("size", [2, 3, 4, 100])
def test_batches_of_different_sizes_count_by_their_samples(classifier, uneven, size):
    net, _, _ = fit(classifier, uneven, accumulate=size)
    assert reference.distance(net, large(classifier, uneven, size)) < 1e-12


@pytest.mark.parametrize("size", [2, 3, 100])
def test_a_generator_has_a_short_last_window_too(classifier, uneven, size):
    net, _, steps = fit(classifier, lambda: (batch for batch in uneven), accumulate=size)
    assert reference.distance(net, large(classifier, uneven, size)) < 1e-12
    assert len(steps.gradients) == 2 * -(-4 // size)


def test_the_size_may_change_from_epoch_to_epoch(classifier, batches):
    net, _, steps = fit(classifier, batches, accumulate={0: 8, 2: 3, 3: 1}, epochs=5)
    expected = reference.train_in_windows(
        copy.deepcopy(classifier).double(),
        lambda epoch: batches,
        sgd,
        partial(F.cross_entropy, reduction="sum"),
        epochs=5,
        accumulate=lambda epoch: (8, 8, 3, 1, 1)[epoch],
    )
    assert reference.distance(net, expected.net) < 1e-12
    assert len(steps.gradients) == len(expected.rates) == 1 + 1 + 3 + 7 + 7


def test_a_schedule_goes_by_the_number_of_the_epoch_where_training_goes_on(classifier, batches):
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", precision="64")
    steps = Steps()
    model.fit(batches, epochs=2, accumulate={0: 7, 2: 1}, callbacks=[steps], verbose=0)
    model.fit(batches, epochs=4, initial_epoch=2, accumulate={0: 7, 3: 4}, callbacks=[steps], verbose=0)
    assert len(steps.gradients) == 1 + 1 + 1 + 2


# Masks, weights and kinds of losses.


def masked(batches, shares):
    """The batches with so many targets of each masked."""
    result = []
    for (x, y), share in zip(batches, shares, strict=True):
        y = y.clone()
        y[: round(share * len(y))] = MASKED
        result.append((x, y))
    return result


@pytest.mark.parametrize("as_arrays", [True, False])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_masked_targets_do_not_count(classifier, batches, size, as_arrays):
    data = masked(batches, (0.9, 0.0, 0.5, 0.95, 0.0, 0.1, 0.8))
    options = {"batch_size": 20, "shuffle": False} if as_arrays else {}
    net, history, _ = fit(classifier, reference.joined(data) if as_arrays else data, accumulate=size, **options)
    assert reference.distance(net, large(classifier, data, size)) < 1e-12
    expected = reference.train_in_windows(
        copy.deepcopy(classifier).double(),
        lambda epoch: data,
        sgd,
        partial(F.cross_entropy, reduction="sum"),
        epochs=2,
        accumulate=lambda epoch: size,
        units=lambda y: (y != MASKED).sum(),
    )
    assert reference.distance(net, expected.net) < 1e-12
    assert history["loss"] == closely(expected.losses)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"weight": torch.linspace(0.5, 2, 10).double()},
        {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, 10).double()},
        {"reduction": "none"},
    ],
)
def test_a_batch_and_a_window_with_nothing_but_masked_targets_change_nothing(classifier, batches, options):
    data = masked(batches, (1.0, 0.5, 0.0, 0.0, 1.0, 1.0, 0.2))  # in windows of 2: the third one is empty
    net, history, steps = fit(classifier, data, nn.CrossEntropyLoss(**options), accumulate=2, epochs=1)
    loss = nn.CrossEntropyLoss(**options | {"reduction": "mean"})
    expected = reference.train(
        copy.deepcopy(classifier).double(),
        lambda epoch: [reference.joined(window) for window in (data[:2], data[2:4], data[6:])],
        sgd,
        loss,
        epochs=1,
    )[0]
    assert reference.distance(net, expected) < 1e-12
    assert all(not gradient.any() for gradient in steps.gradients[2])
    assert history["loss"][0] > 0


def test_weights_and_logs_stay_finite_where_an_optimizer_with_momentum_meets_an_empty_window(classifier, batches):
    data = masked(batches, (0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 1.0))
    net, history, _ = fit(classifier, data, accumulate=2, optimizer="adam")
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert torch.tensor(history["loss"]).isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_tokens_count_where_they_are_not_masked(digits, channels_last):
    """The 8 rows of a digit as a sequence, with the digit as the class of each row and rows of all lengths masked."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 10)

        def forward(self, x):
            output = self.layer(x)
            return output if channels_last else output.transpose(1, 2)

    x = digits[0][:60].reshape(60, 8, 8).double()
    y = digits[1][:60, None].repeat(1, 8)
    y[torch.arange(8) > torch.arange(60)[:, None] // 8] = MASKED
    data, net = reference.cut(x, y, 7), Rows()
    loss = lambda output, y: F.cross_entropy(output.transpose(1, 2) if channels_last else output, y)  # noqa: E731
    for form, options in ((data, {}), ((x, y), {"batch_size": 7, "shuffle": False})):
        trained, _, _ = fit(net, form, accumulate=4, **options)
        assert reference.distance(trained, large(net, data, 4, loss)) < 1e-12


WEIGHTS = torch.linspace(0.2, 3, 10, dtype=torch.float64)
LOSSES = {
    "weight": nn.CrossEntropyLoss(weight=WEIGHTS),
    "weight and mask": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=3),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3),
    "weight and smoothing": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "nll": lambda output, y: F.nll_loss(output.log_softmax(1), y),
    "partial": partial(F.cross_entropy, weight=WEIGHTS, ignore_index=3),
    "smoothed partial": partial(F.cross_entropy, label_smoothing=0.1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "partial sum": partial(F.cross_entropy, reduction="sum"),
    "margins": nn.MultiMarginLoss(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("data", ["batches", "uneven"])
def test_every_kind_of_loss_is_the_mean_of_the_window(classifier, name, data, request):
    data, loss = request.getfixturevalue(data), LOSSES[name]
    optimizer = partial(torch.optim.SGD, lr=0.01 if "sum" in name else 0.5)
    net, _, _ = fit(classifier, data, copy.deepcopy(loss), accumulate=3, optimizer=optimizer)
    assert reference.distance(net, large(classifier, data, 3, loss, optimizer=optimizer)) < 1e-12


def squares(output, y):
    return (output - y).square()


@pytest.mark.parametrize(
    ("loss", "torchs"),
    [
        ("mse", F.mse_loss),
        ("l1", F.l1_loss),
        ("huber", F.huber_loss),
        ("bce_with_logits", F.binary_cross_entropy_with_logits),
        (nn.MSELoss(reduction="none"), F.mse_loss),
        (squares, F.mse_loss),
    ],
)
def test_losses_on_values_count_by_samples(regressor, diabetes, loss, torchs):
    x, y = diabetes[0].double(), diabetes[1].double()
    y = (y > 0).double() if loss == "bce_with_logits" else y
    data = [*zip(x.split([50, 3, 40, 57]), y.split([50, 3, 40, 57]), strict=True)]
    net, _, _ = fit(regressor, data, loss, accumulate=3)
    assert reference.distance(net, large(regressor, data, 3, torchs)) < 1e-12


@pytest.mark.parametrize("mask", [False, True])
def test_sample_weights_are_divided_by_the_samples_of_the_window(classifier, uneven, mask):
    data = masked(uneven, (0.8, 0.3, 0.0, 0.5)) if mask else uneven
    weighted = [(x, y, torch.linspace(0, 2, len(x), dtype=torch.float64)) for x, y in data]
    net, history, _ = fit(classifier, weighted, accumulate=3)
    expected = reference.train_in_windows(
        copy.deepcopy(classifier).double(),
        lambda epoch: weighted,
        sgd,
        lambda output, y, weight: (F.cross_entropy(output, y, reduction="none") * weight).sum(),
        epochs=2,
        accumulate=lambda epoch: 3,
        units=lambda y, weight: (y != MASKED).sum(),
    )
    assert reference.distance(net, expected.net) < 1e-12
    assert history["loss"] == closely(expected.losses)


def test_class_weights_are_divided_by_the_samples_of_the_window(classifier, batches):
    class_weight = {digit: 0.5 + digit / 4 for digit in range(10)}
    net, _, _ = fit(classifier, batches, accumulate=3, class_weight=class_weight)
    table = torch.tensor([*class_weight.values()], dtype=torch.float64)
    loss = lambda output, y: (F.cross_entropy(output, y, reduction="none") * table[y]).mean()  # noqa: E731
    assert reference.distance(net, large(classifier, batches, 3, loss)) < 1e-12


# Several outputs.


class TwoHeads(nn.Module):
    """A digit, and how much ink it has."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 12), nn.Tanh())
        self.digit, self.ink = nn.Linear(12, 10), nn.Linear(12, 1)

    def forward(self, x):
        z = self.body(x)
        return {"digit": self.digit(z), "ink": self.ink(z)}


class Masked(nn.Module):
    """Two heads with a class each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 12), nn.Tanh())
        self.digit, self.parity = nn.Linear(12, 10), nn.Linear(12, 2)

    def forward(self, x):
        z = self.body(x)
        return self.digit(z), self.parity(z)


@pytest.mark.parametrize("mask", [False, True])
def test_several_outputs_are_each_the_mean_over_their_own(digits, mask):
    x, digit = digits[0].double(), digits[1].clone()
    if mask:
        digit[:90][torch.arange(90) % 3 != 0] = MASKED
    ink = x.mean(1, keepdim=True)
    splits = [60, 11, 49, 30]
    data = [
        (x, {"digit": d, "ink": i})
        for x, d, i in zip(x.split(splits), digit.split(splits), ink.split(splits), strict=True)
    ]
    net = TwoHeads()

    def of_window(window):
        def mean(net):
            outputs = [net(x) for x, _ in window]
            digits = F.cross_entropy(*(torch.cat([p["digit"] for p in parts]) for parts in (outputs, targets)))
            inks = F.mse_loss(*(torch.cat([p["ink"] for p in parts]) for parts in (outputs, targets)))
            return 2.0 * digits + 0.5 * inks

        targets = [y for _, y in window]
        return mean

    losses = {"ink": ("mse", 0.5), "digit": ("cross_entropy", 2.0)}
    frozen = partial(torch.optim.SGD, lr=0.0)
    _, _, steps = fit(net, data, losses, accumulate=3, optimizer=frozen, epochs=1)
    assert len(steps.gradients) == 2
    for gradients, window in zip(steps.gradients, (data[:3], data[3:]), strict=True):
        assert_close(gradients, large_gradients(net, of_window(window)))


def test_two_masked_outputs_are_each_the_mean_over_their_own_targets(digits):
    x, digit, parity = digits[0].double(), digits[1].clone(), digits[1] % 2
    digit[20:70], parity[:40] = MASKED, MASKED
    parity[60:] = torch.where(torch.arange(90) % 4 == 0, parity[60:], MASKED)
    net = Masked()
    frozen = partial(torch.optim.SGD, lr=0.0)
    data = [*zip(x.split(40), [*zip(digit.split(40), parity.split(40), strict=True)], strict=True)]
    _, history, steps = fit(net, data, ["cross_entropy", ("cross_entropy", 3.0)], accumulate=2, optimizer=frozen)
    for window, rows in enumerate((slice(0, 80), slice(80, 150)) * 2):

        def mean(net, rows=rows):
            first, second = net(x[rows])
            return F.cross_entropy(first, digit[rows]) + 3 * F.cross_entropy(second, parity[rows])

        assert_close(steps.gradients[window], large_gradients(net, mean))
    outputs = copy.deepcopy(net).double()(x)
    assert history["output_1_loss"][0] == closely(F.cross_entropy(outputs[0], digit).item())
    assert history["output_2_loss"][0] == closely(F.cross_entropy(outputs[1], parity).item())


def test_an_output_that_trains_nothing_is_left_out(digits):
    """Of a frozen head, say: its loss is logged, and has no gradient."""

    class Frozen(Masked):
        def forward(self, x):
            digit, parity = super().forward(x)
            return digit, parity.detach()

    x, digit, parity = digits[0].double(), digits[1].clone(), digits[1] % 2
    digit[20:70], parity[:40] = MASKED, MASKED
    net, targets = Frozen(), [*zip(digit.split(40), parity.split(40), strict=True)]
    data = [*zip(x.split(40), targets, strict=True)]
    trained, history, _ = fit(net, data, ["cross_entropy", "cross_entropy"], accumulate=2)
    expected = large(net, [(x, y) for x, (y, _) in data], 2, lambda output, y: F.cross_entropy(output[0], y))
    assert reference.distance(trained, expected) < 1e-12
    assert history["output_2_loss"][0] > 0


@pytest.mark.parametrize("name", ["samples", "sums", ""])
def test_names_of_outputs_mean_nothing(digits, name):
    class Named(TwoHeads):
        def forward(self, x):
            outputs = super().forward(x)
            return {name: outputs["digit"], "ink": outputs["ink"]}

    x, digit = digits[0].double(), digits[1].clone()
    digit[:90] = MASKED
    ink = x.mean(1, keepdim=True)
    data = [(x, {name: d, "ink": i}) for x, d, i in zip(*(part.split(40) for part in (x, digit, ink)), strict=True)]
    net = Named()

    def mean(net):
        outputs = net(x)
        return F.cross_entropy(outputs[name], digit) + F.mse_loss(outputs["ink"], ink)

    losses = {name: "cross_entropy", "ink": "mse"}
    _, _, steps = fit(net, data, losses, accumulate=4, optimizer=partial(torch.optim.SGD, lr=0.0), epochs=1)
    assert_close(steps.gradients[0], large_gradients(net, mean))


# When a window closes.


class Order(kt.Callback):
    """Writes down what happens."""

    def __init__(self):
        self.events, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.events.append(f"end {batch}")

    def on_before_backward(self, loss):
        self.losses.append(loss.item())

    def on_before_optimizer_step(self, optimizer):
        self.events.append("step")

    def on_before_zero_grad(self, optimizer):
        self.events.append("zero")

    def on_validation_begin(self, logs=None):
        self.events.append("validation")

    def on_epoch_end(self, epoch, logs=None):
        self.events.append("epoch end")


STEP = ["step", "zero"]


def test_the_last_window_closes_with_the_last_batch_where_that_is_known(classifier, uneven):
    order = Order()
    fit(classifier, uneven, accumulate=3, epochs=1, callbacks=[order], validation_data=uneven)
    assert order.events == ["end 0", "end 1", *STEP, "end 2", *STEP, "end 3", "validation", "epoch end"]


def test_steps_per_epoch_makes_it_known(classifier, uneven):
    order = Order()
    fit(classifier, lambda: iter(uneven), accumulate=2, epochs=2, steps_per_epoch=3, callbacks=[order])
    assert order.events == ["end 0", *STEP, "end 1", *STEP, "end 2", "epoch end"] * 2


def test_else_it_closes_before_the_validation(classifier, uneven):
    order = Order()
    data = lambda: iter(uneven)  # noqa: E731
    fit(classifier, data, accumulate=3, epochs=1, callbacks=[order], validation_data=uneven)
    assert order.events == ["end 0", "end 1", *STEP, "end 2", "end 3", *STEP, "validation", "epoch end"]


@pytest.mark.filterwarnings("ignore:the data ended after")
def test_it_closes_where_the_data_ends_before_steps_per_epoch(classifier, uneven):
    order = Order()
    net, _, _ = fit(classifier, iter(uneven), accumulate=3, epochs=2, steps_per_epoch=6, callbacks=[order])
    assert order.events == ["end 0", "end 1", *STEP, "end 2", "end 3", *STEP, "epoch end"]
    assert reference.distance(net, large(classifier, uneven, 3, epochs=1)) < 1e-12


@pytest.mark.parametrize("known", [True, False])
def test_a_stop_in_mid_window_closes_it(classifier, batches, known):
    class Stop(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 4

    order = Order()
    data = batches if known else lambda: iter(batches)
    net, _, _ = fit(classifier, data, accumulate=3, epochs=3, callbacks=[order, Stop()])
    assert order.events == ["end 0", "end 1", *STEP, "end 2", "end 3", "end 4", *STEP, "epoch end"]
    assert reference.distance(net, large(classifier, batches[:5], 3, epochs=1)) < 1e-12


def test_no_gradient_is_left_for_the_next_run(classifier, batches):
    class Break(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise InterruptedError

    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", precision="64")
    with pytest.raises(InterruptedError):
        model.fit(batches, accumulate=3, callbacks=[Break()], verbose=0)
    expected = large(classifier, batches, 3)
    model.fit(batches, accumulate=3, epochs=2, verbose=0)
    assert reference.distance(classifier, expected) < 1e-12


# What callbacks, schedules and logs see.


def test_hooks_see_each_batch_before_backward_and_each_window_before_its_step(classifier, uneven):
    order, frozen = Order(), partial(torch.optim.SGD, lr=0.0)
    _, _, steps = fit(classifier, uneven, accumulate=3, epochs=1, callbacks=[order], optimizer=frozen, clip=1e-3)
    net = copy.deepcopy(classifier).double()
    assert order.losses == closely([F.cross_entropy(net(x), y).item() for x, y in uneven])
    for gradients, window in zip(steps.gradients, reference.windows(uneven, 3), strict=True):
        x, y = reference.joined(window)
        assert_close(gradients, large_gradients(net, lambda net, x=x, y=y: F.cross_entropy(net(x), y)))


def test_steps_are_those_of_the_optimizer(classifier, batches):
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", precision="64", schedule="linear")
    rates = []
    model.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    model.fit(batches, accumulate={0: 3, 1: 2}, epochs=2, verbose=0)
    assert rates == pytest.approx([0.5 * (1 - step / 7) for step in range(3 + 4)])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_optimizers_with_a_state_step_as_often_as_with_large_batches(classifier, batches, optimizer):
    net, _, _ = fit(classifier, batches, accumulate=3, optimizer=optimizer)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[optimizer]
    assert reference.distance(net, large(classifier, batches, 3, optimizer=kind)) < 1e-9


def test_dropout_draws_the_same_numbers_as_a_loop_by_hand(digits):
    net, data = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)), reference.cut(*digits, 40)
    torch.manual_seed(3)
    expected = reference.train_in_windows(
        net,
        lambda epoch: data,
        sgd,
        partial(F.cross_entropy, reduction="sum"),
        epochs=2,
        accumulate=lambda epoch: 3,
    )
    torch.manual_seed(3)
    kt.Model(net, backend="cpu").compile(sgd, "cross_entropy").fit(data, epochs=2, accumulate=3, verbose=0)
    assert reference.distance(net, expected.net) < 1e-6


def test_the_logged_loss_is_that_of_the_batches(classifier, uneven):
    frozen = partial(torch.optim.SGD, lr=0.0)
    plain, gathered = (fit(classifier, uneven, accumulate=size, optimizer=frozen)[1] for size in (1, 3))
    assert gathered == plain
    _, trained, _ = fit(classifier, uneven, accumulate=3)
    expected = reference.train_in_windows(
        copy.deepcopy(classifier).double(),
        lambda epoch: uneven,
        sgd,
        partial(F.cross_entropy, reduction="sum"),
        epochs=2,
        accumulate=lambda epoch: 3,
    )
    assert trained["loss"] == closely(expected.losses)


def test_a_loss_of_ones_own_counts_by_samples(classifier, uneven):
    class Own(kt.Model):
        def compute_loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.module(x), y)

    net = copy.deepcopy(classifier)
    Own(net, backend="cpu").compile(sgd, precision="64").fit(uneven, accumulate=3, epochs=2, verbose=0)
    assert reference.distance(net, large(classifier, uneven, 3)) < 1e-12


def test_a_loss_that_the_module_computes_counts_by_samples(classifier, uneven):
    class WithLoss(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return F.cross_entropy(self.net(x), y)

    net = WithLoss(copy.deepcopy(classifier))
    kt.Model(net, backend="cpu").compile(sgd, precision="64").fit(uneven, accumulate=3, epochs=2, verbose=0)
    assert reference.distance(net.net, large(classifier, uneven, 3)) < 1e-12


def test_a_loss_over_tokens_that_the_module_computes_counts_by_tokens(digits):
    """The ink of the 8 rows of a digit as tokens, each predicting the next; sequences of all lengths."""

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)

        def forward(self, tokens, labels):
            output = self.head(self.embedding(tokens))
            return {"loss": F.cross_entropy(output.flatten(0, 1), labels.flatten()), "logits": output}

    tokens = (digits[0][:60].reshape(60, 8, 8).mean(2) * 9).round().long()
    labels = tokens.roll(-1, 1)
    labels[torch.arange(8) >= 1 + torch.arange(60)[:, None] // 9] = MASKED
    net = Language().double()
    data = [*zip(tokens.split([7, 30, 3, 20]), labels.split([7, 30, 3, 20]), strict=True)]
    expected = copy.deepcopy(net)
    optimizer = sgd(expected.parameters())
    for window in reference.windows(data, 3) * 2:
        expected(*reference.joined(window))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model = kt.Model(net, backend="cpu").compile(sgd, precision="64")
    model.fit(data, accumulate=3, epochs=2, verbose=0)
    assert reference.distance(net, expected) < 1e-12


@pytest.mark.parametrize("mask", [False, True])
def test_sparse_gradients_are_gathered_too(digits, mask):
    net = nn.Sequential(nn.Embedding(17, 4, sparse=True), nn.Flatten(), nn.Linear(256, 10))
    x, y = (digits[0] * 16).long(), digits[1].clone()
    y[20:90] = MASKED if mask else y[20:90]
    data = reference.cut(x, y, 40)
    trained, _, _ = fit(net, data, accumulate=3, optimizer=partial(torch.optim.SGD, lr=0.1))
    expected = large(net, data, 3, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert reference.distance(trained, expected) < 1e-12


# What it costs.


class Operations(TorchDispatchMode):
    """Names of all the operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(net, data, size):
    """What an epoch of batches of 20 does on the device, with so many of them in a window."""
    model = kt.Model(copy.deepcopy(net), backend="cpu").compile(sgd, "mse")
    with Operations() as seen:
        model.fit(*data, batch_size=20, accumulate=size, shuffle=False, verbose=0)
    return Counter(seen.names)


@pytest.mark.parametrize(("samples", "passes"), [(120, 0), (100, 1), (110, 1)])
def test_only_an_irregular_window_is_divided_again(regressor, diabetes, samples, passes):
    x, y = diabetes[0][:samples], diabetes[1][:samples]
    assert operations(regressor, (x, y), 3)["_foreach_mul_"] == passes


def test_a_regular_window_adds_a_multiplication_to_each_batch_and_no_more(regressor, diabetes):
    data = diabetes[0][:120], diabetes[1][:120]
    added = operations(regressor, data, 6) - operations(regressor, data, 1)
    # Its factor, forward and backward; and what torch itself does to add a gradient to one that is there.
    assert added.pop("mul") == 2 * 6
    assert set(added) <= {"add", "add_", "detach"}


def test_it_reads_nothing_from_the_device(classifier, digits, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _name=name, _original=original: reads.append(_name) or _original(self, *a),
        )
    model = kt.Model(classifier, backend="cpu").compile("adam", "cross_entropy", clip=1.0, metrics=["accuracy"])
    data = masked(reference.cut(*digits, 5), (0.5, 0.2, 0.0) * 10)

    def reads_of(batches):
        reads.clear()
        model.fit(data[:batches], accumulate=3, verbose=0)
        return len(reads)

    assert reads_of(29) == reads_of(2)


# Bad input.


@pytest.mark.parametrize("accumulate", [0, -1, 2.5, "4", True, None, {0: 0}, {0: 2, 3: 1.5}])
def test_an_impossible_number_is_refused(classifier, batches, accumulate):
    with pytest.raises(ValueError, match="accumulate=.* is no number of batches"):
        fit(classifier, batches, accumulate=accumulate)


def test_a_schedule_starts_with_epoch_0(classifier, batches):
    with pytest.raises(ValueError, match=r"accumulate=\{1: 4\} says nothing about epoch 0"):
        fit(classifier, batches, accumulate={1: 4})


@pytest.mark.parametrize("key", [-1, "late", 1.0])
def test_the_keys_of_a_schedule_are_epochs(classifier, batches, key):
    with pytest.raises(ValueError, match="accumulate=.* has keys that are no epochs"):
        fit(classifier, batches, accumulate={0: 4, key: 2})


@pytest.mark.parametrize("accumulate", [2, {0: 2}, {0: 1, 1: 2}])
def test_an_optimizer_that_evaluates_the_loss_again_is_refused(regressor, diabetes, accumulate):
    model = kt.Model(regressor, backend="cpu").compile("lbfgs", "mse")
    with pytest.raises(ValueError, match="LBFGS .* does not go with accumulate"):
        model.fit(*diabetes, accumulate=accumulate, epochs=2, verbose=0)
