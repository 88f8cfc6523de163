"""Precisions: which dtypes each computes in, equal to a loop by hand; overflows skipped; what a device cannot do."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from tests import reference

sgd = partial(torch.optim.SGD, lr=0.1)
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
ON_CPU = ["32", "16", "bf16", "16-true", "bf16-true", "64"]
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Probe(nn.Module):
    """A classifier that writes down the dtypes it meets."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.seen = set()

    def forward(self, x):
        output = self.layers(x)
        self.seen.add((self.layers[0].weight.dtype, x.dtype, output.dtype))
        return output


def by_hand(net, x, y, mode, loss=F.cross_entropy, epochs=2):
    """The loop that one would write in each precision, and its epoch losses."""
    autocast = {"16": HALF, "bf16": BRAIN}.get(mode)
    weights = {"16-true": HALF, "bf16-true": BRAIN, "64": DOUBLE}.get(mode, SINGLE)
    net = copy.deepcopy(net).to(weights)
    optimizer, scaler = sgd(net.parameters()), torch.amp.GradScaler("cpu", enabled=mode == "16")
    losses = []
    for _ in range(epochs):
        total = 0.0
        for part_x, part_y in reference.cut(x.to(weights), y, 50):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                output = net(part_x)
            value = loss(output if mode == "64" else output.float(), part_y)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += value.item() * len(part_x)
        losses.append(total / len(x))
    return net, losses


def fit(net, data, mode, loss="cross_entropy", *, epochs=2, optimizer=sgd, **options):
    """A copy of `net`, trained in order, and its history."""
    model = kt.Model(copy.deepcopy(net), backend="cpu").compile(optimizer, loss, precision=mode)
    options = {"batch_size": 50, "shuffle": False} | options if isinstance(data, tuple) else options
    return model, model.fit(data, epochs=epochs, verbose=0, **options).history


# The same as by hand.


