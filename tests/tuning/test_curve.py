"""Curves of losses over rates: averages, where they end, what is read off them, and when they say nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kerastorch.tuning import curve

RATES = np.logspace(-7, 1, 100)


def noisy(seed, points=40):
    generator = np.random.default_rng(seed)
    return np.cumsum(generator.standard_normal(points)) * 0.1 + generator.standard_normal(points) * 0.2 + 5


# Averages and the end.


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.98])
def test_smoothing_weighs_each_loss_by_its_age(beta):
    losses = noisy(1, points=20)
    for step, mean in enumerate(curve.smoothed(losses, beta)):
        weights = [beta ** (step - earlier) for earlier in range(step + 1)]
        assert mean == pytest.approx(np.average(losses[: step + 1], weights=weights), rel=1e-12)


def test_a_constant_loss_is_smoothed_to_itself():
    assert curve.smoothed([3.0] * 50, 0.98) == pytest.approx([3.0] * 50, rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "factor", "end"),
    [
        ([2.0, 1.0, 3.9, 4.1, 0.5], 4, 3),
        ([2.0, 1.0, 4.0], 4, None),  # over, not as much as
        ([2.0, 1.0, 9.0], None, None),
        ([1.0, math.nan, 1.0], None, 1),
        ([1.0, math.inf], 4, 1),
        ([math.nan], 4, 0),
        ([-1.0, -2.0, 3.9], 4, None),  # a best of -2 is left by 3 * 2
        ([-1.0, -2.0, 4.1], 4, 2),
        ([0.0, 0.1], 4, 1),
        ([], 4, None),
    ],
)
def test_a_curve_ends_where_it_is_so_many_times_its_best_or_not_finite(losses, factor, end):
    assert curve.end_of(losses, factor) == end


def test_a_tenth_of_the_beginning_and_five_points_of_the_end_are_left_out():
    losses = [*range(60, 0, -1)]
    rates, kept = curve.trimmed(RATES[:60], losses, 100)
    assert rates.tolist() == RATES[10:55].tolist() and kept.tolist() == losses[10:55]


def test_nothing_is_left_of_few_points():
    for points in range(6):
        assert all(len(kept) == max(points - 5, 0) for kept in curve.trimmed(RATES[:points], [1.0] * points, 7))


def test_what_is_not_finite_is_left_out_with_its_rate():
    losses = [1.0] * 20 + [math.nan] + [1.0] * 20
    rates, kept = curve.trimmed(RATES[:41], losses, 41)
    assert len(rates) == len(kept) == 41 - 4 - 5 - 1
    assert RATES[20] not in rates


# What is read off.


def test_the_longest_descent_of_a_line_has_its_middle_in_the_middle():
    """A third and a sixth of its 50 points, each rounded down, from one point before its first on."""
    assert curve.valley(RATES[:50], np.arange(50.0, 0.0, -1.0)) == RATES[-1 + 16 + 8]


def test_a_descent_of_two_points_at_the_beginning_is_not_at_the_end():
    """There fastai's indices are below 0, and count from the end."""
    assert curve.valley(RATES[:5], np.array([3.0, 2.0, 4.0, 5.0, 6.0])) == RATES[0]


def test_a_valley_goes_by_the_order_of_losses_alone():
    losses = noisy(3)
    assert curve.valley(RATES[:40], losses) == curve.valley(RATES[:40], np.exp(losses))


def longest_descent(losses):
    """By trying all: length and end of the first longest falling subsequence, by its end."""
    lengths = {}
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(range(len(losses)), count) for count in range(1, len(losses) + 1)
    ):
        if all(losses[a] > losses[b] for a, b in itertools.pairwise(chosen)):
            lengths[chosen[-1]] = max(lengths.get(chosen[-1], 0), len(chosen))
    longest = max(lengths.values())
    return longest, min(end for end, length in lengths.items() if length == longest)


@pytest.mark.parametrize("seed", range(8))
def test_a_valley_is_in_the_middle_of_the_longest_of_all_descents(seed):
    losses = noisy(seed, points=11)
    length, end = longest_descent(losses.tolist())
    start = end - length if end else 0
    third = (end - start) / 3
    assert curve.valley(RATES[:11], losses) == RATES[max(start + int(third) + int(third / 2), 0)]


def fastai_valley(rates, losses):
    """As `fastai.callback.schedule.valley` has it."""
    n = len(losses)
    max_start, max_end = 0, 0
    lds = [1] * n
    for i in range(1, n):
        for j in range(0, i):
            if (losses[i] < losses[j]) and (lds[i] < lds[j] + 1):
                lds[i] = lds[j] + 1
            if lds[max_end] < lds[i]:
                max_end = i
                max_start = max_end - lds[max_end]
    sections = (max_end - max_start) / 3
    idx = max_start + int(sections) + int(sections / 2)
    return float(rates[idx])


