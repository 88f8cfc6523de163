"""Names of schedules -> torch's learning rate schedulers, over the length of the run.

A schedule says how the rate goes relative to the optimizer's `lr`, its highest; `Running` binds one to an optimizer.
What `lr` is and how many steps a run has, others decide.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from .directions import direction


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes, not yet bound to an optimizer. Made by the functions below and by `get`.

    Args:
        name: What messages call it.
        make: `(optimizer, length in steps or None) -> scheduler`.
        every: What moves it on, a "step" of the optimizer or an "epoch".
        needs_length: Whether the length of the run must be known.
        restarts: Whether each run starts it anew from the base rates; else it goes on where it is.
        steps: A length of its own, in optimizer steps; `None` = the run's.
        monitor: What a plateau is looked for in; `None` = "val_loss" where there is one, else "loss".
    """

    name: str
    make: Callable[[Optimizer, int | None], LRScheduler]
    every: Literal["step", "epoch"] = "step"
    needs_length: bool = False
    restarts: bool = True
    steps: int | None = None
    monitor: str | None = None


def one_cycle(*, steps: int | None = None, **options: Any) -> Schedule:
    """Up to `lr`, then down to almost nothing, while the momentum goes the other way.

    Args:
        steps: Length in optimizer steps; `None` = the run's.
        options: Of torch's `OneCycleLR`, e.g. `pct_start=0.3`, the part of the run that rises. `cycle_momentum` is off
            where the optimizer has neither momentum nor betas; an SGD without momentum gets one, as in torch.
    Returns:
        A schedule for `compile`.
    Raises:
        ValueError: an option that torch refuses, or that the optimizer or the run decides.
        TypeError: an option that torch does not know.
    Example:
        >>> one_cycle(pct_start=0.1).every
        'step'

    Source: Smith & Topin 2018, "Super-Convergence"; `torch.optim.lr_scheduler.OneCycleLR`.
    """
    decided = ", ".join(sorted({"max_lr", "total_steps", "epochs", "steps_per_epoch", "last_epoch"} & set(options)))
    if decided:
        raise ValueError(
            f"one_cycle takes no {decided}: its peak is the optimizer's lr, its length the run's or `steps`."
        )
    _try(OneCycleLR, options, max_lr=1.0, total_steps=1009)  # a prime, see the division in `_one_cycle`
    return _over_run("one_cycle", functools.partial(_one_cycle, options), steps)


def cosine(*, warmup: float = 0, final: float = 0.0, steps: int | None = None) -> Schedule:
    """From `lr` to `final * lr` along half a cosine, after a linear warm-up.

    Args:
        warmup: Steps of the warm-up, whose step i, from 0, has `lr * (i + 1) / (warmup + 1)`; a float below 1 is a part
            of the length, rounded. A run no longer than this never reaches `lr`. Default: 0.
        final: Part of `lr` that it goes down to, from 0 to 1. Default: 0.0.
        steps: Length in optimizer steps, warm-up included; `None` = the run's.
    Returns:
        A schedule for `compile`.
    Raises:
        ValueError: a value outside of these ranges.
    Example:
        >>> cosine(warmup=0.1, final=0.01).name
        'cosine'

    Source: Loshchilov & Hutter 2017, "SGDR"; the closed form of `torch.optim.lr_scheduler.CosineAnnealingLR`.
    """
    return _over_run("cosine", functools.partial(_warmed, _cosine, _warmup(warmup), _part("final", final)), steps)


def linear(*, warmup: float = 0, final: float = 0.0, steps: int | None = None) -> Schedule:
    """From `lr` to `final * lr` in a straight line, after a linear warm-up.

    Args, returns, raises: as `cosine`.
    Example:
        >>> linear(warmup=500).name
        'linear'

    Source: Devlin et al. 2019, "BERT", appendix A.2; without warm-up also `torch.optim.lr_scheduler.LinearLR`.
    """
    return _over_run("linear", functools.partial(_warmed, _line, _warmup(warmup), _part("final", final)), steps)


def constant(*, warmup: float = 0, steps: int | None = None) -> Schedule:
    """`lr` all along, after a linear warm-up.

    Args, returns, raises: as `cosine`; a length is needed only where `warmup` is a part of it.
    Example:
        >>> constant(warmup=500).needs_length
        False

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2.
    """
    warmup, steps = _warmup(warmup), _count("steps", steps)
    # With a warm-up in steps it is over once it has reached `lr`: from there on no step of it would change anything.
    length = warmup + 1 if isinstance(warmup, int) else steps
    return _over_run("constant", functools.partial(_warmed, _line, warmup, 1.0), length)


