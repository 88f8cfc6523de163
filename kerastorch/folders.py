"""A state as a folder, which several processes write at once: `state.pt` beside what each of them holds a part of.

Parts are written by `torch.distributed.checkpoint` as safetensors, so that nothing in the folder is ever unpickled but
`state.pt`, a file of `checkpoint.py`, which has marks in their places and the digests of all other files. Any number of
processes can read it, each of them all of it.
"""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .kinds import damaged
from .writing import failure_of_first, hexdigest_of

ENDING = ".dcp"
STATE = "state.pt"
MARK = "part of kerastorch"


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a state is to be, or is, a folder."""
    return str(path).endswith(ENDING)


def mark(name: str, tensor: Tensor) -> dict[str, Any]:
    """What stands for a tensor that is written apart."""
    return {MARK: name, "shape": list(tensor.shape), "dtype": tensor.dtype}


def write(path: str | os.PathLike, state: Mapping[str, Any], parts: Mapping[str, Tensor], ranks: Any) -> None:
    """Writes a state; all processes call it. The folder appears whole; one that was there is replaced.

    Args:
        path: Where to, on a disk that all of them see.
        state: As for `checkpoint.write`, with marks.
        parts: Tensors by the names in the marks, of which each process holds a part.
        ranks: The backend.
    Raises:
        OSError: it cannot be written, or something else is there.
    """
    path = Path(path)
    error: Exception | None = None
    temporary = path.with_name(ranks.collect(f".{path.name}.{uuid.uuid4().hex}", "a write")[0])
    try:
        if ranks.rank == 0:
            _refuse_other(path)
            temporary.mkdir(parents=True)
    except OSError as failure:
        error = failure
    _raise(failure_of_first(ranks, error))
    try:
        if parts:
            _save(temporary, parts)
        digests = _digests(temporary, ranks)
        if ranks.rank == 0:
            checkpoint.write(temporary / STATE, {"files": digests, "state": state})
            _put_in_place(temporary, path)
    except Exception as failure:
        error = failure
    finally:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    _raise(failure_of_first(ranks, error))


def read(path: str | os.PathLike) -> dict[str, Any]:
    """A state with all its tensors, of a folder or of a file of `checkpoint.py`, on the CPU.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged, or something else. Nothing that is in it was run.
    """
    if not is_folder(path):
        return checkpoint.read(path)
    content = checkpoint.read(Path(path) / STATE)
    for name, digest in content["files"].items():
        with open(Path(path) / name, "rb") as file:
            if hexdigest_of(file, file.seek(0, os.SEEK_END)) != digest:
                raise ValueError(damaged(Path(path) / name, "its SHA-256 is not the one it was written with"))
    parts: dict[str, Tensor] = {}
    state = _unmarked(content["state"], parts)
    if parts:
        _load(path, parts)
    return state


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _refuse_other(path: Path) -> None:
    if path.exists() and not (path / STATE).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{str(path)!r} is something else than a folder of model.save. Give another path.")


def _put_in_place(temporary: Path, path: Path) -> None:
    before = temporary.with_name(f"{temporary.name}.before")
    if path.exists():
        os.replace(path, before)
    os.replace(temporary, path)
    shutil.rmtree(before, ignore_errors=True)


def _digests(folder: Path, ranks: Any) -> dict[str, str]:
    """Of all files in it, some by each process."""
    own = {}
    for file in sorted(folder.iterdir())[ranks.rank :: ranks.world]:
        with open(file, "rb") as opened:
            own[file.name] = hexdigest_of(opened, opened.seek(0, os.SEEK_END))
    return {name: digest for one in ranks.collect(own) for name, digest in one.items()}


def _save(folder: Path, parts: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    save(dict(parts), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _load(folder: str | os.PathLike, parts: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in parts.items():
        chunks = known[name].chunks if name in known else []
        if sum(prod(chunk.sizes) for chunk in chunks) != tensor.numel():
            raise ValueError(damaged(folder, f"of {name} a part is missing"))
    with warnings.catch_warnings():  # torch would say that it is one process that reads, as it was told
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(parts, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _unmarked(tree: Any, parts: dict[str, Tensor]) -> Any:
    """The same with tensors for marks, still without their values, which get into `parts` too."""
    if isinstance(tree, dict) and MARK in tree:
        parts[tree[MARK]] = torch.empty(tree["shape"], dtype=tree["dtype"])
        return parts[tree[MARK]]
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _unmarked(value, parts)
        return tree
    return type(tree)(_unmarked(one, parts) for one in tree) if isinstance(tree, (list, tuple)) else tree
