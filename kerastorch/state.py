"""All of a model's state: what a run needs to go on, and the way back into a model that is made and compiled as it was.

Plain data and tensors, for `checkpoint.py` to write and read. Everything is checked before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .checkpoint import plain, refuse_no_weights
from .history import History

OPTIONS_OF_DEVICE = ("fused", "foreach", "capturable")  # how an optimizer computes, not what
NAMES_SHOWN = 10
KEYS = ("module", "optimizers", "schedules", "scaler", "epochs_trained", "history", "callbacks")


def state_of(model: Any, callbacks: Iterable[Any] = ()) -> dict[str, Any]:
    """All that a run needs to go on, by references: to be written before training goes on.

    Args:
        model: A `kerastorch.Model`.
        callbacks: Whose states to take, in order; one without `state_dict`, such as Keras's, has none.
    """
    scaler, whole = _scaler_of(model), model.backend.whole
    for update in model.updates.values():
        if update.scaled_step is not None:
            update.scaled_step.settle()  # what the next step would begin with
    return {
        "module": model.backend.state(model.module),
        "optimizers": {name: _optimizer_state(model, one.optimizer) for name, one in model.updates.items()},
        "schedules": {name: None if one is None else one.state_dict() for name, one in _schedules_of(model).items()},
        "scaler": None if scaler is None else scaler.state_dict(),
        "epochs_trained": model.epochs_trained,
        "history": _history_state(model.history),
        "run": model._run_state(),
        "callbacks": [[type(one).__name__, whole(getattr(one, "state_dict", dict)())] for one in callbacks],
    }


def refuse_unsavable(model: Any, *, is_weights: bool) -> None:
    """Says before training what could not be written.

    Args:
        model: A `kerastorch.Model`.
        is_weights: Whether its weights alone are to be written.
    Raises:
        TypeError: something is no plain data.
    """
    if is_weights:
        refuse_no_weights(model.backend.state(model.module))
    else:
        plain(state_of(model, model._callbacks), "state")


def restore(model: Any, state: Mapping[str, Any], source: str = "the state") -> None:
    """Puts back what `state_of` returned, but for the callbacks' states; all is checked before anything is changed.

    Where a lazy module has no optimizer yet, it is made, and checked, when the module has its weights.

    Args:
        model: A `kerastorch.Model`, compiled as it was.
        state: What `state_of` returned.
        source: Where it is from, for errors.
    Raises:
        ValueError: part of it is missing; the module has other names or shapes, or its training is compiled otherwise.
    """
    refuse_incomplete(state, source)
    model.backend.gather_state()
    refuse_unlike(model.module, state["module"], source)
    was_made = bool(model.updates) or not state["optimizers"]
    if was_made:
        _refuse_other_training(model, state, source)
    model.backend.load(model.module, state["module"])
    if not was_made:
        model._make_optimizer()
        _refuse_other_training(model, state, source)
    schedules, scaler = _schedules_of(model), _scaler_of(model)
    for name, saved in state["optimizers"].items():
        _load_optimizer(model.backend, model.updates[name].optimizer, saved["state"])
        if state["schedules"][name] is not None:
            schedules[name].load_state_dict(state["schedules"][name])
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    model.epochs_trained, model.history = state["epochs_trained"], _history_from(state["history"])
    model._ended_run = state.get("run")


def refuse_incomplete(state: Mapping[str, Any], source: str) -> None:
    """A state must have all its parts, as one that somebody wrote with other means may not.

    Args:
        state: To be put back.
        source: Where it is from, for the error.
    Raises:
        ValueError: some are missing, with the keys that lead to them.
    """
    needed = {(): KEYS, ("history",): ("params", "epoch", "logs", "intervals")}
    for name in state.get("optimizers") or ():
        needed |= {("optimizers", name): ("kind", "groups", "state"), ("schedules",): (name,)}
    missing = []
    for keys, names in needed.items():
        part: Any = state
        for key in keys:
            part = part.get(key)
            if part is None:  # there was none, or it is missing itself
                break
        else:
            missing += ["".join(f"[{key!r}]" for key in (*keys, name)) for name in names if name not in part]
    if missing:
        raise ValueError(
            f"{source} has not all of a state: missing {_listed(missing)}. Nothing was changed. Give a file that "
            f"model.save wrote."
        )


def restore_callbacks(callbacks: Iterable[Any], state: Mapping[str, Any]) -> None:
    """Gives callbacks the states that those of the same class had, in order; others begin anew.

    Args:
        callbacks: Of the run that goes on.
        state: What `state_of` returned.
    """
    left = list(state["callbacks"])
    for callback in callbacks:
        found = next((pair for pair in left if pair[0] == type(callback).__name__), None)
        if found is not None and hasattr(callback, "load_state_dict"):
            left.remove(found)
            callback.load_state_dict(found[1])


def refuse_unlike(
    module: nn.Module,
    weights: Mapping[str, Any],
    source: str,
    strict: bool = True,
    skip_mismatch: bool | None = None,
) -> list[str]:
    """Names and shapes of weights must be those of a module.

    Args:
        module: The module; what is still to be made in it has any shape. Of tied tensors one name is enough.
        weights: Tensors by name.
        source: Where they are from, for the error.
        strict: Whether missing and unexpected names are refused. Default: `True`.
        skip_mismatch: Whether tensors of another shape are not; `None` = they are, and nobody could ask for it.
            Default: `None`.
    Returns:
        What differs and was not refused, in words.
    Raises:
        ValueError: other names with `strict`, other shapes without `skip_mismatch`, or nothing that fits.
    """
    own = module.state_dict(keep_vars=True)
    reshaped = reshaped_of(module, weights)
    present = {id(own[name]) for name in weights if name in own}
    fitting = {id(own[name]) for name in weights if name in own and name not in reshaped}
    found = {
        "missing": [repr(name) for name in own if name not in weights and id(own[name]) not in present],
        "unexpected": [repr(name) for name in weights if name not in own],
        "of another shape": [f"{name!r} {given} instead of {wanted}" for name, (given, wanted) in reshaped.items()],
    }
    allowed = {"missing": not strict, "unexpected": not strict, "of another shape": skip_mismatch}
    differences = [f"{what} {_listed(names)}" for what, names in found.items() if names]
    if any(names and not allowed[what] for what, names in found.items()) or (own and not fitting):
        instead = ""
        if skip_mismatch is not None and fitting:
            needed = {"strict=False": found["missing"] or found["unexpected"], "skip_mismatch=True": reshaped}
            instead = f", or give {' and '.join(one for one in needed if needed[one])} to leave out what does not fit"
        raise ValueError(
            f"{source} does not fit the module, which is as it was: {'; '.join(differences)}. Make the module as it "
            f"was when the file was written{instead}."
        )
    return differences


def reshaped_of(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of weights that are not those of the module, and the module's, by name."""
    return {
        name: (tuple(weights[name].shape), tuple(tensor.shape))
        for name, tensor in module.state_dict(keep_vars=True).items()
        if _has_other_shape(tensor, weights.get(name))
    }