def triangular(
    *, cycles: int = 3, base: float = 0.25, steps: int | None = None, step_size: int | None = None
) -> Schedule:
    """Between `base * lr` and `lr` in straight lines, up and down. The momentum stays.

    Args:
        cycles: Peaks in the run. Default: 3.
        base: Lowest rate as a part of `lr`, from 0 to 1. Default: 0.25.
        steps: Length in optimizer steps; `None` = the run's.
        step_size: Steps from the lowest rate to the highest; with these no length is needed. `None` = the length over
            `2 * cycles`, not rounded, at least 1.
    Returns:
        A schedule for `compile`.
    Raises:
        ValueError: a value outside of these ranges, a count below 1.
    Example:
        >>> triangular(step_size=2000).needs_length
        False

    Source: Smith 2017, "Cyclical Learning Rates", section 3; `torch.optim.lr_scheduler.CyclicLR`.
    """
    return _cycles("triangular", cycles, base, steps, step_size)


def triangular2(
    *, cycles: int = 3, base: float = 0.25, steps: int | None = None, step_size: int | None = None
) -> Schedule:
    """As `triangular`, each peak half as high above `base * lr` as the one before."""
    return _cycles("triangular2", cycles, base, steps, step_size)


def exp_range(
    *,
    cycles: int = 3,
    base: float = 0.25,
    steps: int | None = None,
    step_size: int | None = None,
    gamma: float | None = None,
) -> Schedule:
    """As `triangular`, with a height above `base * lr` that is multiplied by `gamma` each step.

    `gamma` is above 0 and at most 1. `None` = what leaves a tenth of the height after `cycles` cycles, that is at the
    end of a run unless `step_size` is given; torch's own default of 1.0 would be `triangular`.
    """
    if gamma is not None and not (_is_number(gamma) and 0 < gamma <= 1):
        raise ValueError(f"gamma={gamma!r} is not a decay per step. Give a number above 0 and at most 1, or None.")
    return _cycles("exp_range", cycles, base, steps, step_size, gamma)


def plateau(*, monitor: str | None = None, **options: Any) -> Schedule:
    """Cuts the rate, to a tenth by default, after an epoch in which the loss is no longer falling.

    Args:
        monitor: Name in the epoch's logs. Default: `None` = "val_loss" where there is one, else "loss". For a name with
            "val_" epochs without validation do not count.
        options: Of torch's `ReduceLROnPlateau`, e.g. `factor=0.1`, `patience=10` in epochs. `mode` is by default "max"
            where the name of `monitor` tells that higher is better (accuracy, auc, ...), else "min".
    Returns:
        A schedule for `compile`, which goes on from one run to the next.
    Raises:
        ValueError: an option that torch refuses, or a monitor that is no name.
        TypeError: an option that torch does not know.
    Example:
        >>> plateau(patience=3, factor=0.5).every
        'epoch'

    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`; Keras, `ReduceLROnPlateau(mode="auto")`.
    """
    if monitor is not None and not isinstance(monitor, str):
        raise ValueError(f"monitor={monitor!r} is not a name. Give one that the logs have, e.g. 'val_loss', or None.")
    options = {"mode": "max" if monitor and direction(monitor) > 0 else "min"} | options
    _try(ReduceLROnPlateau, options)
    make = functools.partial(_given, functools.partial(ReduceLROnPlateau, **options))
    return Schedule("plateau", make, every="epoch", restarts=False, monitor=monitor)


KNOWN = (one_cycle, cosine, linear, constant, triangular, triangular2, exp_range, plateau)


def get(schedule: Any) -> Schedule | None:
    """What `compile` was given as `schedule` -> a `Schedule`; `None` stays `None`, a rate that nobody moves.

    Args:
        schedule: Name of a function above (any case), what such a function returned, or something that is moved once
            per epoch: a class of `torch.optim.lr_scheduler`, a `functools.partial` of one, or any callable
            `optimizer -> scheduler`. `("step", x)` and `("epoch", x)` say when x is moved.
    Raises:
        ValueError: an unknown name, or a schedule of ours that is to be moved at another time than its own.
        TypeError: something else than these, or a class that needs more than the optimizer.
    Example:
        >>> get(("step", functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.999))).every
        'step'
    """
    every = None
    if isinstance(schedule, tuple) and len(schedule) == 2 and schedule[0] in ("step", "epoch"):
        every, schedule = schedule
    if isinstance(schedule, str):
        schedule = _by_name(schedule)()
    elif inspect.isfunction(schedule) and schedule in KNOWN:
        schedule = schedule()
    if schedule is None and every is None:
        return None
    if not isinstance(schedule, Schedule):
        return _own(schedule, every or "epoch")
    if every not in (None, schedule.every):
        raise ValueError(_not_when_told(schedule.name, schedule.every))
    return schedule


