"""The loops that one would write by hand, what numbers are compared with; and how a run dies in the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kerastorch as kt


def train(
    net: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
) -> tuple[nn.Module, list[float]]:
    """A copy of `net`, trained, and its epoch losses: means over the samples.

    Args:
        batches: Number of the epoch -> its `(x, y)`.
        optimizer: Parameters -> the optimizer.
    """
    net = copy.deepcopy(net).train()
    stepper = optimizer(net.parameters())
    history = []
    for epoch in range(epochs):
        total, samples = 0.0, 0
        for x, y in batches(epoch):
            stepper.zero_grad()
            value = loss(net(x), y)
            value.backward()
            stepper.step()
            total, samples = total + value.item() * len(x), samples + len(x)
        history.append(total / samples)
    return net, history


class Trained(NamedTuple):
    """What a run by hand left behind.

    Attributes:
        net: The trained copy.
        losses: Mean loss of each epoch.
        rates: Learning rate of each optimizer step.
        norms: What `clip` returned at each step.
        skipped: Steps that the scaler left out.
    """

    net: nn.Module
    losses: list[float]
    rates: list[float]
    norms: list[Any]
    skipped: int


def train_in_windows(
    net: nn.Module,
    batches: Callable[[int], Iterable[tuple]],
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    loss: Callable[..., Tensor],
    epochs: int,
    *,
    accumulate: Callable[[int], int] = lambda epoch: 1,
    units: Callable[..., Any] = lambda y, *weight: len(y),
    clip: Callable[[list], Any] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    each: str = "step",
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Trained:
    """A copy of `net`, trained with one optimizer step for each window of batches.

    Args:
        batches: Number of the epoch -> its `(x, y)` or `(x, y, weight)`.
        loss: `(output, y)` or `(output, y, weight)` -> the sum of the losses.
        accumulate: Number of the epoch -> batches in a window.
        units: `(y)` or `(y, weight)` -> how many losses that sum has.
        schedule: Optimizer -> scheduler, moved after `each` "step" or "epoch".
        autocast: Dtype to compute in where that is safe.
        scaler: Against underflow in float16.
    """
    net = copy.deepcopy(net).train()
    parameters = list(net.parameters())
    stepper = optimizer(parameters)
    scheduler = schedule(stepper) if schedule is not None else None
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses, rates, norms, skipped = [], [], [], 0
    for epoch in range(epochs):
        total, count = 0.0, 0
        for window in windows(batches(epoch), accumulate(epoch)):
            counts = [int(units(*targets)) for _, *targets in window]
            for x, *targets in window:
                with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                    output = net(x)
                summed = loss(output.float() if autocast is not None else output, *targets)
                scaler.scale(summed / max(sum(counts), 1)).backward()
                total += summed.item()
            count += sum(counts)
            scaler.unscale_(stepper)
            if clip is not None:
                norms.append(clip(parameters))
            rates.append(stepper.param_groups[0]["lr"])
            scaler.step(stepper)
            before = scaler.get_scale()
            scaler.update()
            stepper.zero_grad()
            if scaler.get_scale() < before:
                skipped += 1
            elif scheduler is not None and each == "step":
                scheduler.step()
        if scheduler is not None and each == "epoch":
            scheduler.step()
        losses.append(total / max(count, 1))
    return Trained(net, losses, rates, norms, skipped)


@torch.no_grad()
def mean_loss(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The loss over all samples at once, in eval mode."""
    return loss(copy.deepcopy(net).eval()(x), y).item()


def cut(x: Tensor, y: Tensor, batch_size: int, order: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Batches of `x` and `y` in order, the last one as short as it must be."""
    rows = torch.arange(len(x)) if order is None else order
    return [(x[chosen], y[chosen]) for chosen in rows.split(batch_size)]


def windows(batches: Iterable[tuple], size: int) -> list[list[tuple]]:
    """So many batches at a time, the last time as many as are left."""
    given = list(batches)
    return [given[start : start + size] for start in range(0, len(given), size)]


def joined(window: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One large batch of several."""
    return tuple(map(torch.cat, zip(*window, strict=True)))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether parameters and buffers are equal, bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def distance(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between two values in the same place of parameters and buffers."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


class Killed(Exception):
    """Ends a run as a process that is killed does."""


class DieBehindWhatIsSaved(kt.Callback):
    """Ends the run after so many batches of it, behind all that callbacks do at that safe point."""

    def __init__(self, after):
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.model.at_safe_point(self.die)

    def die(self):
        raise Killed
