"""The mean of the weights of several files, such as the last or the best checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from .checkpoint import read_weights, refuse_ending, refuse_no_weights, write_weights


def average_checkpoints(
    paths: Iterable[str | os.PathLike], output: str | os.PathLike | None = None
) -> dict[str, Tensor]:
    """The mean of the weights in several files of one model.

    Floats are added up in double precision, one file after the other, so that there is never more in memory than the
    sums and one file. What is counted in whole numbers, such as BatchNorm's batches, is the last file's. BatchNorm's
    statistics are averaged as the weights are; where that is too rough, train on for some batches with `lr=0`.

    Args:
        paths: Files that `model.save` or `model.save_weights` wrote, or other safetensors; all count the same.
        output: Where to write the mean as `.safetensors`, for `model.load_weights`. Default: `None`, nowhere.
    Returns:
        Tensors by name on the CPU, in the dtype of the files.
    Raises:
        TypeError: one path alone, or something in the files that is no dense tensor.
        ValueError: no path; a file that is damaged; names, shapes or dtypes that are not those of the first file.
        OSError: there is no such file, or the output cannot be written.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [f"{folder}/{number}.safetensors" for number in range(3)]
        ...     for number, file in enumerate(files):
        ...         write_weights(file, {"weight": torch.tensor([number, 1.0])})
        ...     average_checkpoints(files)
        {'weight': tensor([1., 1.])}

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 6.1, which averages the last 5 to 20 checkpoints;
    fairseq, `scripts/average_checkpoints.py`, which adds up in the dtype of the files.
    """
    paths = _listed(paths)
    if output is not None:
        refuse_ending(output, is_weights=True)
    forms, sums, dtypes = None, {}, {}
    for path in paths:
        weights = read_weights(path)
        refuse_no_weights(weights)
        found = {name: _form(value) for name, value in weights.items()}
        forms = forms or found
        _refuse_other_forms(found, forms, path, paths[0])
        for name in found:
            value = weights.pop(name)  # and is gone before the next file is read
            sums[name], dtypes[name] = _added(sums.get(name), value), value.dtype
    mean = {name: _divided(sums.pop(name), len(paths), dtypes[name]) for name in forms}
    if output is not None:
        write_weights(output, mean)
    return mean


def _listed(paths: Iterable[str | os.PathLike]) -> list[str | os.PathLike]:
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"paths={str(paths)!r} is one path. Give a list of them.")
    paths = list(paths)
    if not paths:
        raise ValueError("paths is empty. Give at least one file.")
    return paths


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return value.clone()
    wide = value.to(torch.complex128 if value.is_complex() else torch.float64, copy=total is None)
    return wide if total is None else total.add_(wide)


def _divided(total: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return total.div_(count).to(dtype) if dtype.is_floating_point or dtype.is_complex else total


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _refuse_other_forms(
    forms: dict[str, str], expected: dict[str, str], path: str | os.PathLike, first: str | os.PathLike
) -> None:
    if forms == expected:
        return
    missing = [name for name in expected if name not in forms]
    unexpected = [name for name in forms if name not in expected]
    other = [name for name in expected if name in forms and forms[name] != expected[name]]
    name = (missing + unexpected + other)[0]
    raise ValueError(
        f"{str(path)!r} has {forms.get(name, 'nothing')} as {name!r} and {str(first)!r} has "
        f"{expected.get(name, 'nothing')}, with {len(missing + unexpected + other)} tensors that differ. Give files of "
        f"one model."
    )
