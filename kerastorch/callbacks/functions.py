"""`LambdaCallback`: a callback made of functions, without a class."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from .base import HOOKS, Callback


class LambdaCallback(Callback):
    """Calls a function at each moment that is given one.

    Args:
        on_epoch_begin: `(epoch, logs)`.
        on_epoch_end: `(epoch, logs)`.
        on_train_begin: `(logs)`.
        on_train_end: `(logs)`.
        on_train_batch_begin: `(batch, logs)`; returns -1 to end the epoch without the batch.
        on_train_batch_end: `(batch, logs)`.
        hooks: Functions for any other hook of `Callback`, by its name. `None` = none, as for those above.
    Raises:
        TypeError: a name that is no hook, or something that cannot be called.
        ValueError: two functions for one hook, by its two names.
    Example:
        >>> import torch, kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse"), torch.zeros(8, 2)
        >>> callback = LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, sorted(logs)))
        >>> history = model.fit(x, x[:, :1], epochs=2, callbacks=callback, verbose=0)
        0 ['loss']
        1 ['loss']

    Source: Keras, `LambdaCallback`.
    """

    def __init__(
        self,
        on_epoch_begin: Callable[..., Any] | None = None,
        on_epoch_end: Callable[..., Any] | None = None,
        on_train_begin: Callable[..., Any] | None = None,
        on_train_end: Callable[..., Any] | None = None,
        on_train_batch_begin: Callable[..., Any] | None = None,
        on_train_batch_end: Callable[..., Any] | None = None,
        **hooks: Callable[..., Any] | None,
    ) -> None:
        hooks |= {
            "on_epoch_begin": on_epoch_begin,
            "on_epoch_end": on_epoch_end,
            "on_train_begin": on_train_begin,
            "on_train_end": on_train_end,
            "on_train_batch_begin": on_train_batch_begin,
            "on_train_batch_end": on_train_batch_end,
        }
        given = {name: hook for name, hook in hooks.items() if hook is not None}
        for name, hook in given.items():
            _refuse_unfit(name, hook, given)
            setattr(self, name, hook)
        if "on_epoch_end" not in given:
            self.adds_to_logs = ()


def _refuse_unfit(name: str, hook: Any, given: dict[str, Any]) -> None:
    if name not in HOOKS:
        # Lightning's hooks say "start" where Keras's say "begin".
        close = difflib.get_close_matches(name.replace("_start", "_begin"), HOOKS, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Hooks are {', '.join(HOOKS)}."
        raise TypeError(f"LambdaCallback was given {name!r}, which is no hook. {hint}")
    if not callable(hook):
        raise TypeError(f"{name}={hook!r} is a {type(hook).__name__}, expected a function. Give e.g. a lambda.")
    alias = name.replace("_train_batch_", "_batch_")
    if alias != name and alias in given:
        raise ValueError(f"{name} and {alias} are one hook by two names, of which one would be called. Give one.")
