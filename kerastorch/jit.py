"""`jit=True`: the module and its loss in one compiled function, with eager execution to fall back on."""

from __future__ import annotations

import types
import warnings
from typing import Any

import torch
from torch import Tensor

from .computation import Compute
from .losses import Loss, OwnLoss, SumOfLosses
from .memory import is_out_of_memory
from .structures import leaves, map_structure

# Modes in which outputs live in memory that the next call writes to.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
MODES = (True, "default", *CUDA_GRAPH_MODES, "max-autotune-no-cudagraphs")


class Jitted:
    """`compute` through `torch.compile`, as long as that works.

    A batch with fewer samples than those before it, as the last of an epoch, runs eagerly: it comes once an epoch and
    is not worth a compilation. Where several in a row are as short, that is the new size.

    Args:
        compute: `(x, target, weight) -> (output, loss)`, or with a state behind each.
        loss: The loss in it: its checks of a first batch run eagerly.
        mode: `True`, or a mode of `torch.compile`.
    """

    def __init__(self, compute: Compute, loss: Loss | SumOfLosses | OwnLoss, mode: bool | str) -> None:
        self.compute, self.loss = compute, loss
        self.copies = mode in CUDA_GRAPH_MODES and torch.cuda.is_available()
        # With code of its own: torch counts recompilations by code, and would give up on the fifth model of a process.
        own = types.FunctionType(
            compute.__code__.replace(), compute.__globals__, compute.__name__, closure=compute.__closure__
        )
        self.compiled = torch.compile(own, fullgraph=True, mode=None if mode is True else mode)
        self._largest: dict[tuple, tuple[int, int]] = {}  # and how many shorter ones came since, in a row

    def __call__(self, x: Any, *others: Any) -> tuple:
        if self.compiled is None or self.loss.is_unchecked or self._is_short(x):
            return self.compute(x, *others)
        try:
            result = self.compiled(x, *others)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = _reason(error)
        else:
            return map_structure(_copied, result) if self.copies else result
        result = self.compute(x, *others)  # raises what is the user's own mistake, as it would without `jit`
        self.compiled = None
        warnings.warn(f"jit: going on without it, torch.compile failed: {reason}", stacklevel=2)
        return result

    def _is_short(self, x: Any) -> bool:
        shapes = [leaf.shape for leaf in leaves(x) if isinstance(leaf, Tensor)]
        kind = (torch.is_grad_enabled(), *(shape[1:] for shape in shapes))
        samples, (largest, in_a_row) = shapes[0][0], self._largest.get(kind, (0, 0))
        is_short = samples < largest and in_a_row < 3
        self._largest[kind] = (largest, in_a_row + 1) if is_short else (samples, 0)
        return is_short


def refuse_unknown_mode(jit: Any) -> None:
    """`jit` must be a bool or a mode of `torch.compile`."""
    if jit is not False and jit not in MODES:
        raise ValueError(f"jit={jit!r} is not a mode of torch.compile. Give True or one of {', '.join(MODES[1:])}.")


def _reason(error: BaseException) -> str:
    """The first line that says something, of the error that torch's own one came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
