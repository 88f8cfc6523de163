"""What hooks see of the layers in one pass: which one raised an error, the first that returned NaN, scales, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..structures import leaves
from .hints import values_per_sample

ROOT = "the module"  # how the outermost module is called
NORMALIZING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class Layers:
    """What hooks saw of the layers in one pass.

    Args:
        keeps_values: `False` = only which layer is running. Default: `True`.
    Attributes:
        innermost: Name of the layer that was running last, "" where none is; after an error, the one that raised it.
        innermost_inputs: Shapes of what it was given.
        first: Name of the first layer with weights, and the root mean square of its inputs; `None` where that layer
            normalizes them, or takes none that are floats.
        values_per_sample: Name of a BatchNorm in train mode -> values that a sample gives to each channel's mean.
        refuse_output: Called with the module's output, if any.
    """

    def __init__(self, keeps_values: bool = True) -> None:
        self.keeps_values = keeps_values
        self._running: list[tuple[str, str]] = []
        self._finite: list[tuple[str, Tensor]] = []
        self.first: tuple[str, Tensor | None] | None = None
        self.values_per_sample: dict[str, int] = {}
        self.refuse_output: Callable[[Any], None] | None = None

    @property
    def innermost(self) -> str:
        return self._running[-1][0] if self._running else ""

    @property
    def innermost_inputs(self) -> str:
        return self._running[-1][1] if self._running else ""

    @property
    def first_not_finite(self) -> str | None:
        """The first layer that returned NaN or infinity."""
        return next((name for name, is_finite in self._finite if not bool(is_finite)), None)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hooks on all layers meanwhile."""
        handles = []
        for name, layer in module.named_modules():
            if not isinstance(layer, torch.jit.ScriptModule):
                handles.append(layer.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
                handles.append(layer.register_forward_hook(partial(self._end, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str, layer: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        tensors = [leaf.detach() for leaf in leaves((inputs, named)) if isinstance(leaf, Tensor)]
        shapes = ", ".join(f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in tensors)
        self._running.append((f"{name or ROOT} ({type(layer).__name__})", shapes))
        if type(layer).forward in (nn.Embedding.forward, nn.EmbeddingBag.forward):  # a subclass may count them itself
            _refuse_ids(layer, tensors)
        if not self.keeps_values:
            return
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            self.values_per_sample[name] = values_per_sample(tensors)
        if self.first is None and next(layer.parameters(recurse=False), None) is not None and not layer._modules:
            self.first = name or ROOT, _scale_at(layer, tensors)

    def _end(self, name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        while self._running and not self._running.pop()[0].startswith(f"{name or ROOT} ("):
            continue  # layers whose error `forward` caught
        if self.keeps_values and not layer._modules:
            tensors = (leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            self._finite += [(name or ROOT, torch.isfinite(leaf.detach()).all()) for leaf in tensors]
        if not name and self.refuse_output is not None:
            self.refuse_output(output)


def _refuse_ids(layer: nn.Module, tensors: list[Tensor]) -> None:
    """Indices of rows must be in the table: on a GPU that would not raise, but end the process's use of it."""
    if not tensors or tensors[0].is_floating_point() or not tensors[0].numel():
        return
    low, high = (int(end) for end in torch.aminmax(tensors[0].long()))
    if low < 0 or high >= layer.num_embeddings:
        raise ValueError(
            f"the inputs have indices from {low} to {high}, but the embedding has {layer.num_embeddings} rows, 0 to "
            f"{layer.num_embeddings - 1}. Give it {max(high + 1, 1)} rows, or number the inputs from 0."
        )


def _scale_at(layer: nn.Module, tensors: list[Tensor]) -> Tensor | None:
    floats = [one for one in tensors if one.is_floating_point() and one.numel()]
    if isinstance(layer, NORMALIZING) or not floats:
        return None
    return floats[0].float().square().mean().sqrt()
