"""The order of everything: epochs, batches, validation, hooks, and the ways a run can end."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from .history import History
from .step import (
    Recipe,
    close_windows,
    evaluation_step,
    forward,
    forward_backward,
    move_schedules,
    open_windows,
    optimizer_step,
)
from .structures import leaves, map_structure


def fit(
    model: Any,
    training: Recipe,
    epoch_batches: Callable[[], Iterable],
    history: History,
    *,
    epochs: range,
    steps_per_epoch: int | None,
    validate: Callable[[SimpleNamespace], dict[str, Any]] | None,
    is_validated: Callable[[int], bool],
    step: Callable = forward_backward,
) -> History:
    """Trains epoch by epoch.

    Args:
        model: Its `stop_training` is heeded after each batch, its `epochs_trained` counted up.
        training: What a step is made of.
        epoch_batches: Called once for each epoch: its batches, on the device.
        history: Where the logs of each epoch go.
        epochs: Numbers of the epochs, 0-based.
        steps_per_epoch: Batches asked for in each epoch; `None` = all there are.
        validate: Called where `is_validated(epoch)`: runs the validation and returns its logs.
        step: `forward_backward` or what stands for it: called with recipe and batch, says whether the optimizer is due.
    """
    hooks, logs = training.hooks, {}
    with _interruptible() as interruption, announced_errors(hooks):
        for hook in hooks.on_train_begin:
            hook({})
        for epoch in epochs:
            for hook in hooks.on_epoch_begin:
                hook(epoch, {})
            open_windows(training, epoch)
            steps = train_epoch(model, training, step, epoch_batches(), interruption)
            if steps == 0:
                if not interruption.requested:
                    _say_that_data_ended(epoch, history)
                break
            logs = training.tracker.result() | {name: float(rate) for name, rate in training.rates.items()}
            if validate is not None and is_validated(epoch) and not interruption.requested:
                logs |= _validation_logs(hooks, validate, interruption)
            move_schedules(training, logs)
            for hook in hooks.on_epoch_end:
                hook(epoch, logs)
            history.record(epoch, logs)
            _warn_of_lost_loss(epoch, history)
            model.epochs_trained += 1
            if model.stop_training or interruption.requested:
                break
            if _is_short(steps, steps_per_epoch, epoch):
                break
        for hook in hooks.on_train_end:
            hook(logs)
    return history


def train_epoch(model: Any, training: Recipe, step: Callable, batches: Iterable, interruption: SimpleNamespace) -> int:
    """Trains on each batch of one epoch and returns how many there were."""
    hooks, tracker = training.hooks, training.tracker
    set_modes(training)
    tracker.reset()
    index = -1
    try:
        for index, batch in enumerate(batches):
            for hook in hooks.on_train_batch_begin:
                hook(index, {})
            if step(training, batch):
                optimizer_step(training, training.updates[""])
            if hooks.on_train_batch_end:
                logs = tracker.logs(training.rates)
                for hook in hooks.on_train_batch_end:
                    hook(index, logs)
            if model.stop_training or interruption.requested:
                break
    except KeyboardInterrupt:
        if interruption.requested:  # the second one: at once
            raise
        interruption.requested = True
    close_windows(training)
    return index + 1


def _without_objects(output: Any) -> Any:
    """An output by name without what is no tensor, such as the caches that Transformers' language models return."""
    if not isinstance(output, Mapping):
        return output
    return {name: part for name, part in output.items() if all(isinstance(leaf, torch.Tensor) for leaf in leaves(part))}


def _validation_logs(hooks: SimpleNamespace, validate: Callable, interruption: SimpleNamespace) -> dict[str, Any]:
    for hook in hooks.on_validation_begin:
        hook({})
    values = validate(interruption)
    for hook in hooks.on_validation_end:
        hook(values)
    if interruption.requested:  # they are means over a part of the data
        return {}
    return {f"val_{name}": value for name, value in values.items()}


def set_modes(training: Recipe) -> None:
    """Train mode for the module, but for what is frozen."""
    training.module.train()
    for part in training.frozen:
        part.eval()


@torch.no_grad()
def evaluate(evaluation: Recipe, batches: Iterable, interruption: SimpleNamespace | None = None) -> dict[str, Any]:
    """Loss and metrics over all batches, or over those before an interruption, as `{name: value}`."""
    hooks, tracker = evaluation.hooks, evaluation.tracker
    evaluation.module.eval()
    tracker.reset()
    for hook in hooks.on_test_begin:
        hook({})
    index = -1
    for index, batch in enumerate(batches):
        for hook in hooks.on_test_batch_begin:
            hook(index, {})
        evaluation_step(evaluation, batch)
        if hooks.on_test_batch_end:
            logs = tracker.logs({})
            for hook in hooks.on_test_batch_end:
                hook(index, logs)
        if interruption is not None and interruption.requested:
            break
    if index < 0:
        raise ValueError("the data to evaluate is empty: it gave no batch, expected at least one.")
    logs = tracker.result()
    for hook in hooks.on_test_end:
        hook(logs)
    return logs


@torch.no_grad()
def predict(module: torch.nn.Module, network: Callable, hooks: Any, batches: Iterable) -> list[Any]:
    """What the network, which is the module in its precision, returns for each batch, moved to the CPU at once."""
    module.eval()
    outputs = []
    for hook in hooks.on_predict_begin:
        hook({})
    for index, (x, _, _) in enumerate(batches):
        for hook in hooks.on_predict_batch_begin:
            hook(index, {})
        output = _without_objects(forward(network, x))
        outputs.append(map_structure(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, output))
        for hook in hooks.on_predict_batch_end:
            hook(index, {"outputs": outputs[-1]})
    for hook in hooks.on_predict_end:
        hook({})
    return outputs


@contextmanager
def _interruptible() -> Iterator[SimpleNamespace]:
    """Ctrl-C asks for the end, so that the running step can finish; a second one raises `KeyboardInterrupt`."""
    interruption = SimpleNamespace(requested=False)

    def interrupt(number: int, frame: Any) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True

    # Python allows handlers in the main thread only; one that the user installed stays.
    is_ours = threading.current_thread() is threading.main_thread()
    is_ours = is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield interruption
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def announced_errors(hooks: SimpleNamespace) -> Iterator[None]:
    """Tells the callbacks of an error that is about to end the run."""
    try:
        yield
    except BaseException as error:
        for hook in hooks.on_exception:
            hook(error)
        raise


def _warn_of_lost_loss(epoch: int, history: History) -> None:
    losses = history.history.get("loss", [])
    if losses and not math.isfinite(losses[-1]) and all(map(math.isfinite, losses[:-1])):
        warnings.warn(
            f"the loss of epoch {epoch + 1} is {losses[-1]}. Try a lower lr or clip=1.0 in compile, and look for NaN "
            f"or very large values in the data.",
            stacklevel=4,
        )


def _is_short(steps: int, steps_per_epoch: int | None, epoch: int) -> bool:
    """Whether the data ended within an epoch, which is said."""
    is_short = steps_per_epoch is not None and steps < steps_per_epoch
    if is_short:
        warnings.warn(f"the data ended after {steps} of {steps_per_epoch} steps in epoch {epoch + 1}.", stacklevel=4)
    return is_short


def _say_that_data_ended(epoch: int, history: History) -> None:
    if not history.epoch:
        raise ValueError("the data is empty: it gave no batch, expected at least one.")
    warnings.warn(
        f"the data ended before epoch {epoch + 1}: a generator can be gone through once. Give steps_per_epoch, or a "
        f"callable that makes a new one for each epoch.",
        stacklevel=4,
    )
