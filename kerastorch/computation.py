"""From a batch to its output and loss: the function that a step calls, put together once before a run.

In the plain case it is the module and the loss; precision, a state through time and an override of `compute_loss` are
put around these here, so that the step knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .losses import OwnLoss, Share, SumOfLosses
from .precision import as_float32
from .step import forward

Compute = Callable[[Any, Any, Any], tuple[Any, Tensor]]


def output_and_loss(network: Callable, loss: Callable[[Any, Any, Any], Tensor]) -> Compute:
    """The plain case.

    Args:
        network: Called with the inputs: the module, or what its precision made of it.
        loss: `(output, target, weight) -> mean loss`.
    """

    def compute(x: Any, target: Any, weight: Any) -> tuple[Any, Tensor]:
        output = network(x) if isinstance(x, Tensor) else forward(network, x)
        return output, loss(output, target, weight)

    return compute


def without_state(network: Callable) -> Callable:
    """A network `(x, state) -> (output, state)` that starts without a state and keeps the last one to itself."""

    def run(*inputs: Any, **named: Any) -> Any:
        return (network(*inputs, **named, state=None) if named else network(*inputs, None))[0]

    return run


def checked_state(returned: Any) -> tuple[Any, Any]:
    """Output, as float32 if it is less, and state, as a module for truncated backpropagation returns them.

    Raises:
        ValueError: it returned something else.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        return as_float32(returned[0]), returned[1]
    what = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
    raise ValueError(
        f"tbptt_steps needs a module that returns (output, state), but it returned {what}. Return the state too, "
        f"e.g. (output, (h, c)), or leave tbptt_steps out."
    )


def with_graph(compute: Compute, loss: OwnLoss) -> Compute:
    """The function, with a graph as long as the module's own loss needs one, in evaluations too."""

    def run(x: Any, target: Any, weight: Any) -> tuple[Any, Tensor]:
        if not loss.is_unchecked:
            return compute(x, target, weight)
        with torch.enable_grad():
            return compute(x, target, weight)

    return run


def output_loss_and_state(network: Callable, loss: Callable[[Any, Any, Any], Tensor]) -> Callable:
    """For a network `(x, state) -> (output, state)`: `(x, target, weight, state) -> (output, loss, state)`."""

    def compute(x: Any, target: Any, weight: Any, state: Any) -> tuple[Any, Tensor, Any]:
        if isinstance(x, Mapping):
            output, state = network(**x, state=state)
        else:
            output, state = network(*x, state) if isinstance(x, (tuple, list)) else network(x, state)
        return output, loss(output, target, weight), state

    return compute


class Overridden:
    """A `compute_loss` of the user's own, in the place of `output_and_loss`.

    Its loss is taken for a mean over what the compiled loss is the mean over where it asked for that, once, by
    `super().compute_loss(batch)`; else over the samples.

    Args:
        compute_loss: `(x, y)` or `(x, y, weight)` -> the loss, or `(loss, output)`.
        plain: What would be computed without it.
        loss: The loss in `plain`.
        measures: Whether there are metrics, which need an output.
    Attributes:
        latest: Name -> parts or terms of the compiled loss, where that was asked for, of the last batch.
        is_gathered: Whether `shares` will be asked for after each call.
    """

    def __init__(self, compute_loss: Callable[[tuple], Any], plain: Compute, loss: Any, measures: bool) -> None:
        self.compute_loss, self.plain, self.loss, self.measures = compute_loss, plain, loss, measures
        self.latest: dict[str, Tensor] = {}
        self.is_gathered = self._is_of_compiled = False
        self._asked: list[tuple[tuple, Any, Tensor]] = []

    def ask(self, batch: tuple) -> Tensor:
        """The compiled loss of a batch `(x, y, weight)`, for an override that builds on it."""
        output, loss = self.plain(*batch)
        self._asked.append((batch, output, loss))
        return loss

    def __call__(self, x: Any, target: Any, weight: Any) -> tuple[Any, Tensor]:
        self._asked = []
        returned = self.compute_loss((x, target) if weight is None else (x, target, weight))
        loss, output = returned if isinstance(returned, tuple) else (returned, None)
        if output is None and self._asked:
            output = self._asked[-1][1]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise TypeError(
                f"compute_loss returned a loss of {what}, expected a scalar tensor. Return its mean over the samples, "
                f"or (loss, output)."
            )
        if output is None and self.measures:
            raise ValueError(
                "metrics were given, but compute_loss returned no output to measure. Return (loss, output), or call "
                "super().compute_loss(batch) in it."
            )
        self._is_of_compiled = len(self._asked) == 1
        is_sum = isinstance(self.loss, SumOfLosses)
        latest = getattr(self.loss, "latest", {}) if self._asked else {}
        self.latest = {f"{name}_loss" if is_sum else name: value for name, value in latest.items()}
        if not (self.is_gathered and self._is_of_compiled):
            self._asked = []  # the graph must not outlive its step
        return output, loss.reshape(())

    def shares(self, loss: Tensor, output: Any, batch: tuple, samples: int) -> list[Share]:
        """What the loss, just computed, is the mean over."""
        if not self._asked:
            return [Share("", loss, samples, samples)]
        asked_batch, asked_output, asked = self._asked.pop()
        shares = self.loss.shares(asked, asked_output, asked_batch, samples)
        if len(shares) == 1:
            return [shares[0]._replace(loss=loss)]
        return [*shares, Share(("added", ""), loss - asked, samples, samples)]

    def masks(self, output: Any, target: Any) -> bool:
        """Whether it is a mean over targets that are not masked."""
        return self._is_of_compiled and not isinstance(self.loss, SumOfLosses) and self.loss.masks(output, target)

    def units(self, targets: Tensor) -> Tensor:
        """As those of the compiled loss."""
        return self.loss.units(targets)
