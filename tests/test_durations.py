"""Durations: every form that means the same is the same number of seconds; what is none is refused by its name."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction

import numpy as np
import pytest

from kerastorch.durations import seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (90, 90.0),
        (0.25, 0.25),
        (np.int64(3), 3.0),
        (np.float32(1.5), 1.5),
        (Fraction(1, 4), 0.25),
        (timedelta(days=1, seconds=2), 86402.0),
        (timedelta(microseconds=1), 1e-6),
        ({"hours": 1.5}, 5400.0),
        ({"weeks": 1, "days": 1, "hours": 1, "minutes": 1, "seconds": 1}, 694861.0),
        ({"milliseconds": 250, "microseconds": 1}, 0.250001),
        ({"minutes": np.int64(2), "seconds": np.float32(0.5)}, 120.5),
        ({"hours": 1, "minutes": -30}, 1800.0),
        ("00:00:00:01", 1.0),
        ("01:02:03:04", 93784.0),
        ("100:00:00:00", 8_640_000.0),
        (" 0:12:00:00 ", 43200.0),
        ("00:00:90:00", 5400.0),
    ],
)
def test_each_form_is_its_seconds(value, expected):
    found = seconds(value, "duration")
    assert found == expected and type(found) is float


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, "not above 0"),
        (-1.5, "not above 0"),
        (float("inf"), "finite"),
        (float("nan"), "finite"),
        (timedelta(0), "not above 0"),
        (timedelta(seconds=-1), "not above 0"),
        ("00:00:00:00", "not above 0"),
        ({}, "not above 0"),
        ({"hours": -1}, "not above 0"),
        (10**400, "finite"),
        ({"days": 1e12}, "finite"),
        ({"days": float("nan")}, "NaN"),
        ({"days": float("inf")}, "finite"),
        ({"months": 1}, "has 'months', expected of weeks, days, hours"),
        ({1: 1}, "has 1, expected of weeks"),
        ("1 hour", "is no duration"),
        ("", "is no duration"),
        ("01:00:00", "is no duration"),
        ("1:1:1:1", "is no duration"),
        ("-1:00:00:00", "is no duration"),
        ("00:00:00:1.5", "is no duration"),
        ("٠٠:٠٠:٠٠:٠١", "is no duration"),
    ],
)
def test_what_is_no_duration_is_refused_with_what_would_be(value, reason):
    with pytest.raises(ValueError, match=rf'max_time=.*{reason}.*Give seconds \(3600\), "DD:HH:MM:SS"'):
        seconds(value, "max_time")


@pytest.mark.parametrize("value", [True, None, [1], 1j, b"00:00:00:01"])
def test_other_types_are_refused_with_theirs(value):
    with pytest.raises(TypeError, match=f"max_time=.* is a {type(value).__name__}, which is no duration. Give seconds"):
        seconds(value, "max_time")


@pytest.mark.parametrize("number", ["1", None, True])
def test_a_dict_holds_numbers(number):
    with pytest.raises(TypeError, match=f"max_time=.*has {number!r}, expected numbers"):
        seconds({"hours": number}, "max_time")
