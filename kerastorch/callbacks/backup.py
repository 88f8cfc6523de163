"""BackupAndRestore: a run that was killed goes on from its last backup, when the same script is started again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping
from numbers import Integral
from pathlib import Path
from typing import Any

from ..checkpoint import read
from ..seeding import random_state
from .base import Callback
from .files import make_folder


class BackupAndRestore(Callback):
    """Backs up the whole run while it trains; `fit` with a backup in the folder goes on from there.

    The backup has weights, optimizers, schedules, history, all callbacks' states and the random numbers; it is made
    between two epochs, or between two batches, when all callbacks have done their part. The run that goes on takes the
    steps that the other would have taken, bit for bit on the CPU. With `save_freq` in batches it goes through those
    before the backup once more, without training on them, and the means that this one epoch logs are those of its other
    batches. What cannot be exact: samples that are augmented at random, and the order of a loader that shuffles, beside
    `steps_per_epoch` as a count.

    Args:
        backup_dir: Folder of the backup, of this run alone.
        save_freq: `"epoch"`, or a number of training batches: then at the first batch after so many at which no
            gradients are gathered. Default: `"epoch"`.
        double_checkpoint: Whether the backup before is kept too, to go on from where the newest is damaged. Default:
            `False`.
        delete_checkpoint: Whether a run that comes to its end removes the backup; one ended by Ctrl-C or `max_time`
            keeps it. Default: `True`.
    Raises:
        ValueError: a folder without a name, or a `save_freq` that is neither. In `fit`: a backup of another model, or
            one that is damaged.
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
    ) -> None:
        if not str(backup_dir):
            raise ValueError("backup_dir is empty. Give a folder, such as 'runs/backup'.")
        is_count = isinstance(save_freq, Integral) and not isinstance(save_freq, bool) and save_freq >= 1
        if save_freq != "epoch" and not is_count:
            raise ValueError(f'save_freq={save_freq!r} is not known. Give "epoch", or a number of batches from 1 up.')
        self.backup_dir = Path(backup_dir)
        self.save_freq, self.double_checkpoint, self.delete_checkpoint = save_freq, double_checkpoint, delete_checkpoint
        self._position: dict[str, Any] = {}
        self._is_loaded = False

    def restored(self) -> dict[str, Any] | None:
        """The state to go on from; `None` = there is no backup."""
        files = [path for path in (self._newest, self._previous) if path.exists()]
        for path in files:
            try:
                return read(path)
            except ValueError as error:
                if path == files[-1]:
                    raise
                warnings.warn(f"{error} The run goes on from the backup before.", stacklevel=3)
        return None

    @property
    def _newest(self) -> Path:
        return self.model.path_for(self.backup_dir) / "backup.pt"

    @property
    def _previous(self) -> Path:
        return self._newest.with_name("previous.pt")

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        make_folder(self._newest.parent, "BackupAndRestore")
        self._batches, self._is_begun = 0, False
        self._taken = self._position["batches"] if self._is_loaded else 0
        self._is_loaded = False

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._at_epoch = random_state()
        if self._is_begun and self.save_freq == "epoch":
            self._save(epoch, 0)
        self._epoch, self._is_begun = epoch, True

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        if self.save_freq != "epoch" and self._batches >= self.save_freq and not self.model.is_gathering:
            self._save(self._epoch, batch)
            self._batches = 0
        self._batches += 1
        self._taken += 1

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if self.delete_checkpoint and self.model.history.stopped_by not in ("interrupt", "max_time"):
            for path in (self._newest, self._previous):
                path.unlink(missing_ok=True)

    def _save(self, epoch: int, batch: int) -> None:
        self._position = {
            "epoch": epoch,
            "batch": batch,
            "steps": self.model.steps_taken,
            "batches": self._taken,
            # A loader draws the order of an epoch when it begins.
            "random_at_epoch": self._at_epoch,
            "random": random_state() if batch else self._at_epoch,
        }
        if self.double_checkpoint and self._newest.exists():
            os.replace(self._newest, self._previous)
        self.model.save(self._newest)

    def state_dict(self) -> dict[str, Any]:
        """Where in the run the backup was made."""
        return self._position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position, self._is_loaded = dict(state), True
