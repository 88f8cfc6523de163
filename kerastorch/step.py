"""One training step and one evaluation step: forward, loss, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .structures import leaves
from .tracker import Tracker


@dataclass
class Recipe:
    """What the steps of one run are made of, decided once before the first.

    Attributes:
        module: The network.
        loss: `(output, target, weight) -> scalar`.
        tracker: Where loss and metrics are summed.
        hooks: Name of a hook -> the functions to call, from `callbacks.base.hooks_of`.
        optimizer: Updates the parameters; `None` where nothing is trained.
        parameters: Those whose gradients are dropped after each step.
        steps: Optimizer steps taken so far in this run.
    """

    module: nn.Module
    loss: Callable[[Any, Any, Any], Tensor]
    tracker: Tracker
    hooks: SimpleNamespace
    optimizer: torch.optim.Optimizer | None = None
    parameters: tuple[nn.Parameter, ...] = ()
    steps: int = 0


def train_step(recipe: Recipe, batch: tuple[Any, Any, Any]) -> None:
    """One step of the optimizer on one batch `(x, target, weight)`. Nothing in here waits for the device."""
    x, target, weight = batch
    hooks, optimizer = recipe.hooks, recipe.optimizer
    output = forward(recipe.module, x)
    loss = recipe.loss(output, target, weight)
    # Before the update: a metric that does not fit the data fails while nothing has changed.
    recipe.tracker.add(loss, output, target, len(x) if isinstance(x, Tensor) else samples_in(x))
    for hook in hooks.on_before_backward:
        hook(loss)
    loss.backward()
    for hook in hooks.on_after_backward:
        hook()
    for hook in hooks.on_before_optimizer_step:
        hook(optimizer)
    optimizer.step()
    recipe.steps += 1
    for hook in hooks.on_before_zero_grad:
        hook(optimizer)
    for parameter in recipe.parameters:  # what `optimizer.zero_grad()` does, for a tenth of its time
        parameter.grad = None


def closure_step(recipe: Recipe, batch: tuple[Any, Any, Any]) -> None:
    """`train_step` for optimizers that evaluate the loss several times a step (LBFGS); its first value is logged."""
    x, target, weight = batch
    hooks, optimizer = recipe.hooks, recipe.optimizer
    is_first = True

    def closure() -> Tensor:
        nonlocal is_first
        for parameter in recipe.parameters:
            parameter.grad = None
        output = forward(recipe.module, x)
        loss = recipe.loss(output, target, weight)
        if is_first:
            recipe.tracker.add(loss, output, target, len(x) if isinstance(x, Tensor) else samples_in(x))
            is_first = False
        for hook in hooks.on_before_backward:
            hook(loss)
        loss.backward()
        for hook in hooks.on_after_backward:
            hook()
        return loss

    for hook in hooks.on_before_optimizer_step:
        hook(optimizer)
    optimizer.step(closure)
    recipe.steps += 1
    for hook in hooks.on_before_zero_grad:
        hook(optimizer)
    for parameter in recipe.parameters:
        parameter.grad = None


def evaluation_step(recipe: Recipe, batch: tuple[Any, Any, Any]) -> None:
    """Loss and metrics of one batch; called without grad and in eval mode."""
    x, target, weight = batch
    output = forward(recipe.module, x)
    loss = recipe.loss(output, target, weight)
    recipe.tracker.add(loss, output, target, len(x) if isinstance(x, Tensor) else samples_in(x))


def forward(module: nn.Module, x: Any) -> Any:
    """Calls the module: a tuple is spread as positional arguments, a dict as keywords."""
    if isinstance(x, Tensor):
        return module(x)
    if isinstance(x, (tuple, list)):
        return module(*x)
    if isinstance(x, Mapping):
        return module(**x)
    return module(x)


def samples_in(x: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return len(next(leaf for leaf in leaves(x) if isinstance(leaf, Tensor)))
