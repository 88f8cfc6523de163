"""What ends a run from below it: memory that runs out, a data worker or another rank that dies. Where, and what to do.

An error is looked at when it has already ended the run, and the place is read from its traceback: the loop keeps
nothing for it.
"""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from .memory import is_out_of_memory
from .missing import is_of_another, words_of
from .step import forward_backward
from .structures import samples_in

LOOP = f"{__package__}.loop"
READING = tuple(f"{__package__}.{name}" for name in ("backends.", "data", "passes", "samples"))

DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+(?:, \d+)*)\) (?:exited unexpectedly|is killed)")
HOW_IT_DIED = re.compile(r"killed by signal: ([^.]+)\.|with exit code (\d+)")

UNUSED = "Expected to have finished reduction in the prior iteration"

WAITED_S = 0.2  # for a worker to end that has closed its end of a connection

MEMORY_OF_WORKERS = "Each worker holds batches of its own: give fewer num_workers or a smaller prefetch_factor"
CAUSE_IN_THIS_PROCESS = "Give num_workers=0 once, which shows what the dataset does there in this process"
WHY = {
    "SIGKILL": (
        "The system sends it when memory runs out (its log then names the process), and so do schedulers at a limit. "
        f"{MEMORY_OF_WORKERS}."
    ),
    "SIGBUS": (
        "Shared memory, through which workers hand over batches, is most likely full. Make it larger (docker run "
        f"--shm-size=8g). {MEMORY_OF_WORKERS}."
    ),
    "SIGTERM": "Somebody has ended it. Leave workers alone: a SIGTERM to the main process ends the run in good order.",
}


class Place(NamedTuple):
    """Where in a run an error came up.

    Attributes:
        phase: "training", "evaluation" or "prediction".
        epoch: Number of the epoch, counted from 1; `None` = outside of `fit`.
        batch: Number of the batch in it, counted from 1.
        samples: Samples in the batch; `None` = it was not there yet.
        step: What makes steps of batches, in training; else `None`.
    """

    phase: str
    epoch: int | None
    batch: int
    samples: int | None
    step: Any

    def __str__(self) -> str:
        of_samples = "" if self.samples is None else f", which has {self.samples} samples"
        phase = "validation" if self.phase == "evaluation" and self.epoch is not None else self.phase
        of_epoch = "" if self.epoch is None else f" of epoch {self.epoch}"
        return f"in {phase}, at batch {self.batch}{of_epoch} (counted from 1){of_samples}"


def explained(error: BaseException, in_callback: Callable[[], bool]) -> BaseException:
    """The error, or one of its type that says more: where memory ran out or a data worker died, and what to do.

    Args:
        error: With its traceback, from the loop on.
        in_callback: Tells whether it was raised in a hook: memory that runs out there is the callback's affair, while
            it is by chance that a worker dies just then.
    Returns:
        The error itself where it is of neither kind, or says so already; else one to raise from it.
    """
    try:
        return _explained(error, error, in_callback)
    except RuntimeError as told:
        # Torch's, of a dead worker, which comes whenever the system says that a process has ended.
        return _explained(told, error, in_callback)


def _explained(error: BaseException, raised: BaseException, in_callback: Callable[[], bool]) -> BaseException:
    """Of an error, or of another one that came while it was looked at, the text; the place is that of the first."""
    is_in_callback = in_callback()
    _untangle(raised)
    place = _place_of(raised)
    if place is None:
        return error
    if dead := _dead_worker(error):
        return RuntimeError(_text_of_dead(*dead, place))
    if is_of_another(error):
        return RuntimeError(words_of(error, str(place)))
    if isinstance(error, RuntimeError) and UNUSED in str(error):
        return RuntimeError(
            f"a parameter got no gradient {place}, or in the step before, as it did in others, and the ranks waited "
            f"for it. Give DDP(find_unused_parameters=True), or freeze what is not used (model.freeze)."
        )
    in_worker = str(error).startswith("Caught ")  # there the sample is named, and batches have nothing to do with it
    is_told = is_in_callback or in_worker or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
    if is_out_of_memory(error) and not is_told:
        return _again(error, _text_of_memory(error, place))
    return error


def _untangle(error: BaseException) -> None:
    """Lets go of the error what torch keeps of it in its own traceback, where an error of a worker is raised again.

    Such a circle is found late, and in whatever order: torch then waits five seconds for each of the data's workers.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("torch._utils", "reraise"):
            frame.clear()


# Where it was.


def _place_of(error: BaseException) -> Place | None:
    """Read from the loops that the error came through, the innermost of them deciding."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    loops = [index for index, frame in enumerate(frames) if frame.f_globals.get("__name__") == LOOP]
    names = {frames[index].f_code.co_name: index for index in loops}
    name = next((name for name in ("predict", "evaluate", "train_epoch", "fit") if name in names), None)
    if name is None:
        return None
    values = SimpleNamespace(**frames[names[name]].f_locals)
    position = frames[names["fit"]].f_locals["position"] if "fit" in names else None
    epoch = None if position is None else position.epoch + 1
    is_reading = not _is_of_step(frames[names[name] + 1 :])
    if name in ("train_epoch", "fit"):
        samples = None if is_reading or name == "fit" else _samples_in(values)
        return Place("training", epoch, position.batch + 1, samples, getattr(values, "step", None))
    phase = {"evaluate": "evaluation", "predict": "prediction"}[name]
    index = getattr(values, "index", -1)
    return Place(phase, epoch, index + 1 + is_reading, None if is_reading else _samples_in(values), None)


