"""What compile chose: clipping, everything at once against a loop by hand, and what it refuses."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import lr_scheduler

import kerastorch as kt
from tests import reference

sgd = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
MASKED = -100


class Norms(kt.Callback):
    """Writes down the norm that each step found, and the gradients it took."""

    def __init__(self):
        self.norms, self.gradients = [], []

    def on_before_zero_grad(self, optimizer):
        self.norms.append(self.model.gradient_norm)
        self.gradients.append([parameter.grad.clone() for parameter in self.model.module.parameters()])


def fit(net, data, *, optimizer=sgd, precision="64", clip=None, schedule=None, **options):
    """A copy of `net`, trained on batches in their order, its history and its `Norms`."""
    norms = Norms()
    model = kt.Model(copy.deepcopy(net), backend="cpu")
    model.compile(optimizer, "cross_entropy", precision=precision, clip=clip, schedule=schedule)
    history = model.fit(data, callbacks=[norms], verbose=0, **options)
    return model, history.history, norms


def by_hand(net, data, epochs, **options):
    loss = partial(F.cross_entropy, reduction="sum")
    return reference.train_in_windows(
        net, lambda epoch: data, sgd, loss, epochs, units=lambda y: (y != MASKED).sum(), **options
    )


# Clipping.


@pytest.mark.parametrize(
    ("clip", "torchs"),
    [
        (0.5, partial(clip_grad_norm_, max_norm=0.5)),
        (1, partial(clip_grad_norm_, max_norm=1)),
        (np.float32(0.25), partial(clip_grad_norm_, max_norm=0.25)),
        (("norm", 0.5), partial(clip_grad_norm_, max_norm=0.5)),
        (["norm", 1], partial(clip_grad_norm_, max_norm=1)),
        (("value", 0.01), partial(clip_grad_value_, clip_value=0.01)),
        (1e6, partial(clip_grad_norm_, max_norm=1e6)),
        (float("inf"), partial(clip_grad_norm_, max_norm=float("inf"))),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_clipped_as_torch_does_it(classifier, digits, clip, torchs, accumulate):
    data = reference.cut(digits[0].double(), digits[1], 40)
    model, _, norms = fit(classifier, data, clip=clip, epochs=2, accumulate=accumulate)
    expected = by_hand(copy.deepcopy(classifier).double(), data, 2, clip=torchs, accumulate=lambda epoch: accumulate)
    assert reference.distance(model.module, expected.net) < 1e-12
    for ours, theirs in zip(norms.norms, expected.norms, strict=True):
        assert ours is theirs is None or ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_clipping_bounds_the_gradients_and_leaves_small_ones(classifier, digits):
    data = [(digits[0].double(), digits[1])]
    plain = fit(classifier, data, clip=1e6)[2]
    for bound in (0.1, 1e3):
        clipped = fit(classifier, data, clip=bound)[2]
        norm = torch.cat([gradient.flatten() for gradient in clipped.gradients[0]]).norm().item()
        assert norm == pytest.approx(min(bound, plain.norms[0].item()), rel=1e-5)
        assert clipped.norms[0] == plain.norms[0]
    values = fit(classifier, data, clip=("value", 1e-3))[2].gradients[0]
    assert max(gradient.abs().max() for gradient in values) == 1e-3


def test_the_norm_is_a_scalar_on_the_device_that_nobody_has_read(classifier, digits):
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", clip=0.5)
    assert model.gradient_norm is None
    model.fit(*digits, verbose=0)
    assert isinstance(model.gradient_norm, torch.Tensor)
    assert model.gradient_norm.shape == () and model.gradient_norm.device == model.backend.device
    assert not model.gradient_norm.requires_grad
    for clip in (None, ("value", 0.1)):
        model.compile(sgd, "cross_entropy", clip=clip).fit(*digits, verbose=0)
        assert model.gradient_norm is None


def test_the_norm_is_that_of_what_the_optimizer_updates(classifier, digits):
    x, y = digits
    expected = copy.deepcopy(classifier)
    F.cross_entropy(expected(x), y).backward()
    norm = clip_grad_norm_(expected[2].parameters(), 0.01)
    head = torch.optim.SGD(classifier[2].parameters(), lr=1.0)
    model = kt.Model(classifier, backend="cpu").compile(head, "cross_entropy", clip=0.01)
    model.train_on_batch(x, y)
    assert model.gradient_norm == norm
    for ours, theirs in zip(classifier[2].parameters(), expected[2].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)


def test_gradients_are_unscaled_before_they_are_clipped(classifier, digits):
    x, y = digits
    net = copy.deepcopy(classifier)
    with torch.autocast("cpu", torch.float16):
        output = net(x)
    F.cross_entropy(output.float(), y).backward()
    norm = clip_grad_norm_(net.parameters(), 1.0)
    model = kt.Model(classifier, backend="cpu").compile(sgd, "cross_entropy", precision="16", clip=1.0)
    model.train_on_batch(x, y)
    assert model.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-2)


def test_an_optimizer_that_evaluates_the_loss_again_has_each_gradient_clipped(regressor, diabetes):
    x, y = diabetes
    net = copy.deepcopy(regressor)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        clip_grad_norm_(net.parameters(), 0.1)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    chosen = lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=5)  # noqa: E731
    model = kt.Model(regressor, backend="cpu").compile(chosen, "mse", clip=0.1)
    model.fit(x, y, batch_size=150, epochs=2, shuffle=False, verbose=0)
    assert reference.same_weights(regressor, net)


@pytest.mark.parametrize(
    "clip",
    [0, -1, 0.0, -0.5, True, False, float("nan"), "norm", "1.0", ("foo", 1), ("norm",), ("norm", 0), ("value", -1),
     ("norm", "1"), ("value", True), ("norm", 1, 2), (1, "norm"), (1.0, 0.5), {"norm": 1}, [], object],
    ids=str,
)  # fmt: skip
def test_no_bound_of_gradients_is_refused(classifier, clip):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy")
    before = model.optimizer
    with pytest.raises(ValueError, match="clip=.* is no bound of gradients. Give a number above 0"):
        model.compile("adam", "cross_entropy", clip=clip)
    assert model.optimizer is before


# Everything at once.


def cosine_over(steps):
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, steps)


def one_cycle_over(steps):
    return lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps)


def halved(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def decaying(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


# `schedule` of compile -> how to make it by hand of the number of steps, and when it is moved.
SCHEDULES = {
    "none": (None, lambda steps: None, "step"),
    "cosine": ("cosine", cosine_over, "step"),
    "one_cycle": ("one_cycle", one_cycle_over, "step"),
    "each epoch": (halved, lambda steps: halved, "epoch"),
    "each step": (("step", decaying), lambda steps: decaying, "step"),
}
CLIPS = {
    "norm": (1.0, partial(clip_grad_norm_, max_norm=1.0)),
    "value": (("value", 0.02), partial(clip_grad_value_, clip_value=0.02)),
}
AUTOCAST = {"16": torch.float16, "bf16": torch.bfloat16}
# How far weights and losses may be apart. Gradients are multiplied by a count before they are rounded by autocast, and
# divided after it, so that some of them are rounded otherwise than by hand.
TOLERANCES = {"64": 1e-11, "32": 1e-6, "16": 1e-3, "bf16": 1e-2}


@pytest.mark.parametrize("is_masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("accumulate", [3, {0: 3, 1: 2, 2: 1}], ids=["3", "3 2 1"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_all_of_it_together_is_the_loop_by_hand(digits, precision, schedule, clip, accumulate, is_masked):
    """150 digits in batches of 16 and one of 6: windows of 3, 3, 3 and 1, the last one short in samples too."""
    x, y = digits[0], digits[1].clone()
    if is_masked:
        y[::3], y[20:50], y[96:112] = MASKED, MASKED, MASKED
    x = x.double() if precision == "64" else x
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).to(x.dtype)
    size = (lambda epoch: accumulate) if accumulate == 3 else (lambda epoch: accumulate[epoch])
    (chosen, scheduler, each), (bound, clipper) = SCHEDULES[schedule], CLIPS[clip]
    steps = sum(-(-10 // size(epoch)) for epoch in range(3))
    expected = by_hand(
        net,
        reference.cut(x, y, 16),
        3,
        accumulate=size,
        clip=clipper,
        schedule=scheduler(steps),
        each=each,
        autocast=AUTOCAST.get(precision),
        scaler=torch.amp.GradScaler("cpu") if precision == "16" else None,
    )
    options = {"batch_size": 16, "shuffle": False, "epochs": 3, "accumulate": accumulate}
    model, history, norms = fit(net, (x, y), precision=precision, clip=bound, schedule=chosen, **options)
    tolerance = TOLERANCES[precision]
    assert reference.distance(model.module, expected.net) < tolerance
    assert history["loss"] == pytest.approx(expected.losses, rel=tolerance)
    assert len(norms.norms) == len(expected.rates) == steps
    if clip == "norm":
        assert [norm.item() for norm in norms.norms] == pytest.approx(
            [norm.item() for norm in expected.norms], rel=10 * tolerance
        )
    if chosen is not None:
        last = [sum(-(-10 // size(epoch)) for epoch in range(number + 1)) - 1 for number in range(3)]
        assert history["lr"] == pytest.approx([expected.rates[step] for step in last], rel=1e-12)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_micro_batches_go_with_all_of_it(digits, precision):
    x, y = digits[0], digits[1].clone()
    y[::3], y[20:50] = MASKED, MASKED
    x = x.double() if precision == "64" else x
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).to(x.dtype)
    options = {"precision": precision, "clip": 1.0, "schedule": "cosine", "epochs": 3, "accumulate": 3}
    options |= {"batch_size": 16, "shuffle": False}
    (whole, whole_history, _), (pieces, history, _) = (
        fit(net, (x, y), microbatch=size, **options) for size in (None, 5)
    )
    tolerance = TOLERANCES[precision]
    assert reference.distance(whole.module, pieces.module) < tolerance
    assert history["loss"] == pytest.approx(whole_history["loss"], rel=tolerance)
    assert history["lr"] == whole_history["lr"]


def test_validation_and_callbacks_in_between_change_nothing(digits):
    class Busy(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            dict(logs), self.model.evaluate(*digits, verbose=0), self.model.predict(digits[0], verbose=0)

    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    nets = []
    for options in ({}, {"callbacks": [Busy()], "validation_data": digits}):
        model = kt.Model(copy.deepcopy(net), backend="cpu")
        model.compile(sgd, "cross_entropy", precision="bf16", clip=1.0, schedule="cosine")
        model.fit(*digits, epochs=2, batch_size=16, accumulate=3, shuffle=False, verbose=0, **options)
        nets.append(model.module)
    assert reference.same_weights(*nets)


# The rate in the logs.


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "none"])
@pytest.mark.parametrize("precision", ["32", "16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lr_in_the_history_is_the_rate_of_each_epochs_last_step(classifier, digits, schedule, precision, accumulate):
    taken, before, logged = [], [], []

    class Rates(kt.Callback):
        def on_before_optimizer_step(self, optimizer):
            before.append(optimizer.param_groups[0]["lr"])

        def on_train_batch_end(self, batch, logs=None):
            logged.append(logs.get("lr"))

    model = kt.Model(classifier, backend="cpu").compile(
        sgd, "cross_entropy", precision=precision, schedule=SCHEDULES[schedule][0]
    )
    model.optimizer.register_step_pre_hook(lambda optimizer, *_: taken.append(optimizer.param_groups[0]["lr"]))
    options = {"batch_size": 50, "accumulate": accumulate, "epochs": 3, "callbacks": [Rates()], "verbose": 0}
    history = model.fit(*digits, **options).history
    steps = -(-3 // accumulate)
    assert len(taken) == 3 * steps
    assert before == taken
    assert history["lr"] == taken[steps - 1 :: steps]
    assert logged[accumulate - 1 :: 3] == taken[::steps]
    assert logged[2::3] == taken[steps - 1 :: steps]


def test_without_a_schedule_there_is_no_lr_in_the_history(classifier, digits):
    assert set(fit(classifier, [digits], precision="32")[1]) == {"loss"}


def test_a_plateau_is_followed_from_epoch_to_epoch(classifier, digits):
    options = {"precision": "32", "epochs": 4, "validation_data": (digits[0], digits[1].roll(1))}
    schedule = kt.schedules.plateau(patience=0, factor=0.5, mode="max")  # a loss that falls is none that rises
    _, history, _ = fit(classifier, [digits], optimizer=partial(torch.optim.SGD, lr=1e-3), schedule=schedule, **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler, expected = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, mode="max"), []
    for loss in history["val_loss"]:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    assert history["lr"] == expected
    assert len({*expected}) > 1


# Bad input.

REFUSED = {
    "precision": ({"precision": "fp8"}, ValueError, "precision='fp8' is not a precision"),
    "schedule": ({"schedule": "cosin"}, ValueError, "schedule='cosin' is not known. Did you mean 'cosine'"),
    "no schedule": ({"schedule": 3}, TypeError, "schedule=3 is a int"),
    "no scheduler": ({"schedule": lambda optimizer: None}, TypeError, "returned a NoneType"),
    "class of many arguments": ({"schedule": lr_scheduler.StepLR}, TypeError, "schedule=StepLR cannot be made"),
    "jit": ({"jit": "fast"}, ValueError, "jit='fast' is not a mode of torch.compile"),
    "tbptt_steps": ({"tbptt_steps": 0}, ValueError, "tbptt_steps=0 is less than 1"),
    "several optimizers": ({"optimizer": {"0": "sgd", "2": "adam"}}, ValueError, "Override train_step"),
    "no optimizer": ({"optimizer": {}}, ValueError, "optimizer is an empty dict"),
    "lr": ({"lr": -1.0}, ValueError, "lr=-1.0"),
    "rates": ({"lr": {"encoder.*": 0.1}}, ValueError, "lr has the pattern 'encoder"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(classifier, digits, options, error, message):
    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", lr=0.1)
    before, optimizer = copy.deepcopy(classifier), model.optimizer
    with pytest.raises(error, match=message):
        model.compile(**{"optimizer": "sgd", "loss": "cross_entropy"} | options)
    assert model.optimizer is optimizer
    assert reference.same_weights(classifier, before)
    model.fit(*digits, verbose=0)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "linear", "triangular", kt.schedules.cosine(warmup=0.1)])
def test_a_schedule_over_the_run_needs_its_length(classifier, digits, schedule):
    def endless():
        while True:
            yield digits

    model = kt.Model(classifier, backend="cpu").compile("sgd", "cross_entropy", schedule=schedule)
    before = copy.deepcopy(classifier)
    with pytest.raises(ValueError, match="goes over the whole run, but this data has no known length. Give fit steps"):
        model.fit(endless(), verbose=0)
    assert reference.same_weights(classifier, before)
    model.fit(endless(), steps_per_epoch=2, verbose=0)


def test_an_eps_that_float16_rounds_to_zero_is_said(classifier):
    with pytest.warns(UserWarning, match="Adam divides by a number plus eps=1e-08, which float16 rounds to 0"):
        kt.Model(classifier, backend="cpu").compile("adam", "cross_entropy", precision="16-true")


def test_class_weights_of_a_loss_follow_the_precision(classifier, digits):
    loss = nn.CrossEntropyLoss(weight=torch.rand(10))
    model = kt.Model(classifier, backend="cpu").compile("sgd", loss, precision="64")
    expected = F.cross_entropy(model(digits[0]), digits[1], weight=loss.weight.double())
    assert loss.weight.dtype == torch.float32  # the user's own stays as it is
    assert model.evaluate(*digits, verbose=0) == pytest.approx(expected.item(), abs=1e-12)


def test_a_batch_trained_on_by_a_callback_leaves_the_run_as_it_is(digits):
    """Several outputs under accumulate keep terms of their losses for the window."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 2)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    class Extra(kt.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.train_on_batch(x, targets)

    x, targets = digits[0], {"a": digits[1], "b": digits[1] % 2}
    model = kt.Model(Heads(), backend="cpu").compile("sgd", {"a": "cross_entropy", "b": "cross_entropy"})
    history = model.fit(x, targets, accumulate=2, batch_size=50, epochs=2, callbacks=[Extra()], verbose=0).history
    assert history["loss"][1] < history["loss"][0]
