"""What commands on pictures share: which files they are to work on, where they run, and what failed."""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zoo.cli.output import note

__all__ = ["SUFFIXES", "Picture", "add_device", "find_pictures", "one_line", "report_failures"]

SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """One input.

    Args:
        path: The file; it need not exist.
        relative: Its path below the folder that was asked for; for a single file its name.
    """

    path: Path
    relative: Path


def find_pictures(given: Iterable[str]) -> list[Picture]:
    """Return the files that the user means, each once, in the order given.

    Args:
        given: Files, patterns with `*`, `?`, `[...]` and `**`, and folders, which are searched with all below them for
            files with a picture's suffix: in the order of their names, frame2 before frame10. Hidden files and folders
            are left out.
    """
    found: dict[Path, Picture] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            pictures = [Picture(file, file.relative_to(path)) for file in _below(path)]
        elif not path.exists() and glob.has_magic(text):
            root = _root(path)
            matches = sorted(map(Path, glob.glob(text, recursive=True)), key=lambda path: _natural(str(path)))
            pictures = [Picture(file, file.relative_to(root)) for file in matches if file.is_file()]
            pictures = pictures or [Picture(path, Path(path.name))]  # reported as missing
        else:
            pictures = [Picture(path, Path(path.name))]
        for picture in pictures:
            found.setdefault(picture.path, picture)
    return list(found.values())


def _below(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        files += [Path(parent, name) for name in sorted(names, key=_natural) if not name.startswith(".")]
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers count as numbers, and come before letters."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


def _root(pattern: Path) -> Path:
    """Return the folder above the first part with a wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def report_failures(args: argparse.Namespace, failed: list[dict[str, str]], total: int) -> int:
    """List inputs that failed on the standard error, and return the exit code."""
    if failed and not args.json:
        for entry in failed:
            print(f"zoo: {entry['file']}: {entry['error']}", file=sys.stderr)
        note(args, f"{len(failed)} of {total} failed.")
    return 1 if failed else 0


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
