"""The largest batch that fits: trials of the real step, and strategies that say which size to try next.

At heart it is a loop: while the strategy names a size, try it. A trial is a short `fit` with a validation, in every
process on its part of the batch; it fits where no process ran out of memory or took more than it may.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from ..callbacks.base import Callback
from ..checks import is_count, size_at
from ..data import first_batches, open_data, with_batches_of
from ..memory import free_memory, is_out_of_memory
from .budget import Peak, as_bytes, free_bytes, in_words, limited
from .forecast import NOISE, Forecast, traced_bytes
from .rehearsal import fit_quietly, rehearsing, synchronize, without_schedules

NEAR_BEST = 0.97  # of the best throughput: as good, for all that three steps can tell
FIRST, SURE = 0.4, 0.7  # of the memory there is, by a forecast for which nothing was measured yet
FAR = 1.5  # times what was tried: beyond it, a curve through trials alone may turn out to be quadratic, as attention is
GROWTH = 4  # at most so many times what was tried, where that took too little to tell how it goes on
MOST = 2**14  # samples in a batch, of data that does not tell how many it has, and may have no end
IN_SIGHT = 5  # times the largest peak: a budget above it would leave the curve in a plot flat
PATIENCE = 10  # times as many batches as steps, for a step of one's own that asks for none
ROWS = 2  # samples in each process to begin with, since normalizations refuse a single one
OUT = "out of memory"


@dataclass(frozen=True)
class Trial:
    """What came of one batch size.

    Attributes:
        size: Samples in a batch, of all processes together.
        fits: Whether all of them had memory for it.
        peak_bytes: The most that any of them took beyond what it had before; a forecast where it was not run.
        samples_per_s: How fast it went, all processes together; `None` where it did not.
        was_run: Whether it was really tried, and not only forecast.
        reason: Why it does not fit; "" where it does.
    """

    size: int
    fits: bool
    peak_bytes: int
    samples_per_s: float | None = None
    was_run: bool = True
    reason: str = ""


class BatchSize(int):
    """The batch size that was found: a whole number that remembers how.

    Attributes:
        trials: Every `Trial`, in their order.
        per_rank: Samples on the rank that takes most of each batch; the size itself in one process.
        budget_bytes: Memory that each process could take; `None` = not known.
    """

    trials: tuple[Trial, ...] = ()
    per_rank: int = 0
    budget_bytes: int | None = None

    @property
    def throughput_best(self) -> int:
        """The smallest size that was tried whose samples/s are within 3% of the best."""
        measured = [one for one in self.trials if one.fits and one.samples_per_s]
        best = max((one.samples_per_s for one in measured), default=0.0)
        return min((one.size for one in measured if one.samples_per_s >= NEAR_BEST * best), default=int(self))

    @property
    def title(self) -> str:
        """What was found, in a line."""
        budget = "" if self.budget_bytes is None else f" of {in_words(self.budget_bytes)}"
        speed = f"; as fast from {self.throughput_best} on" if self.trials else ""
        return f"batch size {int(self)}{budget}{speed}"

    def __repr__(self) -> str:
        return f"BatchSize({int(self)}, per_rank={self.per_rank}, throughput_best={self.throughput_best})"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec)

    def __str__(self) -> str:
        from tabulate import tabulate

        names = ("batch size", "fits", "peak memory", "samples/s", "")
        rows = [
            (
                one.size,
                "yes" if one.fits else "no",
                in_words(one.peak_bytes) if one.peak_bytes else "",
                f"{one.samples_per_s:,.0f}" if one.samples_per_s else "",
                self._remark(one),
            )
            for one in self.trials
        ]
        return f"{self.title}\n{tabulate(rows, names, 'simple', disable_numparse=True, stralign='right')}"

    def _remark(self, trial: Trial) -> str:
        if trial.size == int(self):
            return "<- found"
        return trial.reason if trial.was_run else "forecast, not tried"

    def plot(self, path: str | None = None) -> Any:
        """Draws memory and samples/s over the batch size; needs matplotlib.

        Args:
            path: File to save the picture in, `.png`, `.svg` or `.pdf`; `None` = it is not saved.
        Returns:
            The `matplotlib.figure.Figure`.
        """
        import matplotlib.pyplot as plt

        figure, (memory, speed) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        by_size = sorted(self.trials, key=lambda one: one.size)
        for fits, marker, label in ((True, "o-", "fits"), (False, "x", "does not fit")):
            shown = [one for one in by_size if one.fits is fits and one.peak_bytes]
            if shown:
                memory.plot([one.size for one in shown], [one.peak_bytes / 1e9 for one in shown], marker, label=label)
        most, there_is = max((one.peak_bytes for one in by_size), default=0), ""
        if self.budget_bytes is not None and self.budget_bytes >= IN_SIGHT * most:
            there_is = f", of {in_words(self.budget_bytes)}"
        elif self.budget_bytes is not None:
            memory.axhline(self.budget_bytes / 1e9, color="gray", linestyle="--", label="there is")
        fast = [one for one in by_size if one.samples_per_s]
        speed.plot([one.size for one in fast], [one.samples_per_s for one in fast], "o-")
        speed.axvline(self.throughput_best, color="gray", linestyle="--", label=f"as fast from {self.throughput_best}")
        for axes, title in ((memory, f"peak memory in GB{there_is}"), (speed, "samples/s")):
            axes.set(xlabel="batch size", title=title, ylim=(0, None))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.axvline(int(self), color="tab:green", alpha=0.5, label=f"found: {int(self)}")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def find_batch_size(
    model: Any,
    data: Any,
    y: Any,
    *,
    mode: str,
    steps_per_trial: int,
    max_trials: int,
    init: int,
    margin: float,
    memory: int | str | None,
    **fit_options: Any,
) -> BatchSize:
    """What `Model.find_batch_size` returns; see there."""
    if mode not in [*STRATEGIES]:
        raise ValueError(f"mode={mode!r} is not known. Give {', '.join(map(repr, STRATEGIES))}.")
    for name, number in (("steps_per_trial", steps_per_trial), ("max_trials", max_trials), ("init", init)):
        if not is_count(number):
            raise ValueError(f"{name}={number!r} is no number of its kind. Give a whole number from 1 up.")
    if not isinstance(margin, Real) or isinstance(margin, bool) or not 0 <= margin < 1:
        raise ValueError(
            f"margin={margin!r} is no part of a batch size. Give a number from 0 up to but not including 1."
        )
    if fit_options.get("microbatch") == "auto":
        raise ValueError(
            "microbatch='auto' cuts batches until they fit, so that there is no largest one. Give one of the two: a "
            "batch_size, or microbatch=None."
        )
    memory = as_bytes(memory)
    with rehearsing(model, data, on_host=True) as undo:
        most, batch = _look_at(model, data, y, fit_options)
        budgets = _budgets(model.backend, memory)
        search = Search(model, (data, y), most, fit_options, int(steps_per_trial), budgets, undo)
        most, forecast = most or MOST, search.forecast_from(batch)
        undo()
        least = ROWS * model.backend.world if model.backend.world > 1 else 1
        bracket = Bracket(most, max(int(init), least), margin, forecast)
        search.warm_up(bracket)
        trials = search.run(STRATEGIES[mode], bracket, max_trials)
    free_memory(model.backend.device)
    result = known_size(model.backend, max(one.size for one in trials if one.fits))
    result.trials, result.budget_bytes = tuple(trials), search.budget
    return result


def known_size(backend: Any, size: int) -> BatchSize:
    """A size of which only the number is left, as in the file of a run that goes on."""
    result = BatchSize(size)
    result.per_rank = size if backend.share is None else backend.share(size)[1].most
    return result


def _look_at(model: Any, data: Any, y: Any, fit_options: dict[str, Any]) -> tuple[int | None, tuple]:
    """How many samples there are, where that is known, and a small batch of them."""
    sample_weight = fit_options.get("sample_weight")
    singles = with_batches_of(data, 1)
    opened = open_data(singles, y, sample_weight, model._reading(None if singles is not data else 1))
    (first, *others), opened = first_batches(opened, 2)
    if not others:
        raise ValueError("the data has one sample, so there are no batch sizes to choose from. Give more data.")
    model._with_optimizer(opened)
    return opened.steps, first[:3]


def _budgets(backend: Any, memory: int | None) -> list[int] | None:
    """What each process may take; `None` = not known."""
    here = 1 if backend.world == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", backend.world))
    free = free_bytes(backend.device, here)
    if free is None and memory is not None:
        raise ValueError(
            f"memory={in_words(memory)} was given, but nobody can measure what a {backend.device.type} device has in "
            f"use. Leave it out: what does not fit is found by its error."
        )
    known = [one for one in (memory, free) if one is not None]
    budgets = backend.collect(min(known, default=None), "a search for a batch size")
    return None if None in budgets else budgets


class Bracket:
    """What is known of the sizes: the largest that fits, and the smallest that does not, of which its trial is kept.

    Args:
        most: Samples in the data.
        init: Size to begin with.
        margin: How near to the largest is near enough, as a part of it.
        forecast: Of the part of the memory that a size takes.
    """

    def __init__(self, most: int, init: int, margin: float, forecast: Forecast) -> None:
        self.most, self.init, self.margin, self.forecast = most, min(init, most), margin, forecast
        self.low, self.smallest = 0, None

    def narrow(self, trial: Trial) -> None:
        """Takes in what came of a trial."""
        if trial.fits:
            self.low = max(self.low, trial.size)
        elif self.smallest is None or trial.size < self.smallest.size:
            self.smallest = trial

    @property
    def high(self) -> int | None:
        """The smallest size that does not fit."""
        return self.smallest and self.smallest.size

    @property
    def is_narrow(self) -> bool:
        """Whether the largest that fits is known well enough."""
        top = self.most if self.high is None else self.high - 1
        return top - self.low <= self.margin * self.low


# Strategies: from what is known to the size to try next; `None` = that is enough.


def power(known: Bracket) -> int | None:
    """Twice what fits, until something does not; where the first does not, half of it, until something does."""
    if known.high is None:
        return min(max(2 * known.low, known.init), known.most) if known.low < known.most else None
    return None if known.low else (known.high // 2 or None)


def binsearch(known: Bracket) -> int | None:
    """As `power`, and then the middle between what fits and what does not."""
    if known.high is None or not known.low:
        return power(known)
    return None if known.is_narrow else (known.low + known.high) // 2


def predict(known: Bracket) -> int | None:
    """What a forecast says, made better by what trials have taken; as `binsearch` where it is contradicted."""
    forecast, low, top = known.forecast, known.low, known.most if known.high is None else known.high - 1
    if known.is_narrow or (not low and known.high is not None):
        return None if low else (known.high // 2 or None)
    if forecast.part_at(top) is None:
        return binsearch(known)
    if not low:
        certain = forecast.largest_within(SURE, top)
        return top if certain == top else max(forecast.largest_within(FIRST, top), min(known.init, top))
    most = min(GROWTH * low, top) if forecast.is_vague else top
    if forecast.largest_within(1.0, most) - low <= known.margin * low:
        return None if known.high is None or most < top else binsearch(known)
    aim = 1.0 - known.margin / 2
    wanted = forecast.largest_within(aim, most)
    if not forecast.is_traced:
        wanted = min(wanted, int(low * max(FAR, (aim / max(forecast.part_at(low), NOISE)) ** 0.5)))
    wanted = max(wanted, low + 1)
    return binsearch(known) if known.high is not None and wanted >= top else wanted


STRATEGIES = {"predict": predict, "power": power, "binsearch": binsearch}


class Search:
    """Tries batch sizes, each with a short run that is undone.

    Args:
        model: A `kerastorch.Model`.
        source: Its data and targets.
        samples: How many these are; `None` = not known.
        fit_options: How they are fitted.
        steps: Optimizer steps of a trial.
        budgets: Bytes that each process may take; `None` = not known.
        undo: Puts the model back.
    """

    def __init__(
        self,
        model: Any,
        source: tuple[Any, Any],
        samples: int | None,
        fit_options: dict[str, Any],
        steps: int,
        budgets: list[int] | None,
        undo: Callable[[], None],
    ) -> None:
        self.model, self.source, self.samples, self.undo = model, source, samples, undo
        self.fit_options, self.steps = fit_options, steps
        self.budget = None if budgets is None else min(budgets)
        self.own_budget = None if budgets is None else budgets[model.backend.rank]
        # Where running out of memory ends a process, or has others wait for it for ever, nothing is tried that is
        # expected not to fit. Where others would wait, only what would end the process is made an error.
        with model.backend.by_itself():
            is_alone = model.backend.world == 1
        self.is_careful = not is_alone or model.backend.device.type == "cpu"
        self.own_limit = self.own_budget if is_alone else free_bytes(model.backend.device)

    def warm_up(self, known: Bracket) -> None:
        """On the CPU: what a process takes once, for code that is loaded late say, is no matter of the batch size."""
        size = min(ROWS * self.model.backend.world, known.most)
        if self.model.backend.device.type == "cpu" and not self._is_too_much(known.forecast.part_at(size)):
            self._tried(size)

    def _is_too_much(self, part: float | None) -> bool:
        return self.is_careful and self.budget is not None and part is not None and part > 1.0

    def forecast_from(self, batch: tuple) -> Forecast:
        """A forecast of the part of its budget that the process takes which takes most of it."""
        backend, traced = self.model.backend, traced_bytes(self.model, batch)
        if self.budget is None or self.fit_options.get("microbatch") is not None:  # of which a trace knows nothing
            return Forecast(None)

        def part(size: int) -> float | None:
            taken = traced(self.rows_of(size))
            of_all = backend.collect(taken and taken / self.own_budget, "a forecast")
            return None if None in of_all else max(of_all)

        return Forecast(part)

    def run(self, strategy: Callable, known: Bracket, max_trials: int) -> list[Trial]:
        """Goes on until the strategy is content, or so many trials were run.

        Raises:
            torch.OutOfMemoryError: nothing fits.
            ValueError: none of so many trials has fitted.
        """
        trials: list[Trial] = []
        while sum(one.was_run for one in trials) < max_trials and (size := strategy(known)) is not None:
            trials.append(self._try_next(size, known))
            known.narrow(trials[-1])
        if not known.low:
            if known.smallest.size > 1:
                raise ValueError(
                    f"none of max_trials={max_trials} trials has fitted, of which batch size {known.smallest.size} was "
                    f"the smallest. Give more, or a smaller init than {known.init}."
                )
            raise torch.OutOfMemoryError(self._words_of_misfit(known.smallest))
        return trials

    def _try_next(self, size: int, known: Bracket) -> Trial:
        """A trial; that one sample is refused for another reason, by a normalization say, says that two are needed.

        Raises:
            torch.OutOfMemoryError: and these do not fit.
        """
        try:
            return self.try_size(size, known)
        except Exception as error:
            if size > self.model.backend.world or known.high is None:
                raise
            raise torch.OutOfMemoryError(self._words_of_misfit(known.smallest)) from error

    def try_size(self, size: int, known: Bracket) -> Trial:
        """One trial, in all processes: what they found together."""
        forecast = known.forecast
        expected = forecast.part_at(size)
        if self._is_too_much(expected):
            return Trial(size, False, int(expected * self.budget), was_run=False)
        of_all = self._tried(size)
        seen = max((one.rows_share for one in of_all if not one.reason), default=1.0)
        if seen < 1.0:  # the data ended
            size = known.most = max(int(size * seen), 1)
        peak, part = max(one.peak_bytes for one in of_all), max(one.part for one in of_all)
        reason = next((one.reason for one in of_all if one.reason), "" if part <= 1.0 else "over the budget")
        if self.budget is not None and reason != OUT:  # else it took what there was, and would have taken more
            forecast.learn(size, part)
        slowest = max(one.seconds or 0.0 for one in of_all)
        return Trial(size, not reason, peak, size / slowest if slowest and not reason else None, True, reason)

    def rows_of(self, size: int) -> int:
        """Samples of a batch that this process takes."""
        share = self.model.backend.share
        return size if share is None else max(share(size)[1].samples, 1)

    def _tried(self, size: int) -> list[_Found]:
        """What each process found.

        Raises:
            Exception: what this process has failed with, unless it is about memory; RuntimeError where another has.
        """
        backend, rows = self.model.backend, self.rows_of(size)
        with backend.by_itself():
            own, error = self._run(size if backend.world > 1 else rows, rows)
        of_all = backend.collect(own, f"a trial of batch size {size}")
        if error is not None:
            raise error
        for rank, one in enumerate(of_all):
            if one.has_failed:
                raise RuntimeError(f"rank {rank} failed in a trial of batch size {size}: {one.reason}")
        return of_all

    def _run(self, size: int, rows: int) -> tuple[_Found, Exception | None]:
        """A short run of this process, which takes so many rows of its batches; and what it failed with else."""
        device, options = self.model.backend.device, dict(self.fit_options)
        watch = _Watch(rows, PATIENCE * self.steps * size_at(options["accumulate"], 0))
        data, y = with_batches_of(self.source[0], size, drops_last=self.samples is not None), self.source[1]
        if self.samples is not None and self.samples % size and self.samples > size:  # full batches alone
            options["steps_per_epoch"] = (self.samples // size) / -(-self.samples // size)
        validated = data if y is None or isinstance(y, str) else (data, y)
        if not self.model._overrides("train_step") or self.model._overrides("compute_loss"):
            options |= {"validation_data": validated, "validation_steps": 1}
        if data is self.source[0]:
            options["batch_size"] = size
        without_schedules(self.model)
        error = None
        with Peak(device) as taken:
            try:
                with limited(device, self.own_limit):
                    fit_quietly(self.model, data, y, epochs=None, max_steps=self.steps, callbacks=[watch], **options)
                reason = ""
            except Exception as raised:
                error = None if is_out_of_memory(raised) else raised
                reason = OUT if error is None else str(error)
            # No name keeps the error any more, nor with its traceback the tensors of the step.
            self.undo()
        part = taken.bytes / self.own_budget if self.own_budget else 0.0
        found = _Found(taken.bytes, part, watch.fastest_s, watch.rows / rows, reason, error is not None)
        return found, error

    def _words_of_misfit(self, trial: Trial) -> str:
        there_is = "what there is" if self.budget is None else f"the {in_words(self.budget)} there are for it"
        takes = f" takes {in_words(trial.peak_bytes)}, which" if trial.peak_bytes else ""
        return (
            f"a step of batch size {trial.size}{takes} does not fit into {there_is}. Give compile "
            f"precision='bf16', the backend checkpoint_activations=True, several devices FSDP, or smaller inputs."
        )


@dataclass
class _Found:
    """What one process found in a trial.

    Attributes:
        peak_bytes: The most that it took.
        part: The same, as a part of its budget.
        seconds: The fastest batch, with its step; `None` = there was none.
        rows_share: Samples in its largest batch, as a part of those wanted.
        reason: Why it does not fit, or what it failed with; "" where it went well.
        has_failed: Whether that was no matter of memory.
    """

    peak_bytes: int
    part: float
    seconds: float | None
    rows_share: float
    reason: str
    has_failed: bool


class _Watch(Callback):
    """Times the batches of a trial that are full."""

    def __init__(self, rows: int, most_batches: int) -> None:
        self.fastest_s, self.rows, self._wanted, self._seen, self._began = None, 0, rows, 0, 0.0
        self._batches_left = most_batches

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._seen, self._began = 0, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        synchronize(self.model.backend.device)
        now, rows = time.perf_counter(), self.model.samples_seen - self._seen
        if rows == self._wanted:
            self.fastest_s = min(now - self._began, self.fastest_s or now)
        self._batches_left -= 1
        if not self._batches_left:
            self.model.stop_training = True
        self._began, self._seen, self.rows = now, self.model.samples_seen, max(self.rows, rows)
