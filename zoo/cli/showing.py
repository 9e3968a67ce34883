"""How made pictures and videos are written: single files, labelled grids, videos, or their frames."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.cli.output import UsageError, check_target, replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Panel", "Target", "has_encoder", "plan_target", "write"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_ENCODED = (".mp4", ".mov", ".mkv", ".webm")
_ANIMATED = (".gif", ".webp")
_COLUMNS = 10  # pictures beside each other in a grid
_WIDTH = 4096  # pixels that they may take
_TILE = 96  # smaller pictures are enlarged to at least this many pixels in a grid
_NAME = 40  # characters of a prompt in a file's name or beside a grid

Panel = tuple[str, Sequence["Tensor"]]
"""A title, and pictures as (1, C, H, W)."""


class Target:
    """Where to write.

    Args:
        path: The file, or the folder.
        kind: "grid" and "picture" are one picture file, "video" is one video; "pictures" and "videos" are folders of
            them, "frames" is a folder of pictures for each video, or for the only one.
        files: What is in the folder, one a picture or video.
    """

    def __init__(self, path: Path, kind: str, files: Sequence[Path] = ()) -> None:
        self.path, self.kind, self.files = path, kind, list(files)


def has_encoder() -> bool:
    """Tell whether there is what encodes videos."""
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def plan_target(output: Path, names: Sequence[str], *, video: bool, grid: bool, force: bool) -> Target:
    """Say what is to be written, and refuse what cannot be, before anything is computed.

    Args:
        output: A file or folder, told apart by the suffix.
        names: What each picture shows.
        video: Whether they are videos.
        grid: Whether a single picture, too, is shown as a grid with its name.
        force: Replace existing files.

    Raises:
        UsageError: The suffix is of something else, or a file is there.
    """
    suffix = output.suffix.lower()
    known = (*_PICTURES, *_ENCODED, *_ANIMATED)
    if suffix in known and suffix not in ((*_ENCODED, *_ANIMATED) if video else _PICTURES):
        fitting = "a video as .mp4, or a folder of them" if video else "a picture file, or a folder"
        raise UsageError(f"The pipeline makes {'videos' if video else 'pictures'}: -o takes {fitting}, not {output}.")
    own = [f"{index:04d}_{_slug(name)}" for index, name in enumerate(names)]
    if suffix not in known:
        if video and not has_encoder():
            target = Target(output, "frames", [output / name for name in own])
        else:
            end = ".mp4" if video else ".png"
            target = Target(output, "videos" if video else "pictures", [output / f"{name}{end}" for name in own])
    elif video and len(names) > 1:
        raise UsageError(f"{output} is one file, and there are {len(names)} videos: give -o FOLDER.")
    elif video and suffix in _ENCODED and not has_encoder():
        target = Target(output.with_suffix(""), "frames", [output.with_suffix("")])
    elif video:
        target = Target(output, "video", [output])
    else:
        target = Target(output, "grid" if grid or len(names) > 1 else "picture", [output])
    for file in target.files:
        if target.kind == "frames" and file.is_dir() and not force:
            raise UsageError(f"{file} exists; --force replaces it.")
        if target.kind != "frames":
            check_target(file, force=force)
    return target


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name[:_NAME]).strip("_.") or "untitled"


def write(target: Target, panels: Sequence[Panel], names: Sequence[str], *, fps: float, force: bool) -> None:
    """Write what was made.

    Args:
        target: Where, from `plan_target`.
        panels: Pictures or videos with titles; what is not a grid is the last of them.
        names: What each picture shows.
        fps: Frames a second of a video.
        force: Replace existing files.
    """
    made = panels[-1][1]
    if target.kind == "grid":
        with replacing(target.path, force=force) as temporary:
            shown = [(title, [_to_pil(picture)[0] for picture in pictures]) for title, pictures in panels]
            _grid(shown, [name if len(name) <= _NAME else f"{name[: _NAME - 3]}..." for name in names]).save(temporary)
        return
    for file, frames in zip(target.files, made, strict=True):
        pictures = _to_pil(frames)
        if target.kind == "frames":
            _write_frames(file, pictures, force=force)
        elif target.kind in ("video", "videos"):
            with replacing(file, force=force) as temporary:
                _encode(pictures, temporary, fps)
        else:
            with replacing(file, force=force) as temporary:
                pictures[0].save(temporary)
            for layer, picture in enumerate(pictures[1:], 1):  # a pipeline that makes layers of each picture
                with replacing(file.with_stem(f"{file.stem}_{layer}"), force=force) as temporary:
                    picture.save(temporary)


def _write_frames(folder: Path, pictures: Sequence[Image], *, force: bool) -> None:
    from zoo.files import whole

    if folder.exists() and not force:
        raise UsageError(f"{folder} exists; --force replaces it.")
    with whole(folder) as temporary:
        temporary.mkdir()
        for index, picture in enumerate(pictures):
            picture.save(temporary / f"{index:04d}.png")


def _encode(pictures: Sequence[Image], path: Path, fps: float) -> None:
    if path.suffix.lower() in _ANIMATED:
        pictures[0].save(path, save_all=True, append_images=list(pictures[1:]), duration=1000 / fps, loop=0)
        return
    from diffusers.utils import export_to_video

    export_to_video(list(pictures), str(path), fps=fps, macro_block_size=2)


def _to_pil(frames: Tensor) -> list[Image]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image((image.float().clamp(0, 1) * 255).round().byte()) for image in frames]


def _grid(panels: Sequence[tuple[str, list[Image]]], names: Sequence[str]) -> Image:
    """Draw titled panels below each other, in each one row or more a class or prompt with its name."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    zoom = max(1, math.ceil(_TILE / min(panels[0][1][0].size)))
    width, height = (side * zoom for side in panels[0][1][0].size)
    columns, gap, head = max(1, min(_COLUMNS, _WIDTH // width)), 4, 28
    rows: list[tuple[str, list[int]]] = []  # a class with many pictures has several, the first with its name
    for name in sorted(set(names), key=list(names).index):
        own = [index for index, other in enumerate(names) if other == name]
        rows += [("" if start else name, own[start : start + columns]) for start in range(0, len(own), columns)]
    widest = max(len(indices) for _, indices in rows)
    margin = 16 + max(int(font.getlength(name)) for name, _ in rows)
    title = max(int(font.getlength(text)) for text, _ in panels)
    full = max(margin + widest * (width + gap), title + 16)
    sheet = Image.new("RGB", (full, len(panels) * (head + len(rows) * (height + gap)) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for text, pictures in panels:
        draw.text((8, y + 6), text, "black", font)
        y += head
        for name, indices in rows:
            draw.text((8, y + height // 2 - 8), name, "black", font)
            for column, index in enumerate(indices):
                tile = pictures[index].convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
                sheet.paste(tile, (margin + column * (width + gap), y))
            y += height + gap
    return sheet