class Running:
    """One schedule at work on one optimizer: step i of a run, from 0, is taken at the rate of step i.

    Args:
        schedule: What `get` returned.
        optimizer: The rates that its groups have now are the base rates.
    Raises:
        TypeError: a callable of the user's returned no scheduler of torch.
        ValueError: it returned one of another optimizer, or a plateau that is to be moved every step.
    """

    def __init__(self, schedule: Schedule, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self._base = [_settings(group) for group in optimizer.param_groups]
        self._monitor, self._watched = schedule.monitor, None
        self._length: int | None = None
        self._scheduler = None if schedule.restarts else self._made(None)
        self._left = math.inf if self._scheduler and schedule.every == "step" else 0

    @property
    def has_begun(self) -> bool:
        """Whether `after_step` can follow, without another `begin`."""
        return self._scheduler is not None

    def begin(self, steps: int | None, done: int = 0) -> None:
        """At the start of a run: what goes over a run starts anew, all else goes on where it is.

        Args:
            steps: Optimizer steps of the whole run; `None` = not known.
            done: How many of them were taken before. Default: 0.
        Raises:
            ValueError: the length is needed and not known, or torch cannot divide one so short.
        """
        if not self.schedule.restarts:
            self._monitor = self.schedule.monitor  # whether there is a validation is another question in each run
            return
        length = self.schedule.steps or steps
        if length is None and self.schedule.needs_length:
            name = self.schedule.name
            raise ValueError(
                f"schedule={name!r} goes over the whole run, but this data has no known length. Give fit "
                f"steps_per_epoch, or the schedule a length of its own: kt.schedules.{name}(steps=...)."
            )
        self._length = None if length is None else max(length, 1)
        last = math.inf if length is None else self._length - 1
        position = min(done, last)
        self._scheduler = self._made(self._length)
        _move_to(self._scheduler, position)
        self._left = last - position

    def after_step(self) -> None:
        """After each optimizer step. At the end of the schedule the rate stays where it is."""
        if self._left:
            self._left -= 1
            self._scheduler.step()

    def after_epoch(self, logs: Mapping[str, Any]) -> None:
        """After each epoch, with its logs.

        Raises:
            ValueError: what a plateau monitors is not among them.
        """
        if self.schedule.every == "step":
            return
        if not isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step()
        elif (value := self._monitored(logs)) is not None:
            self._scheduler.step(value)

    def reset(self) -> None:
        """Rates and momenta as they were before any run, where the schedule goes over a run."""
        if self.schedule.restarts:
            _restore(self.optimizer, self._base)
            self._scheduler, self._left = None, 0

    def rescale(self, rates: list[float]) -> None:
        """New base rates, one per parameter group, at once.

        In the middle of a run the schedule goes on at the new scale, else the rates are these until the next `begin`;
        a schedule of the user's own and a plateau start anew from them.
        """
        self._remember_added_groups()
        if len(rates) != len(self._base):
            raise ValueError(f"{len(rates)} rates for {len(self._base)} parameter groups. Give one per group.")
        self._base = [settings | {"lr": float(rate)} for settings, rate in zip(self._base, rates, strict=True)]
        if not self.schedule.restarts:
            self._scheduler = self._made(None)
        elif self._left or (self.has_begun and self.schedule.steps):  # one of its own length may be over before the run
            self.begin(self._length, self._scheduler.last_epoch)
        else:
            self._scheduler = None
            _restore(self.optimizer, self._base)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on at the same rates."""
        restarts = self.schedule.restarts
        return {
            "schedule": self.schedule.name,
            "base": [dict(settings) for settings in self._base],
            "now": [_settings(group) for group in self.optimizer.param_groups],
            "monitor": self._monitor,
            "watched": self._watched,
            "length": self._length,
            "done": self._scheduler.last_epoch if restarts and self._scheduler else None,
            "scheduler": None if restarts else copy.deepcopy(self._scheduler.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same schedule.

        Raises:
            ValueError: it is one of another schedule, or of another number of parameter groups.
        """
        name, groups = self.schedule.name, len(self.optimizer.param_groups)
        if (state["schedule"], len(state["now"])) != (name, groups):
            raise ValueError(
                f"The state is of schedule={state['schedule']!r} over {len(state['now'])} parameter groups; expected "
                f"{name!r} over {groups}. Compile as it was when the state was saved."
            )
        self._base = [dict(settings) for settings in state["base"]]
        self._monitor, self._watched = state["monitor"], state["watched"]
        if not self.schedule.restarts:
            # A copy, because some schedulers take entries out of what they load.
            self._scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        elif state["done"] is None:
            self._scheduler, self._left = None, 0
        else:
            self.begin(state["length"], state["done"])
        _restore(self.optimizer, state["now"])

    def _made(self, length: int | None) -> LRScheduler:
        """A scheduler that starts from the base rates."""
        self._remember_added_groups()
        _restore(self.optimizer, self._base)
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)  # left by an earlier scheduler; torch would start from it
        scheduler = self.schedule.make(self.optimizer, length)
        _refuse_unfit(scheduler, self.schedule, self.optimizer)
        return scheduler

    def _remember_added_groups(self) -> None:
        self._base += [_settings(group) for group in self.optimizer.param_groups[len(self._base) :]]

    def _monitored(self, logs: Mapping[str, Any]) -> float | None:
        """What the plateau is looked for in; `None` where it waits for an epoch with validation."""
        if self._monitor is None and "val_loss" in logs:
            self._monitor = "val_loss"  # from here on: losses of training and of validation do not compare
        name = self._monitor or "loss"
        if self.schedule.monitor is None and name in logs and name != self._watched:
            if self._watched is not None:  # and from no best yet
                self._scheduler.best = self._scheduler.mode_worse
            self._watched = name
        if name not in logs and not (name.startswith("val_") and not any(key.startswith("val_") for key in logs)):
            raise ValueError(
                f"schedule={self.schedule.name!r} monitors {name!r}, but this epoch has {', '.join(logs)}. Give "
                f"kt.schedules.plateau(monitor=...) one of these."
            )
        return logs.get(name)


