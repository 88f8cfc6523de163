"""One step of training and one of evaluation: forward, loss, backward, optimizer.

`forward_backward` adds the gradient of a batch, `optimizer_step` turns gradients into an update of the parameters. When
the one follows on the other is the loop's to say; what `recipe.compute` does was put together before the run, in
`computation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .accumulation import Parked, Window
from .losses import Share
from .precision import ScaledStep
from .structures import samples_in
from .tracker import Tracker

Batch = tuple[Any, Any, Any]  # inputs, targets, weights; targets and weights may be `None`


@dataclass
class Update:
    """What becomes of the gradients of one optimizer.

    Attributes:
        optimizer: Updates the parameters.
        parameters: Those whose gradients are dropped after each step.
        clip: Bounds the gradients, in place, and returns their norm; `None` = no bounds.
        schedule: Changes the rate after each step or epoch; `None` = nothing does.
        scaled_step: The step under loss scaling; `None` = `optimizer.step`.
        rate_name: What its rate is called in the logs.
        parked: Gathers its gradients where it is one of several and a step takes more than one batch; else `None`.
        gradient_norm: What `clip` returned at the last step: a scalar on the device.
        steps: How many it has taken in the running `fit`.
    """

    optimizer: torch.optim.Optimizer
    parameters: tuple[nn.Parameter, ...]
    clip: Callable[[], Tensor | None] | None = None
    schedule: Any = None
    scaled_step: ScaledStep | None = None
    rate_name: str = "lr"
    parked: Parked | None = None
    gradient_norm: Tensor | None = None
    steps: int = 0

    def in_groups(self) -> list[nn.Parameter]:
        """The parameters that the optimizer has."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass
class Recipe:
    """What the steps of one run are made of, decided once before the first.

    Attributes:
        module: The network.
        compute: `(x, target, weight) -> (output, mean loss)`.
        shares: `(loss, output, batch, samples)` -> what the loss is the mean over.
        tracker: Where loss and metrics are summed.
        hooks: Name of a hook -> the functions to call, from `callbacks.base.hooks_of`.
        ranks: The backend: which part of each batch this process has, and what becomes of gradients of parts.
        measure: `evaluation_step`, or what stands for it.
        updates: Name of an optimizer -> its update; empty where nothing is trained, one named `""` where it is alone.
        backward: `(loss, retain_graph=...)`: puts gradients into the parameters.
        device: Where it all is.
        scaler: Scales losses against underflow in fp16; `None` = nothing does.
        size_of: Number of the epoch -> batches for each optimizer step.
        batches: Batches in an epoch; `None` = not known.
        gathers_pieces: Whether batches come in pieces, whose gradients are gathered too.
        window: Gathers gradients in the running epoch; `None` where each batch makes a step, or several optimizers do.
        frozen: Submodules that stay in eval mode.
        rates: Learning rates of the last step where something changes them, for the logs.
        steps: Optimizer steps taken so far in this run; of several optimizers, those of the one that took most.
        samples: Samples in the running batch, for values of the user's own.
        is_scale_due: Whether optimizers have stepped since the scale was last adapted.
    """

    module: nn.Module
    compute: Callable[[Any, Any, Any], tuple[Any, Tensor]]
    shares: Callable[[Tensor, Any, Batch, int], list[Share]]
    tracker: Tracker
    hooks: SimpleNamespace
    ranks: Any
    measure: Callable[[Recipe, Batch], None]
    updates: dict[str, Update] = field(default_factory=dict)
    backward: Callable[..., None] = Tensor.backward
    device: torch.device = torch.device("cpu")
    scaler: torch.amp.GradScaler | None = None
    size_of: Callable[[int], int] = lambda epoch: 1
    batches: int | None = None
    gathers_pieces: bool = False
    window: Window | None = None
    frozen: Sequence[nn.Module] = ()
    rates: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    is_scale_due: bool = False


def open_windows(recipe: Recipe, epoch: int) -> None:
    """Before an epoch: decides how many batches make a step in it."""
    size, ranks, single = recipe.size_of(epoch), recipe.ranks, recipe.updates.get("")
    is_gathered = size > 1 or ranks.share is not None
    has_window = single is not None and (is_gathered or recipe.gathers_pieces)
    recipe.window = Window(single.parameters, size, ranks, recipe.batches) if has_window else None
    for name, update in recipe.updates.items():
        update.parked = Parked(update.parameters, size, ranks) if name and is_gathered else None


def forward_backward(recipe: Recipe, batch: Batch) -> bool:
    """Adds the gradient of one batch; says whether its window is full. Nothing in here waits for the device."""
    x, target, weight = batch
    hooks, window = recipe.hooks, recipe.window
    samples = len(x) if isinstance(x, Tensor) else samples_in(x)
    output, loss = recipe.compute(x, target, weight)
    # Before the update: a metric that does not fit the data fails while nothing has changed.
    recipe.tracker.add(loss, output, target, samples, weight)
    for hook in hooks.on_before_backward:
        hook(loss)
    if window is None:
        recipe.backward(loss)
    else:
        window.backward(recipe.shares(loss, output, batch, samples), samples, samples, recipe.backward)
    for hook in hooks.on_after_backward:
        hook()
    return window is None or window.count_batch()


