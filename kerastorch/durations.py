"""How long something may take: the forms in which a duration can be given -> seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from numbers import Real
from typing import Any

UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
FORMS = 'Give seconds (3600), "DD:HH:MM:SS" ("00:01:00:00"), a timedelta or a dict ({"hours": 1})'


def seconds(value: Any, name: str) -> float:
    """A duration in seconds, whichever form it was given in.

    Args:
        value: A number of seconds; a `datetime.timedelta`; a dict of its keywords, such as `{"hours": 1.5}`; or a text
            `"DD:HH:MM:SS"` (days, hours, minutes, seconds).
        name: What the argument is called, for errors.
    Returns:
        Seconds, more than 0 and finite.
    Raises:
        ValueError: a text or a dict that is none of these, or a duration that is not positive and finite.
        TypeError: something else.
    Example:
        >>> seconds("01:00:00:30", "duration"), seconds({"minutes": 2}, "duration"), seconds(0.5, "duration")
        (86430.0, 120.0, 0.5)

    Source: the forms are those of `max_time` in Lightning, and a number.
    """
    try:
        found = _seconds(value, name)
    except OverflowError:  # more than a float or a timedelta can hold
        found = math.inf
    if not 0 < found < math.inf:
        raise ValueError(f"{name}={value!r} is no duration: it is not above 0 and finite. {FORMS}.")
    return found


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return _of_units(value, name)
    if isinstance(value, str):
        return _of_text(value, name)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}={value!r} is a {type(value).__name__}, which is no duration. {FORMS}.")


def _of_units(value: Mapping, name: str) -> float:
    unknown = [unit for unit in value if unit not in UNITS]
    if unknown:
        raise ValueError(f"{name}={value!r} has {unknown[0]!r}, expected of {', '.join(UNITS)}. {FORMS}.")
    wrong = [number for number in value.values() if not isinstance(number, Real) or isinstance(number, bool)]
    if wrong:
        raise TypeError(f"{name}={value!r} has {wrong[0]!r}, expected numbers. {FORMS}.")
    try:
        return timedelta(**{unit: float(number) for unit, number in value.items()}).total_seconds()
    except ValueError as error:  # of NaN
        raise ValueError(f"{name}={value!r} is no duration: {error}. {FORMS}.") from error


def _of_text(value: str, name: str) -> float:
    numbers = re.fullmatch("([0-9]+):([0-9]{2}):([0-9]{2}):([0-9]{2})", value.strip())
    if numbers is None:
        raise ValueError(f"{name}={value!r} is no duration. {FORMS}.")
    days, hours, minutes, rest_s = map(int, numbers.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest_s)
