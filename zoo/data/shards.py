"""Images in WebDataset shards: tar files in which a sample is a picture and its label, of one name, one after another.

Nothing is unpacked: a list of places, made once for each shard and kept in zoo's cache folder, makes every sample
readable where it lies. So the order of an epoch is known in advance, and a resumed run goes on exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from zoo.data.readable import Readable, placed, require_known, tell_absent
from zoo.files import cache_dir, whole
from zoo.pictures.eight_bit import read_eight_bit
from zoo.pictures.folders import PARTS, is_picture, walk

__all__ = ["ShardImages", "find_shards"]

_NAMES = ("classes.txt", "classnames.txt")  # one class a line, beside the shards


def find_shards(folder: Path, splits: Sequence[str]) -> list[Path]:
    """Return the tar files of a split, sorted: those in a folder of its name, else those that have it in their names.

    Those that name no split are for training, as class folders are, where nothing else in the folder is pictures.

    Args:
        folder: Holds them.
        splits: Names of the split, the usual one first.
    """
    loose = sorted(path for path in folder.glob("*.tar") if path.is_file())
    for split in splits:
        inside = sorted(path for path in (folder / split).glob("*.tar") if path.is_file())
        if found := inside or [path for path in loose if _is_of(path.name, split)]:
            return found
    unnamed = [path for path in loose if not any(_is_of(path.name, part) for part in PARTS)]
    if "train" not in splits or not unnamed:
        return []
    others = (name for _, _, names in walk(folder) for name in names if is_picture(name) or name.endswith(".parquet"))
    return [] if any(others) else unnamed


def _is_of(name: str, split: str) -> bool:
    return re.search(rf"(^|[-_.]){re.escape(split)}([-_.\d])", name, re.IGNORECASE) is not None


class ShardImages(Readable):
    """The samples of shards as (transformed image, label) pairs.

    A label is the text of NAME.cls, or "label" or "cls" of NAME.json: the number of a class or its name. Names of
    numbers are the lines of classes.txt in the folder of the shards or the one above.

    Args:
        files: Tar files, not compressed.
        transform: Applied to the RGB PIL image.
        classes: Name of each label, of the training shards; None takes those of these.
        source: Where the shards come from, for messages.

    Raises:
        ValueError: A shard is compressed or cut short, a sample has no label or no picture, or a label is none of the
            classes.
    """

    def __init__(
        self,
        files: Sequence[Path],
        transform: Callable[[Image.Image], Any] | None = None,
        classes: Sequence[str] | None = None,
        source: str = "the shards",
    ) -> None:
        self.files, self.transform = list(files), transform
        found = [_index(path) for path in self.files]
        sizes = [len(labels) for _, _, labels in found]
        self.shard = np.repeat(np.arange(len(found), dtype=np.int32), sizes)
        self.place = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        self.offset = np.concatenate([offsets for offsets, _, _ in found])
        self.length = np.concatenate([lengths for _, lengths, _ in found])
        texts = [label for _, _, labels in found for label in labels]
        own, names = _class_names(texts, self.files[0].parent, source)
        self.classes = list(own if classes is None else classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        same = dict(zip(own, placed(own, self.classes, source), strict=True))
        names = [same[name] for name in names]
        used = dict.fromkeys(names)
        require_known([name for name in used if name not in numbers], self.classes, source)
        tell_absent(classes, used, source)
        self.targets = [numbers[name] for name in names]

    def image(self, index: int) -> Image.Image:
        with self.files[self.shard[index]].open("rb") as file:  # opened anew: processes of a loader share no place
            file.seek(int(self.offset[index]))
            stored = file.read(int(self.length[index]))
        return read_eight_bit(stored, self.mode, self.name(index))

    def name(self, index: int) -> str:
        return f"sample {self.place[index]} of {self.files[self.shard[index]]}"

    def keep(self, indices: Sequence[int]) -> None:
        chosen = np.asarray(indices, dtype=np.int64)
        for part in ("shard", "place", "offset", "length"):
            setattr(self, part, getattr(self, part)[chosen])
        self.targets = [self.targets[index] for index in indices]


def _class_names(texts: list[str], folder: Path, source: str) -> tuple[list[str], list[str]]:
    """Return the names of all classes, and the one that each label stands for."""
    if not all(text.isdecimal() for text in texts):
        return sorted(set(texts)), texts
    labels = list(map(int, texts))
    most = max(labels, default=-1)
    names = [str(number) for number in range(most + 1)]
    for path in (place / name for place in (folder, folder.parent) for name in _NAMES):
        if path.is_file():
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if most >= len(names):
                raise ValueError(f"{source} has the label {most}, but {path} names {len(names)} classes.")
            break
    return names, [names[label] for label in labels]


def _index(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    """Return where the pictures of a shard are, their lengths and labels; from the cache where that is true."""
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}".encode()).hexdigest()[:32]
    kept = cache_dir() / "shards" / f"{key}.npz"
    try:
        with np.load(kept, allow_pickle=False) as stored:
            return stored["offset"], stored["length"], stored["label"].tolist()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        found = _scan(path)
    with contextlib.suppress(OSError), whole(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, offset=found[0], length=found[1], label=np.asarray(found[2], dtype=np.str_))
    return found


def _scan(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or not key:
                    continue
                sample = samples.setdefault(f"{member.name.rpartition('/')[0]}/{key}", {})
                if is_picture(member.name):
                    sample["picture"] = (member.offset_data, member.size)
                elif kind in ("cls", "json"):
                    stored = archive.extractfile(member)
                    assert stored is not None  # a file
                    text = stored.read().decode("utf-8").strip()
                    label = _label_of(text) if kind == "json" else text
                    if label is not None:
                        sample["label"] = label
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        why = f"{path} is no shard that can be read: {error}"
        raise ValueError(f"{why}. A compressed one has to be unpacked first.") from error
    for key, sample in samples.items():
        if missing := [name for name in ("picture", "label") if name not in sample]:
            wanted = ".jpg, .png, ..." if missing[0] == "picture" else ".cls, or label in .json"
            raise ValueError(f"The sample {key.lstrip('/')} of {path} has no {missing[0]} ({wanted}).")
    pictures = np.asarray([sample["picture"] for sample in samples.values()], dtype=np.int64).reshape(-1, 2)
    return pictures[:, 0], pictures[:, 1], [sample["label"] for sample in samples.values()]


def _label_of(text: str) -> str | None:
    facts = json.loads(text)
    value = next((facts[name] for name in ("label", "cls") if name in facts), None) if isinstance(facts, dict) else None
    return None if value is None else str(value)
