"""What `compile` chose, checked and ready: from arguments to the optimizers' updates and the function of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import losses, optimizers, schedules
from . import precision as precisions
from .computation import (
    Compute,
    Overridden,
    checked_state,
    output_and_loss,
    output_loss_and_state,
    with_graph,
    without_state,
)
from .jit import Jitted, refuse_unknown_mode
from .losses import Loss, OwnLoss, SumOfLosses
from .patterns import matches, parameters_of
from .step import Update


class Compiled:
    """The choices of one `compile`.

    Attributes:
        loss: Called with `(output, target, weight)`.
        has_own_loss: Whether the module computes its loss itself.
        precision: What the module computes in.
        tbptt_steps: Steps of time in a piece of truncated backpropagation; `None` = sequences are not cut.
        compute: `(x, target, weight) -> (output, loss)`, overrides included.
        compute_evaluated: `compute` for an evaluation.
        plain: The same without an override of `compute_loss`.
        with_state: `(x, target, weight, state) -> (output, loss, state)`, where sequences are cut.
        network: The module in its precision, without the state where it has one.
        logged_loss: What a loss of `compute` came from: its `shares` are what it is the mean over.
        updates: Name of an optimizer -> its update; empty before `make_updates`.
        scaler: Scales losses in fp16; else `None`.
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Any,
        *,
        optimizer: Any,
        loss: Any,
        precision: Any,
        clip: Any,
        lr: Any,
        schedule: Any,
        jit: bool | str,
        tbptt_steps: int | None,
    ) -> None:
        self.module, self.backend, self.device = module, backend, backend.device
        device = self.device
        self.precision = precisions.get(precision, device)
        chosen_loss = losses.get(loss)
        self.has_own_loss = chosen_loss is None
        self.loss: Loss | SumOfLosses | OwnLoss = OwnLoss(module) if chosen_loss is None else chosen_loss
        self.is_single = not isinstance(optimizer, Mapping)
        named = self._named = {"": optimizer} if self.is_single else dict(optimizer)
        given = self._given = {name for name, one in named.items() if isinstance(one, torch.optim.Optimizer)}
        if not named:
            raise ValueError("optimizer is an empty dict. Give an optimizer for each submodule, or one for all.")
        lr = dict(lr) if isinstance(lr, Mapping) else lr
        if isinstance(lr, Mapping) and not self.is_single and not set(lr) <= set(named):
            rates = {name: None if name in given else self._fitting(lr, name) for name in named}
        else:
            rates = _for_each(named, lr, "lr") if not self.is_single else {"": lr}
        chosen = _for_each(named, schedule, "schedule") if not self.is_single else {"": schedule}
        self._makers = {name: optimizers.maker(one, rates[name]) for name, one in named.items()}
        self._schedules = {name: schedules.get(one) for name, one in chosen.items()}
        self._clip = _clipper(clip, backend)
        refuse_unknown_mode(jit)
        if jit and device.type == "xla":
            raise ValueError(f"jit={jit!r} is for torch.compile, and XLA compiles each step by itself. Leave jit out.")
        self._jit, self.tbptt_steps, self.with_state = jit, tbptt_steps, None
        self.updates: dict[str, Update] = {}
        self.scaler = torch.amp.GradScaler(device.type) if self.precision.scales_loss else None

    def settle(self, compute_loss: Callable | None, measures: bool) -> None:
        """Puts the function of a step together.

        Args:
            compute_loss: The user's own; `None` = what `loss` names.
            measures: Whether there are metrics.
        """
        is_double = self.precision.weights is torch.float64
        losses.place(self.loss, self.device, torch.float64 if is_double else None)
        if self.tbptt_steps is None:
            network = precisions.in_precision(self.module, self.precision, self.device)
        else:
            for part in losses.parts_of(self.loss):  # time is dim 1, in pieces of as many steps as classes too
                part.layout.is_last = True
            run = precisions.in_autocast(self.module, self.precision, self.device)
            stateful = lambda *inputs, **named: checked_state(run(*inputs, **named))  # noqa: E731
            self.with_state = self._jitted(output_loss_and_state(stateful, self.loss))
            network = without_state(stateful)
        self.network = network
        self.plain: Compute = self._jitted(output_and_loss(network, self.loss))
        self.compute, self.logged_loss = self.plain, self.loss
        if compute_loss is not None:
            compute_loss = precisions.in_precision(compute_loss, self.precision, self.device)
            self.compute = self.logged_loss = Overridden(compute_loss, self.plain, self.loss, measures)
        is_own = isinstance(self.loss, OwnLoss)
        self.compute_evaluated = with_graph(self.compute, self.loss) if is_own else self.compute

    @property
    def is_plain(self) -> bool:
        """Whether a step is one call of the module and one of a loss that is one mean."""
        is_own = self.compute is not self.plain
        return not (is_own or self._jit or self.tbptt_steps is not None or isinstance(self.loss, SumOfLosses))

    def over(self, network: Callable) -> Compute:
        """`compute`, where it is plain, with something else called for the module."""
        return output_and_loss(precisions.in_precision(network, self.precision, self.device), self.loss)

    def gather(self, is_gathered: bool) -> None:
        """Says whether `logged_loss.shares` will be asked for after each batch of a run."""
        for loss in (self.loss, self.logged_loss):
            loss.is_gathered = is_gathered

    def change_schedule(self, schedule: Any) -> None:
        """Has the rates of all optimizers follow another schedule from here on."""
        chosen = schedules.get(schedule)
        if chosen is not None and chosen.restarts:
            raise ValueError(
                f"change_schedule was given {chosen.name!r}, which goes over a whole run. Give a callable optimizer -> "
                f"LRScheduler, or give compile the schedule."
            )
        for update in self.updates.values():
            if update.scaled_step is not None:
                update.scaled_step.settle()
            update.schedule = None if chosen is None else schedules.Running(chosen, update.optimizer)

    def leave(self, others: set[int]) -> None:
        """Gives optimizers among `others`, by `id`, the rates back that they had before their schedules."""
        for update in self.updates.values():
            if update.schedule is not None and id(update.optimizer) in others:
                update.schedule.reset()

    @property
    def given(self) -> set[int]:
        """Which optimizers are the user's own instances, by `id`."""
        return {id(self._named[name]) for name in self._given}

    def _jitted(self, compute: Callable) -> Callable:
        return Jitted(compute, self.loss, self._jit) if self._jit else compute

    @property
    def optimizer(self) -> Any:
        """The optimizer, or a dict of them; `None` where they are still to be made."""
        made = {name: update.optimizer for name, update in self.updates.items()}
        return made.get("") if self.is_single or not made else made

    def make_updates(self) -> None:
        """Makes the optimizers and what belongs to each; an instance given stays as it is where that fails."""
        given = [group for name in self._given for group in self._named[name].param_groups]
        before = [dict(group) for group in given]
        try:
            self.updates = self._made_updates()
        except BaseException:
            for group, settings in zip(given, before, strict=True):
                group.clear()
                group.update(settings)
            raise
        for name in self._given:
            _follow_dtypes(self._named[name])

    def _made_updates(self) -> dict[str, Update]:
        updates: dict[str, Update] = {}
        for name, make in self._makers.items():
            optimizer = make(self.module, self._parameters_for(name))
            self.backend.adopt(optimizer)
            parameters = tuple(parameter for group in optimizer.param_groups for parameter in group["params"])
            chosen = self._schedules[name]
            schedule = None if chosen is None else schedules.Running(chosen, optimizer)
            updates[name] = Update(
                optimizer,
                # All of the module's where there is one optimizer: its loss reaches them all.
                tuple(self.module.parameters()) if self.is_single else parameters,
                clip=self._clip and partial(self._clip, parameters),
                schedule=schedule,
                scaled_step=self.scaler and precisions.ScaledStep(optimizer, self.scaler),
                rate_name="lr" if self.is_single else f"{name}_lr",
            )
            self._refuse_shared(name, updates)
            self._warn_of_lost_eps(optimizer)
            is_lazy = self.device.type == "xla"  # each reading of a loss would be a program of its own
            if optimizers.needs_closure(optimizer) and (self.scaler is not None or not self.is_single or is_lazy):
                what = "precision='16'" if self.scaler is not None else "a TPU" if is_lazy else "several optimizers"
                raise ValueError(
                    f"{type(optimizer).__name__} evaluates the loss several times a step, which does not go with "
                    f"{what}. Give another optimizer, or precision='bf16' or '32'."
                )
        return updates

    def _fitting(self, lr: Mapping[str, float], name: str) -> dict[str, float]:
        """Those rates by patterns, of rates for several optimizers, that are for parameters of this one."""
        deciding = {known: next((one for one in lr if matches(known, one)), None) for known in self._known_parameters()}
        for pattern in set(lr) - set(deciding.values()):
            raise ValueError(
                f"lr has the pattern {pattern!r}, which fits no parameter that a pattern before it does not, and names "
                f"no optimizer; they are {str([*self._named])[1:-1]}."
            )
        own = {deciding[known] for known in parameters_of(self.module, [name], "optimizer")}
        return {pattern: rate for pattern, rate in lr.items() if pattern in own}

    def _known_parameters(self) -> list[str]:
        return [name for name, _ in self.module.named_parameters(remove_duplicate=False)]

    def _refuse_shared(self, name: str, updates: dict[str, Update]) -> None:
        """Names of submodules, one inside the other, would have two optimizers step on the same parameters."""
        own = set(map(id, updates[name].parameters))
        for other, update in updates.items():
            shared = len(own.intersection(map(id, update.parameters)))
            if other != name and shared and not {name, other} & self._given:
                raise ValueError(
                    f"optimizers {other!r} and {name!r} share {shared} parameters, which both would step on. Name "
                    f"submodules that are not part of one another."
                )

    def _warn_of_lost_eps(self, optimizer: torch.optim.Optimizer) -> None:
        eps = optimizer.defaults.get("eps")
        is_number = isinstance(eps, Real) and eps > 0
        if self.precision.weights is torch.float16 and is_number and float(torch.tensor(eps).half()) == 0.0:
            warnings.warn(
                f"{type(optimizer).__name__} divides by a number plus eps={eps:g}, which float16 rounds to 0: the "
                f"weights may become NaN. Give functools.partial(torch.optim.{type(optimizer).__name__}, eps=1e-4), or "
                f"precision='16' or 'bf16-true'.",
                stacklevel=4,
            )

    def _parameters_for(self, name: str) -> list[tuple[str, nn.Parameter]]:
        if self.is_single:
            return list(self.module.named_parameters())
        if name in self._given:
            return []
        return optimizers.named_parameters(self.module, name)


