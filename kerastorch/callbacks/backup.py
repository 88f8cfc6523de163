"""BackupAndRestore: a run that was killed goes on from its last backup, when the same script is started again."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from numbers import Integral
from pathlib import Path
from typing import Any

from .base import SIGNALS, Callback
from .files import WriteErrors, link_or_copy, make_folder


class BackupAndRestore(Callback):
    """Backs up the whole run while it trains; `fit` with a backup in the folder goes on from there.

    The backup has weights, optimizers, schedules, history, all callbacks' states, the random numbers and the place in
    the data, within an epoch and between two optimizer steps too. The run that goes on takes the steps that the other
    would have taken, bit for bit on the CPU. A run that a signal (Ctrl-C, SIGTERM, SIGUSR1), `max_steps` or `max_time`
    ends is backed up once more, at its last batch.

    Args:
        backup_dir: Folder of the backup, of this run alone.
        save_freq: `"epoch"`, or after how many training batches. Default: `"epoch"`.
        double_checkpoint: Whether the backup before is kept too, to go on from where the newest is damaged. Default:
            `False`.
        delete_checkpoint: Whether a run that comes to its end removes the backup; one ended by a signal or `max_time`
            keeps it. Default: `True`.
        on_write_error: What follows when the system refuses to write a backup, as a full disk does: `"raise"`, or
            `"warn"` = it is said, once of each kind, and training goes on. The backup that is there stays. Default:
            `"raise"`.
    Raises:
        ValueError: a folder without a name, a `save_freq` or `on_write_error` that is neither. In `fit`: a backup of
            another model, or one that is damaged.
        OSError: nothing can be written to the folder.
    Example:
        >>> backup = BackupAndRestore("/tmp/backup", save_freq=100)  # for fit(..., callbacks=[backup])

    Source: arguments of `keras.callbacks.BackupAndRestore`, which starts the epoch anew where this goes on within it.
    """

    adds_to_logs = ()

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        on_write_error: str = "raise",
    ) -> None:
        if not str(backup_dir):
            raise ValueError("backup_dir is empty. Give a folder, such as 'runs/backup'.")
        is_count = isinstance(save_freq, Integral) and not isinstance(save_freq, bool) and save_freq >= 1
        if save_freq != "epoch" and not is_count:
            raise ValueError(f'save_freq={save_freq!r} is not known. Give "epoch", or a number of batches from 1 up.')
        self.backup_dir = Path(backup_dir)
        self.save_freq, self.double_checkpoint, self.delete_checkpoint = save_freq, double_checkpoint, delete_checkpoint
        self.on_write_error, self._errors = on_write_error, WriteErrors(on_write_error, type(self).__name__)
        self._batches = 0
        self._is_loaded = self._is_paused = False
        if save_freq == "epoch":
            self.on_train_batch_end = super().on_train_batch_end  # none, so that the loop calls none

    def backups(self) -> list[Path]:
        """The files to go on from that are there, the newest first."""
        return [path for path in (self._newest, self._previous) if path.exists()]

    @property
    def _newest(self) -> Path:
        return self.model.path_for(self.backup_dir) / "backup.pt"

    @property
    def _previous(self) -> Path:
        return self._newest.with_name("previous.pt")

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        make_folder(self._newest.parent, "BackupAndRestore")
        self._batches = self._batches if self._is_loaded else 0
        self._is_loaded = self._is_paused = False
        self._errors.reset()

    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._batches += 1
        if self._batches >= self.save_freq:
            self._batches = 0
            self.model.at_safe_point(self._save)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        is_cut = self._is_paused or self.model.history.stopped_by in SIGNALS
        if self.save_freq == "epoch" and not is_cut:
            self.model.at_safe_point(self._save)

    def on_train_pause(self) -> None:
        if self.model.history.stopped_by != "stop_training":
            self.model.at_safe_point(self._save)
            self._is_paused = True

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if self.delete_checkpoint and self.model.history.stopped_by in (None, "stop_training", "max_steps"):
            self.model.at_safe_point(self._delete)  # when the other callbacks have ended, too: until then they may fail

    def _delete(self) -> None:
        try:
            for path in (self._newest, self._previous):
                path.unlink(missing_ok=True)
        except OSError as error:
            self._errors.take(error)

    def _save(self) -> None:
        try:
            if self.double_checkpoint and self._newest.exists():
                link_or_copy(self._newest, self._previous)
            self.model.save(self._newest)
        except OSError as error:
            self._errors.take(error)

    def state_dict(self) -> dict[str, Any]:
        """Batches since the last backup."""
        return {"batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches, self._is_loaded = state.get("batches", 0), True
