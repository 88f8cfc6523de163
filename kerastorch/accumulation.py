"""One gradient from several batches, weighted as one large batch would weigh them.

A loss is a mean over so many samples, or over so many targets that are not masked. Here each batch's mean is multiplied
by that count before its gradient is added, and the sum is divided by the total count when the window of batches closes:
no batch has to know of a later one. Where all batches count the same, the division is in the factors already.

The parts of one batch that several processes compute are weighed in the same way. What is averaged over the processes
are gradients and counts both, so that the one divided by the other is what one process would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .losses import Share


class Window:
    """The batches of one optimizer step.

    Args:
        parameters: Those whose gradients are gathered.
        size: Batches in a window.
        ranks: The backend: says what a mean over a part of a batch counts.
        batches: Batches in the epoch, so that its last window closes with its last batch; `None` = not known.
    Attributes:
        is_open: Whether there are gradients that no step has used.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int, ranks: Any, batches: int | None = None) -> None:
        self.parameters, self.size, self.ranks = tuple(parameters), size, ranks
        self._left = batches
        self._forget()
        self._announce()

    @property
    def is_open(self) -> bool:
        return self._batches > 0

    def count_batch(self) -> bool:
        """Counts one batch more, and says whether the window is full."""
        self._batches += 1
        if self._left is not None:
            self._left -= 1
        is_full = self._batches == self.size or self._left == 0
        if not is_full:
            self._announce()
        return is_full

    def _announce(self) -> None:
        """Says whether the batch to come is known to be the last one of the window."""
        self.ranks.expect_step(self._batches + 1 == self.size or self._left == 1)

    def backward(self, shares: list[Share], samples: int, of: int, backward: Callable[..., None]) -> None:
        """Adds the gradient of one batch, or of a piece of one.

        Args:
            shares: Its losses, each with what it is the mean over.
            samples: Rows here.
            of: Rows of the batch.
            backward: `(loss, retain_graph=...)`: puts its gradients into the parameters.
        """
        losses = {share.name: self._weighted(share, samples, of) for share in shares}
        # One without a gradient, of frozen layers say, adds none; where there is no other, torch will say so.
        trained = [name for name, loss in losses.items() if loss.requires_grad] or [*losses]
        for name in trained:
            if len(losses) == 1:
                backward(losses[name])
            else:
                self._add_apart(name, losses[name], backward, is_last=name == trained[-1])

    def count(self, totals: Mapping[Any, Any], most: int) -> dict[Any, Any]:
        """Counts one batch whose gradients somebody else adds, and says what its losses are divided by for now.

        Args:
            totals: What its losses are the means over, by their names; `None` = it is a sum.
            most: Its samples.
        Raises:
            ValueError: means over different things, in a window of several batches.
        """
        if len(totals) > 1 and self.size > 1:
            raise ValueError(
                f"accumulate={self.size} was given with losses that are means over different things (samples, targets "
                f"that are not masked), which this backend does not keep apart. Give accumulate=1."
            )
        for name, total in totals.items():
            self._expected.setdefault(name, max(round(self.size * most), 1))
            self._totals[name] = None if total is None else self._totals.get(name, 0) + total
        return dict(self._expected)

    def close(self) -> None:
        """Leaves the gradient of the mean over the whole window in the parameters."""
        for name, total in zip(self._own, _means(self.ranks, [*self._own.values()]), strict=True):
            self._totals[name] = self._totals.get(name, 0) + total
        if self._apart:
            for name, gradients in self._apart.items():
                self._divide(name, gradients)
            _put(self.parameters, map(_sum, zip(*self._apart.values(), strict=True)))
        self.ranks.average(self.parameters)
        for name in () if self._apart else self._totals:
            self._divide(name, self.ranks.gradients(self.parameters))
        self._forget()
        self._announce()

    def whole(self, shares: list[Share], rows: int) -> Tensor:
        """A window by itself: leaves the gradient of a batch, of all processes' parts, and returns its loss."""
        losses = [share.loss.detach() for share in shares]
        self.backward(shares, rows, rows, Tensor.backward)
        counts = [self.ranks.part.counts(1 if share.count is None else share.count, rows, rows)[0] for share in shares]
        totals = _means(self.ranks, [one * count for one, count in zip(losses, counts, strict=True)] + counts)
        self.close()
        parts = zip(totals[: len(shares)], totals[len(shares) :], strict=True)
        return sum(total / count for total, count in parts)

    def join(self, other: Window) -> None:
        """Takes over what `other` has counted and kept apart; what both left in the parameters, the caller adds up."""
        for name, total in other._totals.items():
            self._totals[name] = total if total is None else self._totals.get(name, 0) + total
            self._expected.setdefault(name, other._expected[name])
        for name, total in other._own.items():
            self._own[name] = self._own.get(name, 0) + total
            self._expected.setdefault(name, other._expected[name])
        for name, gradients in other._apart.items():
            before = self._apart.get(name, [None] * len(gradients))
            self._apart[name] = [_sum(pair) for pair in zip(before, gradients, strict=True)]

    def beside(self) -> Window:
        """An empty window whose losses are weighted as they would be in this one."""
        other = Window(self.parameters, self.size, self.ranks)
        other._expected = dict(self._expected)
        return other

    def state_dict(self) -> dict[str, Any]:
        """What is gathered beside the gradients in the parameters: tensors and plain data."""
        return {
            "batches": self._batches,
            "left": self._left,
            "expected": dict(self._expected),
            "totals": dict(self._totals),
            "own": dict(self._own),
            "apart": {name: self.ranks.gathered(gradients) for name, gradients in self._apart.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, with the gradients that were in the parameters there again."""
        self._batches, self._left, self._expected = state["batches"], state["left"], dict(state["expected"])
        self._announce()
        device = self.parameters[0].device
        self._totals = {name: _on(device, total) for name, total in state["totals"].items()}
        self._own = {name: _on(device, total) for name, total in state.get("own", {}).items()}
        self._apart = {name: self.ranks.taken_up(one, self.parameters) for name, one in state["apart"].items()}

    def _weighted(self, share: Share, samples: int, of: int) -> Tensor:
        """The loss times its count, over the count expected of a whole window, which keeps fp16 in its range."""
        name, loss, count, most = share
        expected = self._expected.get(name)
        if expected is None:
            expected = self._expected[name] = self.ranks.part.expected(self.size, most / (samples / of))
        if count is None:  # a sum, which nothing divides
            self._totals[name] = None
            return loss if self.ranks.world == 1 else loss * self.ranks.world
        count, total = self.ranks.part.counts(count, samples, of)
        if total is None:
            self._own[name] = self._own.get(name, 0) + count
        else:
            self._totals[name] = self._totals.get(name, 0) + total
        if isinstance(count, Tensor):  # not its quotient, a float32. Of nothing the mean is NaN, but its gradient is 0.
            return loss * count / expected
        return loss if count == expected else loss * (count / expected)

    def _divide(self, name: str, gradients: Iterable[Tensor | None]) -> None:
        total, expected = self._totals[name], self._expected[name]
        if total is None or (not isinstance(total, Tensor) and total == expected):
            return
        if isinstance(total, Tensor):  # as float64 where there is one: the quotient of integers would be a float32
            total = torch.where(total > 0, total, 1).to(torch.float32 if total.is_mps else torch.float64)
        factor = expected / total
        there = [gradient for gradient in gradients if gradient is not None]
        if there:
            torch._foreach_mul_(there, factor)

    def _add_apart(self, name: str, loss: Tensor, backward: Callable[..., None], is_last: bool) -> None:
        """Adds to the gradients of this loss alone: what they will be divided by is not what the others' will be."""
        others = [parameter.grad for parameter in self.parameters]
        _put(self.parameters, self._apart.get(name, [None] * len(others)))
        backward(loss, retain_graph=not is_last)
        self._apart[name] = [parameter.grad for parameter in self.parameters]
        _put(self.parameters, others)

    def _forget(self) -> None:
        self._batches = 0
        self._expected: dict[str, float] = {}
        self._totals: dict[str, Any] = {}  # on the mean over all processes
        self._own: dict[str, Any] = {}  # of this process alone
        self._apart: dict[str, list[Tensor | None]] = {}


class Parked:
    """Gradients of one of several optimizers, kept apart until its window of batches is full.

    Between its batches other losses leave gradients in the same parameters, which must not be mixed with these.

    Args:
        parameters: Those of the optimizer.
        size: Calls of `take` in a window.
        ranks: The backend: brings together what several processes count.
    Attributes:
        is_open: Whether there are gradients that no step has used; of frozen parameters there never are any.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int, ranks: Any) -> None:
        self.parameters, self.size, self.ranks = tuple(parameters), size, ranks
        self._forget()

    @property
    def is_open(self) -> bool:
        return any(gradient is not None for gradient in self._gradients)

    def take(self, weight: float | Tensor, scale: Tensor | None) -> bool:
        """Takes the gradients out of the parameters, and says whether the window is full.

        Args:
            weight: What their loss was multiplied by: the samples behind it, in any unit.
            scale: What losses are multiplied by until the next optimizer step; it may be another one later.
        """
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                gradient = parameter.grad if scale is None else parameter.grad.div_(scale)
                self._gradients[index] = _sum((self._gradients[index], gradient))
                parameter.grad = None
        self._batches, self._weight = self._batches + 1, self._weight + weight
        return self._batches == self.size

    def put_back(self, scale: Tensor | None) -> None:
        """Leaves the mean over the samples of the window in the parameters."""
        (weight,) = _means(self.ranks, [self._weight])
        if isinstance(weight, Tensor):
            weight = torch.where(weight > 0, weight, 1.0)
        there = [gradient for gradient in self._gradients if gradient is not None]
        if there:
            torch._foreach_mul_(there, (1.0 if scale is None else scale) / weight)
        _put(self.parameters, self._gradients)
        self.ranks.average(self.parameters)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """What is gathered: tensors and plain data."""
        gradients = self.ranks.gathered(self._gradients)
        return {"gradients": gradients, "batches": self._batches, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._gradients = self.ranks.taken_up(state["gradients"], self.parameters)
        self._batches, self._weight = state["batches"], _on(self.parameters[0].device, state["weight"])

    def _forget(self) -> None:
        self._gradients: list[Tensor | None] = [None] * len(self.parameters)
        self._batches, self._weight = 0, 0.0


def merged_windows(states: Sequence[Mapping[str, Any]], is_first: bool, scale: float) -> dict[str, Any]:
    """The state of a window for one of another number of processes: what all had gathered goes to the first of them.

    Args:
        states: Of all processes.
        is_first: Whether it is for that one.
        scale: Their number divided by the new one: totals are means over the processes.
    """
    totals = {name: total if total is None else total * scale for name, total in states[0]["totals"].items()}
    own: dict[str, Any] = dict.fromkeys(states[0].get("own", {}), 0)
    apart = {name: [None] * len(gradients) for name, gradients in states[0]["apart"].items()}
    for state in states if is_first else ():
        own = {name: total + state["own"][name] for name, total in own.items()}
        apart = {name: [*map(_sum, zip(apart[name], state["apart"][name], strict=True))] for name in apart}
    return dict(states[0]) | {"totals": totals, "own": own, "apart": apart}


def merged_parked(states: Sequence[Mapping[str, Any]], is_first: bool) -> dict[str, Any]:
    """As `merged_windows`, of the gradients of one of several optimizers."""
    if not is_first:
        return dict(states[0]) | {"gradients": [None] * len(states[0]["gradients"]), "weight": 0.0}
    gradients = [_sum(parts) for parts in zip(*(state["gradients"] for state in states), strict=True)]
    return dict(states[0]) | {"gradients": gradients, "weight": sum(state["weight"] for state in states)}


def _means(ranks: Any, values: Sequence[float | Tensor]) -> Sequence[float | Tensor]:
    """Of all processes, where each has its own."""
    return [one / ranks.world for one in ranks.sum(values)] if ranks.measures_parts else values


def _sum(gradients: Iterable[Tensor | None]) -> Tensor | None:
    there = [gradient for gradient in gradients if gradient is not None]
    return sum(there[1:], there[0]) if there else None


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _put(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
