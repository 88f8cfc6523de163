"""What holds while a verb runs, and is as it was when it has ended: modes, precision, gradients, files of a dry run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .overrides import OwnStep
from .precision import dtype_of, forget_steps, tf32_if
from .seeding import random_state_kept
from .state import restore, state_of
from .step import Recipe


@contextmanager
def training(model: Any, recipe: Recipe, step: Callable, data: Any) -> Iterator[None]:
    """Everything that holds while the module is trained."""
    before = [(update, update.schedule, update.parked, update.steps) for update in recipe.updates.values()]
    for update in recipe.updates.values():
        update.steps = 0
    is_nested = model._running is not None  # a batch that a callback trains on: the run around it goes on after it
    gradients = [(parameter, parameter.grad if is_nested else None) for parameter in model.module.parameters()]
    _drop_gradients(model)  # what a loop by hand before this one left there
    running = model.backend.running(model.module)
    with running, computing(model), _as_before_unless_trained(model, recipe), shown(model, recipe):
        outer = model._training_data, model._own_step, model._training
        live = model._live_run
        model._training_data, model._own_step = data, step if isinstance(step, OwnStep) else None
        model._training = recipe
        try:
            yield
            if model._live_run is not live:
                model._ended_run = model._live_run.state_dict()
        finally:
            model._live_run = live
            model._training_data, model._own_step = outer[:2]
            model._training = outer[2] if is_nested else recipe
            for update, schedule, parked, steps in before:
                if update.scaled_step is not None:
                    update.scaled_step.settle()
                update.schedule, update.parked = schedule, parked if is_nested else None
                update.steps = steps
            if recipe.scaler is not None:
                forget_steps(recipe.scaler)
    for parameter, gradient in gradients:
        parameter.grad = gradient


@contextmanager
def no_trace(model: Any, dry_run: bool | int, generators: Iterable[Any]) -> Iterator[None]:
    """In a dry run callbacks write into a folder that is gone afterwards, and the model is then as it was."""
    if not dry_run:
        yield
        return
    history, epochs_trained, stop_training = model.history, model.epochs_trained, model.stop_training
    state, callbacks, training, ended = (
        copy.deepcopy(state_of(model)),
        model._callbacks,
        model._training,
        model._ended_run,
    )
    frozen, trained = list(model._frozen), [(one, one.requires_grad) for one in model.module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.module.buffers()]  # those that no file has, too
    optimizers = [update.optimizer for update in model.updates.values()]
    groups = [[(group, dict(group)) for group in one.param_groups] for one in optimizers]
    with tempfile.TemporaryDirectory() as folder, random_state_kept(generators):
        model._dry_run_folder = Path(folder)
        try:
            yield
            model.save(model._dry_run_folder / "checkpoint.pt")
            model.load(model._dry_run_folder / "checkpoint.pt")
        finally:
            model._dry_run_folder = None  # first: else later runs would write there
            for optimizer, before in zip(optimizers, groups, strict=True):
                for group, settings in before:
                    group.update(settings)
                optimizer.param_groups[:] = [group for group, _ in before]  # without what Unfreeze has split off
            for parameter, is_trained in trained:
                parameter.requires_grad_(is_trained)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            model._frozen[:], model._callbacks = frozen, callbacks
            model._training, model._ended_run = training, ended
            restore(model, state)
            model.history, model.epochs_trained, model.stop_training = history, epochs_trained, stop_training


@contextmanager
def computing(model: Any) -> Iterator[None]:
    """The module runs: in the precision compiled, and is handed back in the modes it came in."""
    with as_it_came(model.module), tf32_if(model._compiled and model._compiled.precision):
        yield


@contextmanager
def shown(model: Any, recipe: Recipe) -> Iterator[None]:
    """`samples_seen` and `log` are those of `recipe` meanwhile."""
    before, model._running = model._running, recipe
    try:
        yield
    finally:
        model._running = before


@contextmanager
def _as_before_unless_trained(model: Any, recipe: Recipe) -> Iterator[None]:
    """An error before the first optimizer step leaves buffers, random numbers and history as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.module.buffers()]
    random_state = torch.get_rng_state()
    history, epochs_trained = model.history, model.epochs_trained
    groups = [(group, dict(group)) for update in recipe.updates.values() for group in update.optimizer.param_groups]
    try:
        yield
    except BaseException:
        if recipe.steps == 0:
            for group, settings in groups:
                group.update({key: value for key, value in settings.items() if key != "params"})
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            torch.set_rng_state(random_state)
            model.history, model.epochs_trained = history, epochs_trained
        raise
    finally:
        _drop_gradients(model)


def _drop_gradients(model: Any) -> None:
    for parameter in model.module.parameters():
        parameter.grad = None


@contextmanager
def as_it_came(module: nn.Module) -> Iterator[None]:
    """Hands every submodule back in the mode, train or eval, that it came in; says what to do about a wrong dtype."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    except RuntimeError as error:
        if "dtype" in str(error) or "expected scalar type" in str(error):
            raise TypeError(
                f"the module computes in {dtype_of(module)}, and torch says of its inputs: {error}. "
                f'Give inputs of the dtype that the layers expect, e.g. x.astype("float32") for whole numbers.'
            ) from error
        if "does not require grad and does not have a grad_fn" in str(error):
            raise ValueError(
                "the loss has no gradient: nothing it was computed from depends on a trainable parameter. Leave out "
                "what cuts the graph (detach, no_grad, argmax, numpy), or unfreeze a parameter."
            ) from error
        raise
    finally:
        for part, mode in modes:
            part.training = mode
