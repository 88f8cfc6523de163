"""Names of precisions -> what they mean: the dtype of the weights, autocast, loss scaling, TF32.

Outputs of a module that computes in less than float32 come out as float32, so that losses and metrics are never summed
in less.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .structures import map_structure

LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """One way to compute.

    Attributes:
        name: As in `compile(precision=...)`.
        weights: Dtype that parameters, buffers and inputs are cast to; `None` = the module's own.
        autocast: Dtype that `torch.autocast` uses where that is safe; `None` = no autocast.
        scales_loss: Whether small gradients would vanish without loss scaling.
        tf32: Whether float32 products on tensor cores may round their factors to 10 bits.
    """

    name: str
    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None
    scales_loss: bool = False
    tf32: bool = False


KNOWN = {
    known.name: known
    for known in (
        Precision("32"),
        Precision("tf32", tf32=True),
        Precision("16", autocast=torch.float16, scales_loss=True),
        Precision("bf16", autocast=torch.bfloat16),
        Precision("16-true", weights=torch.float16),
        Precision("bf16-true", weights=torch.bfloat16),
        Precision("64", weights=torch.float64),
    )
}
# Lightning's names, and the plain ones that people try.
ALIASES = {"32-true": "32", "64-true": "64", "16-mixed": "16", "bf16-mixed": "bf16"} | {
    "float32": "32", "fp32": "32", "float64": "64", "fp64": "64", "float16": "16", "fp16": "16", "bfloat16": "bf16",
    "mixed_float16": "16", "mixed_bfloat16": "bf16",
}  # fmt: skip


def get(precision: Any, device: torch.device) -> Precision:
    """What `compile` was given as `precision` -> its meaning.

    Args:
        precision: A name in `KNOWN`, one of the ints 16, 32 and 64, or Lightning's name for one.
        device: Where it shall be used.
    Raises:
        ValueError: an unknown name, or a precision that the device cannot compute in.
    """
    name = str(precision).lower() if isinstance(precision, (str, int)) and not isinstance(precision, bool) else ""
    name = ALIASES.get(name, name)
    if name not in KNOWN:
        close = difflib.get_close_matches(name, [*KNOWN, *ALIASES], n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]!r}?" if close else f"Give one of {', '.join(map(repr, KNOWN))}."
        raise ValueError(f"precision={precision!r} is not a precision. {hint}")
    if not _is_able(device, KNOWN[name]):
        able = ", ".join(repr(other) for other, meaning in KNOWN.items() if _is_able(device, meaning))
        raise ValueError(f"precision={precision!r} is more than {_named(device)} can do. Give one of {able}.")
    return KNOWN[name]


def _is_able(device: torch.device, precision: Precision) -> bool:
    if device.type == "cuda":
        if precision.tf32:  # tensor cores have it since Ampere
            return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
        if torch.bfloat16 in (precision.autocast, precision.weights):
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return True
    if precision.tf32:
        return False
    if device.type == "xla":  # TPUs have no fp16
        return not precision.scales_loss and precision.weights is not torch.float16
    if device.type == "mps":
        return precision.weights is not torch.float64 and not precision.scales_loss
    return True


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type!r}"


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes all floating point parameters and buffers `dtype`, in place; complex ones and integers stay."""
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating parameter, or torch's default."""
    floating = (parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point)
    return next(floating, torch.get_default_dtype())


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of all parameters and buffers, by name."""
    return {name: tensor.dtype for name, tensor in _named_tensors(module)}


def cast_back(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Gives parameters and buffers the dtypes back that they had, in place."""
    for name, tensor in _named_tensors(module):
        if tensor.is_floating_point() and name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which operations choose the precision's dtype where that is safe."""
    return torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None)


def in_precision(function: Callable, precision: Precision, device: torch.device) -> Callable:
    """The function, computing as `precision` says, its low precision results as float32; itself where that is nothing.

    Losses and metrics are computed from these results, outside of the autocast.
    """
    if precision.autocast is None and precision.weights not in LOW:
        return function
    run = in_autocast(function, precision, device)
    return lambda *inputs, **named: as_float32(run(*inputs, **named))


def in_autocast(function: Callable, precision: Precision, device: torch.device) -> Callable:
    """The function within `autocast`; itself where the precision has none."""
    if precision.autocast is None:
        return function

    def run(*inputs: Any, **named: Any) -> Any:
        with autocast(precision, device):
            return function(*inputs, **named)

    return run


def as_float32(tree: Any) -> Any:
    """float16 and bfloat16 tensors of `tree` as float32; an object that is no nesting of tensors stays as it is."""
    wide = map_structure(lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in LOW else leaf, tree)
    # Transformers' outputs are mappings with attributes, which `forward` of a user's may look at.
    return type(tree)(**wide) if isinstance(tree, Mapping) and is_dataclass(tree) else wide


@contextmanager
def tf32_if(precision: Precision | None) -> Iterator[None]:
    """TF32 products meanwhile, if that is the precision."""
    if precision is None or not precision.tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def scaled_backward(scaler: torch.amp.GradScaler, loss: Tensor, retain_graph: bool | None = None) -> None:
    """`loss.backward`, with gradients large enough for fp16."""
    scaler.scale(loss).backward(retain_graph=retain_graph)


def forget_steps(scaler: torch.amp.GradScaler) -> None:
    """Lets the next run begin with `unscale_`, wherever an error has ended this one."""
    scaler._per_optimizer_states.clear()


class ScaledStep:
    """`optimizer.step` under loss scaling: left out where a gradient overflowed, and the schedule then stays.

    Whether it was is known on the device. The host asks one step later, when the answer has long arrived, so that
    nothing waits: https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling

    Args:
        optimizer: Whose gradients `scaler.unscale_` has divided.
        scaler: Scales the losses of this optimizer.
    Attributes:
        skipped: Steps left out so far: 0, or a scalar on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.skipped: Tensor | int = 0
        self._is_skipped: Tensor | None = None  # the latest step, which no schedule has followed yet
        self._last: tuple[_Flag, Any] | None = None

    def __call__(self) -> bool:
        """One step, and whether there was any gradient to check."""
        # GradScaler keeps for itself what it found, and only until its `update`.
        found = [*self.scaler._found_inf_per_device(self.optimizer).values()]
        if not found:  # all its parameters are frozen
            return False
        self.scaler.step(self.optimizer)
        self._is_skipped = sum(flag.to(found[0].device, non_blocking=True) for flag in found) > 0
        self.skipped = self.skipped + self._is_skipped
        return True

    def follow(self, schedule: Any) -> None:
        """Has `schedule.after_step` called with the next `settle`, unless the latest step was left out."""
        self.settle()
        if self._is_skipped is None:  # no step since the last time
            schedule.after_step()
        else:
            (self._last, self._is_skipped) = (_Flag(self._is_skipped), schedule), None

    def settle(self) -> None:
        """Moves the schedule that follows a step, if that step was taken."""
        if self._last is not None:
            (was_skipped, schedule), self._last = self._last, None
            if not was_skipped.read():
                schedule.after_step()


class _Flag:
    """A flag of the device, on its way to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._copied = None
        if flag.is_cuda:
            self._value = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag.view(()), non_blocking=True)
            self._copied = torch.cuda.current_stream(flag.device).record_event()
        else:
            self._value = flag

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()  # waits for the step before this one, not for what was queued since
        return bool(self._value)
