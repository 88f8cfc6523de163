"""What it means to watch a value: which way is better, whether a change counts, and at which moments it is judged.

`Monitoring` is the base of the callbacks that act on one value of the logs. What follows from a value, they decide.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from numbers import Real
from typing import Any

from ..directions import direction
from .base import SIGNALS, Callback


class Monitoring(Callback):
    """Watches one value of the logs; a subclass says in `judge` what follows from it.

    Each value is judged once. One whose name starts with "val_" is judged after the validation that it comes from: at
    the end of the epoch, or, with several validations in an epoch, after each of them and not once more at the end. All
    else is judged at the end of the epoch, what other callbacks put into the logs there too. An epoch without
    validation says nothing about a name with "val_" and is passed over.

    The same instance starts anew in each run (`reset`), unless a state was loaded just before.

    Args:
        monitor: Name in the logs.
        mode: `"min"` = lower is better, `"max"` = higher is; `"auto"` = "max" where the name has accuracy, auc, f1,
            precision, recall, r2 or the like in it and no loss or error, else "min". Default: `"auto"`.
        min_delta: What a value must be better by, at least; exactly so much is not enough. Default: 0.
    Attributes:
        mode: `"min"` or `"max"`, also where `"auto"` was given.
    Raises:
        TypeError: a monitor that is no text.
        ValueError: another mode, or a `min_delta` that is no number from 0 up. In a run: a monitor that is not in the
            logs, though its kind is.
    Example:
        >>> class Best(Monitoring):
        ...     best = None
        ...
        ...     def judge(self, epoch, logs, value):
        ...         if self.is_better(value, self.best):
        ...             self.best = value
        >>> best = Best("val_accuracy")
        >>> for epoch, accuracy in enumerate([0.5, 0.7, 0.6]):
        ...     best.on_epoch_end(epoch, {"loss": 0.1, "val_accuracy": accuracy})
        >>> best.mode, best.best
        ('max', 0.7)

    Source: Keras, `MonitorCallback`, which takes the direction from the metric and not from its name.
    """

    adds_to_logs: tuple[str, ...] | None = ()

    def __init__(self, monitor: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor={monitor!r} is a {type(monitor).__name__}, expected a name such as 'val_loss'.")
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode={mode!r} is not known. Give 'min', 'max' or 'auto'.")
        if not isinstance(min_delta, Real) or isinstance(min_delta, bool) or not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta={min_delta!r} is no size of a change. Give a number from 0 up.")
        self.monitor, self.mode = monitor, ("max" if direction(monitor) > 0 else "min") if mode == "auto" else mode
        self.min_delta = float(min_delta)
        if mode == "auto" and not direction(monitor):
            warnings.warn(
                f"monitor={monitor!r} does not tell which way is better: lower is taken to be. Give mode='min' or "
                f"mode='max'.",
                stacklevel=3,
            )
        self._judged_epoch: int | None = None  # the epoch that was judged within, and is not at its end
        self._has_judged = self._is_loaded = False

    def judge(self, epoch: int, logs: MutableMapping, value: float) -> None:
        """Called with each new value, at the end of an epoch or of a validation within it.

        Args:
            epoch: Number of the epoch, 0-based.
            logs: Those of the moment; what is put there at the end of an epoch gets into the history.
            value: The monitored one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no judge(epoch, logs, value). Define what a value means.")

    def reset(self) -> None:
        """Forgets what earlier runs brought; a subclass forgets more and calls this one too."""
        self._judged_epoch = None

    def is_better(self, value: float, reference: float | None) -> bool:
        """Whether `value` is better than `reference` by more than `min_delta`; anything is better than `None`.

        Any number is better than NaN, so that a run that begins with NaN can recover (Keras: nothing ever is).
        """
        if reference is None:
            return True
        if math.isnan(reference):
            return not math.isnan(value)
        return value + self.min_delta < reference if self.mode == "min" else value - self.min_delta > reference

    def watched(self, logs: Mapping[str, Any]) -> float | None:
        """The monitored value; `None` where it waits for an epoch with validation.

        Raises:
            ValueError: the logs do not have it.
            TypeError: it is no number.
        """
        if self.monitor in logs:
            return self._number(logs[self.monitor])
        if getattr(self.model, "samples_seen", None) == 0:  # an epoch that ended before its first batch
            return None
        if self.monitor.startswith("val_") and "val_loss" not in logs:  # which every validation brings
            return None
        raise ValueError(self._unknown(logs))

    def state_dict(self) -> dict[str, Any]:
        """What the run so far brought; a subclass adds its own to it."""
        return {"judged_epoch": self._judged_epoch, "has_judged": self._has_judged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the next run does not start anew. A subclass takes its own and calls this one too."""
        self._judged_epoch, self._is_loaded = state["judged_epoch"], True
        self._has_judged = state.get("has_judged", False)

    def on_train_begin(self, logs: MutableMapping | None = None) -> None:
        if not self._is_loaded:
            self._has_judged = False
            self.reset()

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        self._is_loaded = False

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        logs = {} if logs is None else logs
        if self.monitor.startswith("val_") and self.monitor in logs:
            self._judged_epoch = epoch
            self._judge(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        was_judged, self._judged_epoch = self._judged_epoch == epoch, None
        if not was_judged:
            self._judge(epoch, {} if logs is None else logs)

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if not self._has_judged and getattr(getattr(self.model, "history", None), "stopped_by", None) not in SIGNALS:
            warnings.warn(
                f"{type(self).__name__} monitors {self.monitor!r}, but the run ended without a validation: it judged "
                f"nothing. Give fit validation_data and a validation_freq that comes in time, or monitor 'loss'.",
                stacklevel=4,
            )

    def _judge(self, epoch: int, logs: MutableMapping) -> None:
        value = self.watched(logs)
        if value is not None:
            self._has_judged = True
            self.judge(epoch, logs, value)

    def _number(self, value: Any) -> float:
        if not isinstance(value, Real) and getattr(value, "shape", None) == ():  # a tensor or an array of one value
            value = value.item()
        if not isinstance(value, Real):
            raise TypeError(
                f"{type(self).__name__} monitors {self.monitor!r}, which is a {type(value).__name__}, expected a "
                f"number. Log its mean."
            )
        return float(value)

    def _unknown(self, names: Iterable[str]) -> str:
        known = list(names)
        close = difflib.get_close_matches(self.monitor, known, n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]!r}?" if close else "Give one of these, or add the metric to compile."
        return f"{type(self).__name__} monitors {self.monitor!r}, but the logs have {', '.join(known)}. {hint}"
