"""Arguments of the verbs: refused early, in one sentence, before anything has changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .callbacks.base import hooks_of
from .structures import named_leaves


def refuse_nonpositive(**arguments: Any) -> None:
    """Each argument must be an int of at least 1, or `None`; `epochs` cannot be `None`."""
    for name, value in arguments.items():
        if value is None and name != "epochs":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number. Give 1 or more.")
        if value < 1:
            raise ValueError(f"{name}={value} is less than 1. Give a whole number from 1 up.")


def refuse_initial_epoch(initial_epoch: Any) -> None:
    """It must be an int of at least 0."""
    if isinstance(initial_epoch, bool) or not isinstance(initial_epoch, Integral) or initial_epoch < 0:
        raise ValueError(
            f"initial_epoch={initial_epoch!r} is not the number of an epoch. Give a whole number from 0 up."
        )


def refuse_validation(split: Any, freq: Any) -> None:
    """`validation_split` must be a fraction, `validation_freq` a count or a collection of epochs."""
    if isinstance(split, bool) or not isinstance(split, Real) or not 0 <= split < 1:
        raise ValueError(
            f"validation_split={split!r} is not a fraction. Give a number from 0 up to but not including 1, "
            f"e.g. 0.1 for the last tenth."
        )
    if isinstance(freq, Integral) and not isinstance(freq, bool) and freq >= 1:
        return
    if isinstance(freq, (list, tuple, set, range)) and all(isinstance(epoch, Integral) for epoch in freq):
        return
    raise ValueError(f"validation_freq={freq!r} is neither a number of epochs from 1 up nor a list of epochs.")


def refuse_class_weight(class_weight: Any) -> None:
    """It must map class indices to weights."""
    if class_weight is None:
        return
    pairs = class_weight.items() if isinstance(class_weight, Mapping) else ()
    if not pairs or not all(isinstance(i, Integral) and i >= 0 and isinstance(w, Real) for i, w in pairs):
        raise ValueError(f"class_weight={class_weight!r} is not {{class index: weight}}, such as {{0: 1.0, 1: 5.0}}.")


def refuse_unlike(targets: Any, validation_targets: Any) -> None:
    """Targets of training and validation must have one structure and, samples aside, one shape."""
    if targets is None or validation_targets is None:
        return
    ours, theirs = dict(named_leaves(targets, "y")), dict(named_leaves(validation_targets, "y"))
    if set(ours) != set(theirs):
        raise ValueError(
            f"validation targets are {sorted(theirs)}, training targets {sorted(ours)}: expected the same."
        )
    for name, tensor in ours.items():
        other = theirs[name]
        if isinstance(tensor, Tensor) and tensor.ndim != other.ndim:
            raise ValueError(
                f"validation targets {name} have shape {tuple(other.shape)}, training targets {tuple(tensor.shape)}: "
                f"expected the same number of dimensions."
            )


def refuse_second_pass(repeats: bool, steps: int | None, epochs: range, freq: int | Iterable[int]) -> None:
    """A generator of validation data cannot be gone through again after the next epoch."""
    times = sum(is_due(epoch, freq) for epoch in epochs)
    if not repeats and steps is None and times > 1:
        raise ValueError(
            f"validation_data is a generator, which ends after the first of {times} validations. "
            f"Give validation_steps, a list, or a callable that makes a new one each time."
        )


def refuse_unknown_monitors(callbacks: list[Any], names: list[str], is_validated: bool) -> None:
    """What a callback monitors must be among the names that the logs will have.

    A callback behind others that hear of the end of an epoch is let pass: they may put more into the logs.
    """
    known = names + [f"val_{name}" for name in names if is_validated]
    for index, callback in enumerate(callbacks):
        monitor = getattr(callback, "monitor", None)
        if hooks_of(callbacks[:index]).on_epoch_end or not isinstance(monitor, str) or monitor in known:
            continue
        close = difflib.get_close_matches(monitor, known, n=1, cutoff=0.6)
        hint = f"Did you mean {close[0]!r}?" if close else "Give one of these, or add the metric to compile."
        without = "" if is_validated else " (val_ names need validation_data)"
        raise ValueError(
            f"{type(callback).__name__} monitors {monitor!r}, but the logs will have {', '.join(known)}{without}. "
            f"{hint}"
        )


def is_due(epoch: int, freq: int | Iterable[int]) -> bool:
    """Whether an epoch, 0-based, is validated: `freq` counts from 1, as Keras does."""
    return (epoch + 1) % freq == 0 if isinstance(freq, Integral) else epoch + 1 in freq
