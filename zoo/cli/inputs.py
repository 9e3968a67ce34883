"""What commands on pictures share: which files they are to work on, where they run, and what failed."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zoo.cli.errors import code_for, with_code
from zoo.cli.output import FailureError, note
from zoo.files import is_hidden, walk
from zoo.text import natural_order

__all__ = ["ENGINES", "Picture", "add_device", "add_engine", "find_pictures", "one_line", "report_failures", "suffixes"]


@dataclass(frozen=True)
class Picture:
    """One input.

    Args:
        path: The file; it need not exist.
        relative: Its path below the folder that was asked for; for a single file its name.
    """

    path: Path
    relative: Path


def suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of files that are taken from a folder: those that the libraries read."""
    from zoo.pictures.formats import readable_suffixes

    return readable_suffixes()


def find_pictures(given: Iterable[str], leave_out: Path | None = None) -> list[Picture]:
    """Return the files that the user means, each once, in the order given.

    Args:
        given: Files, patterns with `*`, `?`, `[...]` and `**`, and folders, which are searched with all below them for
            files with a picture's suffix: in the order of their names, frame2 before frame10. Hidden files and folders
            are left out. What exists under a name with brackets is no pattern.
        leave_out: A folder that is not searched, where results go.

    Raises:
        FailureError: Only folders were given, and there is no picture in them.
    """
    found: dict[Path, Picture] = {}
    empty: list[str] = []
    for text in given:
        path = Path(text)
        if os.path.isdir(path):
            pictures, others = _below(path, leave_out)
            if not pictures:
                empty.append(f"{path} ({others} other file{'' if others == 1 else 's'})")
        elif not os.path.exists(path) and glob.has_magic(text):
            pattern, root = _pattern(path)
            matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda path: natural_order(str(path)))
            pictures = [Picture(file, file.relative_to(root)) for file in matches if file.is_file()]
            pictures = pictures or [Picture(path, Path(path.name))]  # reported as missing
        else:
            pictures = [Picture(path, Path(path.name))]
        for picture in pictures:
            found.setdefault(picture.path, picture)
    if empty and not found:
        raise FailureError(f"There is no picture in {', '.join(empty)}: 0 of 0 done.")
    return list(found.values())


def _below(folder: Path, leave_out: Path | None) -> tuple[list[Picture], int]:
    """Return the pictures below a folder, and folders that cannot be read; and how many other files there are."""
    skipped = None if leave_out is None or not leave_out.is_dir() else leave_out.resolve()
    files, others = [], 0
    for parent, folders, names in walk(folder, lambda error: files.append(Path(error.filename))):
        if skipped is not None:
            folders[:] = [name for name in folders if Path(parent, name).resolve() != skipped]
        folders.sort(key=natural_order)
        for name in sorted(names, key=natural_order):
            if is_hidden(name):
                continue
            if Path(name).suffix.lower() in suffixes():
                files.append(Path(parent, name))
            else:
                others += 1
    return [Picture(file, file.relative_to(folder)) for file in files], others


def _pattern(path: Path) -> tuple[str, Path]:
    """Return a pattern in which folders that exist under names with brackets are plain, and the last such folder."""
    root, parts = Path(), []
    plain = True
    for index, part in enumerate(path.parts):
        if plain and (not glob.has_magic(part) or (root / part).exists()):
            if index < len(path.parts) - 1:
                root = root / part
            parts.append(glob.escape(part))
            continue
        plain = False
        parts.append(part)
    return str(Path(*parts)), root


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


ENGINES = ("eager", "onnxruntime", "openvino", "inductor", "auto")
"""The same names as `zoo.engines.ENGINE_NAMES`, which costs the import of torch."""


def add_engine(parser: argparse.ArgumentParser, default: str = "eager", more: str = "") -> None:
    """Add --engine."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=default,
        help=f"what runs the network; auto times what is installed{more} (default: {default})",
    )


def report_failures(args: argparse.Namespace, failed: list[dict[str, str]], total: int) -> int:
    """List inputs that failed on the standard error, and return the exit code."""
    if failed and not args.json:
        for entry in failed:
            said = with_code(entry["error"], code_for(entry["error"], "pictures"))
            print(f"zoo: {' '.join(entry['file'].splitlines())}: {said}", file=sys.stderr)
        note(args, f"{len(failed)} of {total} failed.")
    return 1 if failed else 0


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line, with its kind where it says little."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"Out of memory{': ' + said if said else ''}; a smaller --budget, or --crop, takes less."
    if isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, RecursionError):
        return said or type(error).__name__
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
