"""ModelCheckpoint: when a run is saved, what the files are called, and which of them are kept.

What is in a file and how it gets onto the disk, the model and `checkpoint.py` decide.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..checkpoint import WEIGHTS, refuse_ending, snapshot, write, write_weights
from ..durations import seconds
from ..state import refuse_unsavable, state_of
from ..writing import failure_of_first
from .background import Background
from .base import SIGNALS
from .filenames import FileName
from .files import WriteErrors, link_or_copy, make_folder
from .messages import is_verbose, say
from .monitoring import Monitoring


@dataclass
class _Task:
    """What is to be written at a safe point, and in a state says what a run that goes on is still to write.

    Attributes:
        epoch: Number of the epoch, 0-based.
        path: The file, before it gets a number where it is there already; `None` = only `last`.
        value: What was monitored; `None` = nothing.
        last: The moment that `last` is due for, too; `None` = it is not.
        undo: What the callback knows without what is not on the disk yet.
    """

    epoch: int
    path: str | None = None
    value: float | None = None
    last: list[int] | None = None
    undo: dict[str, Any] | None = None


class ModelCheckpoint(Monitoring):
    """Saves the run: after each epoch, so many batches or so much time, and all of it or the best.

    A file has all of the state, for `fit(resume=...)` and `model.load`, or the weights alone, for `model.load_weights`.
    It appears whole or not at all: when all callbacks, those behind this one too, have done their part of the batch or
    the epoch, so that a run goes on from it exactly. After a validation by the averages of an `EMA`, these are the
    weights; a full file has both.

    A run that is ended early (by a signal, a limit, `stop_training`) leaves all of its state in `last` as it was before
    its last epoch was cut short: it is gone on from there, and an epoch that a signal has cut gets no full file.

    What is monitored is judged at the end of each epoch, or after each validation within it. With `save_freq` batches
    or `every`, a value of the training is judged when the time has come, a `val_` value after the next validation
    (Keras, where it is not in the logs, saves in any case). An epoch without validation is not judged by a `val_`
    value (Keras saves it in any case).

    A second run with the same instance goes on: it saves what is better than the best of the first, as in Keras.

    Args:
        filepath: Path of the files, with names in braces: `epoch` (from 1), `step` (optimizer steps of this `fit`),
            `batch` (from 1, not where epochs are saved), or a name in the logs: `"runs/{epoch:02d}-{val_loss:.3f}.pt"`.
            A `val_` value that an epoch does not have is `nan`. With `save_weights_only` the ending is `.safetensors`.
        monitor: Name in the logs that tells the best, for `save_best_only` and `save_top_k`. Default: `"val_loss"`.
        verbose: 1 = prints a line for each file. Default: 0.
        save_best_only: Whether to save only what is better than all before. Default: `False`.
        save_weights_only: Whether a file has the weights alone. Default: `False`.
        mode: `"min"`, `"max"` or `"auto"`: which way is better, as in `Monitoring`. Default: `"auto"`.
        save_freq: `"epoch"`, or after how many batches. Default: `"epoch"`.
        initial_value_threshold: What the first value must be better than, for `save_best_only`. Default: none.
        save_top_k: How many files to keep, the best by `monitor`, while others are deleted; -1 = all. Where two would
            have one name, the second gets `-v1`. Default: none is deleted.
        save_last: Whether the newest state is at `last`, too, with the same ending, in the folder before the first
            brace: after each epoch (or `save_freq`, `every`), among the best or not, and when a run ends or is stopped.
            Default: `False`.
        every: Time between two files, instead of epochs: seconds, a `timedelta`, `{"hours": 1}` or `"DD:HH:MM:SS"`.
            Default: `None`.
        on_exception: Whether to save to `exception`, beside `last`, when an error ends the run: for a look at it. What
            goes on from there is not exact. Default: `False`.
        background: Whether files are written by a thread while training goes on, from a copy in the CPU's memory. One
            at a time is: the next one waits for it, and so does the end of the run, and another callback that saves all
            of the state. Default: `False`.
        on_write_error: What follows when the system refuses to write a file, as a full disk does: `"raise"`, or
            `"warn"` = it is said, once of each kind, training goes on, and the next file is tried again. Files that are
            there stay. With `background` it is seen when the next file is due, or the epoch ends. Default: `"raise"`.
    Attributes:
        best: The best value so far; `None` before the first.
        best_model_path: The file with the best value, the newest one where nothing is monitored; `""` before it.
        last_model_path: The file that `save_last` wrote; `""` before it.
    Raises:
        ValueError: an argument that is none of these, or a combination that means nothing. When a file is written: a
            name in braces that the logs do not have.
        OSError: when training begins, the folder cannot be written to; later, with `on_write_error="raise"`, a file
            cannot be.
        TypeError: a path that is none. Before the first epoch: the state has something that no file can hold.
    Example:
        >>> import tempfile, torch, kerastorch as kt
        >>> model = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saving = kt.callbacks.ModelCheckpoint(folder + "/{epoch}.pt", "loss", save_top_k=2, save_last=True)
        ...     history = model.fit(torch.rand(8, 2), torch.ones(8, 1), epochs=4, callbacks=saving, verbose=0)
        ...     print(sorted(os.listdir(folder)), os.path.basename(saving.best_model_path))
        ['3.pt', '4.pt', 'last.pt'] 4.pt

    Source: Keras, `ModelCheckpoint`; `save_top_k`, `save_last` and the attributes are Lightning's, whose `last` is the
    newest among the best.
    """

    def __init__(
        self,
        filepath: str | os.PathLike,
        monitor: str | None = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        *,
        save_top_k: int | None = None,
        save_last: bool = False,
        every: Any = None,
        on_exception: bool = False,
        background: bool = False,
        on_write_error: str = "raise",
    ) -> None:
        has_best = save_best_only or save_top_k is not None
        super().__init__("val_loss" if monitor is None and not has_best else monitor, mode)
        if not isinstance(filepath, (str, Path)):
            raise TypeError(f"filepath={filepath!r} is a {type(filepath).__name__}, expected a path such as 'run.pt'.")
        self.monitor: str | None = self.monitor if has_best else None
        self.filepath, self.verbose, self.save_freq = str(filepath), is_verbose(verbose), save_freq
        self.save_best_only, self.save_top_k, self.save_weights_only = save_best_only, save_top_k, save_weights_only
        self.save_last, self.initial_value_threshold = save_last, initial_value_threshold
        self.saves_errors, self.background, self.on_write_error = on_exception, background, on_write_error
        self.every_s = None if every is None else seconds(every, "every")
        self._name, self._errors = FileName(self.filepath), WriteErrors(on_write_error, type(self).__name__)
        self._refuse_mistakes()
        self.best: float | None = None if initial_value_threshold is None else float(initial_value_threshold)
        self.best_model_path = self.last_model_path = ""
        self._kept: dict[str, float] = {}  # files of `save_top_k` and their values, oldest first
        self._epoch, self._batch, self._batches, self._began = 0, -1, 0, 0.0
        self._is_due = self._saves_epochs
        self._is_running = self._is_checked = self._is_failing = False
        self._before_dry_run: dict[str, Any] | None = None
        self._moment_of_last: list[int] | None = None  # optimizer steps, and samples of the epoch, in `last`
        self._task: _Task | None = None  # for the next safe point
        self._writing: _Task | None = None
        self._leaving: str | None = None  # the file that goes once the one being written is safe
        self._thread = Background() if background else None
        self._is_paused = False
        if self._saves_epochs and type(self).on_train_batch_end is ModelCheckpoint.on_train_batch_end:
            self.on_train_batch_end = super().on_train_batch_end  # none, so that the loop calls none

    @property
    def keys_needed(self) -> tuple[str, ...]:
        """Names in `filepath` that the logs must have."""
        return tuple(name for name in self._name.names if name not in FileName.COUNTS)

    @property
    def reads_batches(self) -> bool:
        """Whether it looks into the logs of batches, which lack what callbacks add at the end of an epoch."""
        return not self._saves_epochs and not self._awaits_validation

    @property
    def best_model_score(self) -> float | None:
        """The value of the file at `best_model_path`; `None` where there is none, or nothing is monitored."""
        return self.best if self.best_model_path and self.monitor is not None else None

    def saved_files(self) -> list[Path]:
        """The files of all state that are on the disk, those of earlier processes too, in no order; for `fit(resume)`.

        Of files with numbers in their names those are meant that have numbers there.
        """
        if self.save_weights_only:
            return []
        others = [self.best_model_path, *self._kept, *([self._beside("last")] if self.save_last else [])]
        found = self._name.files(self._place(self._name.folder or "."))
        return [*{*found, *(self._place(path) for path in others if path and self._is_there(path))}]

    # When.

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        super().on_train_begin(logs)
        make_folder(self._place(self._name.folder), type(self).__name__)
        self._before_dry_run = self.state_dict() if self.model.is_dry_run else None
        self._kept = {path: value for path, value in self._kept.items() if self._is_there(path)}
        if not self._is_loaded:
            self._task, self._moment_of_last, self._leaving = None, None, None
        elif self._leaving is not None and self._leaving not in self._kept and self._is_there(self._leaving):
            self._delete(self._leaving)  # what the run that this one goes on from had no time for
        self._is_running, self._is_checked, self._is_paused, self._is_failing = True, False, False, False
        self._errors.reset()
        self._began = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._epoch = epoch
        if not self._is_checked:  # here, where all callbacks have begun
            refuse_unsavable(self.model, is_weights=self.save_weights_only)
            self._is_checked = True
            if self._moment_of_last is not None and self._moment_of_last[0] > self.model.steps_taken:
                self._moment_of_last = None  # of a run that this one is not the rest of
            self._save_what_is_due()  # what the run that this one goes on from had no time for

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._batch = batch
        if self._saves_epochs or not self._is_time():
            return
        self._is_due, logs = True, self.model.of_all_ranks(logs)
        if self.monitor is None:
            self._plan(self._epoch, logs)
        else:
            self._judge(self._epoch, logs)  # a `val_` value is not there, and waits
        self._plan_last()

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if self._awaits_validation:
            super().on_interval_end(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if not self.model.samples_seen:  # it ended before its first batch
            return
        self._wait()
        if not self.save_weights_only and self.model.history.stopped_by in SIGNALS:
            return  # it is not over: the run that goes on ends it
        if self.monitor is None and self._saves_epochs:
            self._plan(epoch, logs)
        elif self._awaits_validation or (self.monitor is not None and self._saves_epochs):
            super().on_epoch_end(epoch, logs)
        if self._saves_epochs or epoch + 1 == self.params["epochs"]:
            self._plan_last()

    def judge(self, epoch: int, logs: MutableMapping, value: float) -> None:
        if not self._is_due:
            return
        self._wait()  # what is better than the best depends on whether that could be written
        self._is_due = self._saves_epochs
        if self._is_among_best(value):
            self._plan(epoch, logs, value)
        elif self.verbose:
            say(f"Epoch {epoch + 1}: {self.monitor} = {value:.5f} is not among the best, down to {self._bound():.5f}")

    def on_train_pause(self) -> None:
        if self.save_last and not self.save_weights_only:
            if self._moment_of_last != self._moment():
                self._plan_last()
            self._is_paused = True

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if self._is_broken_off:
            self._task = None
        self._save_what_is_due()
        if (self._moment_of_last or [None])[0] != self.model.steps_taken and not self._is_broken_off:
            self._plan_last()
            self._save_what_is_due()
        self._wait()
        if self.monitor is not None:
            super().on_train_end(logs)
        self._end()

    def on_exception(self, error: BaseException) -> None:
        if not self._is_running:
            return
        self._task, self._is_failing = None, True
        is_alone = self.model.backend.world == 1  # others may be anywhere, and all must take part in saving
        try:
            self._wait()
            # Who presses Ctrl-C a second time wants the end at once.
            if self.saves_errors and self.model.steps_taken and is_alone and not isinstance(error, KeyboardInterrupt):
                self._save_error()
        except Exception as failure:  # the first error is the one to be seen
            warnings.warn(f"{type(self).__name__} could not save what {error!r} ended: {failure}", stacklevel=2)
        self._end()

    @property
    def _is_broken_off(self) -> bool:
        """Whether the run was interrupted in the middle of a step: it is gone on with from what was saved before."""
        return self.model.history.stopped_by in SIGNALS and not (self._is_paused or self.save_weights_only)

    def _end(self) -> None:
        """After a run; of a dry one nothing is left."""
        self._is_running = False
        if self._before_dry_run is not None:
            self._take(self._before_dry_run)

    def _moment(self) -> list[int]:
        return [self.model.steps_taken, self.model.samples_seen]

    @property
    def _saves_epochs(self) -> bool:
        return self.save_freq == "epoch" and self.every_s is None

    @property
    def _awaits_validation(self) -> bool:
        return self.monitor is not None and self.monitor.startswith("val_")

    def _is_time(self) -> bool:
        if self.every_s is None:
            self._batches = (self._batches + 1) % self.save_freq
            return self._batches == 0
        now = time.monotonic()
        if not self.model.backend.collect(now - self._began >= self.every_s)[0]:  # by the clock of rank 0
            return False
        self._began = now
        return True

    # Which.

    @property
    def _is_full(self) -> bool:
        """Whether one of the files kept goes when another one comes."""
        return self.save_top_k is not None and 0 < self.save_top_k <= len(self._kept)

    def _is_among_best(self, value: float) -> bool:
        return (not self.save_best_only and not self._is_full) or self.is_better(value, self._bound())

    def _bound(self) -> float | None:
        """What must be beaten."""
        return self._kept[self._worst()] if self._is_full else self.best

    def _worst(self) -> str:
        """The file to give up; of equal ones the oldest."""
        return max(self._kept, key=lambda path: self._loss(self._kept[path]))

    def _loss(self, value: float) -> float:
        """A value of which lower is better, and NaN worst."""
        return math.inf if math.isnan(value) else value if self.mode == "min" else -value

    # At the next safe point.

    def _plan(self, epoch: int, logs: Mapping[str, Any] | None, value: float | None = None) -> None:
        """Has a file written when all callbacks have done their part."""
        counts = {"epoch": epoch + 1, "batch": self._batch + 1, "step": self.model.steps_taken}
        path = self._name.filled(counts, {} if logs is None else logs)
        self._await_safe_point(path=path, epoch=epoch, value=value)

    def _plan_last(self) -> None:
        if self.save_last and not self._is_paused:
            self._await_safe_point(last=self._moment())

    def _await_safe_point(self, **due: Any) -> None:
        is_first, self._task = self._task is None, replace(self._task or _Task(self._epoch), **due)
        if is_first:
            self.model.at_safe_point(self._save_what_is_due)

    def _save_what_is_due(self) -> None:
        """Writes the file that is due and `last`, or has them written while training goes on."""
        if self._task is None:
            return
        self._wait()
        task, self._task = self._task, None
        task.undo = self._books()
        loser = self._leaving = self._note(task)  # first: the file has it too
        try:
            act = partial(self._carry_out, task, loser, self._books(), self._writer())
            if self._thread is None:
                act()
                self._leaving = None
            else:
                self._thread.start(act)
                self._writing = task
        except BaseException as error:
            self._fail(task, error)

    def _wait(self) -> None:
        """Until the thread has nothing to do; its error is raised here, or said."""
        if self._writing is None:
            return
        error = None
        try:
            self._thread.wait()
        except Exception as failure:
            error = failure
        try:
            if not self._is_failing:
                error = failure_of_first(self.model.backend, error)
            if error is not None:
                self._fail(self._writing, error)
        finally:
            self._writing = self._leaving = None

    def _fail(self, task: _Task, error: BaseException) -> None:
        """What could not be written is forgotten, and the error raised or, once of each kind, said."""
        self._enter(task.undo)
        self._leaving = None
        self._errors.take(error)

    def _note(self, task: _Task) -> str | None:
        """Enters a file and `last` as if they were written, and returns the file that goes."""
        loser = None
        if task.path is not None:
            loser = self._worst() if self._is_full else None
            task.path = self._numbered(task.path, loser)
            self._note_file(task.path, task.value, loser)
        if task.last is not None:
            self._moment_of_last, self.last_model_path = task.last, self._beside("last")
        return loser if loser != task.path else None

    def _numbered(self, path: str, loser: str | None) -> str:
        stem, suffix, number = path.removesuffix(self._name.suffix), self._name.suffix, 0
        while path in self._kept and path != loser:
            number += 1
            path = f"{stem}-v{number}{suffix}"
        return path

    def _note_file(self, path: str, value: float | None, loser: str | None) -> None:
        if value is None:
            self.best_model_path = path
        elif self.save_best_only:
            self.best, self.best_model_path = value, path
        else:
            self._kept.pop(loser, None)
            self._kept[path] = value
            self.best_model_path = min(self._kept, key=lambda one: self._loss(self._kept[one]))
            self.best = self._kept[self.best_model_path]

    # Files.

    def _writer(self) -> Callable[[Path], None]:
        """Writes the state to a path: as it is then or, for the thread, as it is now."""
        if self._thread is None:
            return self.model.save_weights if self.save_weights_only else self.model.save
        if self.save_weights_only:
            state, write_state = self.model.backend.state(self.model.module), write_weights
        else:
            state, write_state = state_of(self.model, self.model._callbacks), write
        if self.model.backend.rank > 0:  # in its place: that it is there is all that anybody asks of it
            return lambda path: path.touch()
        copied = snapshot(state)
        return lambda path: write_state(path, copied)

    def _carry_out(
        self, task: _Task, loser: str | None, books: dict[str, Any], write_to: Callable[[Path], None]
    ) -> None:
        """One thing after the other: what is on the disk is not given up before what comes is safe."""
        last = self._place(self._beside("last"))
        if task.path is not None:
            write_to(self._place(task.path))
            task.undo = books | {name: task.undo[name] for name in ("last_model_path", "moment_of_last")}
            if self.verbose:
                self._say_saved(task, books["best"])
            if loser is not None:
                self._delete(loser)
        if task.last is not None and task.path is not None:
            link_or_copy(self._place(task.path), last)
        elif task.last is not None:
            write_to(last)
        elif self._is_paused and last.exists():
            os.utime(last)  # the newest file is what the run goes on from
        task.undo = books

    def _say_saved(self, task: _Task, best: float | None) -> None:
        what = "" if task.value is None else f"{self.monitor} = {task.value:.5f}, the best is {best:.5f}, "
        say(f"Epoch {task.epoch + 1}: {what}saved {task.path}")

    def _save_error(self) -> None:
        """The state of an error; `last`, which a run goes on from, stays, but weights alone are the newest there."""
        path = self._place(self._beside("exception"))
        (self.model.save_weights if self.save_weights_only else self.model.save)(path)
        if self.save_last and self.save_weights_only:
            link_or_copy(path, self._place(self._beside("last")))
            self.last_model_path = self._beside("last")

    def _place(self, path: str) -> Path:
        return Path(path) if self.model is None else self.model.path_for(path)

    def _is_there(self, path: str) -> bool:
        """Whether a file kept before is one to go on with; what is elsewhere is not ours to delete."""
        is_there = Path(path).parent.is_relative_to(self._name.folder) and self._place(path).exists()
        return self.model.backend.collect(is_there)[0]  # rank 0 has written it

    def _delete(self, path: str) -> None:
        try:
            self._place(path).unlink(missing_ok=True)
        except OSError as error:  # no reason to end a run
            warnings.warn(f"{type(self).__name__} could not delete {path!r}: {error.strerror}.", stacklevel=2)

    def _beside(self, name: str) -> str:
        return os.path.join(self._name.folder, name + self._name.suffix)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The best value, the files that are kept with their values, and what is still to be written."""
        self._wait()  # a run that goes on from here would neither know of this file nor come by its moment again
        due = self._task and [self._task.epoch, self._task.path, self._task.value, self._task.last]
        counts = {"batches": self._batches, "batch": self._batch, "is_due": self._is_due}
        return super().state_dict() | self._books() | counts | {"due": due, "leaving": self._leaving}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; files that are no longer there are forgotten when the run begins."""
        super().load_state_dict(state)
        self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        self._enter(state)
        self._batches, self._batch, self._is_due = state["batches"], state["batch"], state["is_due"]
        self._task = state["due"] and _Task(*state["due"])
        self._leaving = state["leaving"]

    def _books(self) -> dict[str, Any]:
        """What there is on the disk, once all is written."""
        return {
            "best": self.best,
            "kept": [[path, value] for path, value in self._kept.items()],
            "best_model_path": self.best_model_path,
            "last_model_path": self.last_model_path,
            "moment_of_last": self._moment_of_last,
        }

    def _enter(self, books: Mapping[str, Any]) -> None:
        self.best, self._kept = books["best"], dict(books["kept"])
        self.best_model_path, self.last_model_path = books["best_model_path"], books["last_model_path"]
        self._moment_of_last = books["moment_of_last"]

    # Mistakes.

    def _refuse_mistakes(self) -> None:
        self._refuse_paths()
        self._refuse_moments()
        self._refuse_best()

    def _refuse_paths(self) -> None:
        refuse_ending(self.filepath, is_weights=self.save_weights_only)
        if self.filepath.endswith(".dcp"):
            raise ValueError(
                f"filepath={self.filepath!r} ends as folders do, and ModelCheckpoint writes files. Give it another "
                f"ending, or call model.save with that path."
            )
        if self.save_weights_only and self._name.suffix not in WEIGHTS:
            raise ValueError(
                f"filepath={self.filepath!r} does not end in {WEIGHTS[0]!r}, as files of save_weights_only=True do. "
                f"Give {self.filepath.removesuffix(self._name.suffix) + WEIGHTS[0]!r}."
            )
        for name, is_written in (("last", self.save_last), ("exception", self.saves_errors)):
            if is_written and os.path.normpath(self._beside(name)) == os.path.normpath(self.filepath):
                raise ValueError(f"filepath={self.filepath!r} is where {name!r} goes, too. Give it another name.")

    def _refuse_moments(self) -> None:
        if self.save_freq != "epoch" and (not _is_whole(self.save_freq) or self.save_freq < 1):
            raise ValueError(
                f"save_freq={self.save_freq!r} is neither 'epoch' nor a number of batches from 1 up. For a time give "
                f"every, such as every={{'hours': 1}}."
            )
        if self.save_freq != "epoch" and self.every_s is not None:
            raise ValueError(f"save_freq={self.save_freq} and every both say when to save. Give one of them.")
        if self._saves_epochs and "batch" in self._name.names:
            raise ValueError(
                f"filepath={self.filepath!r} names the batch, but epochs are saved. Name the epoch or the step, or "
                f"give save_freq a number of batches."
            )
        unknown = [name for name in self.keys_needed if name.startswith("val_")]
        if unknown and not self._saves_epochs and not self._awaits_validation:
            raise ValueError(
                f"filepath={self.filepath!r} names {unknown[0]!r}, which is not known within an epoch. Name the epoch "
                f"or the step."
            )

    def _refuse_best(self) -> None:
        count, threshold = self.save_top_k, self.initial_value_threshold
        if count is not None and (not _is_whole(count) or count < -1 or count == 0):
            raise ValueError(f"save_top_k={count!r} is no number of files. Give 1 or more, or -1 for all of them.")
        if count is not None and self.save_best_only:
            raise ValueError(
                f"save_best_only=True and save_top_k={count} both say what to keep. Give save_top_k, which deletes "
                f"what is no longer among the best, or save_best_only, which deletes nothing."
            )
        if count not in (None, 1) and not self._name.names:
            raise ValueError(
                f"save_top_k={count} keeps several files, but filepath={self.filepath!r} is one. Name the epoch in it: "
                f"{{epoch}}."
            )
        is_number = isinstance(threshold, Real) and not isinstance(threshold, bool)
        if threshold is not None and not (is_number and self.save_best_only):
            raise ValueError(
                f"initial_value_threshold={threshold!r} is a number for save_best_only=True to compare with. Give "
                f"both, or neither."
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
