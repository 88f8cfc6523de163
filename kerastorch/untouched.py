"""Code that leaves nothing behind: attributes, containers, tensors, gradients and generators are put back in place.

What is put back is the very object that was there, with what it held: whoever refers to it, an optimizer to its
parameters say, sees no change.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .losses import parts_of as of_losses
from .seeding import Generator, random_state, set_random_state

# Share of the free device memory that copies may take; others go to the host's.
COPIES_SHARE = 0.5


@contextmanager
def untouched(
    whole: Iterable[Any],
    attributes: Iterable[Any] = (),
    generators: Iterable[Generator] = (),
    *,
    device: torch.device,
    on_host: bool = False,
) -> Iterator[Callable[[], None]]:
    """Puts back what changes within, whichever way it ends.

    Args:
        whole: Objects whose attributes are put back, and what these hold in containers, modules, tensors, arrays and
            random generators. Objects of other classes inside of them are not looked into.
        attributes: Objects, such as datasets, that may hold very much: attributes, by reference, and generators.
        generators: Random numbers of others, wherever they are.
        device: Its random numbers are put back too, beside those of Python, numpy and torch.
        on_host: Whether copies are kept in the host's memory, all of the device's being needed. Default: where they
            would take much of it.
    Yields:
        What puts all back at once, as often as it is called.
    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with untouched([net], device=torch.device("cpu")):
        ...     output = net(torch.rand(4, 2))
        >>> net.running_mean
        tensor([0., 0.])
    """
    memory = _Memory(tuple(generators))
    for thing in attributes:
        memory.keep_attributes(thing)
    for thing in whole:
        memory.keep_whole(thing)
    memory.copy_tensors(device, on_host)
    try:
        yield memory.restore
    finally:
        memory.restore()


def parts_of(model: Any) -> list[Any]:
    """A model and what it has beside its optimizers in which a step of training leaves something."""
    compiled = model._compiled
    if compiled is None:
        return [model, model.module]
    losses, trackers = of_losses(compiled.loss), (model._training_tracker, model._evaluation_tracker)
    parts = [compiled, compiled.loss, compiled.logged_loss, compiled.plain, compiled.compute, *losses, *trackers]
    parts += [loss.layout for loss in losses] + [loss.function for loss in losses]
    means = (metric.function for tracker in trackers for _, metric in tracker.means)
    return [model, model.module, *parts, *(one for function in means for one in _behind(function))]


def _behind(function: Any) -> list[Any]:
    """What a metric's function keeps: a loss, or a callable of the user's own."""
    return [function, *(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())]


def sources_of(data: Any) -> list[Any]:
    """Objects whose attributes may change when a batch is taken: loaders, samplers, datasets, iterables."""
    parts = [data]
    for name in ("dataset", "sampler", "batch_sampler"):
        for part in list(parts):
            parts += [getattr(part, name)] if hasattr(part, name) else []
    return parts


class _Memory:
    """How everything was, as a list of functions that put it back."""

    def __init__(self, generators: tuple[Generator, ...]) -> None:
        self._generators, self._random = generators, random_state(generators)
        self._seen: dict[int, Any] = {}  # with the objects, so that no `id` is used again meanwhile
        self._tensors: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []

    def keep_whole(self, thing: Any) -> None:
        """Attributes or contents, and all that can be reached from them."""
        if type(thing) in RESTORERS:
            self._keep_container(thing)
        if not self._is_new(thing):
            return
        if hasattr(thing, "__dict__"):
            self._keep_class_and(vars(thing), thing)
            for value in list(vars(thing).values()):
                self._keep_value(value)
        if isinstance(thing, nn.Module):  # a script module has them in no container of Python's
            for value in (*thing.parameters(recurse=False), *thing.buffers(recurse=False), *thing.children()):
                self._keep_value(value)

    def keep_attributes(self, thing: Any) -> None:
        """Attributes by reference, and generators among them."""
        if self._is_new(thing) and hasattr(thing, "__dict__"):
            self._keep_class_and(vars(thing), thing)
            for value in vars(thing).values():
                self._keep_generator(value)

    def copy_tensors(self, device: torch.device, on_host: bool) -> None:
        """Copies what the tensors hold, once it is known how much that is."""
        needed = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors if tensor.is_cuda)
        fits = device.type != "cuda" or needed < COPIES_SHARE * torch.cuda.mem_get_info(device)[0]
        for tensor in self._tensors:
            held = tensor if _is_of_xla(tensor) else _own_part(tensor.data)
            is_moved = held.device.type != "cpu" and (on_host or not fits or held is tensor)
            copy = held.detach().cpu() if is_moved else held.clone()
            self._undo.append(partial(_restore_values, held, copy))

    def restore(self) -> None:
        """Everything as it was; what was kept last comes first, so that values return before what refers to them."""
        with torch.no_grad():
            for undo in reversed(self._undo):
                undo()
        set_random_state(self._random, self._generators)

    def _is_new(self, thing: Any) -> bool:
        is_new = id(thing) not in self._seen
        self._seen[id(thing)] = thing
        return is_new

    def _keep_class_and(self, attributes: dict[str, Any], thing: Any) -> None:
        self._undo.append(partial(_restore_class, thing, type(thing)))  # lazy layers change theirs
        self._undo.append(partial(_restore_dict, attributes, dict(attributes)))

    def _keep_value(self, value: Any) -> None:
        if isinstance(value, (str, int, float, type(None))):
            return
        if isinstance(value, nn.Module):
            self.keep_whole(value)
        elif isinstance(value, Tensor):
            self._keep_tensor(value)
        elif type(value) in RESTORERS or type(value) is tuple:
            self._keep_container(value)
        elif isinstance(value, np.ndarray):
            if self._is_new(value) and value.flags.writeable and value.dtype != object:
                self._undo.append(partial(np.copyto, value, value.copy()))
        else:
            self._keep_generator(value)

    def _keep_container(self, container: Any) -> None:
        if not self._is_new(container):
            return
        if type(container) is not tuple:
            self._undo.append(partial(RESTORERS[type(container)], container, container.copy()))
        for value in container.values() if isinstance(container, dict) else container:
            self._keep_value(value)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if not self._is_new(tensor):
            return
        if is_lazy(tensor):
            self._undo.append(partial(_restore_lazy, tensor, type(tensor), tensor.data))
            return
        if tensor.is_leaf and not tensor.is_inference():
            self._undo.append(partial(_restore_gradient, tensor, tensor.grad, tensor.requires_grad))
            tensor.grad = None  # else a backward pass would add to what it holds
        if _can_be_written(tensor):
            self._undo.append(partial(_restore_storage, tensor, tensor.data))
            self._tensors.append(tensor)

    def _keep_generator(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))


def _is_of_xla(tensor: Tensor) -> bool:
    """Whether others that refer to its memory lose it when the tensor changes: XLA hands it on."""
    return tensor.device.type == "xla"


def _own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, of which each of several may hold a part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _can_be_written(tensor: Tensor) -> bool:
    """Whether it has values of its own: no fake tensor, none that was expanded, none of inference mode."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_inference():
        return False
    return all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _restore_values(held: Tensor, copy: Tensor) -> None:
    # Only what changed is written: weights may be in a file that is mapped into memory to be read. Through `data`,
    # which no graph that is waiting for its backward pass knows of.
    copy = copy.to(held.device)
    if not torch.equal(held, copy):
        held.copy_(copy)


