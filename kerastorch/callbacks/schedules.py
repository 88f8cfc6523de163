"""Learning rates that callbacks set: `ReduceLROnPlateau` by a value of the logs, `LearningRateScheduler` by the epoch.

What moves a rate each step is `compile(schedule=...)`; a run has the one or the other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, MutableMapping
from numbers import Real
from typing import Any

from torch import Tensor

from .base import Callback
from .messages import is_verbose, say
from .monitoring import Monitoring
from .rates import set_rate
from .values import count, number


class ReduceLROnPlateau(Monitoring):
    """Multiplies the learning rate by a factor when a value has stopped getting better.

    The rates of all parameter groups and of all optimizers are multiplied alike. The logs have the rate as `lr`
    (`..._lr` of each of several optimizers): the first group's as the epoch ends, before it is reduced. An average over
    epochs that sets the rate itself (`StochasticWeightAveraging`) is left alone from there on.

    Args:
        monitor: Name in the logs. Default: "val_loss".
        factor: What rates are multiplied by, from 0 up to but not including 1. Default: 0.1.
        patience: Epochs (or validations, with several in an epoch) without a better value that are waited for; 0 is as
            1. Default: 10.
        verbose: 1 = say when rates are reduced; 0 = silent. Default: 0.
        mode: `"min"` = lower is better, `"max"` = higher is, `"auto"` = by the name. Default: `"auto"`.
        min_delta: What a value must be better by; exactly so much is not enough. Default: 1e-4.
        cooldown: Epochs (or validations) after a reduction in which nothing is waited for. Default: 0.
        min_lr: Rates are not reduced below this. Default: 0.0.
    Attributes:
        best: The best value; `None` before the first.
        wait: Values in a row that were not better.
        cooldown_counter: How many more are not waited for.
    Raises:
        ValueError: a number outside of these ranges, an unknown mode. When training begins: `compile` has a schedule.
        TypeError: no number where one is expected.
    Example:
        >>> import torch, kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse", lr=0.4), torch.zeros(8, 2)
        >>> plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10)
        >>> history = model.fit(x, x[:, :1], epochs=4, callbacks=plateau, verbose=0)
        >>> history.history["lr"]
        [0.4, 0.4, 0.2, 0.1]

    Source: Keras, `ReduceLROnPlateau`, which logs the rate as `learning_rate`.
    """

    adds_to_logs = ("lr",)

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.factor, self.min_lr = number("factor", factor), number("min_lr", min_lr)
        if not 0 <= self.factor < 1:
            raise ValueError(f"factor={factor!r} reduces nothing. Give a number from 0 up to but not including 1.")
        if not 0 <= self.min_lr < math.inf:
            raise ValueError(f"min_lr={min_lr!r} is not a learning rate. Give a number from 0 up, e.g. 1e-6.")
        self.patience, self.cooldown = count("patience", patience), count("cooldown", cooldown)
        self.verbose = is_verbose(verbose)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.best: float | None = None
        self.wait = self.cooldown_counter = 0

    def state_dict(self) -> dict[str, Any]:
        """The best so far and what is waited for; the rates are the optimizer's."""
        own = {name: getattr(self, name) for name in ("best", "wait", "cooldown_counter")}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the next run does not start anew."""
        super().load_state_dict(state)
        self.best, self.wait, self.cooldown_counter = state["best"], state["wait"], state["cooldown_counter"]

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        super().on_train_begin(logs)
        _refuse_schedules(self.model, type(self).__name__)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        logs = {} if logs is None else logs
        logs.update(_logged_rates(self.model))
        super().on_epoch_end(epoch, logs)

    def judge(self, epoch: int, logs: MutableMapping, value: float) -> None:
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
        if self.is_better(value, self.best):
            self.best, self.wait = value, 0
        elif self.cooldown_counter == 0:
            self.wait += 1
            if self.wait >= self.patience and self._reduce(epoch):
                self.cooldown_counter, self.wait = self.cooldown, 0

    def _reduce(self, epoch: int) -> bool:
        """Whether any rate could still be reduced."""
        is_reduced = False
        for name, update in _unscheduled(self.model):
            is_reduced |= self._reduce_one(epoch, name, update)
        return is_reduced

    def _reduce_one(self, epoch: int, name: str, update: Any) -> bool:
        before = _rates(update)
        for group, rate in zip(update.optimizer.param_groups, before, strict=True):
            if self.min_lr < rate:
                set_rate(group, max(self.factor * rate, self.min_lr))
        after = _rates(update)
        # Looked up: a rate in a float32 tensor may be a rounding error above `min_lr` for ever.
        is_reduced = after != before
        if is_reduced and self.verbose:
            say(f"Epoch {epoch + 1}: ReduceLROnPlateau reducing {_titled(name)} to {after[0]:g}.")
        return is_reduced


class LearningRateScheduler(Callback):
    """Sets the learning rate at the beginning of each epoch to what a function of the epoch returns.

    With several parameter groups the rate is the first one's, and the others keep their ratios to it. With several
    optimizers the function is called for each. The logs have the rate as `lr` (`..._lr` of each of several optimizers).
    An average over epochs that sets the rate itself (`StochasticWeightAveraging`) is left alone from there on.

    Args:
        schedule: `(epoch, rate now) -> rate`, or `(epoch) -> rate`, where epochs count from 0; with several optimizers
            it may also return a dict of rates by their names.
        verbose: 1 = say what the rate is set to; 0 = silent. Default: 0.
    Raises:
        TypeError: a schedule that cannot be called so; in a run, one that returns no number.
        ValueError: when training begins: `compile` has a schedule; in a run: a rate that is negative, NaN or infinite.
    Example:
        >>> import torch, kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse", lr=0.4), torch.zeros(8, 2)
        >>> halving = LearningRateScheduler(lambda epoch, lr: lr / 2 if epoch else lr)
        >>> history = model.fit(x, x[:, :1], epochs=3, callbacks=halving, verbose=0)
        >>> history.history["lr"]
        [0.4, 0.2, 0.1]

    Source: Keras, `LearningRateScheduler`, which logs the rate as `learning_rate`.
    """

    adds_to_logs = ("lr",)

    def __init__(self, schedule: Callable[..., Any], verbose: int = 0) -> None:
        self.schedule, self.verbose = schedule, is_verbose(verbose)
        self._takes_rate = _takes_rate(schedule)
        self._ratios: dict[str, list[float]] = {}  # of the groups' rates to each other, by the optimizer's name
        self._epoch: int | None = None  # the running one, whose rates are set
        self._is_loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The epoch whose rates are set, and the ratios of the rates, which those do not tell where they are 0."""
        return {"ratios": {name: list(ratios) for name, ratios in self._ratios.items()}, "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the next run does not start anew."""
        self._ratios, self._is_loaded = {name: list(ratios) for name, ratios in state["ratios"].items()}, True
        self._epoch = state.get("epoch")

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        _refuse_schedules(self.model, type(self).__name__)
        if not self._is_loaded:
            self._ratios, self._epoch = {}, None

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        was_set = self._is_loaded and self._epoch == epoch  # in the run that this one goes on from
        self._is_loaded, self._epoch = False, epoch
        if was_set:
            return
        for name, update in _unscheduled(self.model):
            before = _rates(update)
            rate = self._scheduled(epoch, _first(before), name)
            for group, ratio in zip(update.optimizer.param_groups, self._ratios_of(name, before), strict=True):
                set_rate(group, ratio * rate)
            if self.verbose:
                say(f"Epoch {epoch + 1}: LearningRateScheduler setting {_titled(name)} to {rate:g}.")

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._epoch = None
        if logs is not None:
            logs.update(_logged_rates(self.model))

    def _scheduled(self, epoch: int, rate: float, name: str) -> float:
        returned = self.schedule(epoch, rate) if self._takes_rate else self.schedule(epoch)
        if isinstance(returned, Mapping):
            names = [*self.model.updates]
            if {*returned} != {*names} or names == [""]:
                known = ", ".join(map(repr, names)) if names != [""] else "one alone, without a name"
                raise ValueError(
                    f"schedule returned rates for {', '.join(map(repr, returned)) or 'nothing'} in epoch {epoch}, but "
                    f"the optimizers are {known}. Return a rate for each of these, or a number."
                )
            returned = returned[name]
        return _as_rate(returned, epoch)

    def _ratios_of(self, name: str, rates: list[float]) -> list[float]:
        if first := _first(rates):
            self._ratios[name] = [rate / first for rate in rates]
        known = self._ratios.get(name, [])
        return known + [1.0] * (len(rates) - len(known))


def _takes_rate(schedule: Any) -> bool:
    """Whether a schedule is called with the rate, and not with the epoch alone."""
    if not callable(schedule):
        raise TypeError(
            f"schedule={schedule!r} is a {type(schedule).__name__}, expected a function (epoch, rate) -> rate. A "
            f"schedule by name goes to compile(schedule=...)."
        )
    for arguments in ((0, 0.1), (0,)):
        try:
            inspect.signature(schedule).bind(*arguments)
        except (TypeError, ValueError):  # ValueError: what is written in C may have no signature
            continue
        return len(arguments) == 2
    raise TypeError(
        f"schedule={schedule!r} takes neither (epoch, rate) nor (epoch). Give a function that does, e.g. "
        f"lambda epoch, rate: 0.95 * rate."
    )


def _as_rate(value: Any, epoch: int) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"schedule returned {value!r} in epoch {epoch}, which is a {type(value).__name__}, expected a number. "
            f"Return the learning rate."
        )
    if not 0 <= value < math.inf:
        raise ValueError(
            f"schedule returned {value} in epoch {epoch}, which is not a learning rate. Return a number from 0 up."
        )
    return float(value)


def _refuse_schedules(model: Any, owner: str) -> None:
    for update in model.updates.values():
        if update.schedule is not None:
            raise ValueError(
                f"{owner} sets the learning rate, and schedule={update.schedule.schedule.name!r} of compile sets it "
                f"too. Leave {owner} out to go by the schedule, or leave schedule out of compile to go by {owner}."
            )


def _unscheduled(model: Any) -> list[tuple[str, Any]]:
    """Optimizers whose rate nobody else has taken over since training began."""
    return [(name, update) for name, update in model.updates.items() if update.schedule is None]


def _logged_rates(model: Any) -> dict[str, float]:
    return {update.rate_name: _first(_rates(update)) for update in model.updates.values()}


def _rates(update: Any) -> list[float]:
    return [float(group["lr"]) for group in update.optimizer.param_groups]


def _first(rates: list[float]) -> float:
    """That of the first group which is trained at all."""
    return next(filter(None, rates), 0.0)


def _titled(name: str) -> str:
    return f"the learning rate of {name!r}" if name else "the learning rate"
