"""What a file is, by the end of its name and by its first bytes, and what to say of one that is not ours."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

STATES, WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".pkl"), (".safetensors",)  # endings, the first to be suggested
KERAS = (".weights.h5", ".h5", ".hdf5", ".keras")

_OWN_FILE = "Give a file that model.save wrote."
_CALLS = {
    "a safetensors file": "It holds weights alone: call model.load_weights.",
    "a Keras file": "Its weights are in Keras's layout, not torch's. Give a file that model.save wrote.",
}


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


def no_state(path: str | os.PathLike, kind: str) -> str:
    """What to say of a file that is no torch file.

    Args:
        path: The file.
        kind: As `kind_of` says it.
    """
    return f"{str(path)!r} is {kind}, no checkpoint. {_CALLS.get(kind, _OWN_FILE)}"


def why_refused(path: str | os.PathLike) -> str:
    """What to say of a torch file with more in it than can be read without running anything."""
    try:
        with zipfile.ZipFile(path) as file:
            pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    except Exception as error:  # of many types, as damage is
        return damaged(path, error)
    if b"pytorch-lightning_version" in pickled:
        return _lightning(path)
    return (
        f"{str(path)!r} holds more than tensors and plain data, and was not read: reading the rest may run anything. "
        f"{_OWN_FILE}"
    )


def what_foreign(path: str | os.PathLike, content: Any) -> str:
    """What to say of a torch file of plain data that is not ours.

    Args:
        path: The file.
        content: What is in it.
    """
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        return _lightning(path)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return (
            f"{str(path)!r} is a plain state_dict of {len(content)} tensors. Call "
            f"model.module.load_state_dict(torch.load({str(path)!r}))."
        )
    return f"{str(path)!r} is a torch file with a {type(content).__name__} of somebody else's. {_OWN_FILE}"


def damaged(path: str | os.PathLike, why: Exception | str) -> str:
    """What to say of a damaged file.

    Args:
        path: The file.
        why: What is wrong with it.
    """
    what = (str(why) or type(why).__name__).splitlines()[0].rstrip(".")
    return f"{str(path)!r} is damaged: {what}. Give an older file."


def _lightning(path: str | os.PathLike) -> str:
    return (
        f"{str(path)!r} is a checkpoint of Lightning. Its names begin with the attribute that held the module, such as "
        f"'net.': call model.module.load_state_dict({{name.removeprefix('net.'): value for name, value in torch.load("
        f"{str(path)!r}, weights_only=True)['state_dict'].items()}})."
    )