@pytest.mark.parametrize("mode", ON_CPU)
def test_a_mode_is_bit_equal_to_its_loop_by_hand(classifier, digits, mode):
    expected, losses = by_hand(classifier, *digits, mode)
    model, history = fit(classifier, digits, mode)
    assert reference.same_weights(model.module, expected)
    assert history["loss"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("mode", ON_CPU)
def test_values_as_targets_are_not_rounded(regressor, diabetes, mode):
    """70000 is more than float16 has."""
    x, y = diabetes[0], diabetes[1] + 70000 * (diabetes[1] > 2)
    loss = lambda output, y: F.smooth_l1_loss(output, y.to(output.dtype))  # noqa: E731
    expected, losses = by_hand(regressor, x, y, mode, loss)
    model, history = fit(regressor, (x, y), mode, "smooth_l1")
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert reference.same_weights(model.module, expected)


@pytest.mark.parametrize(
    ("mode", "weights", "inputs", "raw", "wide"),
    [
        ("32", SINGLE, SINGLE, SINGLE, SINGLE),
        ("16", SINGLE, SINGLE, HALF, SINGLE),
        ("bf16", SINGLE, SINGLE, BRAIN, SINGLE),
        ("16-true", HALF, HALF, HALF, SINGLE),
        ("bf16-true", BRAIN, BRAIN, BRAIN, SINGLE),
        ("64", DOUBLE, DOUBLE, DOUBLE, DOUBLE),
    ],
)
def test_dtypes_of_weights_inputs_outputs_and_losses(digits, mode, weights, inputs, raw, wide):
    met = []

    def loss(output, y):
        met.append(output.dtype)
        return F.cross_entropy(output, y)

    class Losses(kt.Callback):
        def on_before_backward(self, loss):
            met.append(loss.dtype)

        def on_before_optimizer_step(self, optimizer):
            gradients = {parameter.grad.dtype for parameter in self.model.module.parameters()}
            assert gradients == {weights}

    net = Probe()
    model = kt.Model(net, backend="cpu").compile(sgd, loss, metrics=["accuracy"], precision=mode)
    model.fit(*digits, callbacks=[Losses()], validation_data=digits, verbose=0)
    model.evaluate(*digits, verbose=0)
    outputs = [model.predict(digits[0], verbose=0), model(digits[0]), model.predict_on_batch(digits[0])]
    assert net.seen == {(weights, inputs, raw)}
    assert {*met, *(output.dtype for output in outputs)} == {wide}
    assert model.predict(digits[0].numpy(), verbose=0).dtype == str(wide).removeprefix("torch.")


@pytest.mark.parametrize("mode", ON_CPU)
def test_evaluation_and_prediction_compute_in_the_compiled_precision(classifier, digits, mode):
    x, y = digits
    model = kt.Model(copy.deepcopy(classifier), backend="cpu").compile(sgd, "cross_entropy", precision=mode)
    autocast = {"16": HALF, "bf16": BRAIN}.get(mode)
    weights = {"16-true": HALF, "bf16-true": BRAIN, "64": DOUBLE}.get(mode, SINGLE)
    net = copy.deepcopy(classifier).to(weights)
    with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.no_grad():
        expected = net(x.to(weights))
    expected = expected if mode == "64" else expected.float()
    for output in (model.predict(x, batch_size=150, verbose=0), model(x), model.predict_on_batch(x)):
        assert torch.equal(output, expected)
    loss = F.cross_entropy(expected, y).item()
    assert model.evaluate(x, y, batch_size=150, verbose=0) == pytest.approx(loss, rel=1e-9)
    assert model.test_on_batch(x, y) == pytest.approx(loss, rel=1e-9)
    assert model.train_on_batch(x, y) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("mode", ["16", "bf16"])
def test_a_loss_of_ones_own_is_computed_in_it_too(digits, mode):
    class Own(kt.Model):
        def compute_loss(self, batch):
            x, y = batch
            output = self.module(x)
            assert output.dtype == {"16": HALF, "bf16": BRAIN}[mode]
            return F.cross_entropy(output.float(), y)

    net = Probe()
    expected, losses = by_hand(net, *digits, mode)
    model = Own(net, backend="cpu").compile(sgd, precision=mode)
    history = model.fit(*digits, batch_size=50, shuffle=False, epochs=2, verbose=0).history
    assert reference.same_weights(net, expected)
    assert history["loss"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("mode", ["16", "bf16", "16-true", "bf16-true"])
def test_several_outputs_come_out_wide(digits, mode):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            output = self.layer(x)
            return {"one": output, "two": (output, [output])}

    output = kt.Model(Nested(), backend="cpu").compile(sgd, "mse", precision=mode)(digits[0])
    assert {output["one"].dtype, output["two"][0].dtype, output["two"][1][0].dtype} == {SINGLE}


def test_sums_of_losses_are_kept_in_more_than_float32():
    """2**24 + 1 is no float32: 32 batches of it have a mean that float32 sums could not give."""
    x, value = torch.zeros(64, 1), 2.0**24
    y = torch.full((64, 1), value)
    y[:2] = value + 2
    model = kt.Model(nn.Linear(1, 1, bias=False), backend="cpu").compile(sgd, "l1")
    assert model.evaluate(x, y, batch_size=2, verbose=0) == value + 2 / 32


# Names.


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (16, "16"),
        (32, "32"),
        (64, "64"),
        ("32-true", "32"),
        ("64-true", "64"),
        ("16-mixed", "16"),
        ("bf16-mixed", "bf16"),
        ("BF16", "bf16"),
        ("float16", "16"),
        ("bfloat16", "bf16"),
        ("mixed_bfloat16", "bf16"),
    ],
)
def test_other_names_of_the_same(classifier, digits, name, mode):
    ours, theirs = (fit(classifier, digits, chosen)[0].module for chosen in (name, mode))
    assert reference.same_weights(ours, theirs)
    assert next(ours.parameters()).dtype == next(theirs.parameters()).dtype


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bf61", "Did you mean 'bf16'"),
        ("16-treu", "Did you mean '16-true'"),
        ("float23", "Did you mean 'float32'"),
        ("full", "Give one of '32', 'tf32'"),
        (8, "Give one of"),
        (True, "Give one of"),
        (None, "Give one of"),
        (32.0, "Give one of"),
        (torch.bfloat16, "Give one of"),
    ],
)
def test_an_unknown_name_is_refused_with_a_close_one(classifier, name, hint):
    with pytest.raises(ValueError, match=f"precision={name!r} is not a precision. {hint}"):
        kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", precision=name)


def test_what_the_device_cannot_do_is_refused_with_what_it_can(classifier):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
    before = model.optimizer
    with pytest.raises(ValueError, match="precision='tf32' is more than device 'cpu' can do. Give one of '32', '16'"):
        model.compile("adam", "cross_entropy", precision="tf32")
    assert model.optimizer is before


