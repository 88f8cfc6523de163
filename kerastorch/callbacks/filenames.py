"""Names of files that say when they were written, and how good what is in them is: `{epoch:02d}-{val_loss:.3f}.pt`."""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class FileName:
    """A path with names in braces, which may have dots and slashes in them as names of logs have.

    Args:
        text: The path. What is in braces has formats as in `str.format`: of whole numbers for `COUNTS`, else of floats.
    Attributes:
        names: What is in braces.
        folder: The last folder before the first brace.
        suffix: The ending, with its dot; `""` = none.
    Raises:
        ValueError: no name of a file, braces without a name or their partner, or a format that is none of numbers.
    Example:
        >>> name = FileName("runs/{epoch:02d}-{val_loss:.2f}.pt")
        >>> name.filled({"epoch": 3}, {"loss": 0.1, "val_loss": 0.25}), name.folder, name.suffix
        ('runs/03-0.25.pt', 'runs', '.pt')
    """

    COUNTS = ("epoch", "batch", "step")

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._parts = [*string.Formatter().parse(text)]  # (text before, name, format, conversion)
        except ValueError as error:
            raise ValueError(f"filepath={text!r} is no template: {error}. Write braces in pairs: {{epoch}}.") from error
        if os.path.basename(text) in ("", ".", ".."):
            raise ValueError(f"filepath={text!r} names no file. Give one, e.g. 'runs/{{epoch:02d}}.pt'.")
        named = [part for part in self._parts if part[1] is not None]
        for _, name, spec, conversion in named:
            self._refuse_unfit(name, spec, conversion)
        first, (last, name_at_end, _, _) = self._parts[0][0], self._parts[-1]
        self.names = tuple(name for _, name, _, _ in named)
        self.folder = os.path.dirname(first)
        self.suffix = "" if name_at_end is not None else os.path.splitext("x" + os.path.basename(last))[1]

    def filled(self, counts: Mapping[str, int], logs: Mapping[str, Any]) -> str:
        """The path at one moment.

        Args:
            counts: Values of `COUNTS`.
            logs: Values of all other names; one with `val_` that is missing is NaN: an epoch without validation.
        Raises:
            ValueError: the logs do not have a name.
        """
        text = ""
        for before, name, spec, _ in self._parts:
            text += before
            if name is not None:
                text += format(counts[name] if name in counts else self._logged(name, logs), spec)
        return text

    def files(self, folder: str | os.PathLike) -> list[Path]:
        """Files in a folder, in the place of `self.folder`, that have such a name, or one with `-v1` at its end.

        What is in braces stands for any number in its format, all else for itself.
        """
        found = [Path(folder)]
        for pattern in self._pattern().split(_SEPARATOR):
            entries = (path for one in found if one.is_dir() for path in one.iterdir())
            found = [path for path in entries if re.fullmatch(pattern, path.name)]
        return [path for path in found if path.is_file()]

    def _pattern(self) -> str:
        """A regular expression for what comes after the folder, with `_SEPARATOR` between the folders in it."""
        (first, *_), *_ = self._parts
        literals = [os.path.basename(first), *(part[0] for part in self._parts[1:])]
        if self._parts[-1][1] is None:
            literals[-1] = literals[-1].removesuffix(self.suffix)
        fields = ("" if name is None else _number(spec) for _, name, spec, _ in self._parts)
        joined = "".join(map("".join, zip(map(_literal, literals), fields, strict=True)))
        return rf"{joined}(-v\d+)?{re.escape(self.suffix)}"

    def _logged(self, name: str, logs: Mapping[str, Any]) -> float:
        if name in logs:
            return float(logs[name])
        if name.startswith("val_"):
            return math.nan
        raise ValueError(
            f"filepath={self.text!r} names {name!r}, but the logs have {', '.join(logs)}. Name one of these, or "
            f"{', '.join(self.COUNTS)}."
        )

    def _refuse_unfit(self, name: str, spec: str, conversion: str | None) -> None:
        if not name or name.isdigit():
            raise ValueError(f"filepath={self.text!r} has braces without a name. Write one in them: {{epoch:02d}}.")
        if conversion is not None:
            raise ValueError(f"filepath={self.text!r} has !{conversion}, which numbers do not need. Leave it out.")
        try:
            format(1 if name in self.COUNTS else 0.5, spec)
        except ValueError as error:
            raise ValueError(
                f"filepath={self.text!r} gives {name!r} the format {spec!r}: {error}. Give one of numbers, as in "
                f"{{epoch:02d}} or {{val_loss:.3f}}."
            ) from error


_SEPARATOR = "\0"  # which no name of a file has


def _literal(text: str) -> str:
    return _SEPARATOR.join(map(re.escape, text.replace(os.altsep or os.sep, os.sep).split(os.sep)))


def _number(spec: str) -> str:
    """A regular expression for numbers in a format."""
    if spec[-1:] in tuple("bcoxX"):
        return r"[\w#]+"
    filled = re.match(r"(.)[<>=^]", spec)
    fill = re.escape(filled[1] if filled else " ") + "*"
    return rf"[-+ ]?{fill}[-+ ]?(?:\d[\d.,_]*(?:[eE][-+]?\d+)?|nan|inf|NAN|INF)%?{fill}"
