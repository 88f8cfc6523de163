"""How long a run is, how much data it goes through, and when it validates; and what wins where these disagree.

`fit`'s arguments become numbers here, before anything runs. The loop asks `Ending` after each batch and `Frequency` for
the next validation.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count
from numbers import Integral, Real
from typing import Any

from .callbacks.base import SIGNALS
from .checks import is_count, refuse_nonpositive
from .durations import seconds


@dataclass(frozen=True)
class Limits:
    """Where a run may end and where it must.

    Attributes:
        first_epoch: Number of its first epoch, 0-based.
        epochs: Number of the epoch to end before; `None` = none.
        min_epochs, min_steps: Before these, nobody's `stop_training` ends it.
        max_steps: Optimizer steps.
        max_time_s: Seconds.
    """

    first_epoch: int = 0
    epochs: int | None = 1
    min_epochs: int = 0
    min_steps: int = 0
    max_steps: float = math.inf
    max_time_s: float = math.inf

    def numbers(self, first: int) -> Iterable[int]:
        """Numbers of the epochs from the first to come, maybe without end."""
        return count(first) if self.epochs is None else range(first, self.epochs)


def limits(
    epochs: Any, initial_epoch: Any, min_epochs: Any, min_steps: Any, max_steps: Any, max_time: Any, dry_run: Any
) -> Limits:
    """`fit`'s arguments as `Limits`; without `epochs`, `max_steps` or `max_time` alone say where a run ends.

    Raises:
        TypeError, ValueError: one that is no count or no time.
    """
    refuse_nonpositive(epochs=epochs, max_steps=max_steps, min_epochs=min_epochs or None, min_steps=min_steps or None)
    if isinstance(initial_epoch, bool) or not isinstance(initial_epoch, Integral) or initial_epoch < 0:
        raise ValueError(
            f"initial_epoch={initial_epoch!r} is not the number of an epoch. Give a whole number from 0 up."
        )
    max_time_s = math.inf if max_time is None else seconds(max_time, "max_time")
    if dry_run:
        return Limits(initial_epoch, initial_epoch + 1)
    if epochs is None and max_steps is None and max_time is None:
        epochs = min_epochs or 1
    return Limits(initial_epoch, epochs, min_epochs or 0, min_steps or 0, max_steps or math.inf, max_time_s)


class Ending:
    """Whether a run is over, and why.

    A stop that somebody asked for waits for the minimums; the maximums and signals wait for nothing. What one of
    several processes alone may know, a signal, the time or a wish, ends the run for all of them at the same step.

    Args:
        model: Its `stop_training` is a stop asked for.
        training: Counts the optimizer steps.
        limits: Of the run, which begins now.
        history: Of the run.
        position: Where the run is.
    Attributes:
        epochs_done: Number of the epoch that comes next.
        interrupted_by: `"interrupt"` once the user pressed Ctrl-C, or the name of the signal that came; else `None`.
        is_near: Whether it can be due though nobody asked for a stop: the loop need not ask after each batch else.
        is_announced: Whether the callbacks know.
        reason: `None` while the run goes on; then `interrupted_by`, `"max_steps"`, `"max_time"` or `"stop_training"`.
    """

    def __init__(self, model: Any, training: Any, limits: Limits, history: Any, position: Any) -> None:
        self.model, self.training, self.limits = model, training, limits
        self._is_alone = training.ranks.world == 1
        self._signal: str | None = None
        self.history, self.position = history, position
        self.epochs_done, self.is_announced = limits.first_epoch, False
        self.interrupted_by: str | None = None
        self.is_near = limits.max_steps < math.inf or limits.max_time_s < math.inf or not self._is_alone
        self.reason: str | None = None
        self._deadline, self._is_late = time.monotonic() + limits.max_time_s, False
        self._waits_at_batches = not self._is_alone and model.may_stop_at_batches

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal asked for the end, and all processes know."""
        return self.interrupted_by is not None

    @property
    def is_signalled(self) -> bool:
        """Whether a signal came to this process."""
        return self._signal is not None

    def interrupt(self, by: str = "interrupt") -> None:
        """A signal came: it ends the run once all processes know of it."""
        self._signal, self.is_near = self._signal or by, True
        if self._is_alone:
            self.interrupted_by = self._signal

    def heed(self, now: bool = True) -> None:
        """Has each of several processes know what any of them wishes; called by all of them at the same place.

        Args:
            now: Whether they wait for one another; else what is known is what was wished at the call before.
        """
        if self._is_alone:
            return
        wishes = [self.model.stop_epoch, self.model.stop_training, time.monotonic() >= self._deadline]
        wishes += [self._signal == name for name in SIGNALS]
        agreed = self.training.ranks.agree(wishes, now)
        self.model.stop_epoch, self.model.stop_training, self._is_late = agreed[:3]
        signals = (name for name, was_sent in zip(SIGNALS, agreed[3:], strict=True) if was_sent)
        self.interrupted_by = self.interrupted_by or next(signals, None)

    def ends_epoch(self) -> bool:
        """After a batch: whether it was the last one of its epoch."""
        self.heed(now=self._waits_at_batches)  # where only a signal or the time can ask for it, nobody waits
        return self.model.stop_epoch or self.is_due()

    def break_off(self) -> None:
        """An interruption came in the middle of a step: what was to be saved could not be gone on from."""
        self.interrupt()
        self.interrupted_by = self._signal
        self.is_announced, self.history.stopped_by = True, self.interrupted_by
        self.position.waiting.clear()

    def is_over_before(self, epoch: int) -> bool:
        """Whether an epoch shall not begin; one that an earlier run has begun comes to its end, if no signal came."""
        self.epochs_done = epoch
        is_gone_on = bool(self.position.batch or self.history.epoch)  # by a run whose end may have been asked for
        is_asked = self.is_near or (is_gone_on and self.model.stop_training)
        return is_asked and self.is_over() and (self.position.batch == 0 or self.is_interrupted)

    def is_over(self) -> bool:
        """Whether no other batch may follow; callbacks hear of it once, while what they save can be gone on from."""
        self.heed()
        if self.is_due() and not self.is_announced:
            self.is_announced, self.history.stopped_by = True, self.reason
            for hook in self.training.hooks.on_train_pause:
                hook()
            self.position.reach_safe_point()
        return self.reason is not None

    def is_due(self) -> bool:
        """Whether no other batch may follow."""
        if self.is_interrupted:
            self.reason = self.interrupted_by
        elif self.training.steps >= self.limits.max_steps:
            self.reason = "max_steps"
        elif self._is_late or (self._is_alone and time.monotonic() >= self._deadline):
            self.reason = "max_time"
        elif self.model.stop_training and self._has_minimum():
            self.reason = "stop_training"
        return self.reason is not None

    def _has_minimum(self) -> bool:
        return self.epochs_done >= self.limits.min_epochs and self.training.steps >= self.limits.min_steps