def _has_other_shape(own: Any, given: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(given, Tensor) or is_lazy(own):
        return False
    return own.shape != given.shape


def _optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state, and what it is of: torch's own state knows parameters by their numbers alone."""
    state = model.backend.state(optimizer)
    return {"kind": type(optimizer).__name__, "groups": _groups(model.module, optimizer), "state": state}


def _groups(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names.get(id(one), "of another module") for one in group["params"]] for group in optimizer.param_groups]


def _load_optimizer(backend: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """torch's `load_state_dict`, but that how it computes is left as it was compiled for this device."""
    own = [{key: group[key] for key in OPTIONS_OF_DEVICE if key in group} for group in optimizer.param_groups]
    rates = [group.get("lr") for group in optimizer.param_groups]
    groups = [saved | options for saved, options in zip(state["param_groups"], own, strict=True)]
    backend.load(optimizer, state | {"param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.fill_(group["lr"])  # in place: a captured graph reads it from this very tensor
        elif isinstance(group.get("lr"), Tensor):
            group["lr"] = float(group["lr"])


def _refuse_other_training(model: Any, state: Mapping[str, Any], source: str) -> None:
    """Optimizers and schedules must be those of the state."""
    saved, own = state["optimizers"], model.updates
    if set(saved) != set(own):
        raise ValueError(
            f"{source} has the optimizers {_listed([repr(name) for name in saved]) or 'of no compile'}, the model "
            f"{_listed([repr(name) for name in own]) or 'none'}. Compile as it was when the file was written."
        )
    for name, one in own.items():
        kind, groups = type(one.optimizer).__name__, _groups(model.module, one.optimizer)
        of = f" {name!r}" if name else ""
        if kind != saved[name]["kind"]:
            raise ValueError(
                f"{source} has the state of {saved[name]['kind']}, and the optimizer{of} is {kind}. Compile as it was "
                f"when the file was written, or load the weights alone: model.load_weights."
            )
        if groups != saved[name]["groups"]:
            raise ValueError(
                f"{source} has an optimizer{of} of {_sizes(saved[name]['groups'])}, the model one of {_sizes(groups)}: "
                f"expected the same parameters in the same groups. Compile as it was when the file was written; where "
                f"a callback made groups, give fit that callback."
            )
    for name, one in _schedules_of(model).items():
        schedule = state["schedules"][name]
        if schedule is not None and (one is None or one.schedule.name != schedule["schedule"]):
            raise ValueError(
                f"{source} has the state of schedule={schedule['schedule']!r}, the model "
                f"{'none' if one is None else repr(one.schedule.name)}. Compile as it was when the file was written."
            )


def _schedules_of(model: Any) -> dict[str, Any]:
    """The schedules that were compiled; what a callback has put in the place of one, it puts there again."""
    chosen = {} if model._compiled is None else model._compiled._schedules
    running = {name: update.schedule for name, update in model.updates.items()}
    return {name: None if one is None or one.schedule is not chosen[name] else one for name, one in running.items()}


def _scaler_of(model: Any) -> torch.amp.GradScaler | None:
    return None if model._compiled is None else model._compiled.scaler


def _history_state(history: Any) -> dict[str, Any] | None:
    if not isinstance(history, History):
        return None
    epochs = history._epochs_of
    values = {name: dict(zip(epochs[name], column, strict=True)) for name, column in history.history.items()}
    logs = [{name: known[epoch] for name, known in values.items() if epoch in known} for epoch in history.epoch]
    kept = {"params": dict(history.params), "epoch": list(history.epoch), "logs": logs}
    return kept | {"intervals": history.intervals}


def _history_from(state: Mapping[str, Any] | None) -> History | None:
    if state is None:
        return None
    history = History(dict(state["params"]))
    for epoch, logs in zip(state["epoch"], state["logs"], strict=True):
        history.record(epoch, logs)
    history.intervals = list(state["intervals"])
    return history


# Words.


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _sizes(groups: list[list[str]]) -> str:
    return f"{' + '.join(str(len(group)) for group in groups)} parameters"
