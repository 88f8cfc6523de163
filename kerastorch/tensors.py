"""Arrays of any kind -> tensors of the right dtype, and one raw batch -> `(x, target, weight)`.

The caller's memory is read, never written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch

from .structures import map_structure

Batch = tuple[Any, Any, Any]


def unpack(raw: Any, targets: tuple[str, ...] = ()) -> Batch:
    """One raw batch, or everything: `x`, `(x, y)`, `(x, y, weight)` or a mapping -> `(x, y, weight)`.

    Args:
        raw: What a loader or iterable gave, or the columns of a dataset.
        targets: Names a mapping's target may have: the first one found is taken out of it; none = it stays whole.
    """
    if isinstance(raw, Mapping):
        name = next((name for name in targets if name in raw), None)
        if name is None:
            return raw, None, None
        x = {key: column for key, column in raw.items() if key != name}
        # One column is one input, whatever its name: `nn.Sequential` would not take it as a keyword.
        return next(iter(x.values())) if len(x) == 1 else x, raw[name], None
    if isinstance(raw, (tuple, list)) and 1 <= len(raw) <= 3:
        x, y, weight = (*raw, None, None)[:3]
        return x, y, weight
    if isinstance(raw, (tuple, list, set, str, bytes, Number)) or raw is None:
        length = f" of {len(raw)}" if isinstance(raw, (tuple, list)) else ""
        raise TypeError(
            f"a batch is a {type(raw).__name__}{length}; expected x, (x, y), (x, y, weight) or a dict. "
            f"Put several inputs into one tuple or dict: ((a, b), y)."
        )
    return raw, None, None


def to_tensors(parts: Batch, dtype: torch.dtype, keeps_maps: bool = False) -> Batch:
    """Tensors of everything in a batch: floating point values as `dtype`, integer targets as int64.

    Targets and weights are float32 at least: losses are computed in that. With `keeps_maps`, inputs in a memory map
    stay there in their own dtype: all of them may not fit into memory.
    """
    x, y, weight = parts
    exact = torch.promote_types(dtype, torch.float32)
    return (
        map_structure(partial(to_tensor, dtype=dtype, keeps_maps=keeps_maps), grouped(x)),
        map_structure(partial(_to_target, dtype=exact), grouped(y)),
        map_structure(partial(_to_weight, dtype=exact), grouped(weight)),
    )


def to_tensor(leaf: Any, dtype: torch.dtype, keeps_maps: bool = False) -> Any:
    """A tensor of `leaf`; floating point values as `dtype`. Strings and other objects of a batch stay as they are."""
    tensor = leaf if isinstance(leaf, torch.Tensor) else _from_array(array_of(leaf), leaf)
    if not isinstance(tensor, torch.Tensor) or (keeps_maps and isinstance(leaf, np.memmap)):
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor


def _to_target(leaf: Any, dtype: torch.dtype) -> torch.Tensor:
    tensor = to_tensor(leaf, dtype)
    if tensor.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        return tensor.long()  # torch's losses take class indices as int64 only
    return tensor


def _to_weight(leaf: Any, dtype: torch.dtype) -> torch.Tensor:
    return to_tensor(leaf, dtype).to(dtype)


def _from_array(array: np.ndarray, leaf: Any) -> Any:
    if array.dtype == object or array.dtype.kind in "USMm":
        if isinstance(leaf, (str, bytes)):
            return leaf
        raise TypeError(
            f"the data has a {type(leaf).__name__} of dtype {array.dtype}, expected numbers. "
            f"Encode text, dates and categories as numbers first."
        )
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)  # torch cannot gather rows of these
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # Read-only arrays (memory maps, pandas) are fine here: nothing ever writes to the data.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def array_of(leaf: Any) -> Any:
    """Something that can be sliced and has a shape: the tensor itself, else a numpy array."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return leaf
    if hasattr(leaf, "to_numpy"):  # pandas
        array = leaf.to_numpy()
        return array if array.dtype != object else _numeric(leaf)
    return np.asarray(leaf)


def _numeric(frame: Any) -> np.ndarray:
    """Values of a pandas object whose columns are numbers with missing values, which numpy sees as objects."""
    try:
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        columns = [str(name) for name, kind in getattr(frame, "dtypes", {}).items() if kind.kind not in "biufc"]
        raise TypeError(
            f"the data has columns that are no numbers: {columns or frame.name!r}. "
            f"Encode them as numbers (pandas.get_dummies, .cat.codes) or drop them."
        ) from error


