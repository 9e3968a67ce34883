"""Drawn pictures: flat shapes, lines and text, whose edges are exact.

Photographs come sharpened by their cameras: a restorer that learns from them alone draws a bright and a dark seam along
every edge. `python -m zoo.data.drawings FOLDER` writes pictures without any, to be trained on beside photos.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw"]

_OVER = 4  # drawn at this multiple of the size and averaged down: no overshoot


def draw(seed: int, width: int = 480, height: int = 320) -> Image.Image:
    """Draw a picture of 20 to 60 shapes, lines and words on a plain ground.

    Args:
        seed: Equal seeds give equal pictures.
        width: Pixels.
        height: Pixels.

    Returns:
        An RGB picture. Its colours keep away from black and white, where clipping would hide an overshoot, but for one
        in five.
    """
    rng = np.random.default_rng(seed)
    canvas = Image.new("RGB", (width * _OVER, height * _OVER), _colour(rng))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(20, 61)):
        centre = rng.uniform(0, 1, 2) * canvas.size
        extent = _OVER * np.exp(rng.uniform(np.log(4), np.log(height / 2)))
        colour = _colour(rng)
        kind = rng.choice(["polygon", "ellipse", "line", "text"])
        if kind == "polygon":
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
            corners = centre + extent * np.stack([np.cos(angles), np.sin(angles)], 1)
            pen.polygon([tuple(corner) for corner in corners], colour)
        elif kind == "ellipse":
            half = extent * rng.uniform(0.3, 1, 2)
            pen.ellipse([*(centre - half), *(centre + half)], colour)
        elif kind == "line":
            angle, half = rng.uniform(0, np.pi), 2 * extent
            reach = half * np.array([np.cos(angle), np.sin(angle)])
            pen.line([*(centre - reach), *(centre + reach)], colour, int(_OVER * rng.uniform(1, 9)))
        else:
            font = ImageFont.load_default(float(_OVER * rng.uniform(9, 48)))
            letters = string.ascii_letters + string.digits
            word = "".join(rng.choice(list(letters), rng.integers(2, 12)))
            pen.text((float(centre[0]), float(centre[1])), word, colour, font=font, anchor="mm")
    return canvas.reduce(_OVER)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a colour, gray for every other call."""
    low, high = (0, 256) if rng.random() < 0.2 else (40, 216)
    red, green, blue = (int(value) for value in rng.integers(low, high, 3))
    return (red, green, blue) if rng.random() < 0.5 else (red, red, red)


def main() -> None:
    """Write pictures 000.png, 001.png, ... into a folder."""
    parser = argparse.ArgumentParser(prog="python -m zoo.data.drawings", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to, new or empty")
    parser.add_argument("--count", type=int, default=100, help="pictures (default: 100)")
    arguments = parser.parse_args()
    if arguments.folder.exists() and (not arguments.folder.is_dir() or any(arguments.folder.iterdir())):
        parser.error(f"{arguments.folder} is there already: take a new or empty folder.")
    if arguments.count < 1:
        parser.error(f"--count must be at least 1, got {arguments.count}.")
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for seed in range(arguments.count):
            draw(seed).save(arguments.folder / f"{seed:03d}.png")
    except OSError as error:
        parser.error(f"{arguments.folder} cannot be written: {error.strerror}.")


if __name__ == "__main__":
    main()
