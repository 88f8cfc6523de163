"""Predictions: writes what a module predicts to disk, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from .base import Callback
from .files import make_folder


class Predictions(Callback):
    """Writes predictions to `.npy` files while `predict` runs.

    The format is numpy's: a row for each sample, in the order of the inputs, that `numpy.load(path, mmap_mode="r")`
    reads without loading it all, here or anywhere; and it can grow by a batch at a time. Rows are as `predict` returns
    them, bfloat16 as float32, which numpy has. Files have their names only when they are complete: until then, and
    where a process was killed, these end in `.partial`.

    Args:
        path: A file that ends in `.npy`, where the module returns one tensor; or a folder, with one file for each
            tensor that it returns, named after its keys or numbers: `{"logits": ..., "state": (..., ...)}` becomes
            `logits.npy`, `state.0.npy` and `state.1.npy`. What is there is replaced.
        in_memory: Whether `predict` also keeps the predictions in memory and returns them; `False` = it returns `None`,
            and may be given more than fits. Default: `True`.
    Raises:
        TypeError: `path` is no path; while predicting, an output that is no tensor.
        OSError: before predicting, a folder that cannot be written to, or a folder where a file is meant.
        ValueError: while predicting, several outputs for one file, or outputs of another shape or dtype than before.
    Example:
        >>> import tempfile, kerastorch as kt
        >>> model, folder = kt.Model(torch.nn.Linear(4, 2), backend="cpu"), tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "outputs.npy")
        >>> outputs = model.predict(np.ones((10, 4)), callbacks=Predictions(path), verbose=0)
        >>> np.array_equal(np.load(path, mmap_mode="r"), outputs)
        True
        >>> folder.cleanup()

    Source: the format, NEP 1, "A simple file format for NumPy arrays".
    """

    rank_zero_only = True

    def __init__(self, path: str | os.PathLike, *, in_memory: bool = True) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path={path!r} is a {type(path).__name__}, expected a file or folder to write to.")
        if not str(path):
            raise ValueError("path is empty. Give a file that ends in .npy, or a folder.")
        self.path, self.takes_outputs = path, not in_memory
        self._files: dict[str, _GrowingFile] = {}

    def on_predict_begin(self, logs: MutableMapping | None = None) -> None:
        self._leave()
        path = self.model.path_for(self.path)
        self._is_file = path.suffix == ".npy"
        if self._is_file and path.is_dir():
            raise IsADirectoryError(f"Predictions cannot write to {str(path)!r}: it is a folder. Give another file.")
        make_folder(path.parent if self._is_file else path, "Predictions")
        self._path = path

    def on_predict_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        found = {name: _rows(leaf) for name, leaf in _named(logs["outputs"])}
        if batch == 0:
            for name, path in self._paths(found).items():
                self._files[name] = _GrowingFile(path)
        if set(found) != set(self._files):
            raise ValueError(
                f"batch {batch} has outputs {sorted(found)}, those before had {sorted(self._files)}. Have the module "
                f"return the same for each batch."
            )
        for name, rows in found.items():
            self._files[name].append(rows, batch)

    def on_predict_end(self, logs: MutableMapping | None = None) -> None:
        for file in self._files.values():
            file.finish()
        self._files = {}

    def on_exception(self, error: BaseException) -> None:
        self._leave()

    def _paths(self, names: Mapping[str, Any]) -> dict[str, Path]:
        if not self._is_file:
            return {name: self._path / f"{name or 'outputs'}.npy" for name in names}
        if [*names] != [""]:
            raise ValueError(
                f"Predictions was given one file, {str(self.path)!r}, for outputs {', '.join(names)}. Give a folder."
            )
        return {"": self._path}

    def _leave(self) -> None:
        """Takes away what is not complete."""
        for file in self._files.values():
            file.discard()
        self._files = {}


class _GrowingFile:
    """An array on disk that grows by rows, and gets its name when it is complete.

    The header comes first and says how many rows there are. numpy leaves room in it for any number, so that it can be
    written again at the end.

    Args:
        path: The name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.rows, self.kind = 0, None
        self._file: BinaryIO = self.partial.open("wb")

    def append(self, rows: np.ndarray, batch: int) -> None:
        """Adds the rows of a batch."""
        kind = rows.shape[1:], rows.dtype
        if self.kind is None:
            self.kind = kind
            self._write_header()
        if kind != self.kind:
            raise ValueError(
                f"batch {batch} has outputs of shape (samples, {_listed(kind[0])}) and dtype {kind[1]}, those before "
                f"had (samples, {_listed(self.kind[0])}) and {self.kind[1]}. One file takes one kind of rows."
            )
        rows.tofile(self._file)
        self.rows += len(rows)

    def finish(self) -> None:
        """Completes the file and puts it in its place."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        os.replace(self.partial, self.path)

    def discard(self) -> None:
        """Takes the file away."""
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def _write_header(self) -> None:
        shape, dtype = self.kind
        described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.rows, *shape)}
        npy.write_array_header_1_0(self._file, described)


def _rows(leaf: Any) -> np.ndarray:
    """An output of one batch as `predict` would return it; a scalar is one row."""
    if not isinstance(leaf, Tensor):
        raise TypeError(f"the module returned a {type(leaf).__name__} in its output, expected tensors only.")
    array = (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
    return array[None] if array.ndim == 0 else array


def _named(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested outputs with the names of their files."""
    if isinstance(tree, Mapping):
        parts = tree.items()
    elif isinstance(tree, (tuple, list)):
        parts = enumerate(tree)
    else:
        if tree is not None:
            yield name, tree
        return
    for key, part in parts:
        # Dots divide the keys of nested outputs, and what may not be in a file's name is quoted.
        quoted = quote(str(key), safe=" ").replace(".", "%2E")
        yield from _named(part, f"{name}.{quoted}" if name else quoted)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
