"""What labelled images of every kind share: reading one, its label, leaving some out."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image
from torch.utils.data import Dataset

from zoo.catalog import did_you_mean
from zoo.notices import notice

__all__ = ["Readable", "in_words", "placed", "places_of", "require_known", "tell_absent", "wordnet_descriptions"]


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


def placed(names: Sequence[str], classes: Sequence[str], source: str | Path) -> list[str]:
    """Find the model's class that each class of the data stands for; what is not its own name is told in a notice.

    Numbers, "0" to "9", are places among the model's classes, and n01440764 is "tench", as in WordNet. Capitals,
    and "_" and "-" for spaces, do not count; of "tench, Tinca tinca" one is enough.

    Args:
        names: Classes of the data.
        classes: Those of the model.
        source: Where the data come from, for the notice.

    Returns:
        A class for each name; the name itself where none can be meant.

    Raises:
        ValueError: A name may stand for several classes.
    """
    strange = [name for name in dict.fromkeys(names) if name not in classes]
    if not strange:
        return list(names)
    numbers = list(map(str, range(len(classes))))
    if all(name.isdecimal() and int(name) < len(classes) for name in names) and (
        list(classes) == numbers or len(strange) == len(set(names))
    ):
        found = {name: classes[int(name)] for name in names}
        if list(classes) != numbers:
            _tell(f"{source} has numbers for classes, taken as places among the model's", found)
        return [found[name] for name in names]
    wordnet = wordnet_descriptions([part for name in (*strange, *classes) for part in _number(name)])

    def words(name: str) -> set[str]:
        said = _number(name)
        synonyms = wordnet.get(said[0], name).split(",") if said else name.split(",")
        return {re.sub(r"[\s_-]+", " ", each).strip().casefold() for each in (*said, *synonyms)}

    known = {name: words(name) for name in classes}
    found = {}
    for name in strange:
        own = words(name)
        meant = [label for label, theirs in known.items() if own & theirs]
        exact = [label for label in meant if own - {*_number(name)} == known[label] - {*_number(label)}]
        if len(meant) > 1 and len(exact) != 1:
            raise ValueError(f"{source} has the class {name!r}, which may be {' or '.join(map(repr, meant))}.")
        if meant:
            found[name] = exact[0] if exact else meant[0]
    if found:
        _tell(f"{source} has other names for classes", found)
    return [found.get(name, name) for name in names]


def _number(name: str) -> list[str]:
    """Return WordNet's number that a name is, or begins with (n01440764-tench); nothing where there is none."""
    found = re.match(r"(n\d{8})(?![^\s_-])", name)
    return [found[1]] if found else []


def _tell(what: str, found: dict[str, str]) -> None:
    notice(f"{what}: {_some([f'{name!r} for {label!r}' for name, label in found.items()])}.")


def _some(parts: Sequence[str]) -> str:
    """List the first four, and tell how many more there are."""
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def require_known(strange: Sequence[str], classes: Sequence[str], source: str | Path) -> None:
    """Refuse classes that are not those of the model, or of the images that it is trained on."""
    if strange:
        hint = did_you_mean(strange[0], classes, quoted=True, cutoff=0.7)
        listed, known = _some(list(map(repr, strange))), _some(list(map(repr, classes)))
        which = "class" if len(strange) == 1 else "classes"
        verb = "is" if len(strange) == 1 else "are"
        raise ValueError(f"{source} has the {which} {listed}, which {verb} none of the known ones, {known}.{hint}")


def places_of(names: Sequence[str], classes: Sequence[str], source: str | Path) -> list[int]:
    """Return the place of each name among a model's classes; those that are none of them are refused."""
    require_known([name for name in names if name not in classes], classes, source)
    return [list(classes).index(name) for name in names]


def tell_absent(classes: Sequence[str] | None, used: Container[str], source: str | Path) -> None:
    """Say which of training's classes a split lacks."""
    absent = [name for name in classes or () if name not in used]
    if absent:
        which = "class" if len(absent) == 1 else "classes"
        notice(f"{source} has no images of the {which} {_some(list(map(repr, absent)))}.")
