"""Files that callbacks write: refused before training where they cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..writing import replacing


def make_folder(folder: str | os.PathLike, owner: str) -> Path:
    """Makes a folder, with those above it, and proves that files can be written there.

    Args:
        folder: Which one.
        owner: Who wants to write, for the error.
    Returns:
        The folder.
    Raises:
        OSError: it cannot be made, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # also on what only says that it can be written: a full disk
            return folder
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{owner} cannot write to {str(folder)!r}: {error.strerror}. Give a folder that can be written to.",
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, in the place of what is there; a copy where the file system has no links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
