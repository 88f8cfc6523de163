"""A forecast of memory: the shape from a trace, the scale from trials; or a curve through trials alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.tuning.forecast import Forecast, traced_bytes


def affine(size: int) -> float:
    return 0.1 + size / 1000


def quadratic(size: int) -> float:
    return (size / 1000) ** 2


def nothing(size: int) -> None:
    return None


def learned(traced, *points: tuple[int, float]) -> Forecast:
    forecast = Forecast(traced)
    for size, part in points:
        forecast.learn(size, part)
    return forecast


@pytest.mark.parametrize("curve", [affine, quadratic])
def test_before_any_trial_it_is_the_trace(curve) -> None:
    forecast = Forecast(curve)
    assert forecast.is_known and not forecast.is_vague
    assert [forecast.part_at(size) for size in (1, 50, 700)] == [curve(size) for size in (1, 50, 700)]


def test_what_was_tried_is_known() -> None:
    assert learned(affine, (50, 0.7)).part_at(50) == 0.7


def test_after_one_trial_what_differs_is_a_factor_or_a_constant_whichever_is_worse() -> None:
    more = learned(affine, (100, 0.4))  # the trace says 0.2
    assert more.part_at(900) == pytest.approx(2.0)  # a factor of 2: 2 * 1.0, not 1.0 + 0.2
    less = learned(affine, (100, 0.1))
    assert less.part_at(900) == pytest.approx(0.9)  # a constant of -0.1, not a half of 1.0
    assert more.part_at(50) == pytest.approx(0.3)


@pytest.mark.parametrize("curve", [affine, quadratic])
def test_after_two_trials_it_is_a_straight_line_over_the_trace(curve) -> None:
    forecast = learned(curve, *((size, 1.5 * curve(size) + 0.05) for size in (100, 300)))
    assert forecast.part_at(800) == pytest.approx(1.5 * curve(800) + 0.05)
    assert forecast.part_at(200) == pytest.approx(1.5 * curve(200) + 0.05)


def test_small_trials_do_not_flatten_the_trace() -> None:
    forecast = learned(affine, (2, 0.11), (4, 0.11))
    assert forecast.part_at(500) == pytest.approx(0.11 + 1.0 * (affine(500) - affine(4)))


def test_without_a_trace_two_trials_are_needed_for_a_line() -> None:
    forecast = learned(None, (10, 0.1))
    assert not forecast.is_known and forecast.part_at(20) is None
    forecast.learn(20, 0.15)
    assert forecast.part_at(50) == pytest.approx(0.3) and not forecast.is_vague


def test_without_a_trace_three_trials_make_a_parabola() -> None:
    def curve(size: int) -> float:
        return 1e-6 * size**2 + 1e-4 * size + 0.01

    forecast = learned(None, *((size, curve(size)) for size in (100, 200, 400)))
    assert forecast.part_at(800) == pytest.approx(curve(800))
    assert forecast.part_at(300) == pytest.approx(curve(300))


def test_a_curve_that_bends_down_is_taken_for_straight() -> None:
    forecast = learned(None, (100, 0.1), (200, 0.3), (400, 0.4))
    assert forecast.part_at(600) == pytest.approx(0.5)


def test_only_the_last_three_trials_count() -> None:
    forecast = learned(None, (1, 0.9), (100, 0.1), (200, 0.2), (300, 0.3))
    assert forecast.part_at(400) == pytest.approx(0.4)


@pytest.mark.parametrize("traced", [None, quadratic])
def test_between_trials_it_is_between_what_they_took(traced) -> None:
    forecast = learned(traced, (100, 0.01), (1000, 1.0), (1400, 2.1), (1500, 2.0))  # the last two contradict a growth
    assert 0.01 < forecast.part_at(500) < forecast.part_at(700) < 1.0 < forecast.part_at(1200) < 2.1
    assert forecast.part_at(1450) == pytest.approx(2.1, abs=0.11) and forecast.part_at(3000) >= 2.0


def test_trials_that_took_next_to_nothing_say_next_to_nothing() -> None:
    assert learned(None, (2, 0.001), (4, 0.002)).is_vague
    assert not learned(affine, (2, 0.001), (4, 0.002)).is_vague
    assert learned(None, (2, 0.001), (4, 0.05)).is_vague
    assert not learned(None, (2, 0.001), (4, 0.05), (8, 0.1)).is_vague


@pytest.mark.parametrize("most", [1, 2, 100, 10**4, 2**20])
@pytest.mark.parametrize("curve", [affine, quadratic, lambda size: 0.3, lambda size: 2.0, lambda size: size / 3])
@pytest.mark.parametrize("part", [0.4, 1.0])
def test_the_largest_within_is_within_and_the_largest_to_a_hundredth(curve, most, part) -> None:
    size = Forecast(curve).largest_within(part, most)
    exact = max((one for one in range(1, min(most, 3000) + 1) if curve(one) <= part), default=0)
    exact = most if curve(most) <= part else exact
    assert 0 <= size <= most and (size == 0 or curve(size) <= part)
    assert exact - size <= max(1, size // 50)


def test_few_traces_are_made_for_it() -> None:
    for curve, most_asked in ((affine, 5), (quadratic, 14)):
        asked = []
        forecast = Forecast(lambda size, curve=curve, asked=asked: asked.append(size) or curve(size))
        size = forecast.largest_within(1.0, 2**24)
        assert len(asked) == len(set(asked)) <= most_asked
        # What a trial makes known moves the scale, not the shape.
        forecast.learn(size // 2, 1.02 * curve(size // 2))
        other = forecast.largest_within(1.0, 2**24)
        assert 0.95 * size < other < size and len(asked) <= most_asked + 4


def test_a_trace_that_fails_is_none() -> None:
    forecast = Forecast(nothing)
    assert forecast.part_at(10) is None and not forecast.is_known and forecast.largest_within(1.0, 100) == 1


def test_a_trace_that_begins_to_fail_leaves_it_to_the_trials() -> None:
    forecast = learned(lambda size: affine(size) if size < 100 else None, (10, 0.1), (20, 0.2))
    assert forecast.part_at(200) == pytest.approx(2.0)  # the line through both
    assert forecast.part_at(50) == pytest.approx(0.5)  # from then on
    forecast = learned(lambda size: affine(size) if size < 100 else None, (10, 0.1))
    assert forecast.largest_within(1.0, 1000) == 10


# Of modules.


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 1000), nn.Tanh(), nn.Linear(1000, 1))


def traced(model: kt.Model, *batch: torch.Tensor) -> list[float | None]:
    taken = traced_bytes(model, (*batch, None))
    return [taken(size) for size in (1000, 2000, 3000)]


def test_a_trace_counts_activations_by_the_sample() -> None:
    model = kt.Model(net(), backend="cpu").compile("sgd", "mse")
    first, second, third = traced(model, torch.rand(3, 8), torch.rand(3, 1))
    assert third - second == pytest.approx(second - first, rel=0.01)
    per_sample = (second - first) / 1000  # of 1000 values: the layer's, tanh's and a gradient
    assert 2 * 4000 <= per_sample <= 4 * 4000


def test_a_trace_counts_what_the_optimizer_will_have() -> None:
    weights = 4 * sum(one.numel() for one in net().parameters())
    sgd, adam = (
        traced(kt.Model(net(), backend="cpu").compile(name, "mse"), torch.rand(3, 8), torch.rand(3, 1))[0]
        for name in ("sgd", "adam")
    )
    assert adam - sgd == 2 * weights


def test_a_trace_runs_nothing_and_leaves_nothing() -> None:
    calls = []

    class Calls(nn.Linear):
        def forward(self, x):
            calls.append(type(x))
            return super().forward(x)

    model = kt.Model(Calls(8, 1), backend="cpu").compile("sgd", "mse")
    batch = torch.rand(3, 8), torch.rand(3, 1)
    numbers = torch.get_rng_state()
    traced(model, *batch)
    assert calls and torch.Tensor not in calls and torch.equal(numbers, torch.get_rng_state())
    assert all(one.grad is None for one in model.module.parameters())


class OwnStep(kt.Model):
    def train_step(self, batch):
        raise AssertionError("it is not run")


class OwnLoss(kt.Model):
    def compute_loss(self, batch):
        raise AssertionError("it is not run")


@pytest.mark.parametrize("kind", [OwnStep, OwnLoss])
def test_steps_of_ones_own_are_not_traced(kind) -> None:
    assert traced(kind(net(), backend="cpu").compile("sgd", "mse"), torch.rand(3, 8), torch.rand(3, 1)) == [None] * 3


def test_a_module_that_looks_at_values_is_not_traced() -> None:
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x[:, :1]

    model = kt.Model(Looks(8, 1), backend="cpu").compile("sgd", "mse")
    assert traced(model, torch.rand(3, 8), torch.rand(3, 1)) == [None] * 3
