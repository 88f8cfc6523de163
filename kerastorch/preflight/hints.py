"""What the first steps of a run show at no cost: no pass of their own, and nothing is read from the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ..data import DEFAULT_BATCH_SIZE
from ..optimizers import needs_closure
from ..step import Recipe
from ..structures import leaves
from ..tensors import array_of, grouped, is_arrays
from .findings import counted, several

PATIENCE_STEPS = 100  # of an optimizer, within which each of its parameters should have had a gradient


@contextmanager
def first_batch_hints(training: Recipe, last_batch: int | bool | None = None) -> Iterator[None]:
    """Warns, once a run, of parameters that get no gradient, and of a last batch that BatchNorm cannot take.

    A parameter that only some batches use is not warned of once one has used it. The hooks that look are gone after
    the first step in which all is well, else after the first epoch or `PATIENCE_STEPS` steps.

    Args:
        training: What the steps of the run are made of; its hooks are those of this run alone.
        last_batch: Samples in the last batch of an epoch, from `last_batch_size`; nothing = not known or not reached.
    """
    unused = _Unused(training)
    handles = _watch_norms(training.module) if last_batch == 1 else []
    try:
        yield
    finally:
        unused.leave()
        for handle in handles:
            handle.remove()


class _Unused:
    """Hooks that look which parameters of each optimizer had no gradient in any of its steps so far."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, 0
        self.suspects: dict[int, list[nn.Parameter]] = {}  # by the `id` of their optimizer
        optimizers = [update.optimizer for update in recipe.updates.values()]
        self.awaited = set(map(id, optimizers))
        # Some compute their gradients after the hook, and some backends keep theirs.
        if recipe.ranks.leaves_gradients and not any(map(needs_closure, optimizers)):
            recipe.hooks.on_before_optimizer_step += (self.look,)
            recipe.hooks.on_epoch_end += (self.say,)

    def look(self, optimizer: Any) -> None:
        key, self.steps = id(optimizer), self.steps + 1
        if key not in self.suspects:
            self.suspects[key] = [one for group in optimizer.param_groups for one in group["params"]]
        self.suspects[key] = [one for one in self.suspects[key] if one.grad is None and one.requires_grad]
        if self.awaited == self.suspects.keys() and not any(self.suspects.values()):
            self.leave()
        elif self.steps >= PATIENCE_STEPS * len(self.awaited):
            self.say()

    def say(self, epoch: int = 0, logs: MutableMapping | None = None) -> None:
        self.leave()
        ids = {id(one) for found in self.suspects.values() for one in found}
        names = [name for name, one in self.recipe.module.named_parameters() if id(one) in ids]
        if names:
            warnings.warn(
                f"{counted(len(names), 'trainable parameter')} got no gradient in the first epoch: {several(names)}. "
                f"Use them in forward, remove them, or freeze them by model.freeze.",
                stacklevel=2,
            )

    def leave(self) -> None:
        hooks = self.recipe.hooks
        hooks.on_before_optimizer_step = tuple(one for one in hooks.on_before_optimizer_step if one != self.look)
        hooks.on_epoch_end = tuple(one for one in hooks.on_epoch_end if one != self.say)


def _watch_norms(module: nn.Module) -> list[Any]:
    """Hooks on BatchNorm layers that look, once, at the shape of their inputs."""
    handles: list[Any] = []

    def look(name: str, layer: nn.Module, inputs: tuple) -> None:
        fails = layer.training and values_per_sample(inputs) == 1
        for handle in handles if fails else [by_name[name]]:
            handle.remove()
        if fails:
            warnings.warn(
                f"the last batch of an epoch has one sample, by which BatchNorm ({name!r}) cannot normalize: torch "
                f"raises there. Give another batch_size, or the DataLoader drop_last=True.",
                stacklevel=2,
            )

    by_name = {
        name: part.register_forward_pre_hook(partial(look, name))
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
    }
    handles += by_name.values()
    return handles


def values_per_sample(inputs: Any) -> int | None:
    """How many values of each channel a sample gives to BatchNorm."""
    first = next((leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)), None)
    return None if first is None or first.ndim < 2 else first.shape[2:].numel()


def last_batch_size(data: Any, batch_size: int | None = None, validation_split: float = 0.0) -> int | None:
    """Samples in the last batch of an epoch; `None` where it is not known, or the loader drops it if it is short.

    Args:
        data: As in `fit`, like the others.
        batch_size: `None` = 32, or the loader's.
        validation_split: Share of the samples that is cut off before.
    Example:
        >>> import numpy as np
        >>> last_batch_size(np.zeros((65, 3)))
        1
    """
    samples, size = _sizes(data, batch_size, validation_split)
    return None if samples is None else samples % size or size


def other_size(data: Any, batch_size: int | None, validation_split: float) -> str:
    """What to do about a last batch of one sample."""
    if isinstance(data, DataLoader):
        return "Give the DataLoader drop_last=True, or another batch_size."
    samples, size = _sizes(data, batch_size, validation_split)
    if samples < 3:
        return "Give more samples."
    better = next(one for one in (*range(size + 1, size + samples), *range(2, size)) if samples % one != 1)
    return f"Give batch_size={better}, or leave one of the {samples:,} samples out."


def _sizes(data: Any, batch_size: int | None, validation_split: float) -> tuple[int | None, int]:
    """Samples in an epoch, where they are known, and in a batch."""
    size, samples = batch_size or DEFAULT_BATCH_SIZE, None
    if isinstance(data, DataLoader):
        order = data.batch_sampler
        is_known = type(order) is BatchSampler and not order.drop_last
        size, samples = (order.batch_size, _length_or_none(order.sampler)) if is_known else (size, None)
    elif is_arrays(data):
        first = next(leaves(grouped(data)), None)
        samples = None if first is None else len(array_of(first))
    elif hasattr(data, "__len__") and (isinstance(data, Dataset) or hasattr(data, "column_names")):
        samples = None if isinstance(data, IterableDataset) else len(data)
    return None if not samples else int(samples * (1.0 - validation_split)), size


def _length_or_none(sized: Any) -> int | None:
    return len(sized) if hasattr(sized, "__len__") else None