@dataclass(frozen=True)
class Frequency:
    """When a run validates.

    Attributes:
        epochs: After every so many epochs, or after these, counted from 1; `None` = it goes by batches.
        batches: Training batches between two validations; `None` = it goes by epochs.
        goes_on: Whether batches are counted on across epochs, and not anew in each.
    """

    epochs: int | Collection[int] | None = 1
    batches: int | None = None
    goes_on: bool = False

    def is_due_after(self, epoch: int) -> bool:
        """Whether a validation follows on the last batch of an epoch, 0-based."""
        if self.epochs is None:
            return False
        return (epoch + 1) % self.epochs == 0 if isinstance(self.epochs, int) else epoch + 1 in self.epochs

    def is_repeated_in(self, limits: Limits) -> bool:
        """Whether there is more than one validation in a run, as far as is known."""
        if self.epochs is None or limits.epochs is None:
            return True
        return sum(map(self.is_due_after, limits.numbers(limits.first_epoch))) > 1


def frequency(freq: Any, batches: int | None) -> Frequency:
    """`validation_freq` as a `Frequency`.

    Args:
        freq: A number of epochs, a collection of epochs counted from 1, a fraction of an epoch, or `"N steps"`.
        batches: Batches in an epoch; `None` = not known.
    Raises:
        ValueError: `freq` is none of these, or a fraction of nobody knows how much.
    """
    if isinstance(freq, Integral) and not isinstance(freq, bool) and freq >= 1:
        return Frequency(epochs=int(freq))
    if isinstance(freq, (list, tuple, set, range)) and freq and all(map(is_count, freq)):
        return Frequency(epochs=freq)
    if isinstance(freq, str) and (steps := re.fullmatch(r"\s*0*([1-9]\d*)\s*steps?\s*", freq)):
        return Frequency(epochs=None, batches=int(steps[1]), goes_on=True)
    if _is_fraction(freq):
        if freq == 1:
            return Frequency()
        return Frequency(epochs=None, batches=_part_of(batches, freq, "validation_freq", '"100 steps"'))
    raise ValueError(
        f"validation_freq={freq!r} does not say when to validate. Give a number of epochs from 1 up, a list of "
        f'epochs, a fraction of an epoch such as 0.25, or "100 steps".'
    )


