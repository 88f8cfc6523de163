"""Numbers that callbacks are given: refused early, in one sentence."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def count(name: str, value: Any) -> int:
    """A whole number from 0 up.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than 0.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number. Give one from 0 up.")
    if value < 0:
        raise ValueError(f"{name}={value} is less than 0. Give a whole number from 0 up.")
    return int(value)


def number(name: str, value: Any) -> float:
    """Any number but NaN.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected a number. Give one such as 0.1.")
    if math.isnan(value):
        raise ValueError(f"{name}={value!r} is nothing to compare with. Give a number such as 0.1.")
    return float(value)


def number_or_none(name: str, value: Any) -> float | None:
    """As `number`, where `None` stands for none."""
    return None if value is None else number(name, value)
