"""What a curve of losses over learning rates says: four ways to read a rate off it, and when it says nothing.

Curves are smoothed, without their noisy ends, and hold finite losses at rates that grow: `trimmed` makes them so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEFT_OUT = 0.1  # of the steps, at the beginning, where the smoothing has not warmed up; fastai's
LAST = 5  # points, where it diverges; fastai's
NEIGHBOURS = 5  # losses whose median says how high the loss is there
OF_NOISE = 2.5  # differences between neighbours, which the lowest median is below the start in 1 of 70 tests by chance
ROUNDING = 1e-6  # of a loss, in float32 and in its average


def smoothed(losses: Sequence[float], beta: float) -> list[float]:
    """Exponential moving average of the losses, each divided by the sum of its weights.

    Source: Kingma & Ba 2015, "Adam", section 3 (the bias correction).
    """
    average, means = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        means.append(average / (1 - beta**step))
    return means


def end_of(curve: Sequence[float], factor: float | None) -> int | None:
    """Number of the step at which a smoothed curve has diverged: over `factor` times its best; `None` = it has not."""
    best = float("inf")
    for step, loss in enumerate(curve):
        # A best below 0 is left by as much as one above it; a loss that is not finite is over everything.
        if not loss < float("inf") or (step and factor is not None and loss > best + (factor - 1) * abs(best)):
            return step
        best = min(best, loss)
    return None


def trimmed(lrs: Sequence[float], curve: Sequence[float], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve of a test of so many steps without its ends and what is not finite."""
    first, end = int(LEFT_OUT * steps), max(len(curve) - LAST, 0)
    rates, kept = np.asarray(lrs, dtype=float)[first:end], np.asarray(curve, dtype=float)[first:end]
    return rates[np.isfinite(kept)], kept[np.isfinite(kept)]


def why_silent(losses: Sequence[float], curve: np.ndarray, steps: int, has_diverged: bool) -> str:
    """Why a curve gives no answer; "" where it does.

    Args:
        losses: As they were measured.
        curve: The same, smoothed and trimmed.
        steps: Of the test.
        has_diverged: Whether it ended before them.
    """
    if len(curve) < LAST and not has_diverged:
        return f"{steps} steps are too few: give more"
    if not np.isfinite(losses[0]):
        return f"the first loss is {losses[0]}: look for NaN in data and weights"
    if len(curve) < LAST:
        return f"the loss diverged at once, after {len(losses)} of {steps} steps: give a lower min_lr"
    raw = np.asarray(losses, dtype=float)
    raw = raw[np.isfinite(raw)]
    # Medians of neighbours, since what is smoothed as much as the curve is late by half of the test.
    first = max(int(LEFT_OUT * steps), NEIGHBOURS)
    start, around = (
        np.median(raw[:first]),
        [np.median(raw[at : at + NEIGHBOURS]) for at in range(len(raw) - NEIGHBOURS + 1)],
    )
    noise = max(OF_NOISE * noise_of(losses), ROUNDING * abs(start))
    if start - min(around) <= noise:
        is_rising = around[-1] - start > noise
        return "the loss rises at once: give a lower min_lr" if is_rising else "the loss falls by less than its noise"
    if not has_diverged and int(np.argmin(around)) >= len(around) - NEIGHBOURS:
        return "the loss still falls at max_lr: give a higher one"
    return ""


def noise_of(losses: Sequence[float]) -> float:
    """By how much one loss differs from the next: the median."""
    differences = np.abs(np.diff(np.asarray(losses, dtype=float)))
    differences = differences[np.isfinite(differences)]
    return float(np.median(differences)) if len(differences) else 0.0


def steepest(lrs: np.ndarray, curve: np.ndarray) -> float:
    """The rate at which the loss falls fastest per factor of the rate.

    Source: fastai, `fastai.callback.schedule.steep`.
    """
    return float(lrs[int((np.diff(curve) / np.diff(np.log(lrs))).argmin())])


def minimum(lrs: np.ndarray, curve: np.ndarray) -> float:
    """A tenth of the rate with the lowest loss: by that one the loss is about to rise.

    Source: fastai, `fastai.callback.schedule.minimum`.
    """
    return float(lrs[int(curve.argmin())]) / 10


def valley(lrs: np.ndarray, curve: np.ndarray) -> float:
    """The middle of the longest descent: of the longest subsequence of ever lower losses, which may skip points.

    Source: fastai, `fastai.callback.schedule.valley`, after ESRI's `arcgis.learn`. Its third and sixth of the length,
    each rounded down, are this middle; the descent is taken to begin as many points before its end as it is long.
    """
    lengths = np.ones(len(curve), dtype=int)  # of the longest falling subsequence that ends here
    for end in range(1, len(curve)):
        lengths[end] += lengths[:end][curve[:end] > curve[end]].max(initial=0)
    longest = int(lengths.argmax())
    start = longest - int(lengths[longest]) if longest else 0
    third = (longest - start) / 3
    return float(lrs[max(start + int(third) + int(third / 2), 0)])  # a descent of two points would begin before them


def slide(lrs: np.ndarray, curve: np.ndarray, width: int = 15, threshold: float = 0.005) -> float:
    """Slides a window down from the largest rate until the loss changes as fast at both its ends.

    Args:
        width: Of the window, in points.
        threshold: What slopes may differ by, in units of the loss per point.

    Source: fastai, `fastai.callback.schedule.slide`; Chambers 2018, "Estimating an Optimal Learning Rate For a Deep
    Neural Network".
    """
    slopes = np.gradient(curve)
    right = len(slopes) - 1
    rate = lrs[max(right - width, 0)]
    while right - width >= 0 and abs(slopes[right] - slopes[right - width]) > threshold:
        rate = lrs[right - width]
        right -= 1
    return float(rate)


METHODS = {"steepest": steepest, "valley": valley, "minimum": minimum, "slide": slide}
