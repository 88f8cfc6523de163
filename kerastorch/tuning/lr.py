"""A good learning rate: a sweep of real steps at growing rates, what its curve says, and short runs that confirm it.

`sweep -> curve -> suggestion`. The sweep is a `fit` whose rate a callback sets before each step; how curves are read is
in `curve.py`. What a curve suggests is only a start: which rate learns fastest is seen by learning with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..callbacks.base import Callback
from ..checks import is_count, refuse_accumulation, size_at
from ..data import open_data
from .curve import METHODS, ROUNDING, end_of, noise_of, smoothed, trimmed, valley, why_silent
from .rehearsal import fit_quietly, rehearsing, without_schedules

PATIENCE = 100  # batches for the first step of an optimizer
READ_EVERY = 10  # steps between two reads of losses from the device
MOST_STEPS = 100  # of a run that confirms a rate; fewer favour rates that are too high or too low, by problem
LEAST_STEPS = 30  # where an epoch has fewer
MOST_RATES = 10  # confirmed, before the search is content with what it has
FINEST = 10 ** (1 / 8)  # between two rates: about as far apart as losses are within a tenth of one another
WIDTHS = (4, 2, 1)  # of the steps from a rate to its neighbours, in finest ones: first half a decade
AS_GOOD = 0.1  # of the lowest loss, above it: rates of the range that is shown
DIVERGED = 4  # times the lowest loss: a step that fails beyond it has failed for that
MODES = ("exponential", "linear")


class LearningRate:
    """What a search for a learning rate has shown.

    Attributes:
        lr: The rate to take; `None` where there is no answer.
        reason: Why the curve alone gives no answer; "" where it does.
        refuted: Why the short runs gave none; "" where they did, or there were none.
        lrs: Rates of the sweep, ascending, those of the optimizer's first group.
        losses: The loss before the step at each rate, as it was.
        smoothed: The same, smoothed.
        tried: Rates that were confirmed -> the mean loss of the last half of a short run at that rate; empty = none.
        optimizer: Which optimizer it is for; "" where there is one.
    """

    def __init__(
        self,
        lrs: Sequence[float],
        losses: Sequence[float],
        smoothing: float,
        steps: int,
        optimizer: str = "",
        mode: str = "exponential",
    ) -> None:
        self.lrs, self.losses, self.smoothed = list(lrs), list(losses), smoothed(losses, smoothing)
        self.optimizer, self._mode = optimizer, mode
        has_diverged = len(self.lrs) < steps or not math.isfinite(self.losses[-1])
        self._rates, self._curve = trimmed(self.lrs, self.smoothed, steps)
        self.noise = noise_of(self.losses)
        self.reason = why_silent(self.losses, self._curve, steps, has_diverged=has_diverged)
        self.refuted, self.tried = "", {}
        self.lr: float | None = self.suggestion("valley")

    def suggestion(self, method: str | None = None) -> float | None:
        """A rate to take.

        Args:
            method: `"steepest"`, `"valley"`, `"minimum"` or `"slide"`, read off the curve alone (their sources are in
                `kerastorch.tuning.curve`); `None` = `lr`, which was confirmed.
        Returns:
            The rate; `None` where there is no answer, of which `reason` tells.
        Raises:
            ValueError: an unknown method.
        """
        if method is None:
            return self.lr
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known. Give {', '.join(map(repr, METHODS))}, or None.")
        return None if self.reason else METHODS[method](self._rates, self._curve)

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest rate that do about as well; `None` where there is no answer."""
        if self.lr is None:
            return None
        best = self.tried.get(self.lr, 0.0)
        good = [rate for rate, loss in self.tried.items() if loss <= best + AS_GOOD * abs(best)]
        good = good or [rate for name in METHODS if (rate := self.suggestion(name)) is not None]
        return min(self.lr, *good), max(self.lr, *good)

    @property
    def title(self) -> str:
        """What was found, in a line."""
        return f"learning rate{f' of {self.optimizer!r}' if self.optimizer else ''}: {self._words_of(self.lr)}"

    def __repr__(self) -> str:
        of = f", optimizer={self.optimizer!r}" if self.optimizer else ""
        return f"<LearningRate {self._words_of(self.lr)}{of}>"

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [(f"{name}, by the curve", self._words_of(self.suggestion(name)), "") for name in METHODS]
        rows += [("confirmed", f"{rate:.3g}", f"{loss:.4g}") for rate, loss in sorted(self.tried.items())]
        lines = [
            self.title,
            *([f"by short runs no answer: {self.refuted}"] if self.refuted else []),
            *([f"by the curve alone no answer: {self.reason}"] if self.reason else []),
        ]
        return "\n".join([*lines, tabulate(rows, ("", "rate", "loss"), "simple", disable_numparse=True)])

    @staticmethod
    def _words_of(rate: float | None) -> str:
        return "no answer" if rate is None else f"{rate:.3g}"

    def plot(self, suggest: bool = True, path: str | None = None) -> Any:
        """Draws the loss over the rate; needs matplotlib.

        Args:
            suggest: Whether to show the rate to take, and the range of those that do about as well. Default: `True`.
            path: File to save the picture in, `.png`, `.svg` or `.pdf`; `None` = it is not saved.
        Returns:
            The `matplotlib.figure.Figure`.
        """
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        axes.plot(self.lrs, self.losses, color="tab:blue", alpha=0.3, label="sweep")
        axes.plot(self.lrs, self.smoothed, color="tab:blue", label="smoothed")
        if self.tried:
            rates = sorted(self.tried)
            axes.plot(rates, [self.tried[rate] for rate in rates], "o", color="tab:orange", label="short runs")
        if suggest and self.lr is not None:
            if self.range[0] < self.range[1]:
                axes.axvspan(
                    *self.range, color="tab:green", alpha=0.15, label="about as good" if self.tried else "suggested"
                )
            axes.axvline(self.lr, color="tab:green", label=f"lr = {self.lr:.3g}")
        finite = [loss for loss in (*self.losses, *self.tried.values()) if math.isfinite(loss)]
        low, first = min(finite, default=0.0), next(iter(finite), 1.0)
        axes.set_ylim(low - 0.05 * abs(first - low), first + 0.5 * abs(first - low) + 1e-12)
        titles = [f"of {self.optimizer!r}"] if self.optimizer else []
        titles += [f"by the curve alone no answer: {self.reason}"] if self.reason else []
        axes.set(xscale="linear" if self._mode == "linear" else "log", xlabel="learning rate", ylabel="loss")
        axes.set_title("\n".join(titles), fontsize="medium", wrap=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def find_lr(
    model: Any,
    data: Any,
    y: Any,
    *,
    min_lr: float,
    max_lr: float,
    steps: int,
    mode: str,
    smoothing: float,
    stop_factor: float | None,
    optimizer: str | None,
    confirm: bool | int,
    **fit_options: Any,
) -> LearningRate | dict[str, LearningRate]:
    """What `Model.find_lr` returns; see there."""
    _refuse_no_sweep(min_lr, max_lr, steps, mode, smoothing, stop_factor, confirm)
    if hasattr(data, "__next__"):
        raise TypeError(
            f"data is a {type(data).__name__}, which can be gone through once, and each run goes through it again. "
            f"Give a callable that makes a new one."
        )
    fit = _Rehearsed(model, data, y, fit_options)
    if confirm and not isinstance(confirm, bool) and not fit.is_single:
        raise ValueError(
            f"confirm={confirm} was given with several optimizers, whose losses do not tell which rate is better. "
            f"Leave it out."
        )
    with rehearsing(model, data) as undo:
        names = fit.names_of(optimizer)
        found = {}
        for name in names:
            rates = rates_between(min_lr, max_lr, steps, mode)
            lrs, losses = fit.sweep(name, rates, smoothing, stop_factor)
            undo()
            found[name] = LearningRate(lrs, losses, smoothing, steps, name, mode)
            if confirm and fit.is_single:  # losses of networks that play against each other do not compare
                run_steps = fit.confirming_steps if confirm is True else confirm
                _confirm(found[name], lambda rate: fit.loss_at(rate, run_steps, undo), min_lr, max_lr)  # noqa: B023
    return found[""] if [*found] == [""] else found[optimizer] if optimizer is not None else found


def rates_between(min_lr: float, max_lr: float, steps: int, mode: str) -> list[float]:
    """So many rates, the first and the last included, in equal ratios or, with `"linear"`, in equal steps."""
    parts = [step / (steps - 1) for step in range(steps)]
    if mode == "linear":
        return [min_lr + part * (max_lr - min_lr) for part in parts]
    return [min_lr * (max_lr / min_lr) ** part for part in parts]


def _confirm(found: LearningRate, loss_at: Callable[[float], float], min_lr: float, max_lr: float) -> None:
    """Goes from what the curve suggests to the rate with the lowest loss among its neighbours, in ever smaller steps.

    Neighbours are compared by runs from the same start, on the same data and random numbers, so that they differ by
    their rates alone.
    """
    if not len(found._rates):
        return
    start, losses, best = valley(found._rates, found._curve), {}, 0  # places are numbers of steps from the start

    def rate_at(place: int) -> float:
        return start * FINEST**place

    def loss_of(place: int) -> float:
        if not min_lr <= rate_at(place) <= max_lr:
            return math.inf
        if place not in losses:
            losses[place] = loss_at(rate_at(place))
        return losses[place]

    for width in WIDTHS:
        while len(losses) < MOST_RATES:
            better = min((best, best + width, best - width), key=loss_of)
            if better == best:
                break
            best = better
    found.tried = {rate_at(place): loss for place, loss in losses.items()}
    found.lr = rate_at(best)
    # Against the lowest rate of all, at which nothing is learned; what follows from noise is not learned either.
    gained = loss_at(min_lr) - losses[best]
    if not gained > max(found.noise / READ_EVERY**0.5, ROUNDING * abs(losses[best])):
        found.lr, found.refuted = None, "no rate has made the loss lower than it is untrained"


class _Rehearsed:
    """Runs of `fit` at rates of one's own.

    Args:
        model: A `kerastorch.Model`.
        data, y: What it is fitted on.
        fit_options: How.
    """

    def __init__(self, model: Any, data: Any, y: Any, fit_options: dict[str, Any]) -> None:
        self.model, self.data, self.y, self.fit_options = model, data, y, fit_options
        accumulate, tbptt_steps = fit_options["accumulate"], model._compiled.tbptt_steps
        refuse_accumulation(accumulate, fit_options["microbatch"], tbptt_steps, model._overrides("train_step"))
        self.all_names = [*model._compiled._makers]
        reading = model._reading(fit_options["batch_size"], model.batch_size)
        data = open_data(data, y, fit_options["sample_weight"], reading)
        self._epoch_steps = data.steps and -(-data.steps // size_at(accumulate, 0))

    @property
    def is_single(self) -> bool:
        """Whether one optimizer trains all."""
        return len(self.all_names) == 1

    @property
    def confirming_steps(self) -> int:
        """Steps of a run that confirms a rate: an epoch where it is neither very long nor very short."""
        return min(max(self._epoch_steps or MOST_STEPS, LEAST_STEPS), MOST_STEPS)

    def names_of(self, optimizer: str | None) -> list[str]:
        """Optimizers to find a rate for.

        Raises:
            ValueError: there is none of that name.
        """
        if optimizer is None:
            return self.all_names
        if optimizer not in self.all_names:
            known = ", ".join(map(repr, self.all_names)) if not self.is_single else "one alone, without a name"
            instead = "Leave it out" if self.is_single else "Give one of these, or None for all"
            raise ValueError(f"optimizer={optimizer!r} names no optimizer; there is {known}. {instead}.")
        return [optimizer]

    def sweep(
        self, name: str, rates: Sequence[float], smoothing: float, stop_factor: float | None
    ) -> tuple[list[float], list[float]]:
        """The rates up to where the smoothed loss diverges, and the loss before each one's step."""
        losses = self._run(name, rates, lambda losses: end_of(smoothed(losses, smoothing), stop_factor))
        return [*rates[: len(losses)]], losses

    def loss_at(self, rate: float, steps: int, undo: Callable[[], None]) -> float:
        """The mean loss of the last half of so many steps, at one rate; infinite if it diverges."""
        (name,) = self.all_names
        losses = self._run(name, [rate] * steps, lambda losses: end_of(losses, None))
        undo()
        last = losses[len(losses) // 2 :]
        return sum(last) / len(last) if len(losses) == steps and all(map(math.isfinite, losses)) else math.inf

    def _run(self, name: str, rates: Sequence[float], ends_at: Callable) -> list[float]:
        without_schedules(self.model)
        watch = _Steps(name, rates, ends_at)
        # The optimizer that steps most often counts, and may do so many times as often as this one.
        limits = {"epochs": None, "max_steps": len(rates) if self.is_single else 100 * len(rates)}
        try:
            fit_quietly(self.model, self.data, self.y, callbacks=[watch], **limits, **self.fit_options)
        except Exception:
            if not self._has_diverged(watch):
                raise
        losses = watch.read()
        if not losses:
            raise ValueError(
                f"optimizer {name!r} has made no step in {watch.batches} batches. Call self.optimizer_step in "
                f"train_step, from the first epoch on."
            )
        return losses

    def _has_diverged(self, watch: _Steps) -> bool:
        """Whether a step has failed because those before it diverged: losses are read every few steps alone."""
        if self.model.backend.world > 1 or not watch.has_begun:  # reading takes all processes: who knows where they are
            return False
        losses = watch.read()
        is_far = end_of(losses, DIVERGED) is not None
        return watch.is_over or is_far or not _are_finite(self.model.module.parameters())


class _Steps(Callback):
    """Takes each step of an optimizer at a rate of its own, and puts down the loss that the step was made from.

    Args:
        name: Of the optimizer.
        rates: For each step, those of its first group; the others keep their ratios to it.
        ends_at: Losses -> number of the one to end with; `None` = go on. Asked when losses are read, every few steps;
            what has come after that one is left out.
    """

    def __init__(self, name: str, rates: Sequence[float], ends_at: Callable[[list[float]], int | None]) -> None:
        self.name, self.rates, self.ends_at = name, rates, ends_at
        self._losses: list[float] = []
        self._taken: list[tuple] = []  # not yet read
        # Of a step of the user's own: sums of the losses of its running round, and of those that this optimizer uses.
        self._round: list[tuple] = []
        self._heard: list[tuple] = []
        self._is_round_over = self.is_over = False
        self.batches = 0

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.model.updates[self.name].optimizer

    @property
    def has_begun(self) -> bool:
        """Whether a step was taken."""
        return bool(self._losses or self._taken)

    def on_train_begin(self, logs: Any = None) -> None:
        self._ratios = ratios_of(self._optimizer)
        self._patience = PATIENCE * self.model._training.size_of(0)
        if self.model._own_step is not None:
            self._listen(self.model._own_step)

    def _listen(self, own_step: Any) -> None:
        """One round of backward passes is for all optimizers that are asked to step before the next one."""
        step = own_step.optimizer_step

        def noted(name: str | None) -> None:
            if (name or "") == self.name:
                self._heard += self._round
            self._is_round_over = True
            step(name)

        own_step.optimizer_step = noted

    def on_before_backward(self, loss: Any) -> None:
        if self.model._own_step is None:
            return
        if self._is_round_over:
            self._round, self._is_round_over = [], False
        samples = self.model._running.samples
        self._round.append((loss.detach().to(self.model._training_tracker.dtype) * samples, samples))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        step = len(self._losses) + len(self._taken)
        if optimizer is self._optimizer and step < len(self.rates):
            set_rates(optimizer, [self.rates[step] * ratio for ratio in self._ratios])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        # After the step: what evaluates the loss within it has then told its loss, too.
        if optimizer is not self._optimizer or self.is_over:
            return
        heard, self._heard = self._heard, []
        tracker = self.model._training_tracker
        taken = tracker.take()
        if heard and (len(self.model.updates) > 1 or taken is None):  # the tracker has none of this optimizer's
            taken = (tuple(map(sum, zip(*heard, strict=True))),)
        self._taken.append(taken)
        self.is_over = len(self._losses) + len(self._taken) == len(self.rates)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if self.batches >= self._patience and not self._losses and not self._taken:
            self.model.stop_training = True
        if len(self._taken) >= READ_EVERY or self.is_over:
            self.read()
            self.model.stop_training = self.is_over

    def read(self) -> list[float]:
        """All losses so far, up to where it ends."""
        taken, self._taken = self._taken, []
        losses = self.model._training_tracker.losses_of(taken)
        # A step without a loss, on targets that are all masked, has that of its neighbour.
        last = next((loss for loss in (*self._losses[-1:], *losses) if loss is not None), math.nan)
        for loss in losses:
            last = last if loss is None else loss
            self._losses.append(last)
        end = self.ends_at(self._losses)
        if end is not None:
            self.is_over, self._losses = True, self._losses[: end + 1]
        return self._losses


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(one.detach().isfinite().all()) for one in tensors)


def set_rates(optimizer: torch.optim.Optimizer, rates: Iterable[float]) -> None:
    """Sets the rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place: a captured graph reads it from this very tensor
        else:
            group["lr"] = rate


def ratios_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """The rates of its parameter groups, in parts of the first that is not 0."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    first = next((rate for rate in rates if rate), None)
    return [1.0] * len(rates) if first is None else [rate / first for rate in rates]


def apply_rate(update: Any, rate: float) -> None:
    """Gives an optimizer, and the schedule of it, another rate; parameter groups keep their ratios."""
    rates = [rate * ratio for ratio in ratios_of(update.optimizer)]
    if update.schedule is None:
        set_rates(update.optimizer, rates)
    else:
        update.schedule.rescale(rates)


def _refuse_no_sweep(
    min_lr: Any, max_lr: Any, steps: Any, mode: Any, smoothing: Any, stop_factor: Any, confirm: Any
) -> None:
    for name, rate in (("min_lr", min_lr), ("max_lr", max_lr)):
        if not _is_number(rate) or not 0 < rate < math.inf:
            raise ValueError(f"{name}={rate!r} is no learning rate. Give a number above 0.")
    if min_lr >= max_lr:
        raise ValueError(f"min_lr={min_lr:g} is not below max_lr={max_lr:g}. Give a lower min_lr or a higher max_lr.")
    if not is_count(steps, least=2):
        raise ValueError(f"steps={steps!r} is no number of steps. Give a whole number from 2 up, such as 100.")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known. Give {' or '.join(map(repr, MODES))}.")
    if not _is_number(smoothing) or not 0 <= smoothing < 1:
        raise ValueError(
            f"smoothing={smoothing!r} is no weight. Give a number from 0 (none) up to but not including 1."
        )
    if stop_factor is not None and (not _is_number(stop_factor) or not stop_factor > 1):
        raise ValueError(
            f"stop_factor={stop_factor!r} is no factor. Give a number above 1, or None to go on to max_lr."
        )
    if not isinstance(confirm, bool) and not is_count(confirm, least=2):
        raise ValueError(f"confirm={confirm!r} is no number of steps. Give True, False or a whole number from 2 up.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
