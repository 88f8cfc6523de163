"""Forms that arguments of the verbs may have -> one form; and results -> the forms that Keras returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .structures import leaves
from .tensors import is_array


def takes(module: nn.Module, inputs: int) -> bool:
    """Whether `forward` takes so many positional arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional for parameter in parameters) >= inputs


def targets_as_inputs(batch: tuple) -> tuple:
    """A module that computes its own loss takes the targets behind its inputs; they still say how much is masked."""
    x, target, weight = batch
    if not isinstance(x, Mapping):
        inputs = x if target is None else (*x, target) if isinstance(x, tuple) else (x, target)
        return inputs, target, weight
    if target is not None and target is not x.get("labels"):
        raise ValueError("loss=None and inputs by name: put the target among them too, or give compile a loss.")
    return x, x.get("labels"), weight


def with_labels(batch: tuple) -> tuple:
    """Targets that are among inputs by name, as Transformers' modules take them, are targets too."""
    x, target, weight = batch
    return (x, x.get("labels"), weight) if target is None and isinstance(x, Mapping) else batch


def as_list(callbacks: Any) -> list[Any]:
    """Callbacks as a new list: one of them, several, or none."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]


def as_pair(validation_data: Any) -> Any:
    """A list of arrays is `(x, y[, weight])` here, as in Keras: inputs alone could not be validated."""
    is_pair = isinstance(validation_data, list) and 2 <= len(validation_data) <= 3
    return tuple(validation_data) if is_pair and all(map(is_array, validation_data)) else validation_data


def length_of(x: Any) -> int:
    """Samples in the arrays of one batch."""
    first = next(leaves(x if not isinstance(x, list) else (x,)), None)
    return len(first)


def returned(logs: dict[str, Any], return_dict: bool) -> float | list | dict[str, Any]:
    """As Keras returns results: a dict, else a list, else, where there is nothing but the loss, a float."""
    if return_dict:
        return logs
    return next(iter(logs.values())) if len(logs) == 1 else list(logs.values())


def concatenated(outputs: list[Any]) -> Any:
    """What the module returned for each batch, as one tensor; a scalar for each batch makes a vector."""
    if not isinstance(outputs[0], Tensor):
        raise TypeError(f"the module returned a {type(outputs[0]).__name__} in its output, expected tensors only.")
    return torch.stack(outputs) if outputs[0].ndim == 0 else torch.cat(outputs)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's values, bfloat16 as float32, since numpy has none."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
