"""Words for people: counted nouns, errors in a line, and tables as plain text for reports that are printed."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence

__all__ = ["counted", "first_line", "natural_order", "table_lines"]


def counted(count: int, noun: str) -> str:
    """Return "1 thread", "2 threads"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def natural_order(name: str) -> list[str | int]:
    """Return a key to sort names by, in which numbers count as numbers and come before letters."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"([0-9]+)", name))]


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, else what kind it is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def table_lines(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return one line a row, with columns two spaces apart.

    Args:
        rows: Cells; each row has as many.
        right: Numbers of the columns that end at one place; the others begin at one.
    """
    from rich.console import Console  # reports are printed rarely, zoo is imported often
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for index in range(len(rows[0])):
        table.add_column(justify="right" if index in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]
