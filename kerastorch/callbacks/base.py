"""Callback: the moments of a run, and the table of who wants to hear of which."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any


def _default(hook: Callable) -> Callable:
    """Marks a hook that nobody overrode. Keras marks its own in the same way, so that one test serves both."""
    hook._is_default = True
    return hook


SIGNALS = ("interrupt", "SIGTERM", "SIGUSR1")  # what `history.stopped_by` is after one


class Callback:
    """Called at the moments of a run. Override the hooks you want; the others are never called.

    `logs` is a mapping of names to values so far; the device is read when you look into it and not before.
    `self.model` is the `kerastorch.Model`; set `self.model.stop_training = True` to end the run.

    Example:
        >>> class Stop(Callback):
        ...     def on_epoch_end(self, epoch, logs=None):
        ...         self.model.stop_training = logs["loss"] < 0.1

    Source: names, arguments and order of the hooks on train, test, predict, epoch and batch are Keras's.
    """

    model: Any = None
    params: dict[str, Any] | None = None
    adds_to_logs: tuple[str, ...] | None = None
    """Names that `on_epoch_end` puts into the logs, so that other callbacks can monitor them; `None` = not known."""

    rank_zero_only: bool = False
    """Whether it only shows or writes what the run does: of several processes, rank 0 alone calls it."""

    needs_all_parameters: bool = False
    """Whether it works on all parameters or gradients together within a run, which not every backend has anywhere."""

    takes_outputs: bool = False
    """Whether predictions are its own business: `predict` then keeps none of them in memory and returns `None`."""

    def set_model(self, model: Any) -> None:
        """Called before the run with the `Model`."""
        self.model = model

    def set_params(self, params: dict[str, Any]) -> None:
        """Called before the run with `{"verbose": ..., "epochs": ..., "steps": ...}`; `None` = not known."""
        self.params = params

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed needs to know: tensors and plain data. Default: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned, before `on_train_begin` of the run that goes on from there."""

    @_default
    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        """Before the first epoch."""

    @_default
    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        """After the last epoch, with its logs."""

    @_default
    def on_train_pause(self) -> None:
        """Before a run ends early, by a signal, a limit or `stop_training`: what is saved now goes on exactly here.

        The epoch that is cut is not over yet: what it still gets (a step on gradients that are gathered, a validation,
        `on_epoch_end`) comes later. `self.model.history.stopped_by` says why.
        """

    @_default
    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        """Before an epoch, counted from 0."""

    @_default
    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        """After an epoch and its validation; what you put into `logs` gets into the history."""

    @_default
    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        """After each validation with `validation_freq` below 1 or `"N steps"`, with what `on_epoch_end` would have."""

    @_default
    def on_train_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> int | None:
        """Before a batch, counted from 0 in each epoch; return -1 to end the epoch without it."""

    @_default
    def on_train_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        """After a batch, with the means of the epoch so far."""

    @_default
    def on_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        """Another name of `on_train_batch_begin`."""

    @_default
    def on_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        """Another name of `on_train_batch_end`."""

    @_default
    def on_before_backward(self, loss: Any) -> None:
        """With the loss of a batch, a scalar tensor, before its gradients are computed."""

    @_default
    def on_after_backward(self) -> None:
        """After the backward pass of each batch; what its step will use is there in `on_before_optimizer_step`."""

    @_default
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Before the parameters change, with the gradients of all its batches in `parameter.grad`, not yet clipped."""

    @_default
    def on_before_zero_grad(self, optimizer: Any) -> None:
        """After the parameters changed, before the gradients are dropped."""

    @_default
    def on_validation_begin(self, logs: MutableMapping | None = None) -> None:
        """Before validation within `fit`; `on_test_begin` follows."""

    @_default
    def on_validation_end(self, logs: MutableMapping | None = None) -> None:
        """After validation within `fit` and its `on_test_end`, with the same logs."""

    @_default
    def on_test_begin(self, logs: MutableMapping | None = None) -> None:
        """Before an evaluation, validation included."""

    @_default
    def on_test_end(self, logs: MutableMapping | None = None) -> None:
        """After an evaluation, with its results; names have no `val_` here."""

    @_default
    def on_test_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        """Before a batch of an evaluation."""

    @_default
    def on_test_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        """After a batch of an evaluation, with the means so far."""

    @_default
    def on_predict_begin(self, logs: MutableMapping | None = None) -> None:
        """Before a prediction."""

    @_default
    def on_predict_end(self, logs: MutableMapping | None = None) -> None:
        """After a prediction."""

    @_default
    def on_predict_batch_begin(self, batch: int, logs: MutableMapping | None = None) -> None:
        """Before a batch of a prediction."""

    @_default
    def on_predict_batch_end(self, batch: int, logs: MutableMapping | None = None) -> None:
        """After a batch of a prediction, with `{"outputs": outputs of the batch}`."""

    @_default
    def on_exception(self, error: BaseException) -> None:
        """When the run is about to end with an error."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def hooks_of(callbacks: Iterable[Any]) -> SimpleNamespace:
    """The table of who overrode which hook: for each name in `HOOKS` a tuple of bound methods, often empty.

    Args:
        callbacks: `Callback`s, or anything with methods of these names such as a Keras callback.
    Raises:
        TypeError: a class where an instance is meant.
        ValueError: a method whose name is nearly a hook's: it would never be called.
    """
    callbacks = list(callbacks)
    for callback in callbacks:
        _refuse_mistakes(callback)
    return SimpleNamespace(**{name: tuple(_overriding(name, callbacks)) for name in HOOKS})


def _overriding(name: str, callbacks: list[Any]) -> Iterable[Callable]:
    alias = name.replace("_train_batch_", "_batch_")
    for callback in callbacks:
        if _overrides(callback, name):
            if not name.startswith("on_batch_"):
                yield getattr(callback, name)
        elif alias != name and _overrides(callback, alias):
            yield getattr(callback, alias)


def _overrides(callback: Any, name: str) -> bool:
    hook = getattr(callback, name, None)
    return hook is not None and not getattr(hook, "_is_default", False)


def _refuse_mistakes(callback: Any) -> None:
    if isinstance(callback, type):
        raise TypeError(f"callback {callback.__name__} is a class, expected an instance. Give {callback.__name__}().")
    names = [name for name in dir(callback) if name.startswith("on_")]
    if not names:
        raise TypeError(
            f"callback {callback!r} is a {type(callback).__name__} without a single hook; expected a Callback."
        )
    for name in set(names) - set(HOOKS):
        # Lightning's hooks say "start" where Keras's say "begin".
        close = difflib.get_close_matches(name.replace("_start", "_begin"), HOOKS, n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"{type(callback).__name__} has a method {name!r}, which is no hook and would never be called. "
                f"Did you mean {close[0]!r}?"
            )
