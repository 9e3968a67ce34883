"""What every command shares: tables, JSON, progress bars, files that appear whole or not at all."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.files import whole
from zoo.text import first_line

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Column, Table

__all__ = [
    "FailureError",
    "UsageError",
    "billions",
    "change",
    "check_target",
    "hush",
    "joined",
    "millions",
    "note",
    "number",
    "pick_device",
    "print_json",
    "print_table",
    "progress",
    "replacing",
    "silent",
    "table",
]

_PIPE_WIDTH = 10_000  # columns where the output is no terminal: nothing may be cut off or folded
_LONGEST_WORD = 28  # cells that a narrow terminal does not break; paths can be longer


class UsageError(ValueError):
    """The call was wrong; exit code 2."""


class FailureError(RuntimeError):
    """The call was right and did not succeed; exit code 1."""


def print_json(data: Any) -> None:
    """Print data for programs; paths become text."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def table(*columns: str, title: str | None = None, right: Iterable[str] = (), drop: Sequence[str] = ()) -> Table:
    """Return an empty rich table.

    Args:
        *columns: Headings.
        title: Line above.
        right: Headings of right-aligned columns.
        drop: Headings of columns that a narrow terminal leaves out first, in this order; then the last ones go.
    """
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    aligned = set(right)
    for column in columns:
        out.add_column(column, justify="right" if column in aligned else "left", overflow="fold")
    out.drop = list(drop)  # type: ignore[attr-defined]
    return out


def print_table(*parts: Any) -> None:
    """Print tables and lines to the standard output; names are shown as they are, brackets and colons too."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    for part in parts:
        if isinstance(part, Table) and part.title:  # rich would fold it to the width of the table
            console.print(part.title, style="table.title", soft_wrap=True)
            part.title = None
        left_out = _narrow(part, console) if isinstance(part, Table) else []
        # lines are not broken: a terminal wraps them, programs read them whole
        console.print(part, soft_wrap=isinstance(part, str))
        if left_out:
            console.print(f"Left out at {console.width} columns: {', '.join(left_out)}.", soft_wrap=True)


def _narrow(part: Table, console: Console) -> list[str]:
    """Take columns out of a table until no word has to be broken, and return their headings."""
    from rich.cells import cell_len

    def needs(column: Column) -> tuple[int, int]:
        """Return the least width, which breaks no word and no number from its unit, and that of whole lines."""
        texts = [str(column.header), *map(str, column.cells)]
        widest = max(cell_len(line) for text in texts for line in text.splitlines() or [""])
        if column.no_wrap or column.justify == "right":
            return widest, widest
        longest = max(cell_len(word) for text in texts for word in text.split() or [""])
        return min(longest, _LONGEST_WORD), widest

    left_out: list[str] = []
    while True:
        widths = [needs(column) for column in part.columns]
        spare = console.width - 3 * len(widths) + 1 - sum(least for least, _ in widths)  # three between two columns
        if spare >= 0 or len(widths) == 1 or not part.columns[-1].header:  # a label without what it says is nothing
            break
        headings = [str(column.header) for column in part.columns]
        first = next((name for name in getattr(part, "drop", ()) if name in headings), None)
        index = len(headings) - 1 if first is None else headings.index(first)
        left_out.append(headings[index])
        del part.columns[index]
        for place, column in enumerate(part.columns):
            column._index = place
    if spare >= 0 and sum(widest - least for least, widest in widths) > spare:
        for column, (least, widest) in zip(part.columns, widths, strict=True):
            column.width = least + min(spare, widest - least)
            spare -= column.width - least
    return left_out


def note(args: argparse.Namespace, text: str) -> None:
    """Print a remark to the standard error, in one line whatever names of files hold, unless the command is quiet."""
    if not args.quiet:
        print(" ".join(text.splitlines()), file=sys.stderr)


def progress(args: argparse.Namespace) -> Progress:
    """Return a progress display with remaining time; silent without a terminal and under -q and --json."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=silent(args),
    )


def hush(args: argparse.Namespace, *, diffusers: bool = False) -> None:
    """Switch off the progress bars of the Hub client, and of diffusers, where nobody watches.

    Args:
        args: The command's options.
        diffusers: Whether the command is about to import diffusers.
    """
    if not silent(args):
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if diffusers and importlib.util.find_spec("diffusers"):
        from diffusers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"There is no device {name!r} here: {first_line(error)}") from error
    return device


def silent(args: argparse.Namespace) -> bool:
    """Tell whether nobody watches progress."""
    return args.quiet or args.json or not sys.stderr.isatty()


@contextmanager
def replacing(path: str | Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends well and vanishes when it fails.

    Args:
        path: Target file; missing folders are made.
        force: Replace an existing file.

    Raises:
        UsageError: The file exists and `force` is not set, or the folder cannot be written to.
    """
    path = Path(path)
    check_target(path, force=force)
    with whole(path) as temporary:
        yield temporary


def at_least(args: argparse.Namespace, **least: float) -> None:
    """Refuse options with numbers below what fits; None is one that was not given.

    Raises:
        UsageError: There is one.
    """
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, got {value:g}.")


def check_target(path: Path, *, force: bool, make: bool = True) -> None:
    """Refuse an output that exists or cannot be written, before any work is done; see `replacing`.

    Args:
        path: A file.
        force: It may exist.
        make: Make the folders above it.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force replaces it.")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))  # others are made with it
    if not folder.is_dir():
        raise UsageError(f"The folder {path.parent} cannot be made: {folder} is a file.")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"The folder {folder} is not writable.")
    if make:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {path.parent} cannot be made: {error.strerror}.") from error


def number(text: str) -> float:
    """Read a count: 30e6, 30M, 1.5G, 500k.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    factors = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    factor = factors.get(text[-1:].lower())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no count; write 30e6 or 30M")
    return value


def millions(value: float) -> str:
    """Return a count in millions, with three digits: "5.74 M"."""
    return f"{_digits(value / 1e6)} M"


def billions(value: float) -> str:
    """Return a count in billions, with three digits: "1.26 G"."""
    return f"{_digits(value / 1e9)} G"


def change(before: str, after: str | None) -> str:
    """Return "before -> after" with the unit once, or "before" alone."""
    if after is None or after == before:
        return before
    left, _, unit = before.rpartition(" ")
    return f"{left if after.endswith(f' {unit}') else before} -> {after}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def joined(values: Sequence[Any], empty: str = "-") -> str:
    """Return values separated by commas, or `empty`."""
    return ", ".join(map(str, values)) or empty
