"""Transfer learning: `Unfreeze`, which has frozen parameters trained from an epoch on, at a rate of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import compress
from numbers import Integral, Real
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from ..patterns import parameters_of
from .base import Callback
from .rates import set_rate


class Unfreeze(Callback):
    """Trains parameters, frozen by `model.freeze` before `fit`, from the beginning of an epoch on.

    They are in the optimizer from the start; without a gradient they cost nothing there. With `lr` they get a group of
    their own, with the options and the state that they have: when training begins, while they are frozen, so that
    nothing about optimizer and schedule changes in mid-run; those that are trained before, at the epoch.

    Args:
        at_epoch: The epoch, 0-based; a run that begins after it unfreezes at once.
        pattern: Name of parameters or of a submodule, or a glob of it: `"backbone"`, `"layers.*.bias"`.
        lr: Rate to train them at, which a schedule moves as it moves the others'; a scheduler of your own starts anew
            with it when training begins. `None` = the rate they were compiled with. Default: `None`.
    Raises:
        ValueError: an epoch or a rate below 0. When training begins: a pattern that fits nothing; parameters that no
            optimizer has; `lr` for what is trained already, beside a scheduler of your own that knows another rate.
        TypeError: a pattern that is no text.
    Example:
        >>> import torch, kerastorch as kt
        >>> model = kt.Model(nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1)), backend="cpu").freeze("0")
        >>> unfreeze, x = kt.callbacks.Unfreeze(at_epoch=1, pattern="0", lr=1e-4), torch.rand(8, 2)
        >>> history = model.compile("adam", "mse").fit(x, x[:, :1], epochs=2, callbacks=unfreeze, verbose=0)
        >>> model.module[0].weight.requires_grad, [group["lr"] for group in model.optimizer.param_groups]
        (True, [0.001, 0.0001])

    Source: gradual unfreezing, Howard & Ruder 2018, "ULMFiT", section 3.3.
    """

    def __init__(self, at_epoch: int, pattern: str, lr: float | None = None) -> None:
        if not isinstance(at_epoch, Integral) or isinstance(at_epoch, bool) or at_epoch < 0:
            raise ValueError(f"at_epoch={at_epoch!r} is no epoch. Give a whole number from 0 up.")
        if not isinstance(pattern, str):
            raise TypeError(f"pattern={pattern!r} is a {type(pattern).__name__}, expected a name or pattern.")
        if lr is not None and (not isinstance(lr, Real) or isinstance(lr, bool) or not 0 <= lr < math.inf):
            raise ValueError(f"lr={lr!r} is not a learning rate. Give a number from 0 up, e.g. 1e-5.")
        self.at_epoch, self.pattern, self.lr = int(at_epoch), pattern, None if lr is None else float(lr)
        self._is_unfrozen = False  # in this run
        self._has_begun = False  # in this run, or in the one whose state was loaded
        self._has_group = self._is_loaded = False

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        parameters = self._parameters()
        _refuse_strangers(self.pattern, parameters, [update.optimizer for update in self._updates()])
        if not self._is_loaded:
            self._has_begun = self._has_group = False
        self._is_unfrozen = False
        if self.lr is None or self._has_group:
            return
        if self.at_epoch == 0 or not any(parameter.requires_grad for parameter in parameters.values()):
            self._give_rate()
        else:
            self._refuse_unaware_schedules()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._is_loaded = False
        if epoch < self.at_epoch or self._is_unfrozen:
            return
        self.model.backend.gather_state()
        if self.lr is not None and not self._has_begun:
            self._give_rate(is_training=True)
        self.model.unfreeze(self.pattern)
        self._is_unfrozen = self._has_begun = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the parameters have a group of their own, and whether the epoch has begun."""
        return {"has_group": self._has_group, "has_begun": self._has_begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. The optimizer gets its groups here, so that its own state can be loaded after this."""
        self._has_begun, self._has_group, self._is_loaded = state["has_begun"], False, True
        if state["has_group"] and self.lr is not None and self.model is not None:
            self._give_rate()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return parameters_of(self.model.module, [self.pattern], "Unfreeze pattern")

    def _updates(self) -> list[Any]:
        return list(self.model.updates.values())

    def _give_rate(self, is_training: bool = False) -> None:
        """Groups of their own for the parameters, at `lr`; what is so already stays as it is."""
        had_group, self._has_group = self._has_group, True
        for update in self._updates():
            schedule = update.schedule if _is_scheduled(update) else None
            if schedule is not None and had_group:  # which moves the rate since training began
                continue
            before = _base_rates(update)
            groups = _groups_of_their_own(update.optimizer, self._parameters().values())
            rates = before + [self.lr] * (len(update.optimizer.param_groups) - len(before))
            rates = [self.lr if index in groups else rate for index, rate in enumerate(rates)]
            if rates == before:
                continue
            # In mid-run what another callback put in the schedule's place is left alone: it would start anew.
            if schedule is not None and (schedule.schedule.restarts or not is_training):
                schedule.rescale(rates)
            else:
                for index in groups:
                    set_rate(update.optimizer.param_groups[index], self.lr)

    def _refuse_unaware_schedules(self) -> None:
        """A scheduler of the user's own cannot be told of a new rate in mid-run."""
        ids = set(map(id, self._parameters().values()))
        for update in self._updates():
            if not _is_scheduled(update) or update.schedule.schedule.restarts:
                continue
            groups = zip(update.optimizer.param_groups, _base_rates(update), strict=True)
            rates = {rate for group, rate in groups if not ids.isdisjoint(map(id, group["params"]))} - {self.lr}
            if rates:
                raise ValueError(
                    f"Unfreeze would change the rate of {self.pattern!r}, which is trained already, from "
                    f"{rates.pop()} to {self.lr} in mid-run, where schedule={update.schedule.schedule.name} knows only "
                    f"the old one. Freeze it before fit, or give a schedule by its name, or compile rates by pattern."
                )


def _refuse_strangers(pattern: str, parameters: Mapping[str, nn.Parameter], optimizers: list[Optimizer]) -> None:
    known = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    strangers = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if strangers:
        raise ValueError(
            f"Unfreeze pattern={pattern!r} means {strangers[0]!r}, which no optimizer has: it would never be trained. "
            f"Make the optimizer of all of module.parameters(), frozen ones too, or give its name."
        )


def _groups_of_their_own(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[int]:
    """Moves parameters out of groups that have others too, and returns the numbers of the groups that they are in.

    What they move into has the options of what they leave. Their state is kept by parameter and needs no move.
    """
    ids, numbers = set(map(id, parameters)), []
    for number, group in enumerate(list(optimizer.param_groups)):
        is_moved = [id(parameter) in ids for parameter in group["params"]]
        if not any(is_moved):
            continue
        if not all(is_moved):
            number = len(optimizer.param_groups)
            _split(optimizer, group, is_moved)
        numbers.append(number)
    return numbers


def _split(optimizer: Optimizer, group: dict[str, Any], is_moved: list[bool]) -> None:
    if isinstance(optimizer, LBFGS):
        raise ValueError("Unfreeze was given lr, but LBFGS has one rate for all parameters. Leave lr out.")
    options = copy.deepcopy({key: value for key, value in group.items() if key not in ("params", "param_names")})
    moved = list(compress(group["params"], is_moved))
    stays = [not moves for moves in is_moved]
    if "param_names" in group:
        moved = list(zip(compress(group["param_names"], is_moved), moved, strict=True))
        group["param_names"] = list(compress(group["param_names"], stays))
    group["params"] = list(compress(group["params"], stays))
    optimizer.add_param_group({"params": moved} | options)


def _is_scheduled(update: Any) -> bool:
    """Whether a schedule computes the rates from base rates; a plateau goes by what the groups have."""
    return update.schedule is not None and update.schedule.schedule.name != "plateau"


def _base_rates(update: Any) -> list[float]:
    if _is_scheduled(update):
        return [settings["lr"] for settings in update.schedule.state_dict()["base"]]
    return [float(group["lr"]) for group in update.optimizer.param_groups]