@dataclass(frozen=True)
class Portion:
    """How many batches of the data a pass takes.

    Attributes:
        batches: So many; `None` = all, however many these are.
        goes_on: Whether the next pass takes up where this one ended, and not at the beginning.
    """

    batches: int | None
    goes_on: bool = False

    @property
    def asked_for(self) -> int | None:
        """The number of batches that was asked for; `None` = none was, but all or a part of those there are."""
        return self.batches if self.goes_on else None

    def at_most(self, number: int, of: int | None) -> Portion:
        """The first so many of each pass, of which there are `of` batches."""
        return Portion(min(int(number), self.batches or number, of or number))


def portion(name: str, wanted: Any, batches: int | None) -> Portion:
    """`steps_per_epoch` and its like as a `Portion`.

    Args:
        name: Of the argument, for the error.
        wanted: A number of batches; a fraction of those there are, the first of each pass; `None` = all.
        batches: Those there are; `None` = not known.
    Raises:
        TypeError, ValueError: `wanted` is neither, or a fraction of nobody knows how much.
    """
    if wanted is None:
        return Portion(batches)
    if _is_fraction(wanted):
        return Portion(_part_of(batches, wanted, name, "a whole number of batches"))
    return Portion(int(wanted), goes_on=True)


def refuse_no_amounts(
    steps_per_epoch: Any, validation_steps: Any, sanity_steps: Any, overfit_batches: Any, dry_run: Any
) -> None:
    """Each must be a number of batches or, but for the last two, may be a fraction.

    Raises:
        TypeError, ValueError: one is neither.
    """
    _refuse_no_amount("steps_per_epoch", steps_per_epoch)
    _refuse_no_amount("validation_steps", validation_steps, least=0)
    _refuse_no_amount("overfit_batches", overfit_batches, least=0)
    if not is_count(sanity_steps, least=-1):
        raise ValueError(f"sanity_steps={sanity_steps!r} is no number of batches. Give 0 for none, -1 for all.")
    if not isinstance(dry_run, bool) and not is_count(dry_run, least=0):
        raise ValueError(f"dry_run={dry_run!r} is no number of batches. Give True for one, or a whole number.")


def _refuse_no_amount(name: str, wanted: Any, least: int = 1) -> None:
    is_none = least == 0 and isinstance(wanted, float) and wanted == 0
    if wanted is None or is_none or _is_fraction(wanted) or is_count(wanted, least):
        return
    kind = TypeError if isinstance(wanted, bool) or not isinstance(wanted, Real) else ValueError
    raise kind(
        f"{name}={wanted!r} is no number of batches. Give a whole number from {least} up, or a fraction such as 0.1."
    )


def _is_fraction(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral) and 0 < value <= 1


def _part_of(batches: int | None, fraction: float, name: str, instead: str) -> int:
    """So many batches, rounded down, but one at least."""
    if batches is None:
        raise ValueError(
            f"{name}={fraction} is a fraction of an epoch, but this data has no known length. Give {instead}."
        )
    return max(1, math.floor(batches * fraction + 1e-9))  # 0.29 of 100 is 29, in floating point not quite
