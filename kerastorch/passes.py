"""The batches of a run, epoch after epoch, and where in the data it is, so that another run can go on from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader

from .data import Data
from .limits import Portion
from .position import Position
from .seeding import random_state, set_random_state
from .structures import leaves


@dataclass(frozen=True)
class Pass:
    """One pass through the data.

    Attributes:
        number: Its number, which its order depends on.
        offset: Batches that were taken before it began.
        random: The random numbers at its beginning; `None` = it draws none.
    """

    number: int
    offset: int
    random: dict[str, Any] | None


class Passes:
    """Gives the batches of one epoch after the other.

    Args:
        data: Where they come from.
        taken: How many an epoch has, and whether the next one goes on in the data where it ended.
        position: Where the run is.
        next_pass: Tells the number of the pass that an epoch begins with.
        feed: Brings batches to the device.
        looks_ahead: Whether `feed` takes a batch from the data before the one before it is trained on.
    """

    def __init__(
        self,
        data: Data,
        taken: Portion,
        position: Position,
        next_pass: Callable[[], int],
        feed: Callable[[Iterable], Iterator],
        looks_ahead: bool = False,
    ) -> None:
        self.data, self.taken, self.position, self.feed = data, taken, position, feed
        self._next_pass, self._looks_ahead = next_pass, looks_ahead and data.draws
        self._begun: deque[Pass] = deque(maxlen=2)  # the running one and, where batches are fetched ahead, the next
        self._stream: Iterator | None = None
        self._pulled, self._before_pull = 0, None
        self._is_over = False  # the running pass of data that tells by itself where it is
        self._saved: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None

    def epoch(self) -> Iterator:
        """The batches of the next epoch; in a run that goes on, those that are left of it."""
        saved, self._saved = self._saved, None
        batches = None if saved is None else self._gone_on(*saved)
        if self.taken.goes_on:
            found = self._stream = self._stream or self._endless(batches)
        else:
            found = self._begin(self._next_pass(), 0) if batches is None else batches
        if self._looks_ahead:
            found = self._noting(found)
        if self.data.own is not None and self.data.own_size is not None:
            found = self._noting_the_end(found)
        return self.feed(islice(found, self.taken.batches and self.taken.batches - self.position.batch))

    @property
    def indices(self) -> list[int] | None:
        """The numbers of the samples in the running batch; `None` where that is not known."""
        running = self._running
        return None if running is None else self.data.indices(running.number, self._done - running.offset)

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is; the data's own state where it has one."""
        if self._saved is not None:  # a callback saves before the run that goes on has opened its data
            return dict(self._saved[0])
        running = (
            self._running if self.position.batch or self.taken.goes_on else None
        )  # else the next pass is a new one
        return {
            "steps": self.data.steps,
            "pass": None if running is None else running.number,
            "batch": 0 if running is None else self._done - running.offset,
            "random": None if running is None else running.random,
            "random_before_next": self._before_pull if self._looks_ahead and self._pulled > self._done else None,
            "own": self._own_state(running),
            "is_over": running is not None and self._is_over,
        }

    def _own_state(self, running: Pass | None) -> Any:
        own = self.data.own
        # Between two passes a loader begins anew, with what it draws then.
        return None if own is None or (running is None and isinstance(own, DataLoader)) else own.state_dict()

    def refuse_other_data(self, state: Mapping[str, Any], source: str) -> None:
        """A place within a pass is one in passes of the same length.

        Raises:
            ValueError: the data has another number of batches.
        """
        if state["batch"] and state["steps"] != self.data.steps:
            raise ValueError(
                f"{source} goes on at batch {state['batch']} of {state['steps']}, but the data now has "
                f"{self.data.steps} batches. Give the data and the batch_size that the run was given."
            )

    def load_state_dict(self, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """The next epoch goes on where a state was taken.

        Args:
            state: What `state_dict` returned.
            now: The random numbers at that time.
        """
        if state["own"] is not None and self.data.own is not None:
            self.data.own.load_state_dict(state["own"])
        self._stream = None
        self._saved = None if state["pass"] is None else (state, now)

    def _gone_on(self, state: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator:
        """The rest of a pass; what is before it is left out, and the random numbers are then those of `now`."""
        generators = self.data.generators
        self._begun.append(Pass(state["pass"], self._done - state["batch"], state["random"]))
        if state["random"] is not None:
            set_random_state(state["random"], generators)
        batches = self.data.batches(state["pass"], state["batch"] if self.data.own is None else 0)
        is_over = state["is_over"] or state["batch"] == state["steps"]
        if self.data.own is not None and is_over:  # which its state may have forgotten
            batches = iter(())
        if state["random_before_next"] is not None:
            set_random_state(state["random_before_next"], generators)
            batches = chain(list(islice(batches, 1)), batches)
        set_random_state(now, generators)
        return batches

    def _begin(self, number: int, offset: int) -> Iterator:
        drawn = random_state(self.data.generators) if self.data.draws else None
        self._begun.append(Pass(number, offset, drawn))
        return self.data.batches(number)

    def _endless(self, batches: Iterator | None) -> Iterator:
        """Pass after pass, until one is empty or the only one is over; first the rest of one."""
        if batches is None:
            number, offset, start = self._next_pass(), self._done, 0
        else:
            number, offset = self._running.number, self._running.offset
            start = self._done - offset
        while True:
            taken = start
            batches = self._begin(number, offset) if batches is None else batches
            for taken, batch in enumerate(batches, start + 1):  # noqa: B007
                yield batch
            if taken == 0 or not self.data.repeats:
                return
            number, offset, start, batches = number + 1, offset + taken, 0, None

    def _noting_the_end(self, batches: Iterator) -> Iterator:
        for batch in batches:
            samples = len(next(leaves(batch[0]))) if len(batch) == 3 else batch[3].whole
            self._is_over = samples < self.data.own_size
            yield batch

    def _noting(self, batches: Iterator) -> Iterator:
        """Keeps the random numbers of before each batch, which is fetched while others are still drawn from them."""
        self._pulled = self._done
        while True:
            self._before_pull = random_state(self.data.generators)
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._pulled += 1
            yield batch

    @property
    def _running(self) -> Pass | None:
        """The pass of the next batch to be trained on, as far as it has begun."""
        return next((one for one in reversed(self._begun) if one.offset <= self._done), None)

    @property
    def _done(self) -> int:
        """Batches of the data that are behind the run: of all of it, or of the epoch where each begins a pass."""
        position = self.position
        if not self.taken.goes_on:
            return position.batch
        return position.batches_before + position.batch + position.dropped
