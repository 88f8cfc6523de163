"""Files that appear whole or not at all: beside their place, on the disk, read back from it, and only then there.

What is in them, and how one tells that it is whole, others decide. What a writer leaves that is killed meanwhile, the
next writer of the same file removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
UNTOUCHED_S = 24 * 3600.0  # no writer is so slow
TEMPORARY = re.compile(r"\.[0-9a-f]{12}-([0-9a-f]{12})-(\d+)-[0-9a-f]{8}\.tmp")  # what is written, where, and by whom
NO_FLUSHING = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of file systems that know no fsync of a folder


def failure_of_first(ranks: Any, error: Exception | None) -> Exception | None:
    """What rank 0, which writes for all, has failed with: each process is to fail where it does.

    Args:
        ranks: The backend; all processes must ask.
        error: What this one has failed with.
    """
    said = ranks.collect(error and [getattr(error, "errno", None), str(error)], "a write")[0]
    if error is not None or said is None:
        return error
    return OSError(*said) if said[0] is not None else RuntimeError(f"rank 0 failed: {said[1]}")


@contextmanager
def replacing(path: str | os.PathLike, is_whole: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A place beside `path`: what is written there takes its place once it is on the disk, and is gone after an error.

    Args:
        path: The file to write or replace; folders above it are made, and a link is followed.
        is_whole: Reads what is on the disk, and says whether it is what was written. Default: `None`, not read.
    Raises:
        OSError: it cannot be written, or is not what was written when it is read back.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} is a folder. Give the path of a file in it.")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, f"{str(path)!r} is a device or a pipe, and not to be replaced. Give another path.")
    before = sys.exc_info()[1]
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)  # first: they take up room
        try:
            yield temporary
            _flush(temporary)
            if is_whole is not None and not is_whole(temporary):
                raise OSError(errno.EIO, "what was read back from the disk is not what was written")
            if target.exists():
                shutil.copymode(target, temporary)
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
    _flush_folder(target.parent)


class Hashed:
    """A file to write to from beginning to end, and the SHA-256 of what was written.

    Args:
        file: Where to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes all of it."""
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Hands what was written to the system."""
        self._file.flush()

    def hexdigest(self) -> str:
        """Of what was written so far, 64 characters."""
        return self._digest.hexdigest()


def hexdigest_of(file: BinaryIO, count: int, then: bytes = b"") -> str:
    """SHA-256 of the first bytes of a file, and of some more.

    Args:
        file: Open for reading.
        count: How many bytes of it.
        then: What comes after them. Default: nothing.
    """
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    file.seek(0)
    while count and (size := file.readinto(chunk[: min(count, CHUNK_BYTES)])):
        digest.update(chunk[:size])
        count -= size
    digest.update(then)
    return digest.hexdigest()


def _temporary(target: Path) -> Path:
    """A name beside a file that nobody else has, and that says what is written, and by whom."""
    return target.with_name(f"{_mark(target)}-{_place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_leftovers(target: Path) -> None:
    """Removes what those have begun to write to a file who are no more."""
    for path in target.parent.glob(f"{_mark(target)}-*.tmp"):
        with suppress(OSError):  # somebody else's, or removed meanwhile: what is to be written can be all the same
            if _is_left(path):
                path.unlink()


def _is_left(temporary: Path) -> bool:
    """Whether its writer is dead: a process of this place that is gone, or one anywhere that has long done nothing."""
    import psutil

    name = TEMPORARY.fullmatch(temporary.name)
    if name is None:
        return False
    if name[1] == _place() and not psutil.pid_exists(int(name[2])):
        return True
    status = temporary.stat()
    return time.time() - max(status.st_mtime, status.st_ctime) > UNTOUCHED_S


def _mark(target: Path) -> str:
    return "." + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def _place() -> str:
    """Where numbers of processes can be compared: a machine since it was started or, in a container, that alone."""
    known = [platform.node()]
    with suppress(OSError):  # elsewhere than in Linux
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:12]


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # out of memory: what is read back is to come from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush_folder(folder: Path) -> None:
    """Without it a power cut may give back the file that was there before."""
    if os.name == "nt":
        return  # has no such thing
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in NO_FLUSHING:
            raise OSError(
                error.errno,
                f"a file is in {str(folder)!r}, which may forget it in a power cut: {error.strerror}. Check the disk.",
            ) from error


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
