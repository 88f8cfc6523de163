"""The order of everything: epochs, batches, validation, hooks, and the ways a run can end."""

from __future__ import annotations

import math
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch

from .faults import explained
from .history import History
from .limits import Ending, Frequency, Limits
from .position import Position
from .step import (
    Recipe,
    close_windows,
    forward,
    forward_backward,
    move_schedules,
    open_windows,
    optimizer_step,
)
from .structures import leaves, map_structure

# Signals that end a run, and what Python does with them else. Windows has no SIGUSR1.
STOPPING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGUSR1"):
    STOPPING[signal.SIGUSR1] = signal.SIG_DFL


@dataclass
class Validation:
    """What is validated, and when.

    Attributes:
        evaluate: Runs it, until it is over or the run is: returns loss and metrics by name.
        frequency: When.
        random: The random numbers that it may draw from, as they are.
        intervals: What was known after each one within an epoch.
        latest: What the last validation within the running epoch put into the logs.
    """

    evaluate: Callable[[Ending], dict[str, Any]]
    frequency: Frequency
    random: Callable[[], dict[str, Any]]
    intervals: list[dict[str, Any]] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)

    def go_on(self, epoch: int) -> None:
        """Takes up what an earlier run had of the epoch that is gone on with; `intervals` has been put back."""
        for last in self.intervals[-1:]:
            if last["epoch"] == epoch:
                self.latest = {name: value for name, value in last.items() if name.startswith("val_")}


def fit(
    model: Any,
    training: Recipe,
    epoch_batches: Callable[[], Iterable],
    history: History,
    position: Position,
    *,
    limits: Limits,
    steps_per_epoch: int | None = None,
    validation: Validation | None = None,
    step: Callable = forward_backward,
    resume: Callable[[], None] | None = None,
) -> History:
    """Trains epoch by epoch.

    Args:
        model: Its `stop_training` and `stop_epoch` are heeded after each batch, its `epochs_trained` counted up.
        training: What a step is made of.
        epoch_batches: Called once for each epoch: its batches, on the device; of the first those from `position` on.
        history: Where the logs of each epoch go.
        position: Where the run begins, and from then on where it is.
        limits: Where the run ends.
        steps_per_epoch: Batches asked for in each epoch; `None` = all there are.
        validation: What is validated and when; `None` = nothing.
        step: `forward_backward` or what stands for it: called with recipe and batch, says whether the optimizer is due.
        resume: Called once the callbacks have begun: puts the state of an earlier run back; `None` = there was none.
    """
    hooks, logs, ending = training.hooks, {}, Ending(model, training, limits, history, position)
    if validation is not None:
        history.intervals = validation.intervals
    with _stoppable(ending), announced_errors(hooks):
        for hook in hooks.on_train_begin:
            hook({})
        if resume is not None:
            resume()
            if validation is not None:
                validation.go_on(position.epoch)
        for epoch in limits.numbers(position.epoch):
            if ending.is_over_before(epoch):
                break
            model.stop_epoch = False
            for hook in hooks.on_epoch_begin:
                hook(epoch, {})
            if position.batch == 0:
                open_windows(training, epoch)
                training.tracker.reset()
            batches = () if model.stop_epoch or ending.reason is not None else epoch_batches()
            train_epoch(model, training, step, batches, ending, validation)
            if position.batch == 0 and not model.stop_epoch:
                if not ending.is_due():
                    _say_that_data_ended(epoch, history)
                break
            logs = training.tracker.result() | {name: float(rate) for name, rate in training.rates.items()}
            if validation is not None:
                logs |= _validation_logs(training, validation, ending)
            if position.batch:
                move_schedules(training, logs)
            history.record(epoch, logs)
            model.epochs_trained += 1
            steps = position.batch
            position.end_epoch()
            for hook in hooks.on_epoch_end:
                hook(epoch, logs)
            history.record(epoch, logs)  # again: with what callbacks have put there
            position.reach_safe_point()
            _warn_of_lost_loss(epoch, history)
            ending.epochs_done += 1
            if ending.is_over() or _has_run_dry(model, epoch, steps, steps_per_epoch, limits):
                break
        history.stopped_by = ending.reason
        for hook in hooks.on_train_end:
            hook(logs)
        position.reach_safe_point()
        history.stopped_by = history.stopped_by or ending.interrupted_by  # by a signal that came meanwhile
    return history