def _follow_dtypes(optimizer: torch.optim.Optimizer) -> None:
    """States of an optimizer that has stepped, in the dtype that its parameters have by now."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            is_like = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
            if is_like and key != "step":
                state[key] = value.to(parameter.dtype)


def _for_each(named: dict[str, Any], given: Any, argument: str) -> dict[str, Any]:
    """One setting for each of several optimizers: `given` by their names, or the same for all."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(named, given)
    if unknown := sorted(set(given) - set(named)):
        raise ValueError(f"{argument} has {unknown[0]!r}, which names no optimizer; they are {str([*named])[1:-1]}.")
    return {name: given.get(name) for name in named}


def _clipper(clip: Any, backend: Any) -> Callable[..., Any] | None:
    """What `compile` was given as `clip` -> the function that does it, to be called with the parameters."""
    if clip is None:
        return None
    kind, bound = clip if isinstance(clip, (tuple, list)) and len(clip) == 2 else ("norm", clip)
    is_number = isinstance(bound, Real) and not isinstance(bound, bool)
    if kind not in ("norm", "value") or not is_number or not bound > 0:
        raise ValueError(
            f"clip={clip!r} is no bound of gradients. Give a number above 0 (their global norm), ('norm', 1.0) or "
            f"('value', 0.5)."
        )
    if kind == "norm":
        return partial(backend.clip_norm, max_norm=float(bound))
    return partial(backend.clip_value, bound=float(bound))
