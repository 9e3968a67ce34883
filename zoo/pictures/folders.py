"""Folders of pictures, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo.files import is_hidden, walk
from zoo.pictures.formats import readable_suffixes

__all__ = ["PARTS", "class_folders", "is_picture", "misnamed_parts", "pictures_below", "split_folder"]

PARTS = ("train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
"""What folders and shards of a part of a data set are called, in small letters."""


def is_picture(name: str) -> bool:
    """Tell whether a file's name is that of a picture of the user's that can be read here."""
    return os.path.splitext(name)[1].lower() in readable_suffixes() and not is_hidden(name)


def class_folders(folder: str | Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without those that are not the user's."""
    found = (Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    return sorted(found, key=lambda path: path.name)


def pictures_below(folder: str | Path) -> Iterator[str]:
    """Yield the names of all pictures in a folder and the folders in it, without what is not the user's."""
    for _, _, names in walk(folder):
        yield from filter(is_picture, names)


def split_folder(folder: str | Path, names: Sequence[str]) -> Path | None:
    """Return the first of the named folders in `folder` that holds folders itself: a class may be called "train".

    "Train" counts as "train": class folders must not be mistaken for pictures of a class of that name.
    """
    inside = class_folders(folder)
    for name in names:
        for path in sorted(inside, key=lambda path: path.name != name):
            if path.name.lower() == name and class_folders(path):
                return path
    return None


def misnamed_parts(folder: str | Path) -> list[str]:
    """Return the names of the folders in `folder` if they are parts of a data set ("training", "testing"), not classes.

    Parts hold the class folders; without this, two classes called "training" and "testing" would be learnt.
    """
    inside = class_folders(folder)
    parts = all(path.name.lower() in PARTS and class_folders(path) for path in inside)
    return [path.name for path in inside] if parts else []
