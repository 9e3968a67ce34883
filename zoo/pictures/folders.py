"""Folders of pictures, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from zoo.files import is_hidden
from zoo.pictures.formats import readable_suffixes

__all__ = ["class_folders", "is_picture", "split_folder"]


def is_picture(name: str) -> bool:
    """Tell whether a file's name is that of a picture of the user's that can be read here."""
    return os.path.splitext(name)[1].lower() in readable_suffixes() and not is_hidden(name)


def class_folders(folder: str | Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without those that are not the user's."""
    found = (Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    return sorted(found, key=lambda path: path.name)


def split_folder(folder: str | Path, names: Sequence[str]) -> Path | None:
    """Return the first of the named folders in `folder` that holds folders itself: a class may be called "train"."""
    for name in names:
        if (Path(folder) / name).is_dir() and class_folders(Path(folder) / name):
            return Path(folder) / name
    return None
