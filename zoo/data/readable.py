"""What labelled images of every kind share: reading one, its label, leaving some out."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image
from torch.utils.data import Dataset

from zoo.catalog import did_you_mean
from zoo.data.notices import notice

__all__ = ["Readable", "by_number", "by_wordnet", "in_words", "require_known", "tell_absent", "wordnet_descriptions"]


class Readable(Dataset[tuple[Any, int]]):
    """What labelled images of every kind share."""

    classes: list[str]
    """Name of each label."""
    targets: list[int]
    """Label of each image."""
    transform: Callable[[Image.Image], Any] | None
    mode: Literal["RGB", "L"] = "RGB"
    """Channels of the images."""
    keep_bytes: int = 0
    """How much memory decoded images may take, so that later epochs need not read them again."""

    def image(self, index: int) -> Image.Image:
        """Read one image upright, with the channels of `mode`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the file or row of one image, for messages."""
        raise NotImplementedError

    def keep(self, indices: Sequence[int]) -> None:
        """Leave all other images out."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._kept_image(index) if self.keep_bytes else self.image(index)
        return (self.transform(image) if self.transform else image), self.targets[index]

    def _kept_image(self, index: int) -> Image.Image:
        kept: dict[int, Image.Image] = self.__dict__.setdefault("_kept", {})
        if index not in kept:
            image = self.image(index)
            used = self.__dict__.get("_used", 0) + len(image.mode) * image.width * image.height
            if used > self.keep_bytes:
                return image
            kept[index], self._used = image, used
        return kept[index].copy()


def wordnet_descriptions(names: Iterable[str]) -> dict[str, str]:
    """Return the synonyms, "tench, Tinca tinca", of those names that are WordNet's numbers as ImageNet writes them."""
    numbers = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    if not numbers:
        return {}
    from timm.data import ImageNetInfo

    known = cast(dict[str, str], ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True))
    return {name: known[name] for name in numbers if name in known}


def in_words(names: Sequence[str]) -> list[str]:
    """Return names for people: "tench" for n01440764, all synonyms where the first is that of another one too."""
    words = wordnet_descriptions(names)
    short = [words[name].partition(",")[0] if name in words else name for name in names]
    return [words.get(name, name) if short.count(word) > 1 else word for name, word in zip(names, short, strict=True)]


def by_wordnet(names: Iterable[str], classes: Sequence[str], source: str | Path) -> dict[str, str]:
    """Find classes by ImageNet's names, and say so: data have n01440764 where the model says "tench", or the other way.

    Args:
        names: Classes of the data.
        classes: Those of the model.
        source: Where the data come from, for the notice.

    Returns:
        The model's class for each name that is none of its own and is, in WordNet, a synonym of one of them alone.
    """
    strange = [name for name in dict.fromkeys(names) if name not in classes]
    wordnet = wordnet_descriptions([*strange, *classes]) if strange else {}
    if not wordnet:
        return {}

    def synonyms(name: str) -> set[str]:
        return {name.casefold(), *map(str.strip, wordnet.get(name, name).casefold().split(","))}

    known = [(name, synonyms(name)) for name in classes]
    found = {name: [label for label, words in known if words & synonyms(name)] for name in strange}
    same = {name: labels[0] for name, labels in found.items() if len(labels) == 1}
    if same:
        told = [f"{name!r} for {label!r}" for name, label in same.items()]
        more = f" and {len(told) - 4} more" if len(told) > 4 else ""
        notice(f"{source} has other names for classes: {', '.join(told[:4])}{more}.")
    return same


def by_number(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the classes that numbers for names, "0" to "9", stand for by their place; other names as they are."""
    places = [int(name) for name in names if name.isdecimal()]
    numbered = len(places) == len(names) and max(places, default=0) < len(classes) and not set(names) & set(classes)
    return [classes[place] for place in places] if numbered else list(names)


def require_known(strange: Sequence[str], classes: Sequence[str], source: str | Path) -> None:
    """Refuse classes that are not those of the model, or of the images that it is trained on."""
    if strange:
        hint = did_you_mean(strange[0], classes, quoted=True, cutoff=0.7)
        listed = ", ".join(map(repr, strange[:4])) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        known = ", ".join(map(repr, classes[:4])) + (f" and {len(classes) - 4} more" if len(classes) > 4 else "")
        raise ValueError(f"{source} has the class {listed}, which is none of the known ones, {known}.{hint}")


def tell_absent(classes: Sequence[str] | None, used: Container[str], source: str | Path) -> None:
    """Say which of training's classes a split lacks."""
    absent = [name for name in classes or () if name not in used]
    if absent:
        listed = ", ".join(map(repr, absent[:4])) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        notice(f"{source} has no images of the class {listed}: nothing is measured there.")
