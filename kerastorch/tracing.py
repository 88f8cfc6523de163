"""One pass of a module on fake tensors: shapes, FLOPs and memory, without memory or arithmetic.

Every trace works on a fake copy, so weights, buffers, modes, hooks and lazy layers of the module itself are never
touched and there is nothing to put back.
"""

from __future__ import annotations

import copy
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass
class Call:
    """What forward hooks saw of one layer."""

    output_shape: tuple | list | dict | None = None
    count: int = 0
    flops: int = 0


@dataclass
class Trace:
    """What one pass on fake tensors showed."""

    module: nn.Module  # the copy it ran on, whose lazy layers have their shapes now
    calls: dict[nn.Module, Call]
    flops: int
    activation_bytes: int  # alive after forward: the batch, what autograd keeps for backward, the output
    peak_bytes: int  # the most ever alive, in backward if there was one


def home(module: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where the module expects its input, and the dtype of its floats; None: it has no tensors, so anywhere."""
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return (tensors[0].device if tensors else None), next(dtypes, torch.get_default_dtype())


def arguments_of(input: Any, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments for `forward`, tensors replaced by meta tensors (no memory)."""
    stand_in = partial(tree_map, partial(_stand_in, dtype=dtype), is_leaf=_is_shape)
    if isinstance(input, Mapping):
        return (), {name: stand_in(value) for name, value in input.items()}
    if isinstance(input, Tensor) or _is_shape(input) or hasattr(input, "__array_interface__"):
        return (stand_in(input),), {}
    if isinstance(input, (tuple, list)):
        return tuple(stand_in(value) for value in input), {}
    raise TypeError(
        f"input is a {type(input).__name__}; expected a tensor, an array, a shape, or a tuple or dict of these. "
        "Give e.g. (32, 3, 8, 8) for 32 images of 3 channels."
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(size) is int for size in value)


def _stand_in(value: Any, dtype: torch.dtype) -> Any:
    """A meta tensor for a tensor, array or shape; other values (flags, None) are arguments as they are."""
    if _is_shape(value):
        if min(value) < 0:
            raise ValueError(f"input shape {value} has a negative size. Give the sizes of one batch, e.g. 32 for -1.")
        return torch.empty(value, dtype=dtype, device="meta")
    if hasattr(value, "__array_interface__"):
        kind = torch.tensor(value.ravel()[:0]).dtype  # of no elements, so nothing is copied
        # Floats take the module's dtype, since numpy's default is float64.
        return torch.empty(value.shape, dtype=dtype if kind.is_floating_point else kind, device="meta")
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def batch_size_of(arguments: Any) -> int | None:
    """Size of the first dim of the first tensor that has one."""
    return next((len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()), None)


def resized(arguments: Any, batch_size: int | None) -> Any:
    """The same arguments at another batch size; tensors with another first dim, such as masks, stay as they are."""
    given = batch_size_of(arguments)

    def resize(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == given
        return leaf.new_empty((batch_size, *leaf.shape[1:])) if is_batch else leaf

    return tree_map(resize, arguments)


def try_trace(module: nn.Module, arguments: Any, training: bool = False) -> tuple[Trace | None, str]:
    """A trace and "", or None and a sentence that says why there is none."""
    try:
        return _trace(module, arguments, training), ""
    # `forward` is the user's code and may raise anything; what it raised is passed on in the note.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "no message")
        missing = "training memory" if training else "shapes"
        tracing = "tracing a copy on fake tensors (shapes without values)"
        return None, f"No {missing}: {tracing} raised {type(error).__name__}: {reason}"


# With gradients even for shapes: without, nn.TransformerEncoder takes a fused path that skips its layers.
@torch.inference_mode(False)
@torch.enable_grad()
def _trace(module: nn.Module, arguments: Any, training: bool) -> Trace:
    """Run a fake copy once: forward and, in training, backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # No fallback kernels: they would run an operator that has no fake version for real. Tensors that `forward` finds
    # outside the module (globals, closures) are faked on sight.
    fake_mode = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    fake = _fake_copy(module, fake_mode)
    if training:
        fake.train()
    counter, meter = _flop_counter(), MemoryMeter(_tensors(fake))
    calls = _watch(fake, counter)
    device, _ = home(module)
    with _random_state_kept(), fake_mode, meter, counter:
        positional, keywords = tree_map(partial(_fake_tensor, device=device), arguments)
        output = fake(*positional, **keywords)
        flops, activation_bytes = counter.get_total_flops(), meter.bytes
        ends = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if training and ends:
            torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
    lazy_bytes = meter.counted(_tensors(fake))  # made by the first forward, but not activations
    return Trace(fake, calls, flops, activation_bytes - lazy_bytes, meter.peak_bytes - lazy_bytes)


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they are alive.

    By storage, since views of one tensor (a reshape, a weight's transpose) take memory once.
    """

    def __init__(self, at_rest: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in at_rest}  # what was there before is not counted
        self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)

    def counted(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that these tensors have in the count."""
        return sum(self.sizes.get(tensor.untyped_storage()._cdata, 0) for tensor in tensors)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers that have data."""
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if not is_lazy(tensor)]


def _fake_tensor(leaf: Any, device: torch.device | None) -> Any:
    """A fake tensor like a meta tensor, on the module's device."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=device) if isinstance(leaf, Tensor) else leaf


def _fake_copy(module: nn.Module, fake_mode: Any) -> nn.Module:
    """A copy of the module whose tensors, also those that are plain attributes, are fake."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    tensors = [*module.parameters(), *module.buffers()]
    # A lazy tensor has no sizes to fake: its copy is lazy too, on the outside.
    copies = {id(lazy): type(lazy)(lazy.requires_grad, lazy.device, lazy.dtype) for lazy in tensors if is_lazy(lazy)}
    with FakeCopyMode(fake_mode):
        fake = copy.deepcopy(module, copies)
    for layer in fake.modules():
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if is_lazy(tensor):  # its own `materialize` would fill it with data, which a fake tensor is not
                tensor.materialize = partial(_materialize, layer, name)
    return fake


def _materialize(layer: nn.Module, name: str, shape: tuple[int, ...], device: Any = None, dtype: Any = None) -> None:
    """Put a fake parameter or buffer in the place of a lazy one."""
    lazy = getattr(layer, name)
    tensor = torch.empty(shape, device=device or lazy.device, dtype=dtype or lazy.dtype)
    setattr(layer, name, nn.Parameter(tensor, lazy.requires_grad) if isinstance(lazy, nn.Parameter) else tensor)


def _flop_counter() -> Any:
    """PyTorch's counter, with the CPU's attention and the fused recurrent layers that it leaves out."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def recurrent(input: list[int], *weights: Any, **_: Any) -> int:
        # Each weight matrix meets each step of each sequence once. cuDNN passes its weights as one list.
        shapes = weights[0] if weights[0] and not isinstance(weights[0][0], int) else weights[:2]
        return 2 * input[0] * input[1] * sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)

    aten = torch.ops.aten
    extra = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    extra |= {aten.mkldnn_rnn_layer: recurrent, aten._cudnn_rnn: recurrent}
    return FlopCounterMode(display=False, custom_mapping=extra)


def _watch(fake: nn.Module, counter: Any) -> dict[nn.Module, Call]:
    """Hooks on every layer of a copy, which fill in the returned records as it runs."""
    calls = {layer: Call() for layer in fake.modules()}
    started: list[int] = []  # a stack: layers begin and end like brackets

    def begin(layer: nn.Module, arguments: Any) -> None:
        started.append(counter.get_total_flops())

    def end(layer: nn.Module, arguments: Any, output: Any) -> None:
        call = calls[layer]
        call.output_shape = tree_map(_shape, _plain(output))
        call.count += 1
        call.flops += counter.get_total_flops() - started.pop()

    for layer in calls:
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end)
    return calls


def _shape(leaf: Tensor | None) -> tuple[int, ...] | None:
    return None if leaf is None else tuple(leaf.shape)


def _plain(output: Any) -> Any:
    """An output as nested lists and dicts of its tensors; dataclasses become dicts, the rest (None, a cache) goes."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    if isinstance(output, Mapping):
        return {str(name): plain for name, value in output.items() if (plain := _plain(value)) is not None}
    if isinstance(output, (tuple, list)):
        return [plain for value in output if (plain := _plain(value)) is not None]
    return output if isinstance(output, Tensor) else None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Python's and numpy's generators, from which a `forward` may draw. Fake tensors draw nothing from torch's."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
