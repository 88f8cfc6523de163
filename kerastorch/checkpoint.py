"""Files of a model: all of its state, as a torch file of plain data, and its weights alone, as safetensors.

A file appears whole or not at all, and reading one runs nothing that is in it. What the state is, `state.py` says; when
files are written and what they are called, others decide.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import secrets
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MARK = "kerastorch checkpoint"
VERSION = 1  # of the format: raised when an older kerastorch could not read what is written

STATES, WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".pkl"), (".safetensors",)  # endings, the first to be suggested
KERAS = (".weights.h5", ".h5", ".hdf5", ".keras")

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
    with replacing(path) as temporary, open(temporary, "xb") as file:
        torch.save(content, file)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` was given, with its tensors on the CPU.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, something else, or of a newer format. Nothing that is in it was run.
    """
    kind = kind_of(path)
    if kind != "a torch file":
        raise ValueError(f"{str(path)!r} is {kind}, no checkpoint. {_CALLS.get(kind, _OWN_FILE)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_refused(path)) from error
    except Exception as error:  # of many types, as damage is
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(content, dict) or content.get("format") != MARK or not {"version", "state"} <= content.keys():
        raise ValueError(_what_foreign(path, content))
    if content["version"] > VERSION:
        raise ValueError(
            f"{str(path)!r} was written by kerastorch {content['kerastorch']} in format {content['version']}, and this "
            f"one reads up to format {VERSION}. Install kerastorch {content['kerastorch']} or newer."
        )
    return content["state"]


def plain(value: Any, where: str) -> Any:
    """A copy of nested containers, with Python's numbers for numpy's.

    Args:
        value: Tensors and plain data.
        where: What it is called, for the error.
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
        return value.detach()  # without what somebody may have hung on to it
    if kind in (list, tuple):
        return kind(plain(part, f"{where}[{index}]") for index, part in enumerate(value))
    if kind in (dict, OrderedDict, Counter):
        parts = {plain(key, f"a key of {where}"): plain(part, f"{where}[{key!r}]") for key, part in value.items()}
        copied = kind(parts)
        if kind is OrderedDict:  # a module's has the versions of its layers in `_metadata`
            vars(copied).update(plain(vars(value), where))
        return copied
    raise TypeError(
        f"{where} is a {kind.__name__}, which no file can hold that is read without running what is in it. Give "
        f"tensors, dicts, lists, tuples, strings, numbers, booleans and None."
    )


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

    tensors = _apart(weights)
    with replacing(path) as temporary:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})  # whose layout it is, for other libraries
        except (KeyError, NotImplementedError, ValueError) as error:  # a dtype or a device
            raise TypeError(f"safetensors has no form for {error}. Call model.save, which keeps everything.") from error
        temporary.chmod(mode)  # safetensors lets nobody else read what it writes


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by name, on the CPU: of a safetensors file, or those of the module in a checkpoint of all state.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = kind_of(path)
    if kind == "a torch file":
        return read(path)["module"]
    if kind != "a safetensors file":
        raise ValueError(f"{str(path)!r} is {kind}, no safetensors. Give a file that model.save_weights wrote.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error


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
    """Contiguous tensors, none of which shares memory with another."""
    refuse_no_weights(weights)
    apart, seen = {}, set()
    for name, tensor in weights.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


# Files.


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A place beside `path`: what is written there takes its place once it is on the disk, and is gone after an error.

    Args:
        path: The file to write or replace; folders above it are made, and a link is followed.
    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} is a folder. Give the path of a file in it.")
    before = sys.exc_info()[1]
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # also where both are links to one file: then moving it does nothing
    except Exception as error:
        cause = _cause(error, before)
        if cause is None:
            raise
        raise type(cause)(
            cause.errno,
            f"{str(path)!r} cannot be written: {cause.strerror}. Make room or give another path; a file that was there "
            f"is as it was.",
        ) from error


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _cause(error: BaseException | None, before: BaseException | None) -> OSError | None:
    """What the system had against it, below what torch, safetensors and this file say on top of that.

    Args:
        error: The error.
        before: One that was being handled when it came, and has nothing to do with it.
    """
    while error is not None and error is not before:
        if isinstance(error, OSError) and error.strerror and error.__cause__ is None:
            return error
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code:
            return OSError(int(code[1]), os.strerror(int(code[1])))
        error = error.__cause__ or error.__context__
    return None


def refuse_ending(path: str | os.PathLike, *, is_weights: bool) -> None:
    """A name must not end as files of another kind do.

    Args:
        path: The file to be written.
        is_weights: Whether it is to hold weights alone.
    Raises:
        ValueError: it does.
    """
    path, own, other = str(path), *((WEIGHTS, STATES) if is_weights else (STATES, WEIGHTS))
    ending = next((ending for ending in KERAS + other if path.endswith(ending)), None)
    if ending is not None:
        whose = "Keras's files" if ending in KERAS else "weights alone" if other is WEIGHTS else "pickled files"
        raise ValueError(
            f"{path!r} ends as {whose} do. Give {path.removesuffix(ending) + own[0]!r}, which says what is in it."
        )


_OWN_FILE = "Give a file that model.save wrote."
_CALLS = {
    "a safetensors file": "It holds weights alone: call model.load_weights.",
    "a Keras file": "Its weights are in Keras's layout, not torch's. Give a file that model.save wrote.",
}


def kind_of(path: str | os.PathLike) -> str:
    """What a file is, by its first bytes: `"a torch file"`, `"a safetensors file"`, `"a Keras file"` or what is wrong.

    Raises:
        FileNotFoundError, IsADirectoryError: it is no file.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} is a folder. Give the path of a file in it.")
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, f"there is no file {str(path)!r}. Give the path of one that was saved.")
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"\x89HDF"):
        return "a Keras file"
    if head[8:] == b"{":  # after the length of the header
        return "a safetensors file"
    if not head.startswith(b"PK\x03\x04"):
        return "damaged or a file of another kind" if head else "an empty file"
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception:  # of many types, as damage is
        return "a torch file that is cut off or damaged"
    if any(name.endswith("data.pkl") for name in names):
        return "a torch file"
    return "a Keras file" if "model.weights.h5" in names else "a zip file"


def _why_refused(path: str | os.PathLike) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    except Exception as error:  # of many types, as damage is
        return _damaged(path, error)
    if b"pytorch-lightning_version" in pickled:
        return _lightning(path)
    return (
        f"{str(path)!r} holds more than tensors and plain data, and was not read: reading the rest may run anything. "
        f"{_OWN_FILE}"
    )


def _what_foreign(path: str | os.PathLike, content: Any) -> str:
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        return _lightning(path)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return (
            f"{str(path)!r} is a plain state_dict of {len(content)} tensors. Call "
            f"model.module.load_state_dict(torch.load({str(path)!r}))."
        )
    return f"{str(path)!r} is a torch file with a {type(content).__name__} of somebody else's. {_OWN_FILE}"


def _lightning(path: str | os.PathLike) -> str:
    return (
        f"{str(path)!r} is a checkpoint of Lightning. If you trust it, call model.module.load_state_dict(torch.load("
        f"{str(path)!r}, weights_only=False)['state_dict']); names there may begin with the name of an attribute."
    )


def _damaged(path: str | os.PathLike, error: Exception) -> str:
    what = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{str(path)!r} is damaged: {what}. Give an older file."
