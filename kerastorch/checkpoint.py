"""Files of a model: all of its state, as a torch file of plain data, and its weights alone, as safetensors.

Each has a digest of itself in it, and reading one runs nothing that is in it. What the state is, `state.py` says; how a
file appears whole or not at all, `writing.py`; what else a file may be, `kinds.py`. When files are written and what
they are called, others decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .kinds import WEIGHTS as WEIGHTS
from .kinds import damaged, kind_of, no_state, what_foreign, why_refused
from .kinds import refuse_ending as refuse_ending
from .writing import Hashed, hexdigest_of
from .writing import replacing as replacing

MARK = "kerastorch checkpoint"
VERSION = 2  # of the format: raised when an older kerastorch could not read what is written
VERSION_OF_SEALS = 2  # from which on a file ends in a digest of itself

SEAL = re.compile(rb"G\0sha256:([0-9a-f]{64})")  # at the end of the zip file: a comment, after its length
SEAL_BYTES, NO_COMMENT = 73, b"\0\0"
FOLDER = 0x10  # attribute of a part of a zip file

SCALARS = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)
TENSORS = (Tensor, nn.Parameter)


# All of the state, as a file.


def write(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Writes a state; the file appears whole or, after an error, is the one that was there before.

    Args:
        path: Where to; folders above it are made.
        state: Tensors and plain data: dicts, lists, tuples, strings, numbers, booleans and `None`. Numpy's numbers
            become Python's.
    Raises:
        TypeError: anything else is in it.
        OSError: it cannot be written.
    """
    from . import __version__

    content = {
        "format": MARK,
        "version": VERSION,
        "kerastorch": __version__,
        "torch": str(torch.__version__),
        "state": plain(state, "state"),
    }
    with replacing(path, _is_sealed) as temporary, open(temporary, "xb") as file:
        hashed = Hashed(file)
        torch.save(content, hashed)
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(b"G\0sha256:" + hashed.hexdigest().encode())


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` was given, with its tensors on the CPU.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, something else, or of a newer format. Nothing that is in it was run.
    """
    kind = kind_of(path)
    if kind != "a torch file":
        raise ValueError(no_state(path, kind))
    content, is_sealed = _loaded(path)
    if not _is_own(content):
        raise ValueError(what_foreign(path, content))
    if content["version"] > VERSION:
        raise ValueError(
            f"{str(path)!r} was written by kerastorch {content['kerastorch']} in format {content['version']}, and this "
            f"one reads up to format {VERSION}. Install kerastorch {content['kerastorch']} or newer."
        )
    if content["version"] >= VERSION_OF_SEALS and not is_sealed:
        raise ValueError(damaged(path, "the SHA-256 that it was written with is not at its end"))
    return content["state"]


def _loaded(path: str | os.PathLike) -> tuple[Any, bool]:
    """What is in a torch file, and whether it ends in a digest of itself; torch sees nothing before it holds."""
    with open(path, "rb") as file:  # once: it may be replaced at any moment, and what is verified is what is read
        holds = _seal_holds(file)
        if holds is False:
            raise ValueError(damaged(path, "its SHA-256 is not the one it was written with"))
        try:
            parts_bytes = _bytes_of_parts(file, is_verified=holds is True)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            if _bytes_of_tensors(content) > parts_bytes:  # torch 2.9 makes them of memory that is not theirs
                raise ValueError("its tensors are larger than what is in it")
        except pickle.UnpicklingError as error:
            raise ValueError(why_refused(path)) from error
        except Exception as error:  # of many types, as damage is
            raise ValueError(damaged(path, error)) from error
    return content, holds is True


def _is_own(content: Any) -> bool:
    kinds = {"format": str, "version": int, "kerastorch": str, "state": dict}
    has_kinds = isinstance(content, dict) and all(isinstance(content.get(name), kinds[name]) for name in kinds)
    return has_kinds and content["format"] == MARK


def _is_sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        return _seal_holds(file) is True


def _seal_holds(file: BinaryIO) -> bool | None:
    """Whether a file is what it was when it was written; `None` = it does not say, as those of format 1 do not."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SEAL_BYTES))
    seal = SEAL.fullmatch(file.read())
    if seal is None:
        return None
    return hexdigest_of(file, size - SEAL_BYTES, then=NO_COMMENT) == seal[1].decode()


def _bytes_of_parts(file: BinaryIO, *, is_verified: bool) -> int:
    """Size of all that is in a zip file; refuses what torch would believe: a part of another sum or size."""
    with zipfile.ZipFile(file) as parts:
        infos = parts.infolist()
        parts_bytes = sum(one.file_size for one in infos)
        has_own_form = all(map(_has_own_form, infos)) and len(set(parts.namelist())) == len(infos)
        if not has_own_form or parts_bytes > file.seek(0, os.SEEK_END):
            raise ValueError("its parts are not as torch writes them")
        broken = None if is_verified else parts.testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken!r} in it is another")
    return parts_bytes


def _has_own_form(part: zipfile.ZipInfo) -> bool:
    # Of a folder torch reads nothing, and gives memory as it is.
    return part.compress_type == zipfile.ZIP_STORED and not part.external_attr & FOLDER


def _bytes_of_tensors(content: Any) -> int:
    """Size of the memory behind all tensors in nested containers; what is there twice counts once."""
    memories, seen, left = {}, set(), [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.device.type == "cpu":
                memories[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            left += value
    return sum(memories.values())


def plain(value: Any, where: str, copied: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
    """A copy of nested containers, with Python's numbers for numpy's.

    Args:
        value: Tensors and plain data.
        where: What it is called, for the error.
        copied: What becomes of a tensor. Default: the same without what somebody may have hung on to it.
    Raises:
        TypeError: something in it is neither, with the keys that lead to it.
    Example:
        >>> plain({"best": np.float64(0.5)}, "state")
        {'best': 0.5}
    """
    value = value.item() if isinstance(value, np.generic) else value
    kind = type(value)  # exactly: of a subclass a reader that runs nothing makes nothing
    if kind in SCALARS:
        return value
    if kind in TENSORS:
        return copied(value)
    if kind in (list, tuple):
        return kind(plain(part, f"{where}[{index}]", copied) for index, part in enumerate(value))
    if kind in (dict, OrderedDict, Counter):
        parts = {plain(key, f"a key of {where}"): plain(one, f"{where}[{key!r}]", copied) for key, one in value.items()}
        made = kind(parts)
        if kind is OrderedDict:  # a module's has the versions of its layers in `_metadata`
            vars(made).update(plain(vars(value), where, copied))
        return made
    raise TypeError(
        f"{where} is a {kind.__name__}, which no file can hold that is read without running what is in it. Give "
        f"tensors, dicts, lists, tuples, strings, numbers, booleans and None."
    )


def snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state in the memory of the CPU, for a thread to write while training goes on.

    Tensors that share memory share it in the copy, and each memory is copied once, as a whole. From a GPU it is copied
    into pinned memory, and waited for once.

    Args:
        state: What `state_of` returned.
    Raises:
        TypeError: something in it is neither a tensor nor plain data.
    Example:
        >>> weight = torch.zeros(2)
        >>> copied = snapshot({"weight": weight, "tied": weight, "best": np.float64(0.5)})
        >>> weight += 1
        >>> copied["tied"] += 2
        >>> copied
        {'weight': tensor([2., 2.]), 'tied': tensor([2., 2.]), 'best': 0.5}
    """
    storages: dict[tuple, torch.UntypedStorage] = {}
    streams = {}

    def copied(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # a shape alone
            return tensor.detach()
        is_odd = tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg()  # more than what its memory says
        if is_odd or tensor.device.type not in ("cpu", "cuda"):
            return tensor.detach().to("cpu", copy=True)
        storage = tensor.untyped_storage()
        memory = tensor.device, storage.data_ptr(), storage.nbytes()
        if memory not in storages:
            storages[memory] = _copied_storage(storage)
            if tensor.is_cuda:
                streams[tensor.device] = torch.cuda.current_stream(tensor.device)
        copy = torch.empty(0, dtype=tensor.dtype)
        return copy.set_(storages[memory], tensor.storage_offset(), tensor.size(), tensor.stride())

    taken = plain(state, "state", copied)
    for stream in streams.values():
        stream.synchronize()
    return taken


def _copied_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    given = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    copy = torch.empty(given.shape, dtype=torch.uint8, pin_memory=given.is_cuda)
    return copy.copy_(given, non_blocking=True).untyped_storage()


# Weights alone.


def write_weights(path: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Writes tensors by name as safetensors, whole or not at all; those that share memory are there by each name.

    Args:
        path: Where to; folders above it are made.
        weights: As `module.state_dict()` returns them.
    Raises:
        TypeError: something that is no tensor, or one that safetensors has no form for.
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    from . import __version__

    with replacing(path, _are_whole) as temporary:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            tensors = _apart(weights)
            # "pt" says whose layout it is, for other libraries.
            metadata = {"format": "pt", "kerastorch": __version__, "sha256": hexdigest_of_weights(tensors)}
            save_file(tensors, temporary, metadata=metadata)
            _put_metadata_in_order(temporary, metadata)
        except (KeyError, NotImplementedError, ValueError) as error:  # a dtype or a device
            raise TypeError(f"safetensors has no form for {error}. Call model.save, which keeps everything.") from error
        temporary.chmod(mode)  # safetensors lets nobody else read what it writes


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by name, on the CPU: of a safetensors file, or those of the module in a checkpoint of all state.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    kind = kind_of(path)
    if kind == "a torch file":
        return _module_of(path)
    if kind != "a safetensors file":
        raise ValueError(f"{str(path)!r} is {kind}, no safetensors. Give a file that model.save_weights wrote.")
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(damaged(path, error)) from error
    has_digest = "kerastorch" in metadata or "sha256" in metadata  # those of other libraries have neither
    if has_digest and metadata.get("sha256") != hexdigest_of_weights(weights):
        raise ValueError(damaged(path, "the SHA-256 of its tensors is not the one it was written with"))
    return weights


def hexdigest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes and shapes, as JSON, and then of each tensor's bytes; all in the order of the names.

    Args:
        weights: Contiguous tensors on the CPU.
    Example:
        >>> weights = {"b": torch.tensor(1, dtype=torch.uint8), "a": torch.zeros(2, dtype=torch.uint8)}
        >>> said = b'[["a", "torch.uint8", [2]], ["b", "torch.uint8", []]]'
        >>> hexdigest_of_weights(weights) == hashlib.sha256(said + bytes([0, 0, 1])).hexdigest()
        True
    """
    named = sorted(weights.items())
    digest = hashlib.sha256(json.dumps([[name, str(one.dtype), list(one.shape)] for name, one in named]).encode())
    for _, tensor in named:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # where they lie: nothing is copied
    return digest.hexdigest()


def _put_metadata_in_order(path: Path, metadata: dict[str, str]) -> None:
    """Equal weights make equal files: safetensors writes its metadata in an order of chance."""
    with open(path, "r+b") as file:
        file.seek(8)  # after the length of the header, which it begins
        file.write(b'{"__metadata__":' + json.dumps(metadata, separators=(",", ":")).encode())


def _are_whole(path: Path) -> bool:
    path.stat()  # the system's own error where it is gone
    try:
        read_weights(path)
    except ValueError:
        return False
    return True


def _module_of(path: str | os.PathLike) -> dict[str, Tensor]:
    module = read(path).get("module")
    if not isinstance(module, dict):
        raise ValueError(
            f"{str(path)!r} has no weights in it. Give a file that model.save or model.save_weights wrote."
        )
    return module


def refuse_no_weights(weights: Mapping[str, Any]) -> None:
    """Each value must be a dense tensor: safetensors holds nothing else.

    Raises:
        TypeError: something is not.
    """
    for name, value in weights.items():
        if type(value) in TENSORS and value.layout == torch.strided:
            continue
        what = f"a {type(value).__name__}" if type(value) not in TENSORS else "sparse"
        instead = "Call fit or predict first, which make it" if is_lazy(value) else "Call model.save, which keeps it"
        raise TypeError(f"{name!r} is {what}, and safetensors holds dense tensors alone. {instead}.")


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none of which shares memory with another."""
    refuse_no_weights(weights)
    apart, seen = {}, set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart
