"""Images with class labels in folders, Parquet files and on the Hub: one way of reading, one meaning of a label."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from zoo.data.readable import Readable, placed, require_known, tell_absent
from zoo.data.shards import ShardImages, find_shards
from zoo.files import is_hidden, walk
from zoo.pictures.eight_bit import read_eight_bit
from zoo.pictures.folders import class_folders, is_picture, misnamed_parts, pictures_below, split_folder
from zoo.text import first_line

__all__ = [
    "DamagePolicy",
    "FolderImages",
    "LabelledImages",
    "find_damaged",
    "has_parquet",
    "open_labelled_images",
    "stratified_split",
]

DamagePolicy = Literal["stop", "skip"]
"""What to do with an image that cannot be read: stop there, or read all before the start, list those and go without."""

VALIDATION_SPLITS = ("validation", "val", "valid", "test")


class LabelledImages(Readable):
    """A `datasets` split as (transformed image, label) pairs.

    Args:
        split: A `datasets.Dataset` with one image column and one label column: class numbers or names.
        transform: Applied to the RGB PIL image.
        image_key: Image column; None takes the only one of type `Image`.
        label_key: Label column; None takes the only one of type `ClassLabel`, else "label".
        classes: Name of each label, of the training split; None takes those of this one.
        source: Where the split comes from, for messages.

    Raises:
        ValueError: There is no such column, or several that could be meant, or a label is none of the classes.
    """

    def __init__(
        self,
        split: Any,
        transform: Callable[[Image.Image], Any] | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        classes: Sequence[str] | None = None,
        source: str = "the data set",
    ) -> None:
        self.image_key = _column(split, image_key, "Image", ("image", "img"))
        self.label_key = _column(split, label_key, "ClassLabel", ("label", "labels", "fine_label"))
        self.source, self.transform = source, transform
        own, values = _names(split.features[self.label_key], list(split[self.label_key]), self.label_key, source)
        self.classes = own if classes is None else list(classes)
        own = placed(own, self.classes, source)
        numbers = {name: number for number, name in enumerate(self.classes)}
        used = dict.fromkeys(own[value] for value in values)
        require_known([name for name in used if name not in numbers], self.classes, source)
        self.targets = [numbers[own[value]] for value in values]
        tell_absent(classes, used, source)
        split = split.select_columns([self.image_key])
        if type(split.features[self.image_key]).__name__ == "Image":
            split = split.cast_column(self.image_key, type(split.features[self.image_key])(decode=False))
        self.split, self.rows = split, list(range(len(split)))

    def image(self, index: int) -> Image.Image:
        stored = self.split[index][self.image_key]
        if isinstance(stored, dict):
            stored = stored["path"] if stored.get("bytes") is None else stored["bytes"]
        return read_eight_bit(stored, self.mode, self.name(index))

    def name(self, index: int) -> str:
        return f"row {self.rows[index]} of {self.source}"

    def keep(self, indices: Sequence[int]) -> None:
        self.split, self.rows = self.split.select(list(indices)), [self.rows[index] for index in indices]
        self.targets = [self.targets[index] for index in indices]


def _names(feature: Any, values: list[Any], label_key: str, source: str) -> tuple[list[str], list[int]]:
    """Return the class names of a label column, and the place of each value in them."""
    names = getattr(feature, "names", None)
    if names is None and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        places = {name: place for place, name in enumerate(names)}
        return names, [places[value] for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, int) or value < 0 or (names is not None and value >= len(names)):
            raise ValueError(f"Row {row} of {source} has no class: its {label_key!r} is {value!r}.")
    if names is None:
        names = [str(number) for number in range(max(values, default=-1) + 1)]
    return list(names), values


class FolderImages(Readable, ImageFolder):
    """A folder of class folders as (transformed image, label) pairs.

    Hidden files and folders, and those that a system writes (`__MACOSX`), are left out.

    Args:
        root: Holds one folder a class.
        transform: Applied to the RGB PIL image.
        classes: Name of each label, of the training folder; None takes the sorted names of the folders.

    Raises:
        FileNotFoundError: There is no class folder, or one without pictures.
        ValueError: There is a class that is none of `classes`.
    """

    def __init__(
        self,
        root: str,
        transform: Callable[[Image.Image], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._given = classes
        ImageFolder.__init__(self, root, transform, is_valid_file=self._is_picture, allow_empty=True)
        used = {self.classes[label] for label in self.targets}
        if classes is None:
            for name in self.classes:
                if name not in used:
                    folder = Path(root, name)
                    raise FileNotFoundError(f"The class folder {folder} holds no picture{_formats(folder)}")
        tell_absent(classes, used, root)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        found = [path.name for path in class_folders(directory)]
        if not found:
            raise FileNotFoundError(f"{directory} holds no class folders.")
        if self._given is None:
            return found, {name: label for label, name in enumerate(found)}
        labels = {name: label for label, name in enumerate(self._given)}
        same = zip(found, placed(found, self._given, directory), strict=True)
        labels |= {name: labels[known] for name, known in same if known in labels}
        strange = [name for name in found if name not in labels]
        require_known([name for name in strange if self._any_picture(directory, name)], self._given, directory)
        return list(self._given), labels

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """Return every picture with its label, in the order of torchvision; links that lead in a circle end here."""
        assert is_valid_file is not None  # ours gives one
        return [
            (path, label)
            for name, label in sorted(class_to_idx.items())
            if os.path.isdir(os.path.join(directory, name))  # a split may lack a class
            for parent, _, names in sorted(walk(os.path.join(directory, name)))
            for path in (os.path.join(parent, file) for file in sorted(names))
            if is_valid_file(path)
        ]

    def _any_picture(self, directory: str | Path, name: str) -> bool:
        return any(
            self._is_picture(os.path.join(parent, file))
            for parent, _, files in walk(os.path.join(directory, name))
            for file in files
        )

    def _is_picture(self, path: str) -> bool:
        *folders, name = path[len(str(self.root)) :].split(os.sep)
        return is_picture(name) and not any(map(is_hidden, folders))

    def image(self, index: int) -> Image.Image:
        return read_eight_bit(self.samples[index][0], self.mode)

    def name(self, index: int) -> str:
        return str(self.samples[index][0])

    def keep(self, indices: Sequence[int]) -> None:
        kept = [self.samples[index] for index in indices]  # type: ignore[has-type]
        self.samples = self.imgs = kept
        self.targets = [label for _, label in self.samples]


def _formats(folder: Path) -> str:
    """Say which other files a folder holds."""
    suffixes = sorted({path.suffix.lower() for path in folder.rglob("*.*") if not is_hidden(path.name)})
    found = f", but {', '.join(suffixes[:4])}" if suffixes else ""
    return f"{found}: fill it, or take it away."


def _column(split: Any, chosen: str | None, kind: str, usual: Sequence[str]) -> str:
    if chosen is not None:
        if chosen not in split.column_names:
            raise ValueError(f"The data set has no column {chosen!r}; it has {split.column_names}.")
        return chosen
    of_kind = [name for name, feature in split.features.items() if type(feature).__name__ == kind]
    if len(of_kind) == 1:
        return of_kind[0]
    named = [name for name in usual if name in split.column_names]
    if len(named) != 1:
        raise ValueError(
            f"Which column holds the {'image' if kind == 'Image' else 'label'}? The data set has {split.column_names}; "
            f"set image_key and label_key."
        )
    return named[0]


def open_labelled_images(
    data_dir: str,
    split: str,
    transform: Callable[[Image.Image], Any] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    classes: Sequence[str] | None = None,
) -> LabelledImages | FolderImages | ShardImages:
    """Open one split of a folder of class folders, of Parquet files or of WebDataset shards, or a data set on the Hub.

    Args:
        data_dir: `DIR` with `DIR/<split>/<class>/*.jpg`, `DIR` with `<split>*.parquet`, with `<split>*.tar` or
            `<split>/*.tar`, or a Hub name `org/name`. A folder wins over a Hub name. `DIR/<class>/*.jpg` are training
            images, and so are tar files that name no split.
        split: "train", "test", ...; "validation" also finds the usual other names ("val", "valid", "test").
        transform: Applied to each RGB PIL image.
        image_key: Image column of Parquet or Hub data.
        label_key: Label column of Parquet or Hub data.
        classes: Name of each label, where another split has set them; None takes this one's own.

    Raises:
        FileNotFoundError: The folder does not exist, or holds neither.
        ValueError: The data set has no such split, a column cannot be told, or a class is none of `classes`.
    """
    found, source = _find_split(data_dir, split)
    if isinstance(found, list):
        return ShardImages(found, transform, classes, source)
    if isinstance(found, Path):
        return FolderImages(str(found), transform, classes)
    return LabelledImages(found, transform, image_key, label_key, classes, source)


def has_parquet(folder: str | Path) -> bool:
    """Tell whether there are Parquet files in a folder or below."""
    return any(Path(folder).rglob("*.parquet"))


def _find_split(data_dir: str, split: str) -> tuple[Any, str]:
    """Return the shards of a split, its folder, or its table, and what to call it."""
    wanted = VALIDATION_SPLITS if split == "validation" else (split,)
    folder = Path(data_dir)
    if folder.is_dir():
        if shards := find_shards(folder, wanted):
            return shards, f"{data_dir} ({split})"
        found = split_folder(folder, wanted)
        if found is None and split == "train" and split_folder(folder, VALIDATION_SPLITS) is None:
            if parts := misnamed_parts(folder):
                raise ValueError(
                    f"{folder} holds {', '.join(parts)}: call the folder of the training images train, the other val."
                )
            found = folder if any(any(pictures_below(path)) for path in class_folders(folder)) else None
        if found is not None:
            return found, str(found)
        if not has_parquet(folder):
            raise FileNotFoundError(
                f"{folder} holds neither {wanted[0]}/<class>/ folders of images nor Parquet files of that split."
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", data_dir) or data_dir.startswith("."):
        raise FileNotFoundError(f"There is no folder {data_dir}, and a data set on the Hub is called org/name.")
    from datasets import load_dataset

    try:
        splits = load_dataset(data_dir)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"The data set {data_dir} cannot be opened: {first_line(error)}") from error
    for name in wanted:
        if name in splits:
            return _with_own_names(splits[name], folder, name), f"{data_dir} ({name})"
    raise ValueError(f"{data_dir} has no split {split!r}; it has {', '.join(splits)}.")


def _with_own_names(split: Any, folder: Path, name: str) -> Any:
    """Return a split with the class names that its own files state: `datasets` gives all splits those of the first."""
    if not folder.is_dir():
        return split
    from datasets import Features, load_dataset, load_dataset_builder
    from pyarrow import parquet

    files = [str(file) for file in (load_dataset_builder(str(folder)).config.data_files or {}).get(name, ())]
    stated: dict[str, dict[str, list[str]]] = {}
    for file in files:
        facts = (parquet.read_schema(file).metadata or {}).get(b"huggingface") if file.endswith(".parquet") else None
        if facts is not None:
            stated[file] = _class_names(Features.from_dict(json.loads(facts)["info"]["features"]))
    if not stated:
        return split
    first, *others = stated
    for other in others:
        if stated[other] != stated[first]:
            raise ValueError(f"{other} has other names for its labels than {first}: write both with the same ones.")
    if stated[first] == _class_names(split.features):
        return split
    return load_dataset("parquet", data_files={name: files}, split=name)


def _class_names(features: Any) -> dict[str, list[str]]:
    """Return the names of every column of labels."""
    return {key: feature.names for key, feature in features.items() if type(feature).__name__ == "ClassLabel"}


class _Images(Protocol):
    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...


def find_damaged(data: _Images) -> dict[int, str]:
    """Read every image once and return what is wrong with those that cannot be read: index -> message."""

    def problem(index: int) -> str | None:
        try:
            data.image(index)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        return {index: text for index, text in enumerate(pool.map(problem, range(len(data)))) if text is not None}


def stratified_split(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices of (the rest, the part held out): `fraction` of each class, at least one image
    of two; one image of each class always stays.

    Args:
        labels: Class of every image.
        fraction: Share of each class that is held out.
        seed: The same seed and labels give the same parts.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(int(labels[index]), []).append(index)
    held: set[int] = set()
    for members in by_class.values():
        held.update(members[: min(max(round(fraction * len(members)), 1), len(members) - 1)])  # one stays, at least
    return [index for index in range(len(labels)) if index not in held], sorted(held)
