"""Starting ranks from within a process: torch's elastic launcher runs a function in each, and this brings it back.

The ranks are forked, so that they have what the calling process has, whatever it is and wherever it was defined: a
script without `if __name__ == "__main__"`, a REPL, a notebook. Each computes with one thread, since the threads of a
forked process are gone; its GPUs are its own.
"""

from __future__ import annotations

import base64
import builtins
import gc
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .ranks import SCRATCH

FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1")
MONITOR_INTERVAL_S = 0.1
PARENT_INTERVAL_S = 1.0
LAST_WORDS_S = 0.5
SIGNALLED = "signal"


class RankError(RuntimeError):
    """What one of several processes failed with: its traceback is the message."""


def launch(processes: int, call: Callable[[], Any], max_restarts: int = 0) -> Any:
    """Calls a function in so many ranks of this machine and returns what rank 0 returns.

    Args:
        processes: How many.
        call: Called without arguments; what it returns can be pickled.
        max_restarts: How often all are started again when one has failed.
    Raises:
        RuntimeError: ranks cannot be started here.
        Exception: a rank failed: an error of its own type where that can be brought back, else `RuntimeError`, with
            its traceback as the cause.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _refuse_no_fork()
    with tempfile.TemporaryDirectory(prefix="kerastorch-ranks-") as folder, _environment_kept():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port, whichever it is
            local_addr="localhost",
            max_restarts=max_restarts,
            monitor_interval=MONITOR_INTERVAL_S,
            start_method="fork",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        sys.stdout.flush()  # else each rank would print again what waits here
        exit_codes = None
        try:
            with _signals_forwarded(Path(folder), processes), _quiet():
                returned = _in_thread(partial(elastic_launch(config, _as_rank), call, folder))
        except ChildFailedError as error:  # not kept, nor what its traceback holds: the launcher's store and threads
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if exit_codes is not None:
            raise_first_failure(Path(folder), processes, exit_codes)
        # Of this process's own child, through a pipe; to the host: a process that has used a GPU cannot be forked.
        return torch.load(io.BytesIO(returned[0]), map_location="cpu", weights_only=False)


def _in_thread(function: Callable[[], Any]) -> Any:
    """Called in a thread of its own, the launcher leaves the signals alone, which end a run in its own way."""
    returned, raised = [], []

    def run() -> None:
        try:
            returned.append(function())
        except BaseException as error:  # for the one who waits
            raised.append(error)

    thread = threading.Thread(target=run, name="kerastorch-ranks")
    thread.start()
    thread.join()
    if raised:
        raise raised.pop()
    return returned[0]


def _refuse_no_fork() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError(
            "ranks cannot be started from within a process on this system, which cannot fork. Start the script with "
            "torchrun --nproc-per-node=N."
        )
    for kind in ("cuda", "xpu"):
        if torch.get_device_module(kind).is_initialized():
            raise RuntimeError(
                f"ranks cannot be started from a process that has used a GPU ({kind} is initialized). Make the Model "
                f"before anything is put there, or start the script with torchrun --nproc-per-node=N."
            )


def _as_rank(call: Callable[[], Any], folder: str) -> bytes | None:
    """What each rank does."""
    rank = os.environ["RANK"]
    try:
        _begin(Path(folder, f"{rank}.pid"))
        returned = call()
        if rank != "0":
            return None
        packed = io.BytesIO()
        torch.save(returned, packed, pickle_protocol=pickle.HIGHEST_PROTOCOL)  # else numpy's arrays would take long
        return packed.getvalue()
    except BaseException as error:
        _put_down(error, Path(folder), rank, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if isinstance(error, KeyboardInterrupt):  # which torch takes for a good end, and then waits for a result
            raise SystemExit(130) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()


def _begin(pid_file: Path) -> None:
    """Makes a forked process one that can be told to end, and to compute."""
    os.setpgrp()  # Ctrl-C goes to the process that waits, which tells the ranks once
    for name in FORWARDED:
        number = getattr(signal, name)
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ[SCRATCH] = str(pid_file.parent)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    gc.freeze()  # what the calling process has left, such as the store of an earlier launch, waits for its threads
    pid_file.write_text(str(os.getpid()))
    if (signalled := pid_file.parent / SIGNALLED).exists():  # before there was a process to send it to
        os.kill(os.getpid(), int(signalled.read_text()))


def _end_with(parent: int) -> None:
    """A rank does not outlive the process that has started it, whatever ends that."""
    while os.getppid() == parent:
        time.sleep(PARENT_INTERVAL_S)
    os._exit(1)


def _put_down(error: BaseException, folder: Path, rank: str, attempt: str) -> None:
    """Leaves an error for the process that waits: as text, the earliest of all ranks' being the cause of the others."""
    words = {
        "time": time.time(),
        "type": type(error).__name__,
        "message": _message_of(error),
        "errno": getattr(error, "errno", None),
        "packed": None if type(error).__module__ == "builtins" else _packed(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    partly = folder / f"{rank}.{attempt}.partly"
    partly.write_text(json.dumps(words))
    partly.rename(partly.with_suffix(".error"))  # whole or not at all: a rank can be ended at any time
    limit = time.monotonic() + LAST_WORDS_S
    while len([*folder.glob(f"*.{attempt}.error")]) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < limit:
        time.sleep(0.02)  # once this rank is gone the launcher ends the others, who may have the same to say


def _packed(error: BaseException) -> str | None:
    """An error of a type that is not Python's; `None` = it cannot be brought back."""
    try:
        return base64.b64encode(pickle.dumps(error)).decode()
    except Exception:  # whatever a type of somebody's own may raise there
        return None


def _unpacked(packed: str | None) -> Exception | None:
    """The error again; `None` = there is none of that kind, or its type cannot be made of what it was pickled as."""
    try:
        error = packed and pickle.loads(base64.b64decode(packed))  # of this process's own child
    except Exception:  # its text is there, too
        return None
    return error if isinstance(error, Exception) else None


def _message_of(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}) was called"
    is_quoted = isinstance(error, KeyError) and len(error.args) == 1  # by Python, which will do so again
    return str(error.args[0] if is_quoted else error)


def raise_first_failure(folder: Path, processes: int, exit_codes: dict[int, int]) -> None:
    """Raises what the first rank to fail has raised; one that was killed has left nothing to say.

    Args:
        folder: Where the ranks have put down their errors.
        processes: How many ranks there were.
        exit_codes: By rank, of those that the launcher found ended.
    """
    attempts = [(int(one.suffixes[0][1:]), one) for one in folder.glob("*.error")]
    last = max((attempt for attempt, _ in attempts), default=0)
    said = {one.name.split(".")[0]: json.loads(one.read_text()) for attempt, one in attempts if attempt == last}
    causes = {rank: words for rank, words in said.items() if not _is_of_another(words)}
    silent = [rank for rank in range(processes) if str(rank) not in said]
    if silent and not causes:
        ended = [rank for rank, code in exit_codes.items() if rank in silent and code != -signal.SIGTERM]
        rank = [*ended, *silent][0]  # by SIGTERM the launcher ends the others
        raise RuntimeError(f"rank {rank} {_end_of(exit_codes.get(rank))}; the others were ended.")
    rank, first = min((causes or said).items(), key=lambda pair: pair[1]["time"])
    known = getattr(builtins, first["type"], RuntimeError)
    kind = known if isinstance(known, type) and issubclass(known, (Exception, KeyboardInterrupt)) else RuntimeError
    is_of_all = len(said) == processes and len({(one["type"], one["message"]) for one in said.values()}) == 1
    which = "" if is_of_all else f" (rank {rank})"
    if (own := _unpacked(first["packed"])) is not None:
        raise own from RankError(f"in rank {rank}:\n{first['traceback']}")
    cause = RankError(f"in rank {rank}:\n{first['traceback']}")
    try:
        error = kind(f"{first['message']}{which}")
    except TypeError:  # one that wants other arguments
        error = RuntimeError(f"{first['type']}: {first['message']}{which}")
    if first["errno"] is not None:
        error.errno = first["errno"]
    raise error from cause


def _end_of(exitcode: int | None) -> str:
    """How a rank ended that has said nothing; `None` = another one was found first, which missed it."""
    if exitcode is not None and exitcode >= 0:
        return f"ended with exit code {exitcode}, without an error of Python's"
    name = "somebody" if exitcode is None else signal.Signals(-exitcode).name
    is_maybe_memory = name in ("somebody", "SIGKILL")
    return f"was killed by {name}" + (", as the system does where memory is short" if is_maybe_memory else "")


def _is_of_another(words: dict[str, Any]) -> bool:
    """Whether a rank has failed because another one was gone."""
    return "by peer" in words["message"]


@contextmanager
def _environment_kept() -> Iterator[None]:
    """The launcher sets variables of its own."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _signals_forwarded(folder: Path, processes: int) -> Iterator[None]:
    """Signals that end a run go on to the ranks, which end it; a handler that the user has installed stays."""

    def forward(number: int, frame: Any) -> None:
        begun = [*folder.glob("*.pid")]
        if len(begun) < processes:
            (folder / SIGNALLED).write_text(str(number))
        for file in begun:
            try:
                os.kill(int(file.read_text()), number)
            except (ProcessLookupError, ValueError):  # it is over, or has not written its number yet
                continue

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in FORWARDED]
    ours = [one for one in numbers if signal.getsignal(one) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, forward) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the words of the launcher, which are its developers', and of Python, which fears for threads."""
    import logging

    names = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing.spawn")
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
