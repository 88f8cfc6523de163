"""Truncated backpropagation through time: long sequences in pieces, one optimizer step each.

The state goes from piece to piece without its graph, so that a gradient reaches back at most `tbptt_steps` steps of
time. Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent network
trajectories".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .step import Batch, Recipe, optimizer_step
from .structures import detached, leaves, map_structure, samples_in

TIME = 1  # the dim of time, behind that of samples


class TruncatedStep:
    """Goes through a batch of sequences piece by piece, where `forward_backward` takes it whole.

    The state starts as `None` with each batch.

    Args:
        compute: `(x, target, weight, state) -> (output, loss, state)`.
        steps: Length of a piece, in steps of time.
    """

    def __init__(self, compute: Callable, steps: int) -> None:
        self.compute, self.steps = compute, steps

    def __call__(self, recipe: Recipe, batch: Batch) -> bool:
        length, samples, state = _length(batch), samples_in(batch[0]), None
        for piece in pieces(batch, length, self.steps):
            x, target, weight = piece
            output, loss, state = self.compute(x, target, weight, state)
            state = map_structure(detached, state)
            # A short last piece counts as long as it is.
            recipe.tracker.add(loss, output, target, samples * _length((x, target)), weight)
            for hook in recipe.hooks.on_before_backward:
                hook(loss)
            if recipe.window is None:
                recipe.backward(loss)
            else:
                rows = samples_in(x)
                recipe.window.backward(recipe.shares(loss, output, piece, rows), rows, rows, recipe.backward)
            for hook in recipe.hooks.on_after_backward:
                hook()
            optimizer_step(recipe, recipe.updates[""])
        recipe.tracker.samples -= samples * (length - 1)  # counted once for each step of time
        return False


def pieces(batch: Batch, length: int, steps: int) -> Iterator[Batch]:
    """Cuts whatever has the sequences' length along time; the rest (features of a whole sequence) goes with each."""
    for start in range(0, length, steps):

        def cut(leaf: Any, start: int = start) -> Any:
            is_sequence = isinstance(leaf, Tensor) and leaf.ndim > TIME and leaf.shape[TIME] == length
            return leaf.narrow(TIME, start, min(steps, length - start)) if is_sequence else leaf

        yield tuple(map_structure(cut, part) for part in batch)


def _length(batch: tuple) -> int:
    """Steps of time in a batch.

    Raises:
        ValueError: inputs without time, or targets of another length.
    """
    x, target, *_ = batch
    sequence = next((leaf for leaf in leaves(x) if isinstance(leaf, Tensor) and leaf.ndim > TIME), None)
    if sequence is None:
        raise ValueError("tbptt_steps needs inputs of shape (samples, time, ...), but these have no second dimension.")
    length = sequence.shape[TIME]
    for leaf in leaves(target):
        if leaf.ndim <= TIME or leaf.shape[TIME] != length:
            raise ValueError(
                f"tbptt_steps cuts inputs of {length} steps of time, but the targets have shape {tuple(leaf.shape)}. "
                f"Give a target for each step, shape ({len(leaf)}, {length}, ...)."
            )
    return length
