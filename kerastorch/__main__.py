"""`python -m kerastorch`: what is here to train on, in tables; `--json` for programs."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from .environment import Row, report

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what `environment.report` finds.

    Args:
        arguments: Of the command line. Default: `None`, those of this process.
    """
    parser = argparse.ArgumentParser("python -m kerastorch", description="Versions, devices, backends and launching.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    options = parser.parse_args(arguments)
    tables = report()
    text = json.dumps(tables, indent=2) if options.json else as_text(tables, sys.stdout)
    encoding = sys.stdout.encoding or "utf-8"  # names of devices and hosts may be in any script
    print(text.encode(encoding, errors="replace").decode(encoding))


def as_text(tables: dict[str, list[Row]], file: TextIO) -> str:
    """The tables below one another; on a terminal as wide as that, else each row in one line."""
    return "\n\n".join(f"{title}\n{_table(rows, file)}" for title, rows in tables.items() if rows)


def _table(rows: list[Row], file: TextIO) -> str:
    from tabulate import tabulate

    shown = [{_heading(name): _text(name, value) for name, value in row.items()} for row in rows]
    if not file.isatty():
        return tabulate(shown, "keys", "plain", disable_numparse=True)
    columns = list(shown[0])
    taken = sum(max(len(row[name]) for row in [*shown, {one: one for one in columns}]) + 2 for name in columns[:-1])
    widths = [None] * (len(columns) - 1) + [max(30, shutil.get_terminal_size().columns - taken)]
    return tabulate(shown, "keys", "simple", disable_numparse=True, maxcolwidths=widths)


def _heading(name: str) -> str:
    return name.removesuffix("_bytes")


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / GIB:.1f} GiB" if name.endswith("_bytes") else str(value)


if __name__ == "__main__":
    main()
