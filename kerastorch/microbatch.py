"""Batches in pieces that fit into memory, with the gradient of the whole batch.

Each piece's loss counts by its samples (or unmasked targets), so the split changes nothing but rounding; with one
exception that no library can avoid: BatchNorm normalizes by the statistics of the piece it sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .accumulation import Window
from .memory import free_memory, is_out_of_memory
from .step import Batch, Recipe
from .structures import detached, map_structure, samples_in


class PiecewiseStep:
    """`forward_backward` in pieces of at most `size` samples.

    Args:
        size: Samples in a piece, or `"auto"`: whole batches, and half as many samples after each out-of-memory error.
    """

    def __init__(self, size: int | str) -> None:
        self.may_halve = size == "auto"
        self.size: int | None = None if self.may_halve else size
        self._has_said = False

    def state_dict(self) -> dict[str, Any]:
        """The size that memory has allowed: BatchNorm sees it."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.size = state["size"] if self.may_halve else self.size

    def __call__(self, recipe: Recipe, batch: Batch) -> bool:
        samples = samples_in(batch[0])
        while True:
            size = min(self.size or samples, samples)
            if not self.may_halve:
                for computed in self._computed(recipe, recipe.window, batch, size):
                    recipe.tracker.add(*computed)
                break
            before = _State(recipe)
            try:
                tried = recipe.window.beside()
                pieces_computed = [*self._computed(recipe, tried, batch, size)]
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            else:
                before.add_gradients(recipe.window, tried)
                for computed in pieces_computed:  # only now, so that none is tracked twice
                    recipe.tracker.add(*computed)
                break
            # Outside of the `except`: the traceback of the error keeps what the failed try held.
            del tried
            before.restore()
            free_memory(recipe.device)
            self.size = size // 2
            self._say(size, reason)
        return recipe.window.count_batch()

    def _computed(self, recipe: Recipe, window: Window, batch: Batch, size: int) -> Iterator[tuple]:
        """Forward and backward of each piece; yields what the tracker takes of it."""
        samples = samples_in(batch[0])
        for piece in pieces(batch, size):
            x, target, weight = piece
            piece_samples = samples_in(x)
            output, loss = recipe.compute(x, target, weight)
            for hook in recipe.hooks.on_before_backward:
                hook(loss)
            shares = recipe.shares(loss, output, piece, piece_samples)
            window.backward(shares, piece_samples, samples, recipe.backward)
            for hook in recipe.hooks.on_after_backward:
                hook()
            # Without the graph, whose nodes may hold more than torch frees after a backward pass; and of outputs that
            # nobody will measure, the shape alone.
            values = recipe.tracker.values_of(loss.detach())
            output = map_structure(detached if recipe.tracker.measures else _shape_alone, output)
            del loss, shares
            yield values, output, target, piece_samples, weight
        if recipe.ranks.passes_are_common:
            self._keep_others_company(recipe, window, batch, size)

    def _keep_others_company(self, recipe: Recipe, window: Window, batch: Batch, size: int) -> None:
        """Goes through the module as often as the rank with the most samples does, with one that counts nothing."""
        ranks, part, samples = recipe.ranks, recipe.ranks.part, samples_in(batch[0])
        ranks.part = part._replace(samples=0)
        try:
            for _ in range(ceil(part.most / size) - ceil(samples / size)):
                piece = next(pieces(batch, 1))
                output, loss = recipe.compute(*piece)
                window.beside().backward(recipe.shares(loss, output, piece, 1), 1, samples, recipe.backward)
        finally:
            ranks.part = part

    def _say(self, size: int, reason: str) -> None:
        if not self._has_said:
            self._has_said = True
            warnings.warn(
                f"microbatch='auto': a piece of {size} samples did not fit into memory ({reason}); going on with "
                f"pieces of {self.size}.",
                stacklevel=2,
            )


class _State:
    """What a failed try changes, and what it must not: gradients gathered before, buffers, random numbers."""

    def __init__(self, recipe: Recipe) -> None:
        self.parameters = recipe.window.parameters
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self.tracker, self.logged = recipe.tracker, recipe.tracker.logged
        self.buffers = [(buffer, buffer.clone()) for buffer in recipe.module.buffers()]
        self.device = recipe.device
        self.random = torch.get_rng_state()
        self.device_random = torch.get_device_module(self.device).get_rng_state() if self._has_own_random else None

    @property
    def _has_own_random(self) -> bool:
        return self.device.type != "cpu"

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as before the try."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        for buffer, before in self.buffers:
            buffer.copy_(before)
        self.tracker.logged = self.logged
        torch.set_rng_state(self.random)
        if self._has_own_random:
            torch.get_device_module(self.device).set_rng_state(self.device_random)

    def add_gradients(self, window: Window, tried: Window) -> None:
        """The try succeeded: adds what it gathered to what was there."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        window.join(tried)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Cuts a batch into pieces of at most `size` samples; views, nothing is copied."""
    samples = samples_in(batch[0])
    for start in range(0, samples, size):

        def cut(leaf: Any, start: int = start) -> Any:
            is_of_samples = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples
            return leaf[start : start + size] if is_of_samples else leaf

        yield tuple(map_structure(cut, part) for part in batch)


def _shape_alone(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf
