"""What find_lr answers, for one optimizer and for several, and that nothing of the search is left."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from tests import reference


def compiled(net, optimizer="sgd", loss="cross_entropy", kind=kt.Model, **options):
    return kind(copy.deepcopy(net), backend="cpu").compile(optimizer, loss, **options)


def rates(model):
    return [float(group["lr"]) for update in model.updates.values() for group in update.optimizer.param_groups]


# Several optimizers.


class Networks(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, noise):
        return self.generator(noise)


def losses_of_discriminator(net, fake, real):
    return softplus(-net.discriminator(real)).mean() + softplus(net.discriminator(fake.detach())).mean()


class GAN(kt.Model):
    def train_step(self, batch):
        noise, real = batch
        fake = self.module(noise)
        d_loss = losses_of_discriminator(self.module, fake, real)
        self.backward(d_loss)
        self.optimizer_step("discriminator")
        g_loss = softplus(-self.module.discriminator(fake)).mean()
        self.backward(g_loss)
        self.optimizer_step("generator")
        return {"d_loss": d_loss, "g_loss": g_loss}


RATES = {"generator": 0.05, "discriminator": 0.02}


def gan(net=None, **options):
    model = GAN(copy.deepcopy(net) if net is not None else Networks(), backend="cpu")
    return model.compile({"generator": "sgd", "discriminator": "sgd"}, **({"lr": RATES} | options))


@pytest.fixture
def noise_and_digits(digits):
    return torch.randn(len(digits[0]), 4), digits[0]


def gan_by_hand(net, windows, name, sweep, factor=4, smoothing=0.98):
    """The losses of one network, whose rate grows while the other keeps its own, up to where it diverges."""
    net, losses, average, best = copy.deepcopy(net), [], 0.0, math.inf
    steppers = {one: torch.optim.SGD(getattr(net, one).parameters(), lr=rate) for one, rate in RATES.items()}
    size = len(windows[0])
    for step, (rate, window) in enumerate(zip(sweep, itertools.cycle(windows))):
        steppers[name].param_groups[0]["lr"] = rate
        samples = sum(len(noise) for noise, _ in window)
        sums, gradients = {"generator": 0.0, "discriminator": 0.0}, {}
        # The step of a full window comes before the other's loss of its last batch; that of a short one after all.
        for noise, real in window:
            fake, share = net(noise), len(noise) / samples
            value = losses_of_discriminator(net, fake, real)
            gradients.setdefault("discriminator", []).append(
                torch.autograd.grad(value * share, [*net.discriminator.parameters()])
            )
            sums["discriminator"] += value.item() * share
            if len(gradients["discriminator"]) == size:
                take(steppers["discriminator"], net.discriminator, gradients["discriminator"])
            value = softplus(-net.discriminator(fake)).mean()
            gradients.setdefault("generator", []).append(
                torch.autograd.grad(value * share, [*net.generator.parameters()])
            )
            sums["generator"] += value.item() * share
        if len(window) < size:
            take(steppers["discriminator"], net.discriminator, gradients["discriminator"])
        take(steppers["generator"], net.generator, gradients["generator"])
        losses.append(sums[name])
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smooth = average / (1 - smoothing ** (step + 1))
        if step and smooth > factor * best:
            break
        best = min(best, smooth)
    return losses


def take(stepper, net, gradients):
    for parameter, *parts in zip(net.parameters(), *gradients, strict=True):
        parameter.grad = sum(parts)
    stepper.step()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_one_of_several_optimizers_is_swept_while_the_other_keeps_its_rate(noise_and_digits, name, accumulate):
    net, seen = Networks(), {"generator": [], "discriminator": []}
    model = gan(net)
    for one, update in model.updates.items():
        update.optimizer.register_step_pre_hook(
            lambda optimizer, *_, one=one: seen[one].append(optimizer.param_groups[0]["lr"])
        )
    options = {"apply": False, "shuffle": False, "batch_size": 20, "accumulate": accumulate, "min_lr": 1e-3}
    found = model.find_lr(*noise_and_digits, optimizer=name, **options)
    assert isinstance(found, kt.tuning.LearningRate) and found.optimizer == name and not found.tried
    (other,) = {*RATES} - {name}
    assert {*seen[other]} == {RATES[other]}
    assert seen[name][: len(found.lrs)] == pytest.approx(found.lrs)
    assert rates(model) == [*RATES.values()]
    windows = reference.windows([*zip(*(part.split(20) for part in noise_and_digits), strict=True)], accumulate)
    losses = gan_by_hand(net, windows, name, np.geomspace(1e-3, 10, 100).tolist())
    assert found.losses == pytest.approx(losses[: len(found.losses)], rel=1e-3, abs=1e-5)
    assert len(found.losses) == len(losses)


@pytest.mark.filterwarnings("ignore:find_lr has no answer")
def test_without_a_name_all_are_swept_in_turn_from_the_same_start(noise_and_digits):
    net = Networks()
    options = {"shuffle": False, "batch_size": 20, "min_lr": 1e-3}
    each = {name: gan(net).find_lr(*noise_and_digits, optimizer=name, **options) for name in RATES}
    model = gan(net)
    both = model.find_lr(*noise_and_digits, **options)
    assert [*both] == [*model.updates]
    assert all(both[name].losses == each[name].losses and both[name].lr == each[name].lr for name in RATES)
    wanted = [RATES[name] if both[name].lr is None else both[name].lr for name in both]
    assert rates(model) == pytest.approx(wanted)


def test_an_optimizer_that_steps_less_often_gets_its_own_losses(noise_and_digits):
    class Seldom(GAN):
        def train_step(self, batch):
            self.count = getattr(self, "count", 0) + 1
            noise, real = batch
            fake = self.module(noise)
            if self.count % 3:
                self.backward(losses_of_discriminator(self.module, fake, real) + 100)
                self.optimizer_step("discriminator")
            else:
                self.backward(softplus(-self.module.discriminator(fake)).mean())
                self.optimizer_step("generator")

    model = Seldom(Networks(), backend="cpu").compile({"generator": "sgd", "discriminator": "sgd"}, lr=RATES)
    found = model.find_lr(*noise_and_digits, batch_size=20, apply=False)
    assert len(found["generator"].lrs) > 20 and max(found["generator"].losses[:20]) < 10
    assert min(found["discriminator"].losses[:20]) > 100


def test_a_name_that_is_not_there_is_refused(noise_and_digits, classifier, digits):
    with pytest.raises(ValueError, match="optimizer='critic' names no optimizer; there is 'generator', 'discr"):
        gan().find_lr(*noise_and_digits, optimizer="critic")
    with pytest.raises(ValueError, match="there is one alone, without a name"):
        compiled(classifier).find_lr(*digits, optimizer="sgd")


# No trace.


class Noisy(nn.Module):
    """Buffers, dropout and numbers of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        x = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return self.last(x + 0.01 * torch.randn(x.shape, generator=self.generator))


