"""The loops that one would write by hand: what numbers are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def mean_loss(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The loss over all samples at once, in eval mode."""
    return loss(copy.deepcopy(net).eval()(x), y).item()


def cut(x: Tensor, y: Tensor, batch_size: int, order: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Batches of `x` and `y` in order, the last one as short as it must be."""
    rows = torch.arange(len(x)) if order is None else order
    return [(x[chosen], y[chosen]) for chosen in rows.split(batch_size)]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether parameters and buffers are equal, bit for bit."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