def train_epoch(
    model: Any, training: Recipe, step: Callable, batches: Iterable, ending: Ending, validation: Validation | None
) -> None:
    """Trains on each batch of one epoch, or on those that an earlier run has left of it."""
    hooks, tracker, position = training.hooks, training.tracker, ending.position
    set_modes(training)
    try:
        if position.is_validating:
            _validate_within(training, validation, ending)
        for index, batch in enumerate(batches, position.batch):
            if hooks.on_train_batch_begin and _end_epoch_before(index, hooks):
                model.stop_epoch = True
                position.dropped += 1
                break
            if step(training, batch):
                optimizer_step(training, training.updates[""])
            position.batch = index + 1
            if hooks.on_train_batch_end:
                logs = tracker.logs(training.rates)
                for hook in hooks.on_train_batch_end:
                    hook(index, logs)
            if validation is not None and validation.frequency.batches is not None:
                _validate_within(training, validation, ending)
            if position.waiting:
                position.reach_safe_point()
            if (model.stop_epoch or model.stop_training or ending.is_near) and ending.ends_epoch():
                break
    except KeyboardInterrupt:
        if ending.is_signalled:  # the second one: at once
            raise
        ending.break_off()
    if ending.is_near or model.stop_training:
        ending.is_over()
    close_windows(training)


def _end_epoch_before(index: int, hooks: SimpleNamespace) -> bool:
    """Calls the hooks before a batch: whether one of them wants the epoch to end without it."""
    ends = False
    for hook in hooks.on_train_batch_begin:
        returned = hook(index, {})
        ends |= returned is not None and isinstance(returned, Integral) and int(returned) == -1
    return ends


def _without_objects(output: Any) -> Any:
    """An output by name without what is no tensor, such as the caches that Transformers' language models return."""
    if not isinstance(output, Mapping):
        return output
    return {name: part for name, part in output.items() if all(isinstance(leaf, torch.Tensor) for leaf in leaves(part))}


def _validation_logs(training: Recipe, validation: Validation, ending: Ending) -> dict[str, Any]:
    """After the last batch of an epoch: what its validation adds to the logs, or the last one within it."""
    if validation.frequency.is_due_after(ending.position.epoch) and not ending.is_interrupted:
        return _validated(training, validation, ending)
    latest, validation.latest = validation.latest, {}
    return latest


def _validate_within(training: Recipe, validation: Validation, ending: Ending) -> None:
    """After a batch: validates if so many have gone by."""
    frequency, position = validation.frequency, ending.position
    done = position.batch + (position.batches_before if frequency.goes_on else 0)
    if done % frequency.batches or ending.is_interrupted:
        return
    position.is_validating = True
    values = _validated(training, validation, ending)
    set_modes(training)
    position.is_validating = False
    if ending.is_interrupted:
        return
    validation.latest = values
    logs = training.tracker.means_so_far() | training.rates | validation.latest
    for hook in training.hooks.on_interval_end:
        hook(position.epoch, logs)
    validation.intervals.append({"epoch": position.epoch, "batch": position.batch - 1, **logs})


def _validated(training: Recipe, validation: Validation, ending: Ending) -> dict[str, Any]:
    if training.hooks.on_train_pause:  # if it is broken off, a run that goes on does it again
        ending.position.random = validation.random()
    for hook in training.hooks.on_validation_begin:
        hook({})
    values = validation.evaluate(ending)
    for hook in training.hooks.on_validation_end:
        hook(values)
    if ending.is_interrupted:  # they are means over a part of the data
        ending.is_over()
    ending.position.random = None
    return {} if ending.is_interrupted else {f"val_{name}": value for name, value in values.items()}


def set_modes(training: Recipe) -> None:
    """Train mode for the module, but for what is frozen."""
    training.module.train()
    for part in training.frozen:
        part.eval()


@torch.no_grad()
def evaluate(evaluation: Recipe, batches: Iterable, ending: Ending | None = None) -> dict[str, Any]:
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
        evaluation.measure(evaluation, batch)
        if hooks.on_test_batch_end:
            logs = tracker.logs({})
            for hook in hooks.on_test_batch_end:
                hook(index, logs)
        if ending is not None and ending.is_near:
            ending.heed(now=False)
        if ending is not None and ending.is_interrupted:
            break
    if index < 0:
        raise ValueError(
            "the data to evaluate is empty: it gave no batch, expected at least one. A generator can be gone through "
            "once: give a list, or a callable that makes a new one."
        )
    logs = tracker.result()
    for hook in hooks.on_test_end:
        hook(logs)
    return logs


