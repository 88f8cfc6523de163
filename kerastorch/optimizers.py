"""Names of optimizers -> torch optimizers: fused where torch can, with a step that costs what its kernel costs.

The numbers are torch's: defaults, `weight_decay`, `eps` and state are those of the class in `torch.optim` (Keras's
differ: its Adam has `eps=1e-7`, torch's 1e-8).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.optim.optimizer as hooks
from torch import Tensor, nn

from .patterns import matches, parameters_of

Rate = float | dict[str, float] | None
Maker = Callable[[nn.Module, list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def maker(optimizer: Any, lr: Rate = None) -> Maker:
    """What `compile` was given as `optimizer` -> a function that makes the torch optimizer for a module.

    What it makes takes the module and those of its named parameters that shall be optimized, frozen ones too: they are
    trained once they are unfrozen.

    Args:
        optimizer: Name of a class in `torch.optim` (any case), such a class or a `functools.partial` of one, an
            instance, or a callable `params -> Optimizer`.
        lr: Learning rate instead of the optimizer's own; `{pattern: rate}` = a rate for each group of parameters, the
            first pattern that fits deciding; `None` = its own.
    Raises:
        ValueError: an unknown name or an impossible rate; when called, an instance that optimizes other parameters, or
            a pattern that fits no parameter.
        TypeError: something else than these.
    """
    for rate in lr.values() if isinstance(lr, dict) else (lr,):
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0):
            raise ValueError(f"lr={lr!r} is not a learning rate. Give a number from 0 up, e.g. 1e-3.")
    if isinstance(optimizer, torch.optim.Optimizer):
        if isinstance(lr, dict):
            raise ValueError(
                f"lr={lr!r} names parameters, but the optimizer is an instance with groups of its own. Give a rate to "
                f"each of its groups, or give its name and let compile make it."
            )
        return lambda module, named: _with_rate(_checked(optimizer, module), lr)
    make = by_name(optimizer) if isinstance(optimizer, str) else optimizer
    if not callable(make):
        raise TypeError(
            f"optimizer={optimizer!r} is a {type(optimizer).__name__}; expected a name, a class of torch.optim, an "
            f"instance, or a callable that takes the parameters."
        )
    kind, arguments, options = make, (), {}
    if isinstance(make, functools.partial):
        kind, arguments, options = make.func, make.args, make.keywords
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
        if isinstance(lr, float | int):
            options = options | {"lr": lr}
        return lambda module, named: _instance(kind, module, _grouped(named, lr), arguments, options)
    return lambda module, named: _with_rate(_checked(make(_grouped(named, lr)), module), lr)


def _grouped(named: list[tuple[str, nn.Parameter]], lr: Rate) -> list[Any]:
    """Parameters as an optimizer takes them: in groups where patterns give them rates."""
    if not isinstance(lr, dict):
        return [parameter for _, parameter in named]
    groups: dict[str | None, list[nn.Parameter]] = {pattern: [] for pattern in [*lr, None]}
    for name, parameter in named:
        groups[next((pattern for pattern in lr if matches(name, pattern)), None)].append(parameter)
    for pattern in lr:
        if not groups[pattern]:
            names = ", ".join(repr(name) for name, _ in named[:6])
            raise ValueError(
                f"lr has the pattern {pattern!r}, which fits no parameter that a pattern before it does not; the "
                f"parameters are {names}, ... Give a name, a submodule or a glob such as 'backbone.*'."
            )
    rates = {pattern: {"lr": rate} for pattern, rate in lr.items()}
    return [{"params": params} | rates.get(pattern, {}) for pattern, params in groups.items() if params]


def named_parameters(module: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the optimizer with this name, of several, is for: those of the submodule it is named after.

    Raises:
        ValueError: there is none of this name.
    """
    return list(parameters_of(module, [name], "optimizer").items())


def _instance(
    kind: type, module: nn.Module, parameters: list[Any], arguments: tuple, options: dict[str, Any]
) -> torch.optim.Optimizer:
    options = _fastest(kind, module, options) | options
    kind = LEAN.get(kind, kind) if options.get("fused") else kind
    return kind(parameters, *arguments, **options)


