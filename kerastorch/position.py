"""Position: where a run is, so that what is saved now can be gone on from exactly there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """What a run trains on next, kept up to date by the loop, and what waits for a safe point.

    A safe point lies between two batches or two epochs: all callbacks have done their part of the one, and nothing of
    the next has begun.

    Attributes:
        epoch: Number of the epoch, 0-based.
        batch: Number of the batch in it, 0-based.
        batches_before: Batches that the epochs before it had.
        dropped: Batches that were taken from the data and not trained on, as a callback wished.
        is_validating: Whether the validation that follows on the batch before comes first.
        random: The random numbers to save, where those of now have been drawn for what will be done again.
        waiting: What to call at the next safe point.
    """

    epoch: int = 0
    batch: int = 0
    batches_before: int = 0
    dropped: int = 0
    is_validating: bool = False
    random: dict[str, Any] | None = None
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def end_epoch(self) -> None:
        """The epoch is over."""
        self.epoch, self.batches_before, self.batch = self.epoch + 1, self.batches_before + self.batch, 0

    def reach_safe_point(self) -> None:
        """Calls what waits for it, once."""
        waiting, self.waiting = self.waiting, []
        for function in waiting:
            function()