def test_other_devices_have_limits_of_their_own():
    mps = torch.device("mps")
    for mode in ("64", "16", "tf32"):
        with pytest.raises(ValueError, match=f"precision='{mode}' is more than device 'mps' can do"):
            kt.precision.get(mode, mps)
    assert kt.precision.get("bf16", mps).autocast is BRAIN


def test_an_old_gpu_is_told_what_it_can_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for mode in ("tf32", "bf16", "bf16-true"):
        with pytest.raises(ValueError, match=f"'{mode}' is more than Tesla V100 can do. Give one of '32', '16', '16-t"):
            kt.precision.get(mode, torch.device("cuda:0"))
    assert kt.precision.get("16", torch.device("cuda:0")).scales_loss


# What happens to the module.


def dtypes(module):
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}


def test_another_compile_gives_the_module_its_own_dtype_again(classifier, digits):
    model = kt.Model(classifier, backend="cpu")
    for mode, expected in [("16-true", HALF), ("bf16", SINGLE), ("64", DOUBLE), ("bf16-true", BRAIN), ("32", SINGLE)]:
        model.compile("sgd", "cross_entropy", precision=mode).fit(*digits, verbose=0)
        assert {*dtypes(classifier).values()} == {expected}


def test_32_leaves_the_module_as_it_is(classifier, digits):
    classifier.double()
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", precision="32")
    model.fit(*digits, verbose=0)
    assert {*dtypes(classifier).values()} == {DOUBLE}
    model.compile("sgd", "cross_entropy", precision="16-true").compile("sgd", "cross_entropy")
    assert {*dtypes(classifier).values()} == {DOUBLE}


def test_a_refused_compile_leaves_the_module_as_it_is(classifier):
    model = kt.Model(classifier, backend="cpu")
    with pytest.raises(ValueError, match="accuray"):
        model.compile("sgd", "cross_entropy", precision="16-true", metrics=["accuray"])
    assert {*dtypes(classifier).values()} == {SINGLE}


@pytest.mark.parametrize(("mode", "expected"), [("16-true", HALF), ("bf16-true", BRAIN), ("64", DOUBLE)])
def test_only_floating_point_values_are_cast(digits, mode, expected):
    net = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))
    net.register_buffer("phases", torch.tensor([1 + 2j]))
    net.register_buffer("table", torch.arange(3))
    net.register_buffer("flags", torch.tensor([True, False]))
    before = {name: net.get_buffer(name).clone() for name in ("phases", "table", "flags")}
    kt.Model(net, backend="cpu").compile(sgd, "cross_entropy", precision=mode).fit(*digits, verbose=0)
    for name, buffer in before.items():
        assert torch.equal(net.get_buffer(name), buffer)
    assert net[1].num_batches_tracked.dtype == torch.int64
    assert dtypes(net)["0.weight"] == dtypes(net)["1.running_mean"] == expected


@pytest.mark.parametrize("mode", ON_CPU)
def test_tied_weights_stay_tied_and_the_optimizer_has_them(digits, mode):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    net[1].weight = net[0].weight
    parameters = list(net.parameters())
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", precision=mode)
    model.fit(*digits, verbose=0)
    assert net[1].weight is net[0].weight
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    assert all(one is other for one, other in zip(model.optimizer.param_groups[0]["params"], parameters, strict=True))


@pytest.mark.parametrize("mode", ON_CPU)
def test_a_lazy_module_gets_its_parameters_in_it(digits, mode):
    net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
    model, history = fit(net, digits, mode, epochs=3)
    weights = {"16-true": HALF, "bf16-true": BRAIN, "64": DOUBLE}.get(mode, SINGLE)
    assert {*dtypes(model.module).values()} == {weights}
    assert history["loss"][-1] < history["loss"][0]
    model.compile(sgd, "cross_entropy")
    assert {*dtypes(model.module).values()} == {SINGLE}


@pytest.mark.parametrize("mode", ON_CPU)
def test_nothing_global_is_changed(classifier, digits, mode):
    before = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    fit(classifier, digits, mode)
    after = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    assert after == before


# Loss scaling.


def overflowing(digits, *batches):
    """Three batches of digits, in which the losses of those numbered have gradients that float16 has not."""
    data = [(x, y, torch.ones(len(x))) for x, y in reference.cut(*digits, 50)]
    for index in batches:
        data[index][2].fill_(1e20)
    return data


