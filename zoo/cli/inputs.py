"""Which picture files a command is to work on, and where its results go."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SUFFIXES", "Picture", "find_pictures"]

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
            files with a picture's suffix. Hidden files and folders are left out.
    """
    found: dict[Path, Picture] = {}
    for text in given:
        path = Path(text)
        if path.is_dir():
            pictures = [Picture(file, file.relative_to(path)) for file in _below(path)]
        elif not path.exists() and glob.has_magic(text):
            root = _root(path)
            matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
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
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def _root(pattern: Path) -> Path:
    """Return the folder above the first part with a wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)
