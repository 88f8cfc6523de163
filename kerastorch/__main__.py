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
NARROWEST = 30  # columns of text


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
    """The tables below one another; on a terminal as wide as that, else with each row in one line."""
    *tables_above, (_, launches) = tables.items()
    parts = [f"{title}\n{_table(rows, file)}" for title, rows in tables_above if rows]
    # Not as a table: these are to be copied.
    parts += [f"# {row['where']}\n{row['command']}" for row in launches]
    return "\n\n".join(parts)


def _table(rows: list[Row], file: TextIO) -> str:
    from tabulate import tabulate

    shown = [{_heading(name): _text(name, value) for name, value in row.items()} for row in rows]
    if not file.isatty():
        return tabulate(shown, "keys", "plain", disable_numparse=True)
    *columns, _ = shown[0]
    taken = sum(max([len(name) + 2, *(len(row[name]) for row in shown)]) + 2 for name in columns)  # as tabulate pads
    left = max(NARROWEST, shutil.get_terminal_size().columns - taken)
    return tabulate(shown, "keys", "simple", disable_numparse=True, maxcolwidths=[None] * len(columns) + [left])


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