@torch.no_grad()
def predict(
    module: torch.nn.Module,
    network: Callable,
    hooks: Any,
    batches: Iterable,
    gather: Callable[[Any], Any],
    keeps_outputs: bool = True,
) -> list[Any]:
    """What the network, which is the module in its precision, returns for each batch, moved to the CPU at once.

    `gather` makes the whole of it from what each of several processes has. Without `keeps_outputs` the hooks alone get
    it.
    """
    module.eval()
    outputs, index = [], -1
    for hook in hooks.on_predict_begin:
        hook({})
    for index, (x, _, _) in enumerate(batches):
        for hook in hooks.on_predict_batch_begin:
            hook(index, {})
        output = _without_objects(forward(network, x))
        output = gather(map_structure(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, output))
        if keeps_outputs:
            outputs.append(output)
        for hook in hooks.on_predict_batch_end:
            hook(index, {"outputs": output})
    if index < 0:
        raise ValueError("the data is empty: it gave no batch, expected at least one.")
    for hook in hooks.on_predict_end:
        hook({})
    return outputs


@contextmanager
def _stoppable(ending: Ending) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for the end, so that the running step can finish and all be saved.

    A second Ctrl-C raises `KeyboardInterrupt`. SIGUSR1 is what schedulers are told to send some time before SIGKILL.
    """

    def stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and ending.is_signalled:
            raise KeyboardInterrupt
        ending.interrupt("interrupt" if name == "SIGINT" else name)
        if name == "SIGINT" and ending.history.params["verbose"]:
            os.write(2, b"\nThe run ends after this step; Ctrl-C again ends it at once.\n")  # print may be under way

    # Python allows handlers in the main thread only; one that the user installed stays.
    is_main = threading.current_thread() is threading.main_thread()
    ours = {number: own for number, own in STOPPING.items() if is_main and signal.getsignal(number) is own}
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, own in ours.items():
            signal.signal(number, own)


@contextmanager
def announced_errors(hooks: SimpleNamespace) -> Iterator[None]:
    """Tells the callbacks of an error that is about to end the run, once it says where it comes from."""
    try:
        yield
    except BaseException as error:
        told = explained(error, in_callback=partial(_name_callback, error, hooks))
        for hook in hooks.on_exception:
            try:
                hook(told)
            except Exception as another:  # those behind it still have files to close
                warnings.warn(f"{_title('on_exception', hook)} failed too, with {another!r}.", stacklevel=4)
        try:
            if told is error:
                raise
            raise told from error
        finally:
            # Else it and this frame, in its traceback, keep each other alive, and with them the data's workers.
            del told


def _name_callback(error: BaseException, hooks: SimpleNamespace) -> bool:
    """Adds the callback in whose hook an error was raised, if it was in one, to its message."""
    called = [(name, hook) for name, table in vars(hooks).items() for hook in table if hasattr(hook, "__code__")]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    found = next((one for frame in frames for one in called if _is_call_of(frame, one[1])), None)
    if found is None or not isinstance(error, Exception):
        return False
    note = f"raised in {_title(*found)}"
    if len(error.args) <= 1 and all(isinstance(argument, str) for argument in error.args):
        error.args = (" ".join([*error.args, f"({note})"]),)
    elif hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
    return True


def _is_call_of(frame: Any, hook: Callable) -> bool:
    """Whether it is a call of this very hook: callbacks of several classes may have inherited one code."""
    code, owner = frame.f_code, getattr(hook, "__self__", None)
    return code is hook.__code__ and (owner is None or frame.f_locals.get(code.co_varnames[0]) is owner)


def _title(name: str, hook: Callable) -> str:
    """Which hook of which callback it is; of a function, as `LambdaCallback` is given some, what it was given as."""
    callback = getattr(hook, "__self__", None)
    return f"{type(callback).__name__}.{hook.__name__}" if callback is not None else f"the function given as {name}"


def _warn_of_lost_loss(epoch: int, history: History) -> None:
    losses = history.history.get("loss", [])
    if losses and not math.isfinite(losses[-1]) and all(map(math.isfinite, losses[:-1])):
        warnings.warn(
            f"the loss of epoch {epoch + 1} is {losses[-1]}. Try a lower lr or clip=1.0 in compile, and look for NaN "
            f"or very large values in the data.",
            stacklevel=4,
        )


def _has_run_dry(model: Any, epoch: int, steps: int, steps_per_epoch: int | None, limits: Limits) -> bool:
    """Whether nothing would come of another epoch: the data ended within this one, which is said, or nobody wants any.

    A run without a last epoch in which epochs end at once would never end.
    """
    if model.stop_epoch:
        return steps == 0 and limits.epochs is None
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