def by_name(name: str) -> type[torch.optim.Optimizer]:
    """The class of `torch.optim` with this name, in any case."""
    known = {
        key.lower(): kind
        for key, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        names = [kind.__name__.lower() for kind in known.values()]
        close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(sorted(names))}."
        raise ValueError(f"optimizer={name!r} is not in torch.optim. {hint}")
    return known[name.lower()]


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` computes the loss several times itself and so must be given how (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _with_rate(optimizer: torch.optim.Optimizer, lr: Rate) -> torch.optim.Optimizer:
    for group in optimizer.param_groups if isinstance(lr, float | int) else ():
        group["lr"] = lr
    return optimizer


def _checked(optimizer: Any, module: nn.Module) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer(params) returned a {type(optimizer).__name__}, expected a torch.optim.Optimizer.")
    own = {id(parameter) for parameter in module.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in given)
    if foreign:
        raise ValueError(
            f"{foreign} of the {len(given)} parameters that this {type(optimizer).__name__} optimizes are not the "
            f"module's. Make it from module.parameters(), or give its name and let compile make it."
        )
    return optimizer


def _fastest(kind: type, module: nn.Module, given: dict[str, Any]) -> dict[str, bool]:
    """`fused=True` where the class has it and all parameters can, else `foreach=True`; nothing where the user chose."""
    options = inspect.signature(kind).parameters
    if {"fused", "foreach", "capturable", "differentiable"} & set(given):
        return {}
    has_sparse = any(getattr(part, "sparse", False) for part in module.modules())
    devices = {parameter.device.type for parameter in module.parameters()}
    can_fuse = devices <= {"cpu", "cuda", "mps", "xpu"} and all(map(torch.is_floating_point, module.parameters()))
    # On the CPU, torch's fused SGD leaves most half precision values as they are: pytorch/pytorch#191763.
    is_half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters())
    can_fuse = can_fuse and not ("cpu" in devices and is_half and issubclass(kind, torch.optim.SGD))
    # Fused, SGD would dampen the first momentum of a parameter that is unfrozen later; torch dampens no first one.
    if "fused" in options and can_fuse and not has_sparse and not given.get("dampening"):
        return {"fused": True}
    return {"foreach": True} if "foreach" in options and not has_sparse else {}


# A step that costs what its kernel costs. `torch.optim` finds states and groups tensors anew at each step, which for a
# small model takes several times as long as the update itself. Below, the lists that a fused kernel takes are made once
# and used as long as nothing has changed. Everything else (state, `state_dict`, hooks, schedulers) is torch's.


ONE = torch.tensor(1.0, device="cpu")  # whatever the default device is: an import must not wake a GPU


class _Lists:
    """What a fused kernel takes for one parameter group."""

    def __init__(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]], names: tuple[str, ...]) -> None:
        self.parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        self.idle = [parameter for parameter in group["params"] if parameter.grad is None]
        self.states = [[state[parameter][name] for parameter in self.parameters] for name in names]
        self.names = names

    def gradients(self, state: dict[Tensor, dict[str, Any]], names: tuple[str, ...]) -> list[Tensor] | None:
        """The gradients; `None` where the lists no longer hold.

        That is so where another parameter has a gradient, a state was loaded or dropped, or the group's options,
        momentum say, now ask for other states.
        """
        if names != self.names:
            return None
        for parameter in self.idle:
            if parameter.grad is not None:
                return None
        for parameter, first in zip(self.parameters, self.states[0] if names else (), strict=False):
            if state[parameter].get(names[0]) is not first:
                return None
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                return None
            gradients.append(parameter.grad)
        return gradients


def _lean(
    parent: type,
    state_names: Callable[[dict], tuple[str, ...]],
    update: Callable[..., None],
    prepare: Callable[[Any], None] = lambda optimizer: None,
) -> type:
    """A subclass of a torch optimizer that calls its fused kernel at once wherever the lists of the last step hold.

    Args:
        parent: Class of `torch.optim` that has `fused=True`.
        state_names: Parameter group -> names of the states its kernel takes.
        update: `(lists, gradients, group)` -> one call of the kernel.
        prepare: Called with the optimizer before torch's own step. Default: does nothing.
    """
    torchs_step = inspect.unwrap(parent.step)

    def full_step(optimizer: Any, closure: Callable | None = None) -> Any:
        prepare(optimizer)
        loss = torchs_step(optimizer, closure)
        groups = optimizer.param_groups
        is_fused = all(group["fused"] and _is_uniform(group) for group in groups)
        optimizer._lists = (
            [_Lists(group, optimizer.state, state_names(group)) for group in groups] if is_fused else None
        )
        return loss

    # The wrapper that torch puts around every step calls its hooks and names it in profiles. It costs as much as the
    # update of a small model, so it is there only where somebody watches.
    watched_step = torch.optim.Optimizer.profile_hook_step(full_step)

    class Lean(parent):
        _lists: list[_Lists] | None = None

        def step(self, closure: Callable | None = None) -> Any:
            with torch.no_grad():
                if _is_watched(self):
                    return watched_step(self, closure)
                # `found_inf` is left here by a gradient scaler, for torch's own step to heed.
                lists = None if closure is not None or hasattr(self, "found_inf") else self._lists
                if lists is None or len(lists) != len(self.param_groups):
                    return full_step(self, closure)
                found = []
                for group, group_lists in zip(self.param_groups, lists, strict=True):
                    gradients = group_lists.gradients(self.state, state_names(group))
                    if gradients is None:
                        return full_step(self)
                    found.append(gradients)
                for group, group_lists, gradients in zip(self.param_groups, lists, found, strict=True):
                    if gradients:
                        update(group_lists, gradients, group)

        step.hooked = True  # tells torch that it need not wrap this step

    Lean.__name__ = Lean.__qualname__ = parent.__name__
    Lean.__doc__ = f"`torch.optim.{parent.__name__}`, its fused step without the search for its tensors."
    return Lean


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anybody wants to hear of its steps: hooks of its own or of all optimizers, or a profiler."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )


def _is_uniform(group: dict[str, Any]) -> bool:
    """Whether one kernel call can update the whole group: one dtype, one device, a rate that is a number."""
    kinds = {(parameter.dtype, parameter.device) for parameter in group["params"]}
    return len(kinds) == 1 and not isinstance(group["lr"], Tensor)


def _adam_states(group: dict[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "step") + (("max_exp_avg_sq",) if group["amsgrad"] else ())


def _adam_update(lists: _Lists, gradients: list[Tensor], group: dict[str, Any]) -> None:
    averages, squares, steps, *largest = lists.states
    beta1, beta2 = group["betas"]
    if steps[0].is_cpu:  # a plain 1 would be made a tensor once for each parameter
        torch._foreach_add_(steps, ONE, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        lists.parameters,
        gradients,
        averages,
        squares,
        largest[0] if largest else [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _sgd_states(group: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _start_momenta(optimizer: torch.optim.SGD) -> None:
    """Zeros as the momentum of a parameter that has none yet; without dampening that is what torch starts from.

    torch's fused step takes momenta of all parameters of a group or of none. And where loss scaling leaves its first
    step out, it keeps the memory it has set aside for them, with whatever is in there.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"]:
            states = [(one, optimizer.state[one]) for one in group["params"] if one.grad is not None]
            missing = [(one, state) for one, state in states if state.get("momentum_buffer") is None]
            # With dampening, zeros for all would dampen the first step, which torch does not.
            for parameter, state in missing if len(missing) < len(states) or not group["dampening"] else ():
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _sgd_update(lists: _Lists, gradients: list[Tensor], group: dict[str, Any]) -> None:
    torch._fused_sgd_(
        lists.parameters,
        gradients,
        lists.states[0] if lists.states else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )


Adam = _lean(torch.optim.Adam, _adam_states, _adam_update)
AdamW = _lean(torch.optim.AdamW, _adam_states, _adam_update)
SGD = _lean(torch.optim.SGD, _sgd_states, _sgd_update, _start_momenta)

LEAN = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}