def scaled_by_hand(net, data, epochs, **options):
    scaler = torch.amp.GradScaler("cpu")
    loss = lambda output, y, weight: (F.cross_entropy(output, y, reduction="none") * weight).sum()  # noqa: E731
    trained = reference.train_in_windows(
        net, lambda epoch: data, sgd, loss, epochs, autocast=HALF, scaler=scaler, **options
    )
    return trained, scaler.get_scale()


def linear_over(steps):
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


@pytest.mark.parametrize("batches", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2), ()])
def test_an_overflow_is_skipped_and_neither_moves_the_schedule_nor_goes_uncounted(classifier, digits, batches):
    data, epochs = overflowing(digits, *batches), 3
    expected, scale = scaled_by_hand(classifier, data, epochs, schedule=linear_over(3 * epochs))
    net = copy.deepcopy(classifier)
    model = kt.Model(net, backend="cpu").compile(sgd, "cross_entropy", precision="16", schedule="linear")
    history = model.fit(data, epochs=epochs, verbose=0).history
    assert reference.distance(net, expected.net) < 1e-6
    assert model.skipped_steps == expected.skipped == epochs * len(batches)
    assert model._compiled.scaler.get_scale() == scale == 2.0 ** (16 - epochs * len(batches))
    assert history["lr"] == pytest.approx(expected.rates[2::3])
    left = 1 - (3 * epochs - model.skipped_steps) / (3 * epochs)
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * max(left, 1 / (3 * epochs)))


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_optimizers_made_by_name_skip_it_too(classifier, digits, name):
    """They are fused, and learn of the overflow on the device."""
    data = overflowing(digits, 1)
    nets = []
    for form in (data, [data[0], data[2]]):
        net = copy.deepcopy(classifier)
        model = kt.Model(net, backend="cpu").compile(name, "cross_entropy", precision="16", lr=0.01)
        model.fit(form, epochs=1, verbose=0)
        nets.append(net)
    assert not reference.same_weights(nets[0], classifier)
    # The scale differs in the last step, which only rounds gradients elsewhere.
    assert reference.distance(*nets) < 1e-4
    assert all(parameter.isfinite().all() for parameter in nets[0].parameters())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_an_overflow_skips_its_window(classifier, digits, accumulate):
    data = overflowing(digits, 1)
    options = {"clip": partial(nn.utils.clip_grad_norm_, max_norm=0.1), "accumulate": lambda epoch: accumulate}
    expected, scale = scaled_by_hand(classifier, data, 4, **options)
    net = copy.deepcopy(classifier)
    model = kt.Model(net, backend="cpu").compile(sgd, "cross_entropy", precision="16", clip=0.1)
    model.fit(data, epochs=4, accumulate=accumulate, verbose=0)
    assert model.skipped_steps == expected.skipped == 4
    assert model._compiled.scaler.get_scale() == scale
    assert reference.distance(net, expected.net) < 1e-6
    assert reference.same_weights(net, classifier) == (accumulate == 3)


def test_callbacks_see_gradients_without_the_scale(classifier, digits):
    seen = []

    class Look(kt.Callback):
        def on_before_backward(self, loss):
            seen.append(loss.item())

        def on_before_optimizer_step(self, optimizer):
            seen.append([parameter.grad.clone() for parameter in classifier.parameters()])

    net = copy.deepcopy(classifier)
    with torch.autocast("cpu", HALF):
        output = net(digits[0])
    loss = F.cross_entropy(output.float(), digits[1])
    loss.backward()
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", precision="16")
    model.fit(*digits, batch_size=150, shuffle=False, callbacks=[Look()], verbose=0)
    assert seen[0] == pytest.approx(loss.item())
    for ours, parameter in zip(seen[1], net.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-2, atol=1e-5)


def test_skipped_steps_are_counted_since_compile_and_0_elsewhere(classifier, digits):
    model, _ = fit(classifier, overflowing(digits, 0), "16", epochs=2)
    assert model.skipped_steps == 2
    model.fit(overflowing(digits, 0, 1), epochs=1, verbose=0)
    assert model.skipped_steps == 4
    assert model.compile(sgd, "cross_entropy", precision="16").skipped_steps == 0
    assert fit(classifier, digits, "bf16")[0].skipped_steps == 0


