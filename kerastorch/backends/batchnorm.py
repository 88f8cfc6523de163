"""BatchNorm over the global batch: each rank has a part of it, and all normalize by the statistics of the whole.

torch's own `SyncBatchNorm` does it on GPUs alone; here it is plain tensor operations, and the same on all devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


@contextmanager
def normalizing(module: nn.Module, ranks: Any) -> Iterator[None]:
    """Meanwhile every BatchNorm of a module that is in train mode knows of the other ranks.

    Args:
        module: Its BatchNorm layers get a `forward` of their own, and lose it again.
        ranks: The backend. `sync_batchnorm` says whether they normalize by the whole batch, `in_pieces` that there is
            none to be seen; `part` whether this rank's samples count.
    """
    layers = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.forward = partial(_forward, layer, ranks)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, ranks: Any, x: Tensor) -> Tensor:
    counts = ranks.part.samples_of(1) > 0
    is_trained = layer.training or layer.running_mean is None
    if is_trained and ranks.sync_batchnorm and not ranks.in_pieces:
        return _normalized(layer, ranks, x, counts)
    if is_trained and not counts:  # nothing to learn from, and too few for statistics
        return torch.zeros_like(x) + 0.0 * x
    return type(layer).forward(layer, x)


def _normalized(layer: Any, ranks: Any, x: Tensor, counts: bool) -> Tensor:
    layer._check_input_dim(x)
    samples = ranks.part.whole or len(x)
    if samples * x.shape[2:].numel() == 1:  # torch's own words; it would see those of this rank alone
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    mean, variance, count = _statistics(x, counts)
    if layer.training and layer.track_running_stats and layer.running_mean is not None:
        _update(layer, mean.detach(), variance.detach(), count)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    normalized = (x - mean.view(shape)) * torch.rsqrt(variance.view(shape) + layer.eps)
    if layer.weight is not None:
        normalized = normalized * layer.weight.view(shape) + layer.bias.view(shape)
    return normalized.to(x.dtype)


def _statistics(x: Tensor, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all ranks' samples, and how many values that is."""
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = [dim for dim in range(x.ndim) if dim != 1]
    weight = 1.0 if counts else 0.0
    number = values.new_tensor([weight * x.numel() / x.shape[1]])
    sums = _SumOverRanks.apply(torch.cat([weight * values.sum(dims), number]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    shape = [1, -1, *[1] * (x.ndim - 2)]
    squares = _SumOverRanks.apply(weight * (values - mean.view(shape)).square().sum(dims))
    return mean, squares / count, count


@torch.no_grad()
def _update(layer: Any, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """The running statistics, as `torch.nn.functional.batch_norm` moves them: of the variance the unbiased one."""
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:
        momentum = 1.0 / layer.num_batches_tracked
    unbiased = variance * (count / (count - 1))
    for running, value in ((layer.running_mean, mean), (layer.running_var, unbiased)):
        running.mul_(1 - momentum).add_((momentum * value).to(running.dtype))
