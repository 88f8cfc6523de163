"""How much memory a step of training will take at any batch size, without taking it.

A trace of the module and its loss on fake tensors gives the shape of the curve, whatever that is; what trials have
really taken gives its scale. A module that cannot be traced gets a curve through its trials.
"""

from __future__ import annotations

import copy
from bisect import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import precision as precisions
from ..losses import parts_of
from ..step import forward
from ..summary import optimizer_bytes
from ..tracing import resized, try_trace

NOISE = 0.02  # of the memory there is: what other things in the process may take or give back meanwhile
NEAR = 1.05  # two sizes between which a trace would say nothing new: by a parabola's bend, less than 0.1%


class Forecast:
    """The part of the memory there is that a step takes, by batch size; better with each trial.

    Args:
        traced: Batch size -> that part by a trace, or `None` where it fails; `None` = there is no trace.
    """

    def __init__(self, traced: Callable[[int], float | None] | None) -> None:
        self._traced, self._shape, self._known = traced, {}, {}

    @property
    def is_known(self) -> bool:
        """Whether it can tell anything."""
        return self.is_traced or len(self._known) > 1

    @property
    def is_traced(self) -> bool:
        """Whether a trace tells the shape of the curve."""
        return self._traced is not None

    @property
    def is_vague(self) -> bool:
        """Whether its trials, without a trace, took too little to tell how it goes on."""
        return not self.is_traced and sum(part >= NOISE for part in self._known.values()) < 2

    def learn(self, size: int, part: float) -> None:
        """Takes in what a trial has really taken."""
        self._known[size] = part

    def part_at(self, size: int) -> float | None:
        """What a step of this batch size will take; `None` = nobody knows yet."""
        if size in self._known:
            return self._known[size]
        near = self._tried_near(size)
        *curve, at = self._curve([*near, size])
        if not self.is_known:
            return None
        points = [*zip(curve, (self._known[one] for one in near), strict=True)]
        if len(points) > 1:
            return _through(points, at, self.is_traced)
        if not points:
            return at
        ((was, part),) = points
        # What differs may be a factor or a constant: the one that leaves less for larger sizes.
        return max(part * at / was, part + at - was if at > was else 0.0)

    def _tried_near(self, size: int) -> list[int]:
        """The last two sizes tried below it, and the first above; where none is, the ends of what was tried."""
        tried = sorted(self._known)
        end = max(bisect(tried, size) + 1, 2)
        return tried[:end][-3:]

    def _curve(self, sizes: list[int]) -> list[float]:
        """What a trace says of these sizes; where it cannot of all, from then on the sizes themselves."""
        found = [None if self._traced is None else self._shape_at(size) for size in sizes]
        if None in found:
            self._traced = None
            return [*map(float, sizes)]
        return found

    def _shape_at(self, size: int) -> float | None:
        """What a trace says, or two of sizes that are near."""
        below = max((one for one in self._shape if one <= size), default=0)
        above = min((one for one in self._shape if one >= size), default=0)
        if not below or not above or above > NEAR * below:
            below = above = size
            self._shape[size] = self._traced(size)
        if below == above:
            return self._shape[below]
        return _through([(below, self._shape[below]), (above, self._shape[above])], size, is_traced=False)

    def largest_within(self, part: float, most: int) -> int:
        """The largest batch size, up to `most`, that takes no more than `part`, to a hundredth of it; 0 = none."""
        low, high = self._traced_around(part, most)
        is_guess = low > 0 and high <= most
        while high - low > (step := max(1, low // 100)):
            ratio = high / (low or 1)
            size = self._between(low, high, part) if is_guess else int(max(low * high, 1) ** 0.5)
            size = most if high > most else max(min(max(size, low + step), high - step), low + 1)
            expected = self.part_at(size)
            if expected is None:  # the trace has failed: only what was tried is known
                return max(self._known, default=1)
            low, high = (size, high) if expected <= part else (low, size)
            # A guess may narrow one side alone: where it gains less than the middle would have, that one is next.
            is_guess = high <= most and (not is_guess or high / (low or 1) <= ratio**0.5)
        return low

    def _traced_around(self, part: float, most: int) -> tuple[int, int]:
        """Of the sizes that were traced, the two next to one another between which `part` is; 0, `most` + 1 = none."""
        low = 0
        for size in sorted(self._shape if self.is_traced else ()):
            expected = self.part_at(size)
            if size > most or expected is None or expected > part:
                return low, min(size, most + 1)
            low = size
        return low, most + 1

    def _between(self, low: int, high: int, part: float) -> int:
        """Where a straight line between two sizes comes to `part`."""
        below, above = (self.part_at(low) if low else 0.0), self.part_at(high)
        return low + int((part - below) / max(above - below, 1e-9) * (high - low))


def _through(points: list[tuple[float, float]], at: float, is_traced: bool) -> float:
    """The value at `at` of the line through the last two points; of sizes alone, of the parabola through three."""
    (first, below), (last, part) = points[-2:]
    slope = max(part - below, 0.0) / max(last - first, 1e-9)
    if is_traced and at > last:  # what an allocator keeps weighs more on small trials, and must not flatten the line
        return part + max(slope, min(1.0, part / last)) * (at - last)
    bend = 0.0
    if len(points) == 3 and not is_traced:
        before, lowest = points[0]
        bend = max(slope - (below - lowest) / (first - before), 0.0) / (last - before)
    return part + slope * (at - last) + bend * (at - last) * (at - first)


def traced_bytes(model: Any, batch: tuple) -> Callable[[int], float | None]:
    """What a step takes beyond what is there before it, by batch size, as a trace on fake tensors counts.

    Args:
        model: A `kerastorch.Model`, with its optimizer.
        batch: `(x, target, weight)` of any size.
    Returns:
        Batch size -> bytes, or `None` where it cannot be traced, as a step of the model's own never can.

    Source: `FakeTensorMode`; what counts is that of `torch.distributed._tools.mem_tracker.MemTracker`.
    """
    compiled = model._compiled
    is_own = model._overrides("train_step") or model._overrides("compute_loss") or compiled.tbptt_steps is not None
    if is_own or not compiled.is_single:
        return lambda size: None
    step = _Step(model.module, compiled.loss, compiled.precision, model.backend.device)
    arguments = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (tuple(batch), {}))
    gradient_bytes = sum(one.numel() * one.element_size() for one in model.module.parameters() if one.requires_grad)
    state_bytes = optimizer_bytes(model.optimizer, gradient_bytes)

    def traced(size: int) -> float | None:
        for rows in (size, max(size, 2)):  # a normalization refuses one sample: it is taken to need as much as two
            trace, _ = try_trace(step, resized(arguments, rows), training=True)
            if trace is not None:
                return trace.peak_bytes + state_bytes
        return None

    return traced


class _Step(nn.Module):
    """The forward pass of a step: from a batch to its loss."""

    def __init__(self, module: nn.Module, loss: Any, precision: Any, device: torch.device) -> None:
        super().__init__()
        self.network, self.loss, self._precision, self._device = module, copy.deepcopy(loss), precision, device
        for one in parts_of(self.loss):
            one.is_unchecked = False  # fake tensors have no values that could be looked at

    def forward(self, x: Any, target: Any, weight: Any) -> Tensor:
        network = precisions.in_precision(self.network, self._precision, self._device)
        return self.loss(forward(network, x), target, weight)
