"""Verbs of `Model` in several processes: started where there are none yet, and what they did brought back."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Mapping
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .callbacks.base import Callback
from .samples import generators_in
from .seeding import Generator, random_state, set_random_state
from .state import restore, state_of

VERBS = ("fit", "evaluate", "predict", "find_batch_size", "find_lr")
PLAIN = (str, bytes, bool, int, float, torch.Tensor, np.ndarray, np.generic, Path)


def launch_verbs(model: Any) -> None:
    """Has the verbs of a model start the processes that its backend asks for, from then on."""
    for name in VERBS:
        setattr(model, name, wraps(getattr(type(model), name))(partial(_launched, model, name)))


def _launched(model: Any, name: str, *args: Any, **options: Any) -> Any:
    if not model.backend.starts_ranks:  # this is one of them
        return getattr(type(model), name)(model, *args, **options)
    _refuse_wrong_names(model, name, args, options)
    generators = generators_in([args, options, model.module])
    call = partial(_in_rank, model, name, args, options, generators, random_state(generators), time.time())
    brought = model.backend.launch(call)
    if brought["is_sized"]:
        model._sized_loader = weakref.ref(_data_of(args, options))
    return _take_back(model, brought, options, generators)


def _data_of(args: tuple, options: Mapping[str, Any]) -> Any:
    return args[0] if args else options["data"]


def _refuse_wrong_names(model: Any, name: str, args: tuple, options: dict[str, Any]) -> None:
    """Before any process is started."""
    try:
        signature(getattr(type(model), name)).bind(model, *args, **options)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def _in_rank(
    model: Any,
    name: str,
    args: tuple,
    options: dict[str, Any],
    generators: list[Generator],
    random: dict[str, Any],
    began_s: float,
) -> dict[str, Any]:
    """What a process that was started for it does: the verb, and what of it the calling process needs."""
    set_random_state(random, generators)  # the launcher has drawn some
    model.backend.join()
    arrive(model)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and name == "fit":
        options = options | _going_on(model, options, began_s)
        if model.backend.rank == 0:
            where = "from their last file" if options.get("resume") else "from where the call began, for want of a file"
            warnings.warn(f"a rank has died; all were started again (restart {restarts}) {where}.", stacklevel=2)
    value = getattr(model, name)(*args, **options)
    trained = {name for name, one in model.module.named_parameters() if one.requires_grad}
    names = {id(one): name for name, one in model.module.named_modules()}
    callbacks = model.backend.whole([_kept_of(one) for one in _callbacks_in(options)])
    return {
        "value": value,
        "state": state_of(model),
        "trained": trained,
        "frozen": [names[id(one)] for one in model._frozen],
        "stop_training": model.stop_training,
        "buffers": {name: one for name, one in model.module.named_buffers() if name not in model.module.state_dict()},
        "callbacks": callbacks,
        "steps": model.steps_taken,
        "batch_size": model.batch_size,
        "finds_lr": model._finds_lr,
        "is_sized": model._sized_loader() is not None and model._sized_loader() is _data_of(args, options),
        "gradient_norms": {name: update.gradient_norm for name, update in model.updates.items()},
        "random": random_state(generators) | {"cuda": [], "mps": None},  # the calling process leaves GPUs alone
    }


def arrive(model: Any) -> None:
    """The module, and all that was compiled for it, moves to where the backend is now."""
    state, finds_lr = state_of(model), model._finds_lr
    with warnings.catch_warnings():  # what is to be said of it was said when it was made and compiled
        warnings.simplefilter("ignore")
        model.module = model.backend.place(model.module)
        if model._compiled is None:
            return
        own = next(one for one in type(model).__mro__ if one.__module__ == f"{__package__}.model")
        own.compile(model, **model._compile_options)  # with what a subclass's own compile has called it with
    model._finds_lr = finds_lr
    _regroup(model, state)
    restore(model, state)


def _going_on(model: Any, options: Mapping[str, Any], began_s: float) -> dict[str, Any]:
    """After a process has died: from the newest file that callbacks have written since the call began."""
    files = []
    for one in _callbacks_in(options):
        for method in ("backups", "saved_files"):
            if hasattr(one, method):
                one.set_model(model)
                files += getattr(one, method)()
    written = [(path.stat().st_mtime, str(path)) for path in files if path.exists()]
    written = [path for time_s, path in sorted(written) if time_s >= began_s]
    found = model.backend.collect(written)[0]  # rank 0 has written them
    return {"resume": found[-1]} if found else {}


def _callbacks_in(options: Mapping[str, Any]) -> list[Any]:
    callbacks = options.get("callbacks") or []
    return [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]


def _kept_of(callback: Any) -> dict[str, Any]:
    """The attributes of a callback that another process can have."""
    return {name: value for name, value in vars(callback).items() if name != "model" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, PLAIN)


def _take_back(model: Any, brought: dict[str, Any], options: Mapping[str, Any], generators: list[Generator]) -> Any:
    value = brought["value"]
    set_random_state(brought["random"], generators)
    _regroup(model, brought["state"])
    history, stop_training = model.history, model.stop_training
    restore(model, brought["state"], "what the ranks have trained")
    for name, buffer in model.module.named_buffers():
        if name in brought["buffers"]:
            buffer.copy_(brought["buffers"][name])
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in brought["trained"])
    model._frozen[:] = [model.module.get_submodule(name) for name in brought["frozen"]]
    for callback, kept in zip(_callbacks_in(options), brought["callbacks"], strict=True):
        if isinstance(callback, Callback):
            callback.model = model
        _update(vars(callback), kept)
    model._steps_of_ranks, model.batch_size = brought["steps"], brought["batch_size"]
    model._finds_lr = brought["finds_lr"]
    for name, norm in brought["gradient_norms"].items():
        model.updates[name].gradient_norm = norm
    is_trained = type(value).__name__ == "History"
    model.history, model.stop_training = (value, brought["stop_training"]) if is_trained else (history, stop_training)
    return value


def _update(attributes: dict[str, Any], kept: Mapping[str, Any]) -> None:
    """A list or a dict stays the one that others may have, too."""
    for name, value in kept.items():
        before = attributes.get(name)
        if isinstance(value, list) and type(before) is list:
            before[:] = value
        elif isinstance(value, dict) and type(before) is dict:
            before.clear()
            before.update(value)
        else:
            attributes[name] = value


def _regroup(model: Any, state: Mapping[str, Any]) -> None:
    """Gives optimizers the groups that callbacks have made of theirs."""
    parameters = dict(model.module.named_parameters())
    for name, update in model.updates.items():
        groups, first = update.optimizer.param_groups, update.optimizer.param_groups[0]
        wanted = state["optimizers"][name]["groups"]
        if len(wanted) != len(groups):
            groups[:] = [first | {"params": [parameters[one] for one in names]} for names in wanted]
