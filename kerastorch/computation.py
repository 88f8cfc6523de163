"""From a batch to its output and loss: the function that a step calls, put together once before a run.

In the plain case it is the module and the loss; precision, a state through time and an override of `compute_loss` are
put around these here, so that the step knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .losses import Share
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


def output_loss_and_state(network: Callable, loss: Callable[[Any, Any, Any], Tensor]) -> Callable:
    """For a network `(x, state) -> (output, state)`: `(x, target, weight, state) -> (output, loss, state)`."""

    def compute(x: Any, target: Any, weight: Any, state: Any) -> tuple[Any, Tensor, Any]:
        if isinstance(x, Mapping):
            output, state = network(**x, state=state)
        else:
            output, state = network(*x, state) if isinstance(x, (tuple, list)) else network(x, state)
        return output, loss(output, target, weight), state

    return compute


def overridden(compute_loss: Callable[[tuple], Any], latest_output: Callable[[], Any], measures: bool) -> Compute:
    """A `compute_loss` of the user's own.

    Args:
        compute_loss: `(x, y)` or `(x, y, weight)` -> the loss, or `(loss, output)`.
        latest_output: What the module returned if `compute_loss` asked its superclass; else `None`.
        measures: Whether there are metrics, which need an output.
    """

    def compute(x: Any, target: Any, weight: Any) -> tuple[Any, Tensor]:
        returned = compute_loss((x, target) if weight is None else (x, target, weight))
        loss, output = returned if isinstance(returned, tuple) else (returned, latest_output())
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise TypeError(
                f"compute_loss returned a loss of {what}, expected a scalar tensor. Return its mean over the samples, "
                f"or (loss, output)."
            )
        if output is None and measures:
            raise ValueError(
                "metrics were given, but compute_loss returned no output to measure. Return (loss, output), or call "
                "super().compute_loss(batch) in it."
            )
        return output, loss.reshape(())

    return compute


def of_samples(loss: Tensor, output: Any, batch: tuple, samples: int) -> list[Share]:
    """The loss as a mean over the samples, where nothing is known of it."""
    return [Share("", loss, samples, samples)]
