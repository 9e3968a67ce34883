"""Where the results of `zoo restore` go, and what can be said of each picture before anything is computed."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zoo.cli.inputs import Picture, find_pictures, one_line
from zoo.cli.output import FailureError, UsageError
from zoo.sources import beside

if TYPE_CHECKING:
    from zoo.pictures.formats import Kind
    from zoo.pictures.sizes import Size

__all__ = ["FIELDS", "USUAL_SUFFIXES", "Plan", "of_same_names", "plan"]

FIELDS = ("stem", "suffix", "scale", "task", "model", "index")
"""What --template may name."""


_EXTRA = (".heic", ".heif", ".hif", ".jxl")
_NEVER_FOLDERS = (
    *_EXTRA,
    ".psd",
    ".pdf",
    ".svg",
    ".eps",
    ".dng",
    ".nef",
    ".cr2",
    ".cr3",
    ".arw",
    ".exr",
    ".hdr",
    ".xcf",
)
USUAL_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "HEIF": ".heic", "PPM": ".ppm"}
"""Of formats by Pillow's names, where it is not the name."""


class Work(Protocol):
    """What of the work at hand decides where its results go."""

    name: str
    task: str
    scale: int
    size: Size
    references: dict[Path, Path]
    rights: dict[Path, Path]


@dataclasses.dataclass(kw_only=True)
class Plan:
    """What is to become of one picture.

    Args:
        picture: It.
        target: Where its result goes.
        error: Why it cannot be done.
        notes: What is changed on the way, and other things to know.
    """

    picture: Picture
    target: Path
    error: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def plan(pictures: list[Picture], args: argparse.Namespace, job: Work) -> list[Plan]:
    """Return what is to become of each picture.

    Raises:
        UsageError: The output is one file for several pictures, or a result would replace what this run reads.
    """
    from zoo.pictures.formats import writable_suffixes

    output: Path = args.output
    as_file = output.suffix.lower() in writable_suffixes() and not output.is_dir()
    if as_file and (len(pictures) != 1 or Path(args.files[0]).is_dir()):
        raise UsageError(f"{output} names one file for {len(pictures)} pictures: give a folder.")
    if not as_file and output.is_file():
        raise UsageError(f"{output} is a file, and its suffix names no format that can be written: give a folder.")
    if not as_file and not output.is_dir() and output.suffix.lower() in _NEVER_FOLDERS:
        extra = " (`pip install 'ffn-zoo[formats]'` for HEIC and JPEG XL)" if output.suffix.lower() in _EXTRA else ""
        raise UsageError(f"{output.suffix} is no format that can be written here{extra}: png, jpg, webp, tif, ...")
    taken: dict[Path, Path] = {}
    sources = [*(picture.path for picture in pictures), *job.references.values(), *job.rights.values()]
    read = {identity: path for path in sources if (identity := _identity(path)) is not None}
    plans = []
    for index, picture in enumerate(pictures):
        each = Plan(picture=picture, target=output if as_file else output / picture.relative)
        kind = _look(each, args)
        if not as_file:
            each.target = _named(each, kind, args, job, index)
        if each.target in taken:
            if args.template and not {"{stem", "{index"} & set(re.findall(r"\{\w+", args.template)):
                raise UsageError(f"{taken[each.target]} and {picture.path} would both become {each.target}.")
            other, each.target = taken[each.target], _free(each.target, picture, taken)
            each.notes.append(f"{other} has this name too; its result is called {each.target.name}")
        replaced = read.get(identity) if (identity := _identity(each.target)) is not None else None
        if replaced is not None:
            what = "its own input" if replaced == picture.path else f"{replaced}, which this run reads"
            raise UsageError(f"{each.target} would replace {what}: choose another folder.")
        taken[each.target] = picture.path
        if kind is not None:
            _foresee(each, kind, args, job)
        plans.append(each)
    return plans


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from others, whatever it is called and through whatever links; None of no file."""
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def _look(each: Plan, args: argparse.Namespace) -> Kind | None:
    """Look at the head of a file; what is wrong with it is noted."""
    from zoo.pictures.read import peek

    if not os.path.exists(each.picture.path):
        each.error = f"no such file.{beside(each.picture.path)}"
        return None
    try:
        return peek(each.picture.path, None if args.max_pixels is None else int(args.max_pixels))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries raise what they like
        each.error = one_line(error)
        return None


def _named(each: Plan, kind: Kind | None, args: argparse.Namespace, job: Work, index: int) -> Path:
    """Return where a result goes in the output folder."""
    from zoo.pictures.formats import format_of, writable_suffixes

    target = each.target
    if args.format:
        target = target.with_suffix(f".{args.format.lstrip('.').lower()}")
    elif kind is not None and format_of(target) is None:
        usual = USUAL_SUFFIXES.get(kind.format, f".{kind.format.lower()}")
        nearest = ".tif" if kind.colors == "cmyk" or kind.frames > 1 else ".png"
        suffix = usual if usual in writable_suffixes() else nearest
        each.notes.append(f"{target.suffix or 'a file without suffix'} cannot be written; the result is a {suffix}")
        target = target.with_suffix(suffix)
    if args.template:
        scale = job.size.of(kind.size, job.scale)[0] / kind.size[0] if kind is not None else float(job.scale)
        shown = job.size.scale or round(scale, 2)
        shown = int(shown) if shown == int(shown) else shown
        fields = {"stem": target.stem, "suffix": target.suffix, "scale": shown, "task": job.task}
        try:
            name = args.template.format(**fields, model=Path(job.name).name, index=index)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UsageError(f"--template {args.template!r}: {one_line(error)}.") from error
        target = target.with_name(name)
    return target


def _free(target: Path, picture: Picture, taken: dict[Path, Path]) -> Path:
    """Return a name that no other result has: with the suffix of the input, else with a number."""
    own = picture.path.suffix.lstrip(".").lower()
    names = [f"{target.stem}_{own}"] if own else []
    names += [f"{target.stem}_{number}" for number in range(2, len(taken) + 3)]
    free = (target.with_name(name + target.suffix) for name in names)
    return next(path for path in free if path not in taken)


def _foresee(each: Plan, kind: Kind, args: argparse.Namespace, job: Work) -> None:
    """Say what the target's format cannot hold, and refuse what cannot be written."""
    import numpy as np

    from zoo.pictures.formats import FORMATS, format_of, losses, too_large
    from zoo.pictures.picture import Picture as Planes
    from zoo.pictures.picture import PictureError
    from zoo.pictures.restore import Size
    from zoo.pictures.sizes import crop_box
    from zoo.pictures.write import encode

    name = format_of(each.target)
    if name is None:
        each.error = (
            f"{each.target.suffix or 'No suffix'} names no format that can be written: png, jpg, webp, tif, ..."
        )
        return
    size = job.size.of(kind.size, job.scale)
    if args.crop is not None:
        try:
            left, top, right, bottom = crop_box(args.crop, kind.size)
        except ValueError as error:
            each.error = one_line(error)
            return
        new, old = size, kind.size
        size = round((bottom - top) * new[0] / old[0]), round((right - left) * new[1] / old[1])
    reason = too_large(size, name)
    if reason is not None:
        each.error = reason[0].upper() + reason[1:] + "."
        return
    if name not in FORMATS:
        try:
            encode(Planes(color=np.zeros((min(size[0], 64), min(size[1], 64), 3), np.uint8)), name, 95)
        except PictureError as error:
            each.error = one_line(error)
            return
    parent = next((folder for folder in each.target.parents if os.path.exists(folder)), Path())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        each.error = f"The folder {each.target.parent} cannot be written to."
        return
    length, most = len(os.fsencode(each.target.name)), os.pathconf(parent, "PC_NAME_MAX") if os.name == "posix" else 255
    if length > most:
        each.error = f"The name of the result has {length} bytes and may have {most}: --template gives it another one."
        return
    known = format_of(each.picture.path)
    if known is not None and known != kind.format and not {known, kind.format} <= {"BMP", "DIB"}:
        each.notes.append(f"this is a {kind.format} file; the result is written as {name}")
    said = losses(kind, name)
    if said:
        each.notes.append(f"{name}: {', '.join(said)}")
    factor = max(new / old for new, old in zip(size, kind.size, strict=True))
    if args.crop is None and job.size != Size() and factor < 1:
        each.notes.append("the result is smaller than the picture: no network enlarges it first")


def of_same_names(option: str, pictures: list[Picture], given: Path | None) -> dict[Path, Path]:
    """Return the file that an option gives for each picture: of the same name below a folder, in any format."""
    if given is None:
        return {}
    if given.is_file():
        if len(pictures) != 1:
            raise UsageError(f"{option} {given} is one file for {len(pictures)} pictures: give a folder.")
        return {pictures[0].path: given}
    if not given.is_dir():
        raise UsageError(f"{option}: there is no folder {given}.{beside(given)}")
    try:
        others = find_pictures([str(given)])
    except FailureError:
        others = []
    known = {picture.relative.with_suffix("").as_posix(): picture.path for picture in others}
    found = {}
    for picture in pictures:
        name = picture.relative.with_suffix("").as_posix()
        customary = name.rpartition("x")[0] if name.rpartition("x")[2].isdigit() else name  # babyx2 belongs to baby
        match = known.get(name) or known.get(customary)
        if match is not None:
            found[picture.path] = match
    if not found:
        raise UsageError(f"{option}: {given} has no picture that is called like one of the {len(pictures)} inputs.")
    return found