def _restore_storage(tensor: Tensor, held: Tensor) -> None:
    if hasattr(tensor, "to_local") or _is_of_xla(tensor):  # they stay where they are
        return
    if tensor.data_ptr() != held.data_ptr() or tensor.shape != held.shape or tensor.dtype != held.dtype:
        tensor.data = held


def _restore_gradient(tensor: Tensor, gradient: Tensor | None, requires_grad: bool) -> None:
    tensor.grad = gradient
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _restore_lazy(tensor: Tensor, kind: type, nothing: Tensor) -> None:
    if type(tensor) is not kind:
        tensor.grad = None
        tensor.data = nothing
        tensor.__class__ = kind


def _restore_class(thing: Any, kind: type) -> None:
    if type(thing) is not kind:
        thing.__class__ = kind


def _restore_dict(held: dict, before: dict) -> None:
    is_same = len(held) == len(before) and all(key in held and held[key] is value for key, value in before.items())
    if not is_same:
        held.clear()
        held.update(before)


def _restore_list(held: list, before: list) -> None:
    held[:] = before


def _restore_set(held: set, before: set) -> None:
    held.clear()
    held.update(before)


def _restore_deque(held: deque, before: deque) -> None:
    held.clear()
    held.extend(before)


RESTORERS = {
    dict: _restore_dict,
    OrderedDict: _restore_dict,
    defaultdict: _restore_dict,
    Counter: _restore_dict,
    list: _restore_list,
    set: _restore_set,
    deque: _restore_deque,
}