# What `Schedule.make` is made of. Partials of plain functions, so that a schedule can be pickled.


def _over_run(name: str, make: Callable[[Optimizer, int | None], LRScheduler], steps: int | None) -> Schedule:
    steps = _count("steps", steps)
    return Schedule(name, make, needs_length=steps is None, steps=steps)


def _one_cycle(options: dict[str, Any], optimizer: Optimizer, steps: int) -> LRScheduler:
    has_momentum = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
    options = options if has_momentum else {"cycle_momentum": False} | options
    try:
        return OneCycleLR(optimizer, max_lr=_rates(optimizer), total_steps=steps, **options)
    except ZeroDivisionError as error:  # torch divides by `pct_start * total_steps - 1`
        raise ValueError(
            f"pct_start={options.get('pct_start')} of {steps} steps is a rise of one step, by which torch's OneCycleLR "
            f"cannot divide. Give another pct_start, e.g. 0.0 for no rise."
        ) from error


def _warmed(decay: Callable, warmup: float, final: float, optimizer: Optimizer, steps: int) -> LRScheduler:
    warmup = warmup if isinstance(warmup, int) else round(warmup * steps)
    return LambdaLR(optimizer, functools.partial(_factor, decay, warmup, final, steps - warmup))


def _factor(decay: Callable, warmup: int, final: float, length: int, i: int) -> float:
    if i < warmup:
        return (i + 1) / (warmup + 1)
    return final + (1 - final) * decay(i - warmup, length)


def _cosine(i: int, length: int) -> float:
    return (1 + math.cos(math.pi * i / length)) / 2


def _line(i: int, length: int) -> float:
    return 1 - i / length


def _cycles(
    mode: str, cycles: int, base: float, steps: int | None, step_size: int | None, gamma: float | None = None
) -> Schedule:
    base, size, steps = _part("base", base), _count("step_size", step_size), _count("steps", steps)
    make = functools.partial(_cyclic, mode, _count("cycles", cycles, or_none=False), base, size, gamma)
    return Schedule(mode, make, needs_length=size is None and steps is None, steps=steps)


def _cyclic(
    mode: str, cycles: int, base: float, size: int | None, gamma: float | None, optimizer: Optimizer, steps: int | None
) -> LRScheduler:
    size = size or max(1.0, steps / (2 * cycles))
    gamma = gamma or 0.1 ** (1 / (2 * cycles * size))
    rates = _rates(optimizer)
    low = [base * rate for rate in rates]
    return CyclicLR(optimizer, low, rates, step_size_up=size, mode=mode, gamma=gamma, cycle_momentum=False)