def optimizer_step(recipe: Recipe, update: Update, *closure: Callable[[], Tensor], moves_schedule: bool = True) -> None:
    """Turns the gradients that are there, or those of a closure, into one step of the optimizer, and drops them."""
    optimizer, hooks, schedule = update.optimizer, recipe.hooks, update.schedule
    if recipe.window is not None:
        recipe.window.close()
    if recipe.scaler is not None:
        update.scaled_step.settle()  # by now it is known whether the step before was taken
        recipe.scaler.unscale_(optimizer)
    for hook in hooks.on_before_optimizer_step:
        hook(optimizer)
    if update.clip is not None and not closure:
        update.gradient_norm = update.clip()
    if schedule is not None:
        recipe.rates = recipe.rates | {update.rate_name: rate_of(optimizer)}
    if update.scaled_step is not None:
        recipe.is_scale_due |= update.scaled_step()
    else:
        optimizer.step(*closure)
    if schedule is not None and moves_schedule:
        move_after_step(update)
    update.steps += 1
    recipe.steps = max(recipe.steps, update.steps)
    for hook in hooks.on_before_zero_grad:
        hook(optimizer)
    for parameter in update.parameters:  # what `optimizer.zero_grad()` does, for a tenth of its time
        parameter.grad = None
    if recipe.scaler is not None and len(recipe.updates) == 1:
        update_scale(recipe)


def rate_of(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """The rate of now, of its first group."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate  # a tensor is changed in place


def move_after_step(update: Update) -> None:
    """Moves the rate that goes by steps."""
    if update.scaled_step is not None:
        update.scaled_step.follow(update.schedule)
    else:
        update.schedule.after_step()


def update_scale(recipe: Recipe) -> None:
    """Adapts the scale of fp16 losses, once all optimizers have stepped on gradients of the last scale."""
    if recipe.is_scale_due:
        recipe.scaler.update()
        recipe.is_scale_due = False


def close_windows(recipe: Recipe) -> None:
    """Steps on what is left of short windows: the epoch is over."""
    if recipe.window is not None and recipe.window.is_open:
        optimizer_step(recipe, recipe.updates[""])
    for update in recipe.updates.values():
        if update.parked is not None and update.parked.is_open:
            update.parked.put_back(loss_scale(recipe))
            optimizer_step(recipe, update)
    update_scale(recipe)


def move_schedules(recipe: Recipe, logs: Mapping[str, Any]) -> None:
    """After an epoch: moves the rates that go by epochs."""
    for update in recipe.updates.values():
        if update.schedule is not None:
            update.schedule.after_epoch(logs)


def loss_scale(recipe: Recipe) -> Tensor | None:
    """What the scaler multiplies losses by now: a scalar on the device; `None` = there is no scaler."""
    return None if recipe.scaler is None else recipe.scaler.scale(torch.ones((), device=recipe.device))


def closure_step(recipe: Recipe, batch: Batch) -> bool:
    """Both in one, for optimizers that evaluate the loss several times a step (LBFGS); its first value is logged."""
    x, target, weight = batch
    hooks, update = recipe.hooks, recipe.updates[""]
    is_first = True

    def closure() -> Tensor:
        nonlocal is_first
        for parameter in update.parameters:
            parameter.grad = None
        output, loss = recipe.compute(x, target, weight)
        if is_first:
            recipe.tracker.add(loss, output, target, len(x) if isinstance(x, Tensor) else samples_in(x), weight)
            is_first = False
        for hook in hooks.on_before_backward:
            hook(loss)
        if recipe.window is None:
            recipe.backward(loss)
        else:
            loss = recipe.window.whole(recipe.shares(loss, output, batch, samples_in(x)), samples_in(x))
        for hook in hooks.on_after_backward:
            hook()
        if update.clip is not None:
            update.gradient_norm = update.clip()
        return loss

    optimizer_step(recipe, update, closure)
    return False


def evaluation_step(recipe: Recipe, batch: Batch) -> None:
    """Loss and metrics of one batch; called without grad and in eval mode."""
    x, target, weight = batch
    output, loss = recipe.compute(x, target, weight)
    recipe.tracker.add(loss, output, target, len(x) if isinstance(x, Tensor) else samples_in(x), weight)


def forward(module: nn.Module, x: Any) -> Any:
    """Calls the module: a tuple is spread as positional arguments, a dict as keywords."""
    if isinstance(x, Tensor):
        return module(x)
    if isinstance(x, (tuple, list)):
        return module(*x)
    if isinstance(x, Mapping):
        return module(**x)
    return module(x)
