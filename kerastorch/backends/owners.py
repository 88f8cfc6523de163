"""Optimizers whose state is shared out: each rank steps on some of the parameters, and sends them to the others.

A rank hides the gradients of the others' parameters from its optimizer, which then has no state for them. Whatever the
optimizer is (any class, fused or not, groups, schedules, loss scaling) stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ddp import buckets


class Owners:
    """Which rank steps on which parameter.

    Args:
        rank: This one.
        world: How many there are.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._owner: dict[nn.Parameter, int] = {}
        self._loads = [0] * world
        self._stepped: list[tuple[nn.Parameter, Tensor]] = []
        self._adopted: dict[int, torch.optim.Optimizer] = {}

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an optimizer step on this rank's parameters alone, from now on."""
        if self._adopted.get(id(optimizer)) is optimizer:
            return
        self._adopted[id(optimizer)] = optimizer
        optimizer.register_step_pre_hook(self._hide)
        optimizer.register_step_post_hook(self._send)

    def own_of(self, optimizer: torch.optim.Optimizer, states: Mapping[int, Any]) -> dict[int, Any]:
        """Of the states of all parameters, by their numbers, this rank's."""
        parameters = self._shared_out(optimizer)
        return {number: state for number, state in states.items() if self._owner[parameters[number]] == self.rank}

    def _shared_out(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Its parameters, once each has an owner: the largest first, to whom has least. The same on all ranks."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        new = [one for one in parameters if one not in self._owner]
        for parameter in sorted(new, key=nn.Parameter.numel, reverse=True):
            self._owner[parameter] = self._loads.index(min(self._loads))
            self._loads[self._owner[parameter]] += parameter.numel()
        return parameters

    def _hide(self, optimizer: torch.optim.Optimizer, args: tuple, named: dict) -> None:
        parameters = self._shared_out(optimizer)
        self._stepped = [(one, one.grad) for one in parameters if one.grad is not None]
        for parameter, _ in self._stepped:
            if self._owner[parameter] != self.rank:
                parameter.grad = None

    @torch.no_grad()
    def _send(self, optimizer: torch.optim.Optimizer, args: tuple, named: dict) -> None:
        for parameter, gradient in self._stepped:
            parameter.grad = gradient
        sent = []
        for rank in range(self.world):
            for bucket in buckets([one.detach() for one, _ in self._stepped if self._owner[one] == rank]):
                flat = torch.cat([one.reshape(-1) for one in bucket])
                sent.append((dist.broadcast(flat, src=rank, async_op=True), flat, bucket, rank))
        for work, flat, bucket, rank in sent:
            work.wait()
            if rank != self.rank:
                parts = flat.split([one.numel() for one in bucket])
                torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])
        self._stepped = []