def test_several_outputs_with_masks_are_unscaled_and_normalized(digits):
    """Their gradients are kept apart until the window closes."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(64, 12), nn.Linear(12, 10), nn.Linear(12, 2)

        def forward(self, x):
            z = self.body(x).tanh()
            return self.one(z), self.two(z)

    x, first, second = digits[0], digits[1].clone(), digits[1] % 2
    first[10:80], second[:40] = -100, -100
    net = Two()
    expected = copy.deepcopy(net)
    optimizer = sgd(expected.parameters())
    for _ in range(2):
        with torch.autocast("cpu", HALF):
            outputs = expected(x)
        losses = [F.cross_entropy(output.float(), y) for output, y in zip(outputs, (first, second), strict=True)]
        (losses[0] + 0.5 * losses[1]).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    losses = ["cross_entropy", ("cross_entropy", 0.5)]
    model = kt.Model(net, backend="cpu").compile(sgd, losses, precision="16", clip=0.5)
    model.fit(x, (first, second), batch_size=40, accumulate=4, epochs=2, shuffle=False, verbose=0)
    assert model.skipped_steps == 0
    assert reference.distance(net, expected) < 1e-4


def test_an_optimizer_that_evaluates_the_loss_again_has_no_loss_scaling(regressor):
    with pytest.raises(ValueError, match="LBFGS .* does not go with precision='16'"):
        kt.Model(regressor, backend="cpu").compile("lbfgs", "mse", precision="16")


# On a GPU.


@gpu
@needs_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs tensor cores with TF32"
)
def test_tf32_holds_while_the_module_runs_and_no_longer(digits):
    class Look(Probe):
        def forward(self, x):
            self.seen.add(torch.get_float32_matmul_precision())
            return self.layers(x)

    before, net = torch.get_float32_matmul_precision(), Look()
    model = kt.Model(net, backend="cuda").compile(sgd, "cross_entropy", precision="tf32")
    for run in (
        lambda: model.fit(*digits, verbose=0),
        lambda: model.evaluate(*digits, verbose=0),
        lambda: model.predict(digits[0], verbose=0),
        lambda: model(digits[0]),
    ):
        net.seen.clear()
        run()
        assert net.seen == {"high"}
        assert torch.get_float32_matmul_precision() == before
    net.seen.clear()
    model.compile(sgd, "cross_entropy").fit(*digits, verbose=0)
    assert net.seen == {before}


@gpu
@needs_cuda
@pytest.mark.parametrize("mode", ["16", "bf16", "16-true", "bf16-true", "64"])
def test_a_gpu_gives_the_numbers_of_the_cpu(classifier, digits, mode):
    if "bf16" in mode and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs bfloat16")
    histories = []
    for backend in ("cpu", "cuda"):
        model = kt.Model(copy.deepcopy(classifier), backend=backend).compile(sgd, "cross_entropy", precision=mode)
        histories.append(model.fit(*digits, epochs=3, shuffle=False, verbose=0).history["loss"])
    assert histories[1] == pytest.approx(histories[0], rel=1e-9 if mode == "64" else 2e-2)


@gpu
@needs_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_an_overflow_is_skipped_without_waiting_for_the_device(classifier, digits, accumulate):
    class Strict(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            torch.cuda.set_sync_debug_mode("error" if batch > 1 else "default")

        def on_train_batch_end(self, batch, logs=None):
            torch.cuda.set_sync_debug_mode("default")

        def on_exception(self, error):
            torch.cuda.set_sync_debug_mode("default")

    x, y = (tensor.repeat(4, *[1] * (tensor.ndim - 1)) for tensor in digits)
    weight = torch.ones(len(x))
    weight[300:320] = 1e20
    net = copy.deepcopy(classifier)
    model = kt.Model(net, backend="cuda").compile(
        "sgd", "cross_entropy", lr=0.1, precision="16", clip=1.0, schedule="linear"
    )
    options = {"batch_size": 20, "shuffle": False, "accumulate": accumulate, "verbose": 0}
    history = model.fit(x, y, sample_weight=weight, callbacks=[Strict()], **options).history
    steps = 30 // accumulate
    assert model.skipped_steps == 1
    assert history["lr"] == pytest.approx([0.1 * (1 - (steps - 2) / steps)])
    assert all(parameter.isfinite().all() for parameter in net.parameters())
