"""A `train_step` of the user's own: what `self.backward`, `self.optimizer_step` and `self.log` do in it.

The user says which loss goes where; precision, accumulation, clipping and schedules of each optimizer are added here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .accumulation import Parked
from .checks import refuse_no_number
from .optimizers import needs_closure
from .precision import LOW, Precision, autocast
from .step import Batch, Recipe, Update, loss_scale, move_after_step, optimizer_step, update_scale
from .structures import samples_in

KEPT = ("first_samples", "batches", "calls", "has_stepped", "in_window")  # what goes on from one batch to the next


class OwnStep:
    """Calls the user's `train_step` where `forward_backward` is called otherwise.

    One round of backward passes ends with the optimizer steps that follow it. The next round starts without gradients:
    what the loss of one network left behind in another's parameters is used by nobody. Only a `train_step` that asks
    for no step leaves its gradients to the next one.

    A schedule goes by batches here, or by windows of them: however often an optimizer steps, it ends with the run.

    Args:
        train_step: Called with `(x, y)`, or `(x, y, weight)` where there are weights.
        recipe: Its optimizers and hooks.
        precision: The forward passes in `train_step` compute in it.
    Raises:
        ValueError: an optimizer needs a closure.
    """

    def __init__(self, train_step: Callable[[tuple], Any], recipe: Recipe, precision: Precision) -> None:
        self.train_step, self.recipe, self.precision = train_step, recipe, precision
        # All of the module's: a loss also reaches those that are in no optimizer.
        self._parameters = tuple(recipe.module.parameters())
        self._first_samples = self._batches = self._calls = 0
        self._has_stepped, self._weight = False, 1.0
        self._window, self._in_window = None, 0
        for update in recipe.updates.values():
            if needs_closure(update.optimizer):
                raise ValueError(
                    f"{type(update.optimizer).__name__} evaluates the loss several times a step, which does not go "
                    f"with a train_step of your own. Override compute_loss instead, or give another optimizer."
                )

    def __call__(self, recipe: Recipe, batch: Batch) -> bool:
        x, target, weight = batch
        samples = recipe.samples = recipe.ranks.part.samples_of(samples_in(x))
        self._first_samples = self._first_samples or recipe.ranks.part.expected(1, samples)
        before = recipe.tracker.samples
        if recipe.window is not None:
            self._park()
        self._weight = samples / self._first_samples  # how much the batch counts in its window
        calls = self._calls
        with autocast(self.precision, recipe.device):
            returned = self.train_step((x, target) if weight is None else (x, target, weight))
        recipe.tracker.samples = before + samples
        self._log(returned)
        if self._calls > calls:
            self._end_round()
        self._move_schedules()
        self._batches += 1
        if self._batches == recipe.batches and self._calls == 0:
            warnings.warn(
                f"train_step did not call self.optimizer_step in the first epoch ({self._batches} batches): no "
                f"optimizer has stepped. Call it after self.backward(loss).",
                stacklevel=5,
            )
        if self._batches == recipe.batches and recipe.tracker.measures and not recipe.tracker.has_batches:
            warnings.warn(
                "metrics were given, but train_step measured none in the first epoch. Call super().train_step(batch) "
                "in it, or log what you measure.",
                stacklevel=5,
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Where it is in its windows, whose gradients are elsewhere."""
        single = self.recipe.updates.get("")
        kept = {name: getattr(self, f"_{name}") for name in KEPT}
        return kept | {"is_parked": single is not None and single.parked is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, in windows of its epoch that are open and empty."""
        for name in KEPT:
            setattr(self, f"_{name}", state[name])
        if state["is_parked"]:
            self._park()
        updates = self.recipe.updates.values()
        self._window = next((update.parked for update in updates if update.parked is not None), None)

    def _park(self) -> None:
        """Here it is calls of `optimizer_step` that fill a window, which is new in each epoch."""
        single, size, self.recipe.window = self.recipe.updates[""], self.recipe.window.size, None
        single.parked = Parked(single.parameters, size, self.recipe.ranks)

    def weigh(self, count: int | Tensor, loss: Tensor, rows: int) -> None:
        """Has the batch count by what its loss is the mean over, say unmasked targets, instead of its samples."""
        count, _ = self.recipe.ranks.part.counts(count, rows, rows)
        # In the dtype of the loss: the quotient of whole numbers would be a float32.
        count = count.to(loss.dtype) if isinstance(count, Tensor) else count
        self._weight = count / self._first_samples

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"backward was given {_described(loss)}, expected a scalar tensor computed from trainable parameters. "
                f"Take the mean over the samples, without detach or no_grad on the way to it."
            )
        recipe = self.recipe
        if self._has_stepped:
            self._end_round()
        for hook in recipe.hooks.on_before_backward:
            hook(loss)
        with torch.autocast(recipe.device.type, enabled=False):
            loss = loss.float() if loss.dtype in LOW else loss
            recipe.backward(loss if not self._gathers() else loss * self._weight)
        for hook in recipe.hooks.on_after_backward:
            hook()

    def optimizer_step(self, name: str | None) -> None:
        """Steps one optimizer, once its window of batches is full, and clears its gradients."""
        recipe, update = self.recipe, self._update(name)
        self._calls, self._has_stepped = self._calls + 1, True
        if update.parked is not None:
            scale = loss_scale(recipe)
            if not update.parked.take(self._weight, scale):
                return
            update.parked.put_back(scale)
        if recipe.scaler is not None and all(parameter.grad is None for parameter in update.parameters):
            return  # of an optimizer whose parameters are all frozen, torch's scaler would know no overflow
        with torch.autocast(recipe.device.type, enabled=False):
            optimizer_step(recipe, update, moves_schedule=False)
        # The autocast around `train_step` keeps casts of the weights, which are no longer those of the weights.
        torch.clear_autocast_cache()

    def _update(self, name: str | None) -> Update:
        updates = self.recipe.updates
        if name is None and len(updates) == 1:
            name = next(iter(updates))
        if name in updates:
            return updates[name]
        if "" in updates:
            raise ValueError(
                f"optimizer_step was given {name!r}, but compile was given one optimizer, without a name. Call "
                f"self.optimizer_step()."
            )
        known = ", ".join(map(repr, updates))
        raise ValueError(f"optimizer_step was given {name!r}, but the optimizers are {known}. Name one of them.")

    def _log(self, returned: Any) -> None:
        if returned is not None and not isinstance(returned, Mapping):
            raise TypeError(
                f"train_step returned a {type(returned).__name__}, expected None or a dict of values to log. Return "
                f"{{'loss': loss}}, or call self.log('loss', loss)."
            )
        for name, value in (returned or {}).items():
            refuse_no_number(name, value)
            self.recipe.tracker.log(name, value, self.recipe.samples)

    def _gathers(self) -> bool:
        return any(update.parked is not None for update in self.recipe.updates.values())

    def _move_schedules(self) -> None:
        updates = self.recipe.updates.values()
        window = next((update.parked for update in updates if update.parked is not None), None)
        if window is not self._window:  # of a new epoch
            self._window, self._in_window = window, 0
        self._in_window += 1
        if window is None or self._in_window == window.size:
            self._in_window = 0
            for update in updates:
                if update.schedule is not None:
                    move_after_step(update)

    def _end_round(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        update_scale(self.recipe)
        self._has_stepped = False


def _described(loss: Any) -> str:
    """What `backward` was given instead of a loss."""
    if not isinstance(loss, Tensor):
        return f"{loss!r}, a {type(loss).__name__}"
    return f"a tensor of shape {tuple(loss.shape)}" if loss.numel() != 1 else "a loss without a gradient"
