"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_confusion"]

_MOST = 40  # classes whose names and numbers can be read


def draw_confusion(classes: Sequence[str], counts: Sequence[Sequence[int]], path: str | Path) -> None:
    """Draw a confusion matrix: rows are true classes, columns what was said; darker is a larger share of the row.

    Args:
        classes: Names of the first rows and columns.
        counts: (C, C) pictures.
        path: PNG file to write.
    """
    count = len(counts)
    named = count <= _MOST
    cell = max(4, min(64, 1600 // count)) if named else max(2, 1200 // count)
    font = ImageFont.load_default(max(9, min(18, cell // 3)))
    names = [*classes, *("" for _ in range(count - len(classes)))] if named else [""] * count
    short = [name if len(name) <= 24 else f"{name[:23]}..." for name in names]
    margin = 16 + (max(int(font.getlength(name)) for name in short) if named else 0)
    heading = 26
    image = Image.new("RGB", (margin + cell * count + 16, heading + margin + cell * count + 16), "white")
    draw = ImageDraw.Draw(image)
    right, total = sum(row[place] for place, row in enumerate(counts)), sum(map(sum, counts))
    draw.text((8, 6), f"{right} of {total} right; rows: true, columns: said", "black", font=ImageFont.load_default(13))
    top = heading + margin
    for row, values in enumerate(counts):
        if named:
            draw.text((margin - 8, top + cell * (row + 0.5)), short[row], "black", font=font, anchor="rm")
        for column, value in enumerate(values):
            share = value / max(1, sum(values))
            left, upper = margin + cell * column, top + cell * row
            hue = (30, 110, 180) if row == column else (200, 60, 50)
            fill = tuple(round(255 + (level - 255) * share) for level in hue)
            draw.rectangle((left, upper, left + cell - 1, upper + cell - 1), fill, outline=(225, 225, 225))
            if named and value and cell >= 14:
                ink = "white" if share > 0.5 else "black"
                draw.text((left + cell / 2, upper + cell / 2), str(value), ink, font=font, anchor="mm")
    for column, name in enumerate(short):
        if name:
            _write_upwards(image, name, font, (margin + cell * column + cell // 2, top - 6))
    image.save(path)


def _write_upwards(image: Image.Image, text: str, font: Any, foot: tuple[int, int]) -> None:
    """Write a text that runs upwards from `foot`."""
    _, _, right, lower = (round(side) for side in font.getbbox(text))
    line = Image.new("L", (right + 2, lower + 4))
    ImageDraw.Draw(line).text((0, 0), text, 255, font=font)
    line = line.rotate(90, expand=True)
    image.paste((0, 0, 0), (foot[0] - line.width // 2, foot[1] - line.height), line)
