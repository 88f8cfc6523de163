"""Files that callbacks write: refused before training where they cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
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
            os.link(os.path.realpath(source), temporary)  # not a second name of a symbolic link
        except OSError:
            shutil.copyfile(source, temporary)


class WriteErrors:
    """What follows when the system refuses to write a file: the error, or a warning, once of each kind.

    Args:
        policy: `"raise"` or `"warn"`.
        owner: Who writes, for the warning.
    Raises:
        ValueError: another policy.
    """

    def __init__(self, policy: str, owner: str) -> None:
        if policy not in ("raise", "warn"):
            raise ValueError(f'on_write_error={policy!r} is not known. Give "raise" or "warn".')
        self.policy, self.owner = policy, owner
        self._said: set[int | None] = set()

    def reset(self) -> None:
        """A new run has not been told of any yet."""
        self._said.clear()

    def take(self, error: BaseException) -> None:
        """Raises an error or, where it is the system's and `policy` says so, warns of it."""
        if self.policy == "raise" or not isinstance(error, OSError):
            raise error
        if error.errno not in self._said:
            self._said.add(error.errno)
            reason = (error.strerror or str(error)).rstrip(".")
            warnings.warn(f"{self.owner} goes on without a file: {reason}.", stacklevel=2)
