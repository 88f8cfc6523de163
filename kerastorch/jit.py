"""`jit=True`: the module and its loss in one compiled function, with eager execution to fall back on."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .computation import Compute
from .losses import Loss, OwnLoss, SumOfLosses
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
        self.compiled = torch.compile(compute, fullgraph=True, mode=None if mode is True else mode)
        self._largest: dict[tuple, tuple[int, int]] = {}  # and how many shorter ones came since, in a row

    def __call__(self, x: Any, *others: Any) -> tuple:
        if self.compiled is None or self.loss.is_unchecked or self._is_short(x):
            return self.compute(x, *others)
        try:
            result = self.compiled(x, *others)
        except Exception as error:
            # A mistake of the user's raises here again, as it would without `jit`.
            result = self.compute(x, *others)
            self.compiled = None
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(f"jit: going on without it, torch.compile failed: {reason}", stacklevel=2)
            return result
        return map_structure(_copied, result) if self.copies else result

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


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