COMPILED = {
    "sgd": {},
    "momentum": {"optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": 0.05, "clip": 1.0},
    "adam": {"optimizer": "adam", "metrics": ["accuracy"]},
    "one cycle": {"optimizer": "adamw", "schedule": "one_cycle", "lr": 0.01},
    "cosine": {"optimizer": "sgd", "schedule": "cosine", "lr": 0.1},
    "own schedule": {"schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=1), "lr": 0.1},
    "plateau": {"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau, "lr": 0.1},
    "half": {"optimizer": "adam", "precision": "16"},
    "brain": {"optimizer": "adam", "precision": "bf16"},
    "groups": {"lr": {"first": 0.1, "*": 0.01}},
    "lbfgs": {"optimizer": partial(torch.optim.LBFGS, max_iter=2), "lr": 0.1},
    "tensor": {"optimizer": partial(torch.optim.Adam, lr=torch.tensor(0.01))},
}


def numbers():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def everything(model):
    """What a run leaves: weights, optimizers, losses, and the next random numbers."""
    saved = [model.module.state_dict(), *(update.optimizer.state_dict() for update in model.updates.values())]
    scaler = model._compiled.scaler
    return copy.deepcopy([*saved, rates(model), None if scaler is None else scaler.state_dict(), model.epochs_trained])


def assert_equal(one, other):
    flat_one, spec = torch.utils._pytree.tree_flatten(one)
    flat_other, other_spec = torch.utils._pytree.tree_flatten(other)
    assert spec == other_spec
    for a, b in zip(flat_one, flat_other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("name", "begun"), [*((name, True) for name in COMPILED), ("sgd", False), ("one cycle", False), ("half", False)]
)
def test_fit_after_a_search_is_fit_alone(digits, name, begun):
    ends = []
    for searches in (False, True):
        kt.set_seed(5)
        model = compiled(Noisy(), **COMPILED[name])
        if begun:
            model.fit(*digits, epochs=2, batch_size=30, verbose=0)
        history, modes = model.history, [one.training for one in model.module.modules()]
        if searches:
            before = everything(model)
            model.find_lr(*digits, apply=False, confirm=5, steps=20, batch_size=20, min_lr=1e-4)
            assert_equal(everything(model), before)
            assert model.history is history and [one.training for one in model.module.modules()] == modes
            assert all(parameter.grad is None for parameter in model.module.parameters())
        fit = model.fit(*digits, epochs=2, batch_size=20, verbose=0)
        ends.append([everything(model), fit.history, numbers(), model.predict(digits[0], verbose=0).tolist()])
    assert_equal(*ends)


@pytest.mark.parametrize("precision", ["32", "16"])
def test_fit_of_several_optimizers_after_a_search_is_fit_alone(noise_and_digits, precision):
    ends, net = [], Networks()
    for searches in (False, True):
        kt.set_seed(5)
        model = gan(net, schedule={"generator": "cosine", "discriminator": "one_cycle"}, precision=precision)
        model.fit(*noise_and_digits, batch_size=30, verbose=0)
        if searches:
            model.find_lr(*noise_and_digits, apply=False, steps=20)
        fit = model.fit(*noise_and_digits, epochs=2, batch_size=20, verbose=0)
        ends.append([everything(model), fit.history, numbers()])
    assert_equal(*ends)


def test_a_loader_goes_on_with_its_own_random_numbers(classifier, digits):
    ends = []
    for searches in (False, True):
        kt.set_seed(5)
        loader = DataLoader(TensorDataset(*digits), 20, shuffle=True, generator=torch.Generator().manual_seed(1))
        model = compiled(classifier)
        if searches:
            model.find_lr(loader, apply=False, confirm=5, steps=20)
        ends.append([model.fit(loader, epochs=2, verbose=0).history, everything(model)])
    assert_equal(*ends)


class Breaks(nn.Module):
    """At the forward pass of a number."""

    def __init__(self, net, error):
        super().__init__()
        self.net, self.error = net, error
        self.numbers, self.breaks_at = itertools.count(), None  # which nobody puts back

    def forward(self, x):
        if next(self.numbers) == self.breaks_at:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"])
@pytest.mark.parametrize("after", [1, 15, 38], ids=["first step", "sweep", "confirmation"])
def test_nothing_is_left_of_a_search_that_broke_off(digits, error, after):
    model = compiled(Breaks(Noisy(), error), "adam", schedule="one_cycle", lr=0.01)
    model.fit(*digits, verbose=0)
    model.module.breaks_at = next(model.module.numbers) + after
    before, history = everything(model), model.history
    with pytest.raises(type(error), match="mine" if isinstance(error, ValueError) else None):
        model.find_lr(*digits, steps=30, confirm=5, batch_size=20)
    assert_equal(everything(model), before)
    assert model.history is history and model._running is None
    assert math.isfinite(model.fit(*digits, verbose=0).history["loss"][0])


# What becomes of the answer.


def test_the_rate_is_applied_to_all_groups_in_their_ratio(digits):
    model = compiled(Noisy(), lr={"first": 0.1, "*": 0.01})
    found = model.find_lr(*digits, confirm=10, batch_size=20)
    assert found.lr and rates(model) == pytest.approx([found.lr, found.lr / 10])


@pytest.mark.parametrize("begun", [False, True], ids=["at first", "after a fit"])
def test_the_rate_is_the_peak_of_a_schedule(digits, begun):
    model = compiled(Noisy(), schedule="one_cycle")
    if begun:
        model.fit(*digits, verbose=0)
    found = model.find_lr(*digits, confirm=10, batch_size=20)
    seen = []
    model.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    model.fit(*digits, epochs=10, batch_size=10, verbose=0)
    assert max(seen) == pytest.approx(found.lr, rel=0.01) and seen[0] < found.lr / 10


def test_auto_finds_a_rate_at_the_next_fit_once(digits, tmp_path, monkeypatch):
    calls = []
    search = kt.Model.find_lr
    monkeypatch.setattr(
        kt.Model, "find_lr", lambda self, *args, **named: calls.append(1) or search(self, *args, **named)
    )
    net = Noisy()
    expected = compiled(net).find_lr(*digits, batch_size=30)
    model = compiled(net, lr="auto")
    calls.clear()
    model.fit(*digits, batch_size=30, verbose=0)
    assert len(calls) == 1 and rates(model) == [expected.lr]
    model.fit(*digits, batch_size=30, verbose=0)
    model.evaluate(*digits, verbose=0)
    assert len(calls) == 1
    model.save(tmp_path / "model.pt")
    other = compiled(net, lr="auto").load(tmp_path / "model.pt")
    other.fit(*digits, batch_size=30, verbose=0)
    assert len(calls) == 1 and rates(other) == [expected.lr]
    other.compile("sgd", "cross_entropy", lr="auto").fit(*digits, batch_size=30, verbose=0)
    assert len(calls) == 2


def test_auto_is_what_find_lr_and_fit_do_one_after_the_other(digits):
    ends, net = [], Noisy()
    for lr in (None, "auto"):
        kt.set_seed(2)
        model = compiled(net, "adam", lr=lr)
        if lr is None:
            model.find_lr(*digits, batch_size=50)
        history = model.fit(*digits, epochs=2, batch_size=50, verbose=0).history
        ends.append([history, everything(model)])
    assert_equal(*ends)


def test_a_search_before_the_first_fit_of_auto_searches_once(classifier, digits, monkeypatch):
    calls = []
    search = kt.tuning.find_lr
    monkeypatch.setattr(kt.tuning, "find_lr", lambda *args, **named: calls.append(1) or search(*args, **named))
    found = compiled(classifier, lr="auto").find_lr(*digits, confirm=5, steps=20, apply=False)
    assert len(calls) == 1
    assert found.losses == compiled(classifier).find_lr(*digits, confirm=5, steps=20, apply=False).losses
    calls.clear()
    compiled(classifier, lr="auto").find_batch_size(*digits, memory="1GB", max_trials=3)
    assert not calls


class Deaf(nn.Module):
    """Its output has nothing to do with its parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x[:, :10] + 0 * self.weight


@pytest.mark.parametrize("confirm", [False, True])
def test_where_no_rate_learns_there_is_no_answer_and_the_rate_stays(digits, confirm):
    for x in (digits[0], torch.zeros_like(digits[0])):
        model = compiled(Deaf(), lr=0.03)
        with pytest.warns(UserWarning, match="find_lr has no answer: .* The rate stays as it was"):
            found = model.find_lr(x, digits[1], confirm=confirm, steps=50)
        assert found.lr is None and found.reason and found.range is None
        assert all(found.suggestion(method) is None for method in (None, *kt.tuning.curve.METHODS))
        assert rates(model) == [0.03]
        assert "no answer" in str(found) and "no answer" in repr(found) and found.reason in str(found)
        found.plot()


class Explodes(nn.Module):
    def __init__(self, after, value=math.nan):
        super().__init__()
        self.weight, self.left, self.value = nn.Parameter(torch.ones(1)), after, value

    def forward(self, x):
        self.left -= 1
        return x[:, :1] * self.weight + (self.value if self.left < 0 else 0.0)


def test_a_loss_that_is_nan_from_the_start_has_no_answer(diabetes):
    model = compiled(Explodes(0), loss="mse")
    with pytest.warns(UserWarning, match="the first loss is nan"):
        found = model.find_lr(*diabetes)
    assert found.lr is None and len(found.losses) == 1 and not found.tried
    assert found.plot() is not None


def test_a_sweep_ends_with_the_first_loss_that_is_not_finite(diabetes):
    found = compiled(Explodes(23), loss="mse").find_lr(*diabetes, stop_factor=None, confirm=False, apply=False)
    assert len(found.losses) == 24 and math.isnan(found.losses[-1]) and all(map(math.isfinite, found.losses[:-1]))


# The result.


@pytest.fixture(scope="module")
def result(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return compiled(net, "adam").find_lr(*digits, batch_size=20)


def test_a_result_says_what_it_has_found(result):
    low, high = result.range
    assert low <= result.lr <= high and result.lr in result.tried
    assert result.suggestion() == result.lr
    assert repr(result) == f"<LearningRate {result.lr:.3g}>"
    lines = str(result).splitlines()
    assert lines[0] == f"learning rate: {result.lr:.3g}"
    for method in ("steepest", "valley", "minimum", "slide"):
        assert any(f"{method}, by the curve" in line and f"{result.suggestion(method):.3g}" in line for line in lines)
    assert sum("confirmed" in line for line in lines) == len(result.tried)
    assert result.tried[result.lr] == min(result.tried.values())
    assert all(loss <= 1.1 * result.tried[result.lr] for rate, loss in result.tried.items() if rate in (low, high))


def test_a_method_that_is_not_known_is_refused(result):
    with pytest.raises(
        ValueError, match="method='x' is not known. Give 'steepest', 'valley', 'minimum', 'slide', or N"
    ):
        result.suggestion("x")


def test_a_result_is_the_same_from_a_pickle(result):
    other = pickle.loads(pickle.dumps(result))
    assert str(other) == str(result) and other.losses == result.losses and other.range == result.range


@pytest.mark.parametrize("suggest", [True, False])
def test_a_result_is_drawn_and_saved(result, tmp_path, suggest):
    import matplotlib.figure

    figure = result.plot(suggest=suggest, path=tmp_path / "lr.png")
    assert isinstance(figure, matplotlib.figure.Figure) and (tmp_path / "lr.png").stat().st_size > 1000
    assert len(figure.axes[0].lines) == (4 if suggest else 3) and figure.axes[0].get_xscale() == "log"


# Confirmation.


def loss_after(net, data, rate, steps, optimizer="sgd", **options):
    """The mean of the last half of the losses of so many steps, by `fit`."""
    losses = []

    class Reads(kt.Callback):
        def on_before_backward(self, loss):
            losses.append(loss.item())

    model = compiled(net, optimizer, lr=rate, **options)
    model.fit(*data, epochs=None, max_steps=steps, batch_size=20, callbacks=[Reads()], verbose=0)
    last = losses[steps // 2 :]
    return sum(last) / len(last) if all(map(math.isfinite, losses)) else math.inf


@pytest.mark.parametrize("confirm", [True, 7])
def test_a_run_that_confirms_is_a_fit_from_the_same_start_with_the_same_random_numbers(digits, confirm):
    net = Noisy()
    kt.set_seed(4)
    found = compiled(net, "adam").find_lr(*digits, confirm=confirm, batch_size=20)
    assert 3 <= len(found.tried) <= 12
    for rate, loss in found.tried.items():
        kt.set_seed(4)
        # An epoch has 8 steps, which are fewer than 30.
        assert loss_after(net, digits, rate, 30 if confirm is True else confirm, "adam") == pytest.approx(
            loss, rel=1e-5
        )


def test_an_epoch_confirms_where_it_is_neither_long_nor_short(classifier, digits, monkeypatch):
    steps = []
    fit = kt.Model.fit
    monkeypatch.setattr(
        kt.Model, "fit", lambda self, *args, **named: steps.append(named["max_steps"]) or fit(self, *args, **named)
    )
    for batch_size, accumulate, expected in ((3, 1, 50), (1, 1, 100), (50, 1, 30), (1, 3, 50)):
        steps.clear()
        compiled(classifier).find_lr(*digits, batch_size=batch_size, accumulate=accumulate, apply=False)
        assert steps[0] == 100 and {*steps[1:]} == {expected}
        assert 3 <= len(steps) - 1 <= 12


def test_on_a_quadratic_the_rate_is_the_best_of_a_fine_grid():
    """Curvatures from 1 to 10: after so many steps of gradient descent the best rate is near 2 / 11."""
    curvatures = torch.linspace(1, 10, 8).sqrt()
    x = torch.diag(curvatures).repeat(20, 1)
    y = (x @ torch.randn(8, 1)) * 8**0.5
    net = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        net.weight.zero_()
    model = compiled(net, loss="mse")
    found = model.find_lr(x, y, confirm=30, batch_size=160)
    grid = np.geomspace(found.lr / 30, found.lr * 30, 200)

    def loss_at(rate):
        one, losses = copy.deepcopy(net), []
        stepper = torch.optim.SGD(one.parameters(), lr=float(rate))
        for _ in range(30):
            value = F.mse_loss(one(x), y)
            losses.append(value.item())
            stepper.zero_grad()
            value.backward()
            stepper.step()
        return np.mean(losses[15:]) if np.isfinite(losses).all() else math.inf

    best = min(grid, key=loss_at)
    assert best / 1.5 < found.lr < best * 1.5
    assert found.tried[found.lr] == pytest.approx(loss_at(found.lr), rel=1e-4)
    assert rates(model) == [found.lr]


def test_nothing_is_confirmed_if_not_asked_for(classifier, digits):
    found = compiled(classifier, "adam").find_lr(*digits, confirm=False, apply=False, batch_size=20)
    assert not found.tried and found.lr == found.suggestion("valley") and found.range[0] <= found.range[1]


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 1.0, "max_lr": 1.0}, "min_lr=1 is not below max_lr=1"),
        ({"min_lr": 20}, "min_lr=20 is not below max_lr=10. Give a lower min_lr or a higher max_lr"),
        ({"min_lr": 0}, "min_lr=0 is no learning rate. Give a number above 0"),
        ({"min_lr": -1e-3}, "min_lr=-0.001 is no learning rate"),
        ({"min_lr": "low"}, "min_lr='low' is no learning rate"),
        ({"max_lr": math.inf}, "max_lr=inf is no learning rate"),
        ({"max_lr": math.nan}, "max_lr=nan is no learning rate"),
        ({"max_lr": True}, "max_lr=True is no learning rate"),
        ({"steps": 1}, "steps=1 is no number of steps. Give a whole number from 2 up"),
        ({"steps": 10.0}, "steps=10.0 is no number of steps"),
        ({"mode": "log"}, "mode='log' is not known. Give 'exponential' or 'linear'"),
        ({"smoothing": 1}, "smoothing=1 is no weight"),
        ({"smoothing": -0.1}, "smoothing=-0.1 is no weight"),
        ({"smoothing": None}, "smoothing=None is no weight"),
        ({"stop_factor": 1}, "stop_factor=1 is no factor. Give a number above 1, or None"),
        ({"stop_factor": "four"}, "stop_factor='four' is no factor"),
        ({"confirm": "yes"}, "confirm='yes' is no number of steps. Give True, False or a whole number from 2 up"),
        ({"confirm": 1}, "confirm=1 is no number of steps"),
        ({"confirm": None}, "confirm=None is no number of steps"),
    ],
    ids=str,
)
def test_an_argument_that_makes_no_sense_is_refused(classifier, digits, options, message):
    model = compiled(classifier)
    with pytest.raises(ValueError, match=message):
        model.find_lr(*digits, **options)


def test_data_that_can_be_gone_through_once_is_refused(classifier, digits):
    with pytest.raises(TypeError, match="data is a generator, which can be gone through once.* Give a callable"):
        compiled(classifier).find_lr(batch for batch in [digits])


def test_a_model_that_is_not_compiled_is_refused(classifier, digits):
    with pytest.raises(RuntimeError, match="find_lr"):
        kt.Model(classifier, backend="cpu").find_lr(*digits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"accumulate": 0}, "accumulate=0"), ({"batch_size": -1}, "batch_size=-1"), ({"microbatch": 0}, "microbatch=0")],
)
def test_what_fit_refuses_is_refused(classifier, digits, options, message):
    with pytest.raises(ValueError, match=message):
        compiled(classifier).find_lr(*digits, **options)


def test_what_fit_says_of_data_comes_through(classifier, digits):
    model = compiled(classifier)
    with pytest.raises(ValueError, match="150.*149|149.*150"):
        model.find_lr(digits[0], digits[1][:149])


@pytest.mark.filterwarnings("ignore:find_lr has no answer")
@pytest.mark.parametrize("steps", [2, 3, 5, 6, 9])
def test_few_steps_give_no_curve_and_say_so(classifier, digits, steps):
    found = compiled(classifier).find_lr(*digits, steps=steps, confirm=5)
    assert len(found.losses) == steps and found.reason == f"{steps} steps are too few: give more"
    assert found.suggestion("valley") is None and found.reason in str(found)
    assert (found.lr is None) == (found.range is None)


def test_a_lazy_module_gets_a_rate_too(digits):
    net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
    model = kt.Model(net, backend="cpu").compile("sgd", "cross_entropy", schedule="cosine", lr="auto")
    model.fit(*digits, epochs=3, verbose=0)
    assert model.history.history["loss"][-1] < model.history.history["loss"][0]
