"""A `train_step` of the user's own: what `self.backward`, `self.optimizer_step` and `self.log` do in it.

The user says which loss goes where; precision, accumulation, clipping and schedules of each optimizer are added here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .precision import LOW, Precision, autocast
from .step import Batch, Recipe, loss_scale, optimizer_step, samples_in


class OwnStep:
    """Calls the user's `train_step` where `forward_backward` is called otherwise.

    One round of backward passes ends with the optimizer steps that follow it. The next round starts without gradients:
    what the loss of one network left behind in another's parameters is used by nobody.

    Args:
        train_step: Called with `(x, y)`, or `(x, y, weight)` where there are weights.
        recipe: Its optimizers and hooks.
        precision: The forward passes in `train_step` compute in it.
    """

    def __init__(self, train_step: Callable[[tuple], Any], recipe: Recipe, precision: Precision) -> None:
        self.train_step, self.recipe, self.precision = train_step, recipe, precision
        self._first_samples = 0
        self._has_stepped = self._has_scaled_step = False

    def __call__(self, recipe: Recipe, batch: Batch) -> bool:
        x, target, weight = batch
        samples = recipe.samples = len(x) if isinstance(x, Tensor) else samples_in(x)
        self._first_samples, before = self._first_samples or samples, recipe.tracker.samples
        with autocast(self.precision, recipe.device):
            returned = self.train_step((x, target) if weight is None else (x, target, weight))
        recipe.tracker.samples = before + samples
        for name, value in returned.items() if isinstance(returned, Mapping) else ():
            recipe.tracker.log(name, value, samples)
        self._end_round()
        return False

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                f"backward was given {'a loss without a gradient' if isinstance(loss, Tensor) else repr(loss)}, "
                f"expected a scalar tensor computed from trainable parameters. Compute it without detach or no_grad."
            )
        recipe = self.recipe
        if self._has_stepped:
            self._end_round()
        for hook in recipe.hooks.on_before_backward:
            hook(loss)
        with torch.autocast(recipe.device.type, enabled=False):
            loss = loss.float() if loss.dtype in LOW else loss
            recipe.backward(loss if not self._gathers() else loss * self._weight())
        for hook in recipe.hooks.on_after_backward:
            hook()

    def optimizer_step(self, name: str | None) -> None:
        """Steps one optimizer, once its window of batches is full, and clears its gradients."""
        updates = self.recipe.updates
        if name is None and len(updates) == 1:
            name = next(iter(updates))
        if name not in updates:
            known = ", ".join(map(repr, updates))
            raise ValueError(f"optimizer_step was given {name!r}, but the optimizers are {known}. Name one of them.")
        update, self._has_stepped = updates[name], True
        if update.parked is not None:
            scale = loss_scale(self.recipe)
            if not update.parked.take(self._weight(), scale):
                return
            update.parked.put_back(scale)
        optimizer_step(self.recipe, update)
        self._has_scaled_step = self.recipe.scaler is not None and len(updates) > 1

    def _gathers(self) -> bool:
        return any(update.parked is not None for update in self.recipe.updates.values())

    def _weight(self) -> float:
        """How much the batch counts in its window."""
        return self.recipe.samples / self._first_samples

    def _end_round(self) -> None:
        for update in self.recipe.updates.values():
            for parameter in update.parameters:
                parameter.grad = None
        if self._has_scaled_step:
            self.recipe.scaler.update()
        self._has_stepped = self._has_scaled_step = False