def is_arrays(data: Any) -> bool:
    """Whether `data` is an array, or tuples, lists and dicts of arrays: numbers that are all in memory."""
    if isinstance(data, Mapping):
        return bool(data) and all(is_arrays(value) for value in data.values())
    if isinstance(data, tuple):
        return bool(data) and all(is_arrays(value) for value in data)
    if isinstance(data, list):
        # A list of tuples or dicts is a list of batches; a list of arrays is several inputs, as in Keras.
        return not data or is_numbers(data) or all(is_array(value) for value in data)
    return is_array(data)


def is_array(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)) or type(value).__module__.partition(".")[0] == "pandas":
        return True
    return hasattr(value, "__array__") and hasattr(value, "shape")


def is_numbers(value: Any) -> bool:
    """Whether `value` is a list (of lists) of plain numbers, judged by its first items."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (bool, int, float, np.number, np.bool_)) or (isinstance(value, list) and not value)


def grouped(tree: Any) -> Any:
    """Lists of numbers become one array, so that what is left of the structure is structure."""
    if isinstance(tree, (list, tuple)) and tree and not hasattr(tree, "_fields") and is_numbers(tree):
        return np.asarray(tree)
    if isinstance(tree, Mapping):
        return {key: grouped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return tuple(grouped(value) for value in tree)  # several inputs, spread as a tuple is
    return tree


def warn_of_nan(name: str, leaf: Any) -> None:
    """Warns where an array has NaN, and in which columns."""
    if isinstance(leaf, (str, bytes)):
        return
    values = array_of(leaf)
    if isinstance(values, np.memmap):  # reading all of it could take longer than the training
        return
    is_float = values.is_floating_point() if isinstance(values, torch.Tensor) else values.dtype.kind == "f"
    # The sum of everything is NaN where any value is: one cheap read, no array of booleans.
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = float(values.sum()) if is_float else 0.0
    if not np.isnan(total):
        return
    missing = np.isnan(np.asarray(values.detach().cpu().float() if isinstance(values, torch.Tensor) else values))
    if missing.any():
        columns = np.flatnonzero(missing.any(axis=0)).tolist() if missing.ndim == 2 else []
        names = [str(leaf.columns[column]) if hasattr(leaf, "columns") else column for column in columns]
        where = f" in column{'s' * (len(names) > 1)} {', '.join(map(repr, names[:8]))}" if names else ""
        warnings.warn(
            f"{name} has {int(missing.sum())} NaN{where}: the loss will be NaN. Fill or drop them first.", stacklevel=2
        )


def class_table(class_weight: Mapping[int, float]) -> torch.Tensor:
    """Weight by class index, 1 for a class not named; the last entry is 1, for every index that is out of range."""
    table = torch.ones(max(int(index) for index in class_weight) + 2)
    for index, weight in class_weight.items():
        table[int(index)] = weight
    return table


def _is_one_hot(y: torch.Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all() & (y.sum(-1) == 1).all())


def weighted(parts: Batch, table: torch.Tensor, dtype: torch.dtype) -> Batch:
    """The batch with each sample's weight multiplied by its class's from `class_table`."""
    x, y, weight = parts
    if not isinstance(y, torch.Tensor):
        raise ValueError(
            f"class_weight needs one target tensor, got {type(y).__name__}. Give sample_weight for each output instead."
        )
    # One-hot and probability targets have a column for each class, as in Keras; whole numbers may be tokens instead.
    has_columns = y.ndim > 1 and y.shape[-1] > 1
    classes = (y.argmax(-1) if has_columns and (y.is_floating_point() or _is_one_hot(y)) else y).long()
    classes = classes.squeeze(-1) if classes.ndim > 1 and classes.shape[-1] == 1 else classes
    last = len(table) - 1
    table = table.to(y.device, torch.promote_types(dtype, torch.float32))
    factor = table[torch.where((classes < 0) | (classes > last), last, classes)]
    if weight is None:
        return x, y, factor
    return x, y, factor * weight.reshape(weight.shape + (1,) * (factor.ndim - weight.ndim))
