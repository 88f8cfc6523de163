"""One step: the same numbers as a loop by hand, few frames, few calls, nothing that waits for the device."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kerastorch as kt
from kerastorch import loop, model, seeding, step
from tests import reference

PACKAGE = str(Path(kt.__file__).parent)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad"])
def test_training_is_bit_equal_to_a_loop_by_hand(classifier, digits, name):
    x, y = digits

    def by_hand(parameters):
        kind = type(kt.Model(copy.deepcopy(classifier)).compile(name, "cross_entropy").optimizer)
        options = inspect.signature(kind).parameters
        return kind(parameters, **({"fused": True} if "fused" in options else {"foreach": True}))

    expected, losses = reference.train(
        classifier,
        lambda epoch: reference.cut(x, y, 32, seeding.epoch_order(len(x), epoch)),
        by_hand,
        F.cross_entropy,
        epochs=3,
    )
    history = kt.Model(classifier).compile(name, "cross_entropy").fit(x, y, epochs=3, batch_size=32, verbose=0)
    assert reference.same_weights(classifier, expected)
    assert history.history["loss"] == pytest.approx(losses, abs=1e-6)


def test_dropout_draws_the_same_numbers_as_a_loop_by_hand(digits):
    x, y = digits
    net = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    torch.manual_seed(3)
    expected, _ = reference.train(
        net,
        lambda epoch: reference.cut(x, y, 50, seeding.epoch_order(len(x), epoch)),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        F.cross_entropy,
        epochs=2,
    )
    torch.manual_seed(3)
    kt.Model(net).compile("sgd", "cross_entropy", lr=0.1).fit(x, y, epochs=2, batch_size=50, verbose=0)
    assert reference.same_weights(net, expected)


def test_lbfgs_takes_the_same_steps_as_by_hand(regressor, diabetes):
    x, y = diabetes
    expected = copy.deepcopy(regressor)
    optimizer = torch.optim.LBFGS(expected.parameters(), lr=0.5, max_iter=5)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(expected(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        losses.append(optimizer.step(closure).item())
    chosen = lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=5)  # noqa: E731
    history = kt.Model(regressor).compile(chosen, "mse").fit(x, y, epochs=3, batch_size=150, shuffle=False, verbose=0)
    assert reference.same_weights(regressor, expected)
    assert history.history["loss"] == pytest.approx(losses, abs=1e-6)


def test_frames_from_fit_to_the_optimizer_are_four_in_three_files(classifier, digits):
    stacks = []

    class Probe(torch.optim.SGD):
        def step(self, closure=None):
            stacks.append(traceback.extract_stack())
            return super().step(closure)

    net = classifier
    kt.Model(net).compile(Probe(net.parameters(), lr=0.1), "cross_entropy").fit(*digits, verbose=0)
    frames = [frame for frame in stacks[-1] if frame.filename.startswith(PACKAGE)]
    assert [frame.name for frame in frames] == ["fit", "fit", "train_epoch", "optimizer_step"]
    assert len({frame.filename for frame in frames}) == 3


def test_the_way_from_fit_to_the_optimizer_is_read_in_one_sitting():
    """Lines of code: a third of them are the names of fit's arguments, what refuses wrong ones, and what is "auto"."""
    step_by_step = [step.forward_backward, step.optimizer_step, step.forward, step.samples_in]
    functions = [model.Model.fit, loop.fit, loop.train_epoch, *step_by_step]
    assert sum(map(lines_of_code, functions)) <= 219, [lines_of_code(function) for function in functions]


def lines_of_code(function) -> int:
    """Lines without docstring, comments and blanks."""
    source = textwrap.dedent(inspect.getsource(function))
    docstring = ast.parse(source).body[0].body[0]
    lines = enumerate(source.splitlines(), start=1)
    code = [line.strip() for number, line in lines if not docstring.lineno <= number <= docstring.end_lineno]
    return sum(bool(line) and not line.startswith("#") for line in code)


def count_calls(run) -> Counter:
    calls = Counter()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_name] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adam", {}), ("sgd", {}), ("adam", {"verbose": 2}), ("adam", {"validation_split": 0.2})],
)
def test_a_step_makes_at_most_15_python_calls_of_the_package(optimizer, options):
    x, y = torch.rand(1280, 64), torch.randint(0, 10, (1280,))
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trained = kt.Model(net).compile(optimizer, "cross_entropy", metrics=["accuracy"])

    def fit(steps):
        trained.fit(x[: 32 * steps], y[: 32 * steps], batch_size=32, **({"verbose": 0} | options))

    fit(2)
    few, many = count_calls(lambda: fit(8)), count_calls(lambda: fit(40))
    assert (many.total() - few.total()) / 32 <= 15, many - few


def test_a_step_reads_nothing_from_the_device(classifier, digits, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _name=name, _original=original: reads.append(_name) or _original(self, *a),
        )
    trained = kt.Model(classifier).compile("adam", "cross_entropy", metrics=["accuracy", "top3_accuracy"])

    def reads_of(samples):
        reads.clear()
        trained.fit(digits[0][:samples], digits[1][:samples], batch_size=5, verbose=0)
        return len(reads)

    assert reads_of(150) == reads_of(10)


def test_gradients_are_dropped_after_training(classifier, digits):
    kt.Model(classifier).compile("adam", "cross_entropy").fit(*digits, verbose=0)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_frozen_parameters_stay_and_train_once_unfrozen(classifier, digits):
    first = classifier[0].weight
    first.requires_grad_(False)
    before = first.clone()
    trained = kt.Model(classifier).compile("adam", "cross_entropy")
    trained.fit(*digits, verbose=0)
    assert torch.equal(first, before)
    first.requires_grad_(True)
    trained.fit(*digits, verbose=0)
    assert not torch.equal(first, before)


def test_a_tuple_is_spread_and_a_dict_goes_in_by_name(digits):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, left, right):
            return self.head(torch.cat([2 * left, right], dim=1))

    x, y = digits
    left, right = x[:, :32], x[:, 32:]
    net = Two()
    by_tuple, by_name = (copy.deepcopy(net) for _ in range(2))
    for twin, inputs in ((by_tuple, (left, right)), (by_name, {"right": right, "left": left})):
        kt.Model(twin).compile("sgd", "cross_entropy").fit(inputs, y, verbose=0)
    assert reference.same_weights(by_tuple, by_name)
    assert not reference.same_weights(by_tuple, net)