def _given(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer, steps: int | None) -> LRScheduler:
    return make(optimizer)


# What a schedule does to an optimizer.


def _move_to(scheduler: LRScheduler, position: int) -> None:
    """In a single step: those over a run compute their rate from `last_epoch` alone."""
    scheduler.last_epoch = position - 1
    with warnings.catch_warnings():
        # torch looks at the first step of a scheduler only, which is this one. So it does not warn in the run either,
        # where a gradient scaler may leave out the optimizer's first step.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
        scheduler.step()


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a schedule changes of a parameter group."""
    return {"lr": float(group["lr"])} | {key: group[key] for key in ("momentum", "betas") if key in group}


def _restore(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    for group, old in zip(optimizer.param_groups, settings, strict=True):
        for key, value in old.items():
            if isinstance(group[key], Tensor):
                group[key].fill_(value)  # in place: a captured graph reads the rate from this very tensor
            else:
                group[key] = value


def _refuse_unfit(scheduler: Any, schedule: Schedule, optimizer: Optimizer) -> None:
    kind = type(scheduler).__name__
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"schedule={schedule.name!r} returned a {kind}, expected a scheduler of torch.optim.lr_scheduler. Return "
            f"one that is made of the optimizer given."
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"schedule={schedule.name!r} returned a {kind} of another optimizer. Make it of the optimizer given."
        )
    if schedule.every == "step" and isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(_not_when_told(schedule.name, "epoch"))


# What `get` is given.


def _by_name(name: str) -> Callable[..., Schedule]:
    by_key = {known.__name__.replace("_", ""): known for known in KNOWN} | {"reducelronplateau": plateau}
    key = name.lower().replace("_", "")
    if key not in by_key:
        close = [by_key[near].__name__ for near in difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)]
        names = ", ".join(sorted(known.__name__ for known in KNOWN))
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {names}."
        raise ValueError(f"schedule={name!r} is not known. {hint}")
    return by_key[key]


def _own(schedule: Any, every: Literal["step", "epoch"]) -> Schedule:
    """A schedule of the user's own."""
    if not callable(schedule):
        raise TypeError(
            f"schedule={schedule!r} is a {type(schedule).__name__}; expected a name, what a function of kt.schedules "
            f"returns, or a callable that makes a scheduler of an optimizer, e.g. "
            f"lambda optimizer: StepLR(optimizer, step_size=30)."
        )
    kind = schedule.func if isinstance(schedule, functools.partial) else schedule
    name = getattr(kind, "__name__", type(kind).__name__)
    try:
        inspect.signature(schedule).bind(None)
    except ValueError:
        pass  # some that are written in C have no signature; what they return is looked at in any case
    except TypeError as error:
        parameters = inspect.signature(schedule).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
        options = ", ".join(f"{option}=..." for option in required[1:]) or "..."
        raise TypeError(
            f"schedule={name} cannot be made of the optimizer alone: {error}. Give functools.partial({name}, "
            f"{options}) or lambda optimizer: {name}(optimizer, {options})."
        ) from error
    return Schedule(name, functools.partial(_given, schedule), every=every, restarts=False)


def _not_when_told(name: str, every: str) -> str:
    told = "step" if every == "epoch" else "epoch"
    return f'schedule={name!r} is moved every {every}, not every {told}. Give it without ("{told}", ...).'


# Values.


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _count(name: str, value: Any, or_none: bool = True) -> int | None:
    if value is None and or_none:
        return None
    if not (_is_number(value) and isinstance(value, numbers.Integral) and value >= 1):
        raise ValueError(f"{name}={value!r} is not a count. Give a whole number from 1 up.")
    return int(value)


def _part(name: str, value: Any) -> float:
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} is not a part of lr. Give a number from 0 to 1.")
    return float(value)


def _warmup(value: Any) -> float:
    """Steps as an int, a part of the length as a float."""
    if _is_number(value) and (0 <= value < 1 or isinstance(value, numbers.Integral) and value > 0):
        return int(value) if value == int(value) else float(value)  # 0.0 is no steps, which need no length
    raise ValueError(
        f"warmup={value!r} is neither steps nor a part of the run. Give a whole number from 0 up or a float below 1."
    )


def _try(kind: type[LRScheduler], options: dict[str, Any], **given: Any) -> None:
    """What torch has against the options it says now, not when a run begins."""
    single = {name: value[0] if isinstance(value, (list, tuple)) else value for name, value in options.items()}
    kind(torch.optim.SGD([torch.zeros(1, device="cpu")], lr=1.0), **given, **single)
