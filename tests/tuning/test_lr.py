"""find_lr: a sweep is the loop that one would write by hand, leaves no trace, and its answer is where one learns."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kerastorch as kt
from kerastorch.tracker import Tracker
from kerastorch.tuning import lr as lr_module
from tests import reference

closely = partial(pytest.approx, rel=1e-6, abs=1e-6)
very_closely = partial(pytest.approx, rel=1e-11, abs=1e-11)
MASKED = -100
SIZE = 20  # of batches


def rates_of(low=1e-7, high=10.0, steps=100, mode="exponential"):
    return (np.geomspace if mode == "exponential" else np.linspace)(low, high, steps).tolist()


def sweep(net, windows, rates, *, loss=F.cross_entropy, optimizer=torch.optim.SGD, smoothing=0.98, factor=4, **options):
    """The test by hand: losses at the rates, up to where their average is so many times its lowest.

    Args:
        windows: Those of one epoch, each a list of batches for one step.
        options: `clip`, a bound of the norm; `autocast`, a dtype; `scaler`; `units`, how many losses a batch has.
    """
    net = copy.deepcopy(net).train()
    stepper = optimizer(net.parameters(), lr=1.0)
    scaler = options.get("scaler") or torch.amp.GradScaler("cpu", enabled=False)
    units, autocast = options.get("units", lambda batch: len(batch[0])), options.get("autocast")
    losses, average, best = [], 0.0, math.inf
    for step, (rate, window) in enumerate(zip(rates, itertools.cycle(windows))):
        counts, sums = [units(batch) for batch in window], []
        stepper.param_groups[0]["lr"] = rate
        for batch, count in zip(window, counts, strict=True):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                output = net(batch[0])
            value = loss(output.float() if autocast else output, *batch[1:]) * count
            scaler.scale(value / sum(counts)).backward()
            sums.append(value.item())
        scaler.unscale_(stepper)
        if "clip" in options:
            nn.utils.clip_grad_norm_(net.parameters(), options["clip"])
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
        losses.append(sum(sums) / sum(counts))
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smooth = average / (1 - smoothing ** (step + 1))
        if not smooth < math.inf or (step and factor is not None and smooth > factor * best):
            break
        best = min(best, smooth)
    return losses


def compiled(net, optimizer="sgd", loss="cross_entropy", kind=kt.Model, **options):
    return kind(copy.deepcopy(net), backend="cpu").compile(optimizer, loss, **options)


def found_by(model, *data, **options):
    """The curve alone."""
    return model.find_lr(*data, **{"shuffle": False, "confirm": False, "apply": False, "batch_size": SIZE} | options)


def in_windows(x, *y, size=SIZE, accumulate=1):
    """Batches of so many in order, so many in a window."""
    return reference.windows([*zip(*(part.split(size) for part in (x, *y)), strict=True)], accumulate)


def as_doubles(data):
    return data[0].double(), *data[1:]


@pytest.fixture
def double(classifier):
    return classifier.double()


# A sweep is the loop by hand.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "linear", "min_lr": 1e-3, "max_lr": 4.0},
        {"min_lr": 1e-4, "max_lr": 0.3},
        {"stop_factor": None},
        {"stop_factor": 1.2},
        {"smoothing": 0},
        {"smoothing": 0.5, "stop_factor": 2},
        {"steps": 33},
        {"steps": 250, "max_lr": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_sweep_is_a_loop_of_steps_at_growing_rates(double, digits, options, optimizer):
    """In float64: where it diverges, steps make much of the last bit."""
    found = found_by(compiled(double, optimizer, precision="64"), *digits, **options)
    rates = rates_of(*(options.get(name, value) for name, value in (("min_lr", 1e-7), ("max_lr", 10.0))),
                     steps=options.get("steps", 100), mode=options.get("mode", "exponential"))  # fmt: skip
    rule = {"smoothing": options.get("smoothing", 0.98), "factor": options.get("stop_factor", 4)}
    by_name = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    losses = sweep(double, in_windows(*as_doubles(digits)), rates, optimizer=by_name[optimizer], **rule)
    assert found.losses == closely(losses)
    assert found.lrs == pytest.approx(rates[: len(losses)], rel=1e-9)
    assert len(found.smoothed) == len(losses)


def test_a_window_of_batches_is_one_step_with_one_loss(classifier, digits):
    x, y = digits[0].double(), digits[1]
    found = found_by(compiled(classifier, precision="64"), x, y, accumulate=3)
    double = copy.deepcopy(classifier).double()
    assert found.losses == very_closely(sweep(double, in_windows(x, y, accumulate=3), rates_of()))
    large = found_by(compiled(classifier, precision="64"), x, y, batch_size=60)
    assert found.losses == very_closely(large.losses)


def test_pieces_of_a_batch_are_that_batch(classifier, digits):
    x, y = digits[0].double(), digits[1]
    pieces = found_by(compiled(classifier, precision="64"), x, y, microbatch=7)
    assert pieces.losses == very_closely(found_by(compiled(classifier, precision="64"), x, y).losses)


def test_gradients_are_clipped_as_compiled(classifier, digits):
    found = found_by(compiled(classifier, clip=0.1), *digits)
    assert found.losses == closely(sweep(classifier, in_windows(*digits), rates_of(), clip=0.1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_precision_is_as_compiled(classifier, digits, accumulate):
    """Of a window the shares differ in rounding, which float16 and bfloat16 make much of."""
    windows = in_windows(*digits, accumulate=accumulate)
    as_exact = closely if accumulate == 1 else partial(pytest.approx, rel=0.02)
    found = found_by(compiled(classifier, precision="bf16"), *digits, accumulate=accumulate)
    assert found.losses == as_exact(sweep(classifier, windows, rates_of(), autocast=torch.bfloat16))
    found = found_by(compiled(classifier, precision="16"), *digits, accumulate=accumulate)
    half = {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu")}
    assert found.losses == as_exact(sweep(classifier, windows, rates_of(), **half))


def weighted_cross_entropy(output, y, weight):
    return (F.cross_entropy(output, y, reduction="none") * weight).mean()


def test_weights_of_samples_and_classes_count_as_in_fit(classifier, digits):
    x, y = digits
    weight = torch.rand(len(x))
    found = found_by(compiled(classifier), x, y, sample_weight=weight)
    assert found.losses == closely(sweep(classifier, in_windows(x, y, weight), rates_of(), loss=weighted_cross_entropy))
    of_class = {3: 2.5, 5: 0.0}
    weight = torch.tensor([of_class.get(int(label), 1.0) for label in y])
    found = found_by(compiled(classifier), x, y, class_weight=of_class)
    assert found.losses == closely(sweep(classifier, in_windows(x, y, weight), rates_of(), loss=weighted_cross_entropy))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_masked_targets_count_for_nothing(classifier, digits, accumulate):
    x, y = digits[0].double(), digits[1].clone()
    y[torch.rand(len(y)) < 0.4] = MASKED
    y[100:119], y[119] = MASKED, 3  # a batch of one
    double = copy.deepcopy(classifier).double()
    windows = in_windows(x, y, accumulate=accumulate)
    expected = sweep(double, windows, rates_of(), units=lambda batch: int((batch[1] != MASKED).sum()))
    found = found_by(compiled(classifier, precision="64"), x, y, accumulate=accumulate)
    assert found.losses == very_closely(expected)


def test_a_batch_of_which_all_is_masked_ends_nothing(classifier, digits):
    x, y = digits[0], digits[1].clone()
    y[:20], y[80:100] = MASKED, MASKED
    found = found_by(compiled(classifier), x, y)
    rates = [rate for step, rate in enumerate(rates_of()) if step % 8 not in (0, 4)]
    windows = [window for number, window in enumerate(in_windows(x, y)) if number not in (0, 4)]
    losses = sweep(classifier, windows, rates, factor=None)
    assert [loss for step, loss in enumerate(found.losses) if step % 8 not in (0, 4)] == closely(losses)
    assert len(found.losses) == 100 and found.losses[4] == found.losses[3] and found.losses[0] == found.losses[1]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.digit, self.size = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 1)

    def forward(self, x):
        x = self.body(x).tanh()
        return {"digit": self.digit(x), "size": self.size(x)}


def of_heads(output, digit, size):
    return F.cross_entropy(output["digit"], digit) + 0.3 * F.mse_loss(output["size"], size)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_of_several_outputs_are_added_by_their_weights(digits, accumulate):
    x, y = as_doubles(digits)
    net, size = Heads().double(), y[:, None].double() / 10.0
    losses = {"digit": "cross_entropy", "size": ("mse", 0.3)}
    model = compiled(net, loss=losses, metrics={"digit": ["accuracy"]}, precision="64")
    found = found_by(model, x, {"digit": y, "size": size}, accumulate=accumulate)
    expected = sweep(net, in_windows(x, y, size, accumulate=accumulate), rates_of(), loss=of_heads)
    assert found.losses == closely(expected)


@pytest.mark.parametrize("metrics", [["accuracy"], ["accuracy", "auc"]])
def test_metrics_change_no_loss(classifier, digits, metrics):
    plain = found_by(compiled(classifier), *digits, steps=20)
    assert found_by(compiled(classifier, metrics=metrics), *digits, steps=20).losses == plain.losses


def test_of_several_evaluations_in_a_step_the_first_counts(regressor, diabetes):
    x, y = diabetes
    model = compiled(regressor, partial(torch.optim.LBFGS, max_iter=3), "mse")
    found = found_by(model, x, y, batch_size=50, steps=30, min_lr=1e-3)
    net, losses = copy.deepcopy(regressor), []
    stepper = torch.optim.LBFGS(net.parameters(), max_iter=3)
    for rate, (window,) in zip(rates_of(1e-3, steps=30), itertools.cycle(in_windows(x, y, size=50))):
        seen = []

        def closure(window=window, seen=seen):
            stepper.zero_grad()
            value = F.mse_loss(net(window[0]), window[1])
            value.backward()
            seen.append(value.item())
            return value

        stepper.param_groups[0]["lr"] = rate
        stepper.step(closure)
        losses.append(seen[0])
    assert found.losses == pytest.approx(losses[: len(found.losses)], rel=1e-4)
    assert len(found.losses) > 10


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x, state=None):
        out, state = self.cell(x, state)
        return self.head(out), state


def test_each_piece_of_truncated_sequences_is_a_step():
    net, x = Recurrent(), torch.randn(30, 7, 3)
    y = x.cumsum(1).sum(2, keepdim=True)
    found = found_by(compiled(net, loss="mse", tbptt_steps=3), x, y, batch_size=10, min_lr=1e-4)
    hand, losses = copy.deepcopy(net), []
    stepper, rates = torch.optim.SGD(hand.parameters(), lr=1.0), iter(rates_of(1e-4))
    for one, target in itertools.cycle(zip(x.split(10), y.split(10), strict=True)):
        state = None
        for piece, wanted in zip(one.split(3, 1), target.split(3, 1), strict=True):
            stepper.param_groups[0]["lr"] = next(rates, None)
            if stepper.param_groups[0]["lr"] is None:
                break
            output, state = hand(piece, state)
            state = state.detach()
            value = F.mse_loss(output, wanted)
            stepper.zero_grad()
            value.backward()
            stepper.step()
            losses.append(value.item())
        if len(losses) >= 100:
            break
    assert found.losses == pytest.approx(losses[: len(found.losses)], rel=1e-4)
    assert len(found.losses) > 50


class Regularized(kt.Model):
    def compute_loss(self, batch):
        penalty = sum(parameter.square().sum() for parameter in self.module.parameters())
        self.log("penalty", penalty)
        return super().compute_loss(batch) + 0.01 * penalty


class Penalized(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), 0.01 * sum(parameter.square().sum() for parameter in self.net.parameters())


def with_penalty(output, y):
    return F.cross_entropy(output[0], y) + output[1]


class OwnStep(kt.Model):
    def train_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.module(x), y)
        self.backward(loss)
        self.optimizer_step()
        return {"mine": loss}


class OwnStepOnTop(kt.Model):
    def train_step(self, batch):
        return super().train_step(batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Regularized, OwnStep, OwnStepOnTop])
def test_losses_and_steps_of_ones_own_count(double, digits, kind, accumulate):
    found = found_by(compiled(double, kind=kind, precision="64"), *digits, accumulate=accumulate)
    windows = in_windows(*as_doubles(digits), accumulate=accumulate)
    expected = sweep(double, windows, rates_of())
    if kind is Regularized:
        expected = sweep(Penalized(double), windows, rates_of(), loss=with_penalty)
    assert found.losses == very_closely(expected)


def test_parameter_groups_keep_their_ratios(classifier, digits):
    seen = []
    model = compiled(classifier, lr={"0": 0.1, "2": 0.001})

    def step(optimizer, *_):
        seen.append([group["lr"] for group in optimizer.param_groups])

    model.optimizer.register_step_pre_hook(step)
    found = found_by(model, *digits, steps=20)
    assert [rates[0] for rates in seen[: len(found.lrs)]] == pytest.approx(found.lrs)
    assert all(one / other == pytest.approx(100) for one, other in seen)
    assert [group["lr"] for group in model.optimizer.param_groups] == [0.1, 0.001]
    found = model.find_lr(*digits, confirm=10, batch_size=SIZE)
    assert [group["lr"] for group in model.optimizer.param_groups] == pytest.approx([found.lr, found.lr / 100])


def test_a_rate_in_a_tensor_stays_in_it(classifier, digits):
    tensor = torch.tensor(0.01)
    model = compiled(classifier, partial(torch.optim.Adam, lr=tensor))
    expected = found_by(compiled(classifier, "adam"), *digits)
    assert found_by(model, *digits).losses[:80] == pytest.approx(expected.losses[:80], rel=1e-4)
    kept = model.optimizer.param_groups[0]["lr"]
    assert kept.item() == pytest.approx(0.01)
    found = model.find_lr(*digits, confirm=10, batch_size=SIZE)
    assert model.optimizer.param_groups[0]["lr"] is kept and kept.item() == pytest.approx(found.lr)


# Data.


class Digits(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def test_data_of_every_kind_repeats_where_it_is_shorter_than_the_test(classifier, digits):
    x, y = digits[0][:50], digits[1][:50]  # three batches
    losses = sweep(classifier, in_windows(x, y), rates_of())
    kinds = {
        "arrays": (x.numpy(), y.numpy()),
        "dataset": (Digits(x, y),),
        "loader": (DataLoader(TensorDataset(x, y), SIZE),),
        "list": ([(one, two) for ((one, two),) in in_windows(x, y)],),
        "callable": (lambda: ((one, two) for ((one, two),) in in_windows(x, y)),),
    }
    for name, data in kinds.items():
        options = {} if name in ("arrays", "dataset") else {"batch_size": None}
        assert found_by(compiled(classifier), *data, **options).losses == closely(losses), name


def test_one_sample_is_data(regressor, diabetes):
    found = found_by(compiled(regressor, loss="mse"), diabetes[0][:1], diabetes[1][:1])
    assert found.losses == closely(sweep(regressor, in_windows(diabetes[0][:1], diabetes[1][:1]), rates_of(),
                                         loss=F.mse_loss))  # fmt: skip


# When losses are read.


@pytest.mark.parametrize("options", [{}, {"stop_factor": None}, {"smoothing": 0}, {"accumulate": 3}, {"steps": 57}])
def test_losses_are_read_once_in_ten_steps_which_changes_nothing(classifier, digits, monkeypatch, options):
    reads = []
    losses_of = Tracker.losses_of
    monkeypatch.setattr(Tracker, "losses_of", lambda self, taken: reads.append(len(taken)) or losses_of(self, taken))
    seldom = found_by(compiled(classifier), *digits, **options)
    assert len([number for number in reads if number]) <= math.ceil(len(seldom.losses) / 10)
    reads.clear()
    monkeypatch.setattr(lr_module, "READ_EVERY", 1)
    always = found_by(compiled(classifier), *digits, **options)
    assert sum(map(bool, reads)) >= len(always.losses) / 2  # two at once where one ends an epoch
    assert (seldom.losses, seldom.lrs) == (always.losses, always.lrs)
    assert (seldom.lr, seldom.reason) == (always.lr, always.reason)
