"""What a look at a model found, as a list and as a table; what is looked for is left to the checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

SEVERITIES = ("error", "warning", "note")
# Characters in a line of each column: severity and name, where, what was found, remedy.
WIDTHS = (None, None, 22, 48, 48)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: `"error"` = `fit` will fail or be wrong; `"warning"` = probably a mistake; `"note"` = good to know.
        name: Short and always the same, such as `"unused-parameters"`.
        where: A part of the data or of the module, such as `"x"`, `"optimizer"` or `"layers.2"`.
        found: One sentence.
        remedy: One sentence.
    """

    severity: str
    name: str
    where: str
    found: str
    remedy: str


class Findings(list):
    """A list of `Finding`s, errors first; `str` is the plain table.

    Args:
        findings: In the order they were found.
        checked: What was looked at, as the last line says it. Default: nothing.
    """

    def __init__(self, findings: Iterable[Finding] = (), checked: str = "") -> None:
        super().__init__(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
        self.checked = checked

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings and notes may be there."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """What `fit` would fail of, or be wrong with."""
        return self.of("error")

    @property
    def warnings(self) -> list[Finding]:
        """What is probably a mistake."""
        return self.of("warning")

    @property
    def notes(self) -> list[Finding]:
        """What is good to know."""
        return self.of("note")

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self if finding.severity == severity]

    def __str__(self) -> str:
        return "\n".join([*self._table("simple"), self._last_line()])

    __repr__ = __str__  # so that a REPL shows the table

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        import html

        return "".join([*self._table("html"), f"<p>{html.escape(self._last_line())}</p>"])

    def colored(self) -> str:
        """The table with terminal colours: errors red, warnings yellow, notes dim."""
        from colorama import Fore, Style

        tints = {"error": Style.BRIGHT + Fore.RED, "warning": Fore.YELLOW, "note": Style.DIM}
        painted = {severity: f"{tint}{severity}{Style.RESET_ALL}" for severity, tint in tints.items()}
        line = f"{Style.BRIGHT}{self._last_line()}{Style.RESET_ALL}"
        return "\n".join([*self._table("simple", painted), line])

    def print(self, file: TextIO | None = None) -> None:
        """Print the table, in colour on a terminal unless NO_COLOR is set.

        Args:
            file: Where to. Default: None, for `sys.stdout`.
        Source: https://no-color.org
        """
        file = file or sys.stdout
        table = self.colored() if file.isatty() and not os.environ.get("NO_COLOR") else str(self)
        encoding = getattr(file, "encoding", None) or "utf-8"  # names of layers and columns may be in any script
        print(table.encode(encoding, errors="replace").decode(encoding), file=file)

    def _table(self, style: str, shown: dict[str, str] | None = None) -> list[str]:
        """The table and a line behind it, or nothing; `shown` = how severities are written."""
        if not self:
            return []
        from tabulate import tabulate

        rows = [
            ((shown or {}).get(one.severity, one.severity), one.name, one.where, one.found, one.remedy) for one in self
        ]
        table = tabulate(
            rows,
            headers=["", "name", "where", "found", "remedy"],
            tablefmt=style,
            maxcolwidths=list(WIDTHS) if style == "simple" else None,
            disable_numparse=True,
        )
        return [str(table), ""]

    def _last_line(self) -> str:
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        said = ", ".join(f"{number} {severity}{'s' * (number > 1)}" for number, severity in counts if number)
        return f"{said or 'no mistakes found'}; checked: {self.checked or 'nothing'}"


def several(names: Iterable[str], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