def _is_of_step(frames: list[FrameType]) -> bool:
    """Whether what the loop called is of this package: what it iterates over begins in C, or is the user's own."""
    name = frames[0].f_globals.get("__name__", "") if frames else ""
    return name.startswith(f"{__package__}.") and not name.startswith(READING)


def _samples_in(values: SimpleNamespace) -> int | None:
    x = values.x if hasattr(values, "x") else getattr(values, "batch", (None,))[0]
    try:
        return samples_in(x)
    except StopIteration:  # it has no tensors
        return None


# Memory.


def _text_of_memory(error: BaseException, place: Place) -> str:
    reason = (str(error) or type(error).__name__).partition("\n")[0].rstrip(". ")
    peak = _peak_bytes(error)
    at_most = "" if peak is None else f" At its peak, {peak / 2**30:.2f} GiB were in use."
    return f"memory ran out {place}: {reason}.{at_most} {_advice(place)}"


def _advice(place: Place) -> str:
    if place.phase == "prediction":
        return "Give predict a smaller batch_size; kt.callbacks.Predictions keeps outputs on the disk."
    if place.phase == "evaluation":
        smaller = "evaluate a smaller batch_size" if place.epoch is None else "fit a smaller validation_batch_size"
        return f"Give {smaller}, or the loader that it reads from."
    gentler = 'compile precision="bf16", which halves most of what is kept for the backward pass'
    size, may_halve = getattr(place.step, "size", None), getattr(place.step, "may_halve", False)
    if may_halve:
        return f"A single sample does not fit: give smaller ones or a smaller module, or {gentler}."
    if size is not None:
        return f"Give a microbatch smaller than {size}, or {gentler}."
    if place.step is forward_backward:
        pieces = 'fit microbatch="auto", which cuts batches into pieces that fit, or a smaller batch_size'
        return f"Give {pieces}; or {gentler}."
    return f"Give a smaller batch_size with accumulate, which makes one step of several batches; or {gentler}."


def _peak_bytes(error: BaseException) -> int | None:
    """The most memory that was in use where it ran out, if that is known."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
        is_known = torch.cuda.is_initialized()
        devices = range(torch.cuda.device_count()) if is_known else ()
        return max(map(torch.cuda.max_memory_allocated, devices), default=None)
    if sys.platform == "win32" or not (isinstance(error, MemoryError) or "CPUAllocator" in str(error)):
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Workers.


def _dead_worker(error: BaseException) -> tuple[str, str | None, str | None] | None:
    """Process id of a worker that died, the signal that killed it, its exit code; the latter two where known."""
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):  # it died while it handed over a batch
        return _first_dead(error)
    if not isinstance(error, RuntimeError) or not (found := DEAD_WORKER.match(str(error))):
        return None
    said = "".join(f"{one} " for one in _chain(error))
    how = HOW_IT_DIED.search(said)
    if how is None:
        return _first_dead(error) or (found[1], None, None)
    killed_by, code = how.groups()
    return found[1], killed_by and _name_of_signal(killed_by), code


def _first_dead(error: BaseException) -> tuple[str, str | None, str | None] | None:
    """What a loader, if it was one that the error came through, knows of a worker that has ended."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for worker in (one for owner in owners for one in getattr(owner, "_workers", ())):
        try:
            worker.join(WAITED_S)
        except RuntimeError as told:  # torch's, which comes whenever the system says that a process has ended
            return _dead_worker(told)
        if worker.exitcode:
            code = worker.exitcode
            return str(worker.pid), signal.Signals(-code).name if code < 0 else None, str(code) if code > 0 else None
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _name_of_signal(words: str) -> str:
    """ "Killed" -> "SIGKILL": torch says it as the C library does."""
    return next((one.name for one in signal.Signals if signal.strsignal(one) == words), words)


def _text_of_dead(process: str, killed_by: str | None, code: str | None, place: Place) -> str:
    if killed_by is not None:
        how = f"was killed by {killed_by}"
    else:
        how = "ended unexpectedly" if code is None else f"ended with exit code {code}"
    why = WHY.get(killed_by, f"{CAUSE_IN_THIS_PROCESS}.")
    return f"a data worker (process {process}) {how} {place._replace(samples=None)}. {why}"


def _again(error: BaseException, message: str) -> BaseException:
    """An error that whoever catches the given one catches: of its type, or of the next above that takes a message."""
    for kind in type(error).__mro__:
        try:
            return kind(message)
        except TypeError:  # it takes other arguments
            continue
    raise AssertionError("BaseException takes any arguments")