def fastai_slide(rates, losses, lr_diff=15, thresh=0.005, adjust_value=1.0):
    """As `fastai.callback.schedule.slide` has it."""
    loss_grad = np.gradient(losses)
    r_idx = -1
    l_idx = r_idx - lr_diff
    local_min_lr = rates[l_idx]
    while (l_idx >= -len(losses)) and (abs(loss_grad[r_idx] - loss_grad[l_idx]) > thresh):
        local_min_lr = rates[l_idx]
        r_idx -= 1
        l_idx -= 1
    return float(local_min_lr) * adjust_value


def fastai_steep(rates, losses):
    """As `fastai.callback.schedule.steep` has it."""
    grads = (losses[1:] - losses[:-1]) / (np.log(rates[1:]) - np.log(rates[:-1]))
    return float(rates[int(grads.argmin())])


def fastai_minimum(rates, losses):
    """As `fastai.callback.schedule.minimum` has it."""
    return float(rates[losses.argmin()]) / 10


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (curve.valley, fastai_valley),
        (curve.slide, fastai_slide),
        (curve.steepest, fastai_steep),
        (curve.minimum, fastai_minimum),
    ],
)
@pytest.mark.parametrize("kind", ["noise", "smooth", "falls", "rises", "flat"])
def test_what_is_read_off_is_what_fastai_reads(ours, theirs, kind):
    for seed in range(20):
        losses = noisy(seed, points=60)
        losses = {
            "noise": losses,
            "smooth": np.asarray(curve.smoothed(losses, 0.98)),
            "falls": np.sort(losses)[::-1].copy(),
            "rises": np.sort(losses),
            "flat": np.full(60, 2.0),
        }[kind]
        assert ours(RATES[:60], losses) == pytest.approx(theirs(RATES[:60], losses), rel=1e-12)


def test_a_sharp_v_has_its_lowest_loss_and_its_steepest_descent_where_they_were_put():
    """In the logarithm of the rate: flat, then ever steeper down to the 70th rate, then up at once."""
    place = np.arange(100.0)
    losses = np.where(place <= 70, 5 - (place / 70) ** 4, 4 + (place - 70) / 4)
    assert curve.minimum(RATES, losses) == pytest.approx(RATES[70] / 10)
    assert curve.steepest(RATES, losses) == pytest.approx(RATES[69])


def test_a_window_slides_down_to_where_the_slope_is_the_same_at_both_its_ends():
    losses = np.maximum(np.arange(100.0) - 60, 0.0)  # flat, then a line, on which both ends are alike at once
    assert curve.slide(RATES, losses) == RATES[84]
    assert curve.slide(RATES, losses**2) == RATES[60 - 15]


def test_few_points_are_enough_for_all_methods():
    for method in curve.METHODS.values():
        assert math.isfinite(method(RATES[:5], np.array([5.0, 4.0, 3.0, 2.0, 4.0])))


# When it says nothing.


def silence(losses, smoothing=0.98, has_diverged=True):
    steps = len(losses) if not has_diverged else 100
    rates = RATES[: len(losses)]
    _, kept = curve.trimmed(rates, curve.smoothed(losses, smoothing), steps)
    return curve.why_silent(losses, kept, steps, has_diverged)


FALLS_THEN_RISES = [*np.linspace(2, 2, 40), *np.linspace(2, 0.5, 40), *np.linspace(0.6, 40, 8)]


def test_a_loss_that_falls_and_then_rises_gives_an_answer():
    assert silence(FALLS_THEN_RISES) == ""


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_gives_none(seed):
    losses = 2 + 0.1 * np.random.default_rng(seed).standard_normal(100)
    assert silence(losses, has_diverged=False) == "the loss falls by less than its noise"


def test_a_constant_loss_gives_none():
    assert silence([2.0] * 100, has_diverged=False) == "the loss falls by less than its noise"


def test_a_loss_that_only_rises_gives_none():
    assert silence(np.geomspace(1, 50, 80)) == "the loss rises at once: give a lower min_lr"


def test_a_loss_that_still_falls_at_the_highest_rate_gives_none():
    assert silence(np.linspace(2, 1, 100), has_diverged=False) == "the loss still falls at max_lr: give a higher one"


def test_a_first_loss_that_is_not_finite_is_no_matter_of_rates():
    assert silence([math.nan]) == "the first loss is nan: look for NaN in data and weights"


@pytest.mark.parametrize("losses", [[2.0, math.inf], [2.0, 2.0, 2.0, 50.0, 90.0]])
def test_a_loss_that_diverges_at_once_gives_none(losses):
    said = silence(losses)
    assert said == f"the loss diverged at once, after {len(losses)} of 100 steps: give a lower min_lr"


def test_a_loss_that_ends_in_nan_gives_the_answer_of_what_came_before():
    assert silence([*FALLS_THEN_RISES, math.nan]) == ""
    assert silence([*[2.0] * 50, math.nan]) == "the loss falls by less than its noise"
