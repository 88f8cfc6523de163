"""Averages of the weights: `EMA`, a moving one over the steps, and `StochasticWeightAveraging` over the last epochs.

Both keep the averages beside the module, by the names of its parameters, and bring them in by copying values: the
optimizer, compiled graphs and all who hold a parameter go on holding the same one. What a step or an epoch is, others
decide.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR, get_ema_multi_avg_fn, get_swa_avg_fn

from .base import Callback
from .rates import set_rate


class _Averaging(Callback):
    """Averages by the names of the parameters, their way into the module, and its own values back again."""

    needs_all_parameters = True

    def __init__(self) -> None:
        self._averages: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # the module's, while averages are in their place
        self._is_loaded = self._is_running = self._is_new_epoch = False

    def on_exception(self, error: BaseException) -> None:
        # Only in a run of ours: what the last one left in the module, an error elsewhere must not take out.
        if self._is_running:
            self._put_back()
            self._is_running = False

    def _begin(self) -> bool:
        """At the start of a run: whether it starts anew; it goes on where a state was loaded."""
        self._is_running = self._is_new_epoch = True
        if self._is_loaded:
            return False
        self._averages, self._own = {}, {}
        return True

    @torch.no_grad()
    def _put_in(self, averages: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copies averages into the module, and keeps its own values of these, and of `buffers`, aside."""
        named = self._parameters() | dict(buffers)
        # All of them before the first is overwritten: a Ctrl-C in between can be made good.
        self._own = {name: named[name].detach().clone() for name in [*averages, *buffers]}
        for name, average in averages.items():
            named[name].copy_(average)

    def _put_back(self) -> None:
        """Copies the module's own values back, if averages are in their place."""
        if not self._own:
            return
        with torch.no_grad():
            named = self._parameters() | dict(self.model.module.named_buffers())
            for name, value in self._own.items():
                named[name].copy_(value)
            self._own = {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The module's parameters by name; refuses averages of another module, which a state may have brought."""
        named = dict(self.model.module.named_parameters())
        for name, average in self._averages.items():
            if name not in named or named[name].shape != average.shape:
                here = tuple(named[name].shape) if name in named else "no such parameter"
                raise ValueError(
                    f"{type(self).__name__} has an average of {name!r} with shape {tuple(average.shape)}, but the "
                    f"module has {here}. Load a state of this module."
                )
        return named

    def _averaged(self) -> dict[str, nn.Parameter]:
        """What is averaged: what is trained, or was. The average of anything else is the thing itself."""
        named = self._parameters()
        return {name: value for name, value in named.items() if value.requires_grad or name in self._averages}

    def _optimizers(self) -> dict[str, Optimizer]:
        optimizer = self.model.optimizer
        return {"": optimizer} if isinstance(optimizer, Optimizer) else optimizer


@dataclass
class _Kind:
    """Averages and parameters of one dtype, as one kernel takes them; `widened` holds half precision as float32."""

    averages: list[Tensor]
    parameters: list[Tensor]
    widened: list[Tensor] | None


class EMA(_Averaging):
    """Exponential moving average of the weights: serves validation, and is left in the module at the end.

    It starts from the weights after the first optimizer step, and after every `update_every`-th one becomes
    `decay * average + (1 - decay) * weights`. Each optimizer of several counts its own steps; one that loss scaling
    leaves out counts too. Only what is trained is averaged. Buffers are the model's own: BatchNorm normalizes by the
    statistics that it has. Half precision is averaged in float32, where a thousandth of the way is not rounded off.

    From a validation on, until training goes on, the averages are in the module: what other callbacks save or keep at
    the end of that epoch has the values that they monitor. An epoch without validation ends with the weights of
    training. Each run starts anew, unless a state was loaded.

    Args:
        decay: How much of the average stays at each update, from 0 up to but not including 1. Default: 0.999.
        update_every: Optimizer steps between two updates. Default: 1.
        swap: Whether the averages are put into the module for validation and at the end; `False` leaves that to
            `swap_weights`. Default: `True`.
    Raises:
        ValueError: a decay or a count outside of these ranges.
    Example:
        >>> import kerastorch as kt
        >>> model, x = kt.Model(nn.Linear(2, 1), backend="cpu").compile("sgd", "mse"), torch.rand(8, 2)
        >>> ema = kt.callbacks.EMA(0.99)
        >>> history = model.fit(x, x.sum(1, keepdim=True), epochs=3, callbacks=[ema], verbose=0)
        >>> model.module.weight.equal(ema.state_dict()["averages"]["weight"])
        True

    Source: Polyak & Juditsky 1992; `torch.optim.swa_utils.get_ema_multi_avg_fn`; Keras, `SwapEMAWeights`.
    """

    serves_validation = True

    def __init__(self, decay: float = 0.999, *, update_every: int = 1, swap: bool = True) -> None:
        super().__init__()
        if not _is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is not a decay. Give a number from 0 up to but not including 1: 0.999.")
        if not _is_whole(update_every) or update_every < 1:
            raise ValueError(f"update_every={update_every!r} is no count of steps. Give a whole number from 1 up.")
        self.decay, self.update_every, self.swap = float(decay), int(update_every), swap
        self._update = get_ema_multi_avg_fn(self.decay)
        self._steps: dict[str, int] = {}  # by the optimizer's name
        self._followed: dict[Optimizer, tuple[str, list[_Kind]]] = {}

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        self._followed = {}
        if self._begin():
            self._steps = {}

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._is_new_epoch, self._is_loaded = True, False

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        self._put_back()
        if self._is_new_epoch:
            self._is_new_epoch = False
            # Before a step changes what was unfrozen since: so far its average is what it is.
            for name, optimizer in self._optimizers().items():
                if name in self._steps:
                    self._follow(optimizer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._put_back()  # on what a short window has left, after a validation that came with the last batch

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if optimizer not in self._followed:  # its first step
            self._follow(optimizer)
        name, kinds = self._followed[optimizer]
        self._steps[name] = steps = self._steps.get(name, 0) + 1
        if steps % self.update_every == 0:
            for kind in kinds:
                if kind.widened is not None:
                    torch._foreach_copy_(kind.widened, kind.parameters)
                self._update(kind.averages, kind.widened or kind.parameters, None)

    @property
    def leaves_average(self) -> bool:
        """Whether its averages are in the module when the run ends: those of one callback alone can be."""
        return self.swap

    def on_validation_begin(self, logs: MutableMapping | None = None) -> None:
        if self.swap and not self._own:
            self._put_in(self._averages, {})

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._is_running = False
        if self.swap and not self._own:
            self._put_in(self._averages, {})

    def swap_weights(self) -> None:
        """Puts the averages into the module or, where they are in it, the weights of training back.

        Raises:
            RuntimeError: there are no averages yet.
        """
        if not self._averages or self.model is None:
            raise RuntimeError("swap_weights was called before the first optimizer step of fit: nothing is averaged.")
        if self._own:
            self._put_back()
        else:
            self._put_in(self._averages, {})

    def state_dict(self) -> dict[str, Any]:
        """The averages, the steps counted and, while averages are in the module, the weights of training."""
        return {"averages": dict(self._averages), "own": dict(self._own), "steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the run that is running or begins next does not start anew."""
        self._averages = {name: value.clone() for name, value in state["averages"].items()}
        self._own = {name: value.clone() for name, value in state["own"].items()}
        self._steps, self._followed = dict(state["steps"]), {}
        self._is_loaded = self._is_new_epoch = True

    def _follow(self, optimizer: Optimizer) -> None:
        """Finds an optimizer's parameters; where there is no average yet, it starts from the value of this moment."""
        found: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._averaged().items():
            if id(parameter) in own:
                average = self._averages.get(name)
                average = _copied(parameter) if average is None else average.to(parameter.device)
                self._averages[name] = average
                found.setdefault((parameter.dtype, parameter.device), []).append((average, parameter))
        kinds = []
        for pairs in found.values():
            averages, parameters = map(list, zip(*pairs, strict=True))
            is_half = averages[0].dtype != parameters[0].dtype
            kinds.append(_Kind(averages, parameters, [torch.empty_like(one) for one in averages] if is_half else None))
        name = next(name for name, one in self._optimizers().items() if one is optimizer)
        self._followed[optimizer] = name, kinds


class StochasticWeightAveraging(_Averaging):
    """Averages the weights at the ends of the last epochs, at a rate that keeps them moving.

    From epoch `swa_epoch_start` on the rate goes to `swa_lrs` and stays there, in place of the compiled schedule; when
    the run ends it is back where it was before. At the end, an early one too, the mean of the weights at the ends of
    these epochs, all weighing the same, is left in the module, and BatchNorm's running statistics are computed anew in
    one pass over the training data (over as many batches as an epoch has); frozen ones stay. That pass calls
    `model.compute_loss` in train mode, so a model with a `train_step` of its own and BatchNorm needs one that works.

    Validation sees the weights of training, as in Lightning. Half precision is averaged in float32 and rounded once, at
    the end. Each run starts anew, unless a state was loaded.

    Args:
        swa_lrs: Rate that is gone to, or a list of one for each parameter group.
        swa_epoch_start: First epoch averaged, 0-based (Lightning counts from 1); a float from 0 up to but not including
            1 is a part of the run's epochs, rounded down. Default: 0.8.
        annealing_epochs: Epochs on the way to `swa_lrs`; 0 = at once. Default: 10.
        annealing_strategy: `"cos"` or `"linear"`, the way. Default: `"cos"`.
    Raises:
        ValueError: an argument that is none of these. When training begins: a start after the last epoch, a list of
            another length than there are groups, or a module with BatchNorm and a generator, which has no second pass.
    Example:
        >>> import kerastorch as kt
        >>> model, x = kt.Model(nn.Linear(2, 1), backend="cpu").compile("sgd", "mse"), torch.rand(8, 2)
        >>> swa = kt.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)
        >>> history = model.fit(x, x.sum(1, keepdim=True), epochs=4, callbacks=[swa], verbose=0)
        >>> [round(lr, 5) for lr in history.history["lr"]]
        [0.001, 0.0022]

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima"; `torch.optim.swa_utils`; names are
    Lightning's.
    """

    leaves_average = True

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
    ) -> None:
        super().__init__()
        rates = swa_lrs if isinstance(swa_lrs, (list, tuple)) else [swa_lrs]
        if not rates or not all(_is_number(rate) and 0 < rate < math.inf for rate in rates):
            raise ValueError(f"swa_lrs={swa_lrs!r} is no rate. Give a number above 0, or one for each parameter group.")
        is_epoch = _is_whole(swa_epoch_start) and swa_epoch_start >= 0
        if not is_epoch and not (_is_number(swa_epoch_start) and 0 <= swa_epoch_start < 1):
            raise ValueError(
                f"swa_epoch_start={swa_epoch_start!r} is no epoch and no part of a run. Give a whole number from 0 up, "
                f"or a float from 0 up to but not including 1."
            )
        if not _is_whole(annealing_epochs) or annealing_epochs < 0:
            raise ValueError(f"annealing_epochs={annealing_epochs!r} is no count. Give a whole number from 0 up.")
        if annealing_strategy not in ("cos", "linear"):
            raise ValueError(f"annealing_strategy={annealing_strategy!r} is not known. Give 'cos' or 'linear'.")
        self.swa_lrs, self.swa_epoch_start = swa_lrs, swa_epoch_start
        self.annealing_epochs, self.annealing_strategy = int(annealing_epochs), annealing_strategy
        self._average_with = get_swa_avg_fn()
        self._start = self._epoch = 0
        self._forget()

    def _forget(self) -> None:
        self._count = 0  # epochs in the averages
        self._unaveraged: int | None = None  # the epoch that was trained last, until its end is averaged
        self._evaluating: list[str] | None = None  # names of what is not in train mode in training
        self._rates: dict[str, list[float]] = {}  # of each optimizer, before they were annealed
        self._annealed: dict[str, dict[str, Any]] = {}  # states of the schedulers, loaded
        self._schedulers: dict[Optimizer, SWALR] = {}

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        epochs, start = self.params["epochs"], self.swa_epoch_start
        if epochs is None and not _is_whole(start):
            raise ValueError(
                f"swa_epoch_start={start} is a part of a run whose epochs nobody knows. Give fit epochs, or the number "
                f"of an epoch here."
            )
        # A millionth of an epoch: 0.29 of 100 is 28.999999999999996 in floating point.
        self._start = start if _is_whole(start) else int(start * epochs + 1e-6)
        if epochs is not None and self._start >= epochs:
            raise ValueError(
                f"swa_epoch_start={start} is not in a run of {epochs} epochs, 0 to {epochs - 1}: nothing would be "
                f"averaged. Give one of these, or a part of the run as 0.8."
            )
        if any(map(_has_statistics, self.model.module.modules())):
            self.model.training_batches()  # says now that there is no second pass, not after the last epoch
        if self._begin():
            self._forget()
        self._schedulers = {}

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        if not self._schedulers:  # not before: the groups may be made while training begins
            self._refuse_other_rates()
        self._epoch, self._is_new_epoch, self._is_loaded = epoch, True, False
        self._put_back()
        # Here, and not when that epoch ended: a state saved by a callback before this one has the average, too.
        if self._unaveraged is not None and self._unaveraged < epoch:
            self._averages, self._count, self._unaveraged = self._with_weights(), self._count + 1, None
        if epoch >= self._start and not self._schedulers:
            self._anneal()

    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        if self._is_new_epoch and self._epoch >= self._start:
            self._unaveraged = self._epoch
            self._evaluating = [name for name, part in self.model.module.named_modules() if not part.training]
            if self._count:
                # Before a step changes what was unfrozen since: so far its average is what it is.
                for name, parameter in self._averaged().items():
                    if name not in self._averages:
                        self._averages[name] = _copied(parameter)
        self._is_new_epoch = False

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        self._restore_rates()
        if not self._count and self._unaveraged is None:
            warnings.warn(
                f"StochasticWeightAveraging averaged nothing: the run ended before epoch {self._start}, the first to "
                f"be averaged (0-based). The module is as it was trained.",
                stacklevel=4,
            )
        elif self._evaluating is not None:
            # The epoch that was trained last may be half an epoch; in a run that is resumed it goes on.
            averages = self._averages if self._unaveraged is None else self._with_weights()
            norms = self._norms()
            self._put_in(averages, {k: v for name, part in norms.items() for k, v in part.named_buffers(name)})
            self._compute_statistics([*norms.values()])
        self._is_running = False

    def on_exception(self, error: BaseException) -> None:
        if self._is_running:
            self._restore_rates()
        super().on_exception(error)

    def state_dict(self) -> dict[str, Any]:
        """The averages, how many epochs are in them, the rates and, after the end, the weights of training."""
        names = {optimizer: name for name, optimizer in self._optimizers().items()} if self._schedulers else {}
        return {
            "averages": dict(self._averages),
            "own": dict(self._own),
            "count": self._count,
            "unaveraged": self._unaveraged,
            "evaluating": self._evaluating,
            "rates": {name: list(rates) for name, rates in self._rates.items()},
            "annealed": {names[optimizer]: _position(one) for optimizer, one in self._schedulers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the run that is running or begins next does not start anew."""
        self._forget()
        self._averages, self._own = dict(state["averages"]), dict(state["own"])
        self._count, self._unaveraged = state["count"], state["unaveraged"]
        self._evaluating = state["evaluating"]
        self._rates = {name: list(rates) for name, rates in state["rates"].items()}
        self._annealed = {name: dict(one) for name, one in state["annealed"].items()}
        self._is_loaded = True

    @torch.no_grad()
    def _with_weights(self) -> dict[str, Tensor]:
        """The averages with the weights of this moment among them."""
        averages = {}
        for name, parameter in self._averaged().items():
            if name in self._averages:
                before = self._averages[name].to(parameter.device)
                averages[name] = self._average_with(before, parameter, self._count)
            else:
                averages[name] = _copied(parameter)
        return averages

    def _anneal(self) -> None:
        """Has the rates go to `swa_lrs` from here on, or go on on that way."""
        if not self._rates:
            self._rates = {name: _rates(optimizer) for name, optimizer in self._optimizers().items()}
        self.model.change_schedule(self._annealing)

    def _annealing(self, optimizer: Optimizer) -> SWALR:
        name = next(name for name, one in self._optimizers().items() if one is optimizer)
        state = self._annealed.pop(name, None)
        if state is not None:
            _set_rates(optimizer, state["_last_lr"])
        scheduler = SWALR(optimizer, self.swa_lrs, self.annealing_epochs, self.annealing_strategy)
        if state is not None:
            scheduler.load_state_dict(state)
            for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["initial_lr"] = rate  # not the one of this moment, which is on the way already
        self._schedulers[optimizer] = scheduler
        return scheduler

    def _restore_rates(self) -> None:
        for name, optimizer in self._optimizers().items() if self._rates else ():
            _set_rates(optimizer, self._rates[name])

    def _refuse_other_rates(self) -> None:
        for optimizer in self._optimizers().values() if isinstance(self.swa_lrs, (list, tuple)) else ():
            groups = len(optimizer.param_groups)
            if len(self.swa_lrs) != groups:
                raise ValueError(
                    f"swa_lrs={self.swa_lrs!r} has {len(self.swa_lrs)} rates for {groups} parameter groups. Give one "
                    f"for each group, or a number for all."
                )

    def _norms(self) -> dict[str, _BatchNorm]:
        """What has running statistics that training changed, by name."""
        parts = self.model.module.named_modules()
        return {name: part for name, part in parts if _has_statistics(part) and name not in self._evaluating}

    @torch.no_grad()
    def _compute_statistics(self, norms: list[_BatchNorm]) -> None:
        """`torch.optim.swa_utils.update_bn`, for whatever inputs the module takes, and without the frozen norms."""
        if not norms:
            return
        self.model.module.train()
        for name in self._evaluating:
            self.model.module.get_submodule(name).training = False
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches, each weighing the same
            with _nothing_compiled():
                # Not more than an epoch has: with `steps_per_epoch` the data may be endless.
                for x, y, weight in islice(self.model.training_batches(), self.params["steps"]):
                    self.model.compute_loss((x, y) if weight is None else (x, y, weight))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _has_statistics(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and part.running_mean is not None


def _nothing_compiled() -> AbstractContextManager:
    """Compiled functions run as they were written: with a mean over all batches, BatchNorm cannot be compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _copied(parameter: Tensor) -> Tensor:
    """A copy to average on, in no less than float32."""
    is_half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().to(torch.float32 if is_half else parameter.dtype, copy=True)


def _position(scheduler: SWALR) -> dict[str, Any]:
    """Where it is on its way. Its whole state has a function in it before torch 2.13, which no safe file can have."""
    state = scheduler.state_dict()
    position = {name: state[name] for name in ("last_epoch", "_step_count")}
    return position | {name: [float(rate) for rate in state[name]] for name in ("_last_lr", "base_lrs")}


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _set_rates(optimizer: Optimizer, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=False):  # a group that was added since keeps its own
        set_rate(group, rate)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
