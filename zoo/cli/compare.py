"""A page of before/after sliders, one file that works without a network."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from zoo.pictures import divider
from zoo.pictures.divider import divided
from zoo.pictures.picture import Picture
from zoo.pictures.restored_image import as_image

__all__ = ["Comparison"]

_MOST = 60  # pictures on a page, which has to stay of a size that browsers open
_LONGEST = 1600  # pixels of a side that is shown; larger pictures are shown reduced, with a detail in full size
_DETAIL = (960, 640)  # width and height of the detail
_LOSSLESS = 500_000  # pixels up to which a view is stored as PNG; larger ones as JPEG of quality 92


class Comparison:
    """Collects pictures before and after their restoration, and writes them as one HTML page."""

    def __init__(self) -> None:
        self._figures: list[str] = []
        self.count = 0
        self.left_out = 0

    def add(self, name: str, before: Picture, after: Picture, facts: str) -> None:
        """Add a picture; only the encoded views are kept.

        Args:
            name: Heading.
            before: The input; enlarged by bicubic interpolation where the result is larger.
            after: The result.
            facts: Text below.
        """
        if self.count >= _MOST:
            self.left_out += 1
            return
        new, old = _shown(after), _shown(before)
        enlarged = old.size != new.size
        left = "input, bicubic" if enlarged else "input"
        if enlarged:
            old = old.resize(new.size, Image.Resampling.BICUBIC)
        reduced = max(new.size) > _LONGEST
        views = [_slider(old, new, left, name, facts + (" (shown reduced)" if reduced else ""))]
        if reduced:
            box = _most_changed(old, new)
            place = f"detail in full size, {box[2] - box[0]}x{box[3] - box[1]} pixels, where most has changed"
            views.append(_slider(old.crop(box), new.crop(box), left, f"{name}, detail", place))
        self._figures.append(f"<section><h2>{html.escape(name)}</h2>{''.join(views)}</section>")
        self.count += 1

    def page(self, model: str, task: str, scale: float, means: str = "") -> str:
        """Return the page.

        Args:
            model: Name of the restorer.
            task: What it did.
            scale: Output pixels per input pixel.
            means: Mean metrics, if there are any.
        """
        lead = [f"{self.count} picture{'' if self.count == 1 else 's'}", f"{task} by {model}"]
        lead += [f"x{scale:g}"] if scale > 1 else []
        lead += [f"mean {means}"] if means else []
        more = f"<p>{self.left_out} further pictures are left out.</p>" if self.left_out else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="zoo restore">\n'
            f"<title>Before and after: {html.escape(model)}</title>\n<style>{divider.STYLE}{_STYLE}</style>\n"
            "</head>\n<body>\n"
            f"<header><div><h1>Before and after</h1><p>{html.escape(', '.join(lead))}</p></div>{_TOOLS}</header>\n"
            f"<main>{''.join(self._figures)}{more}</main>\n<footer><p>Drag a divider, or reach it with Tab and move it "
            "with the arrow keys. <kbd>N</kbd> and <kbd>P</kbd>: next and previous picture. Hold <kbd>B</kbd>: "
            "everything before.</p></footer>\n"
            f"<script>{divider.SCRIPT}{_SCRIPT}</script>\n</body>\n</html>\n"
        )


def _shown(picture: Picture) -> Image.Image:
    """Return a picture upright as 8-bit RGB; what is transparent shows gray, deep gray is scaled to 8 bits."""
    image = as_image(picture)
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    exif = image.getexif()
    if image.mode == "F" or image.mode.startswith("I"):
        levels = picture.color[..., 0] * (255.0 / picture.peak)
        image = Image.fromarray(levels.round().astype(np.uint8))
    if picture.alpha is not None:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
    image.info.clear()
    image.info["exif"] = exif.tobytes()
    image = ImageOps.exif_transpose(image)
    image.info.clear()
    if profile:
        image.info["icc_profile"] = profile
    return image


def _slider(before: Image.Image, after: Image.Image, left: str, name: str, facts: str) -> str:
    """Return two views of one size above each other, with a divider."""
    width, height = after.size
    if max(width, height) > _LONGEST:
        factor = _LONGEST / max(width, height)
        width, height = max(1, round(factor * width)), max(1, round(factor * height))
        before, after = (view.resize((width, height), Image.Resampling.LANCZOS) for view in (before, after))
    size = f'width="{width}" height="{height}"'
    what = html.escape(name, quote=True)
    stack = divided(
        f'<img class="top" src="{_data_uri(before)}" {size} alt="{what}, before">',
        f'<img src="{_data_uri(after)}" {size} alt="{what}, after">',
        (left, "restored"),
        f"Divider of {name}: input left, restored right",
        style=f"--w:{width}px;--r:{width / height:.5f}",
    )
    return f'<figure><div class="frame">{stack}</div><figcaption>{html.escape(facts)}</figcaption></figure>'


def _data_uri(image: Image.Image) -> str:
    """Return an image within an address: lossless where it is small."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"icc_profile": image.info.get("icc_profile")}
    if image.width * image.height <= _LOSSLESS:
        kind = "png"
        image.save(buffer, "PNG", optimize=True, **options)
    else:
        kind = "jpeg"
        image.save(buffer, "JPEG", quality=92, subsampling=0, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _most_changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the detail in which two views of one size differ most."""
    step = 16
    gray: list[NDArray[np.float32]] = [np.asarray(view.convert("L"), np.float32) for view in (before, after)]
    change = np.abs(gray[0] - gray[1])
    height, width = (side // step for side in change.shape)
    cells = change[: height * step, : width * step].reshape(height, step, width, step).sum((1, 3))
    sums = np.pad(cells, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64).cumsum(1)
    down, right = min(_DETAIL[1] // step, height), min(_DETAIL[0] // step, width)
    totals = sums[down:, right:] - sums[:-down, right:] - sums[down:, :-right] + sums[:-down, :-right]
    top, left = (int(place) * step for place in np.unravel_index(int(totals.argmax()), totals.shape))
    return left, top, left + right * step, top + down * step


_TOOLS = (
    '<div class="tools" role="group" aria-label="View">'
    '<button type="button" id="actual" aria-pressed="false">Actual pixels</button>'
    '<button type="button" id="blocks" aria-pressed="false">Sharp pixels</button></div>'
)

_STYLE = """
:root { --paper: #f4f5f7; --card: #fff; --ink: #17202b; --soft: #5b6878; --line: #dde2e8; --accent: #0b6e5f; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f141a; --card: #171e27; --ink: #e6ebf1; --soft: #98a6b6; --line: #2a3440; --accent: #5fd3bd; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center;
  justify-content: space-between; padding: 12px max(16px, calc(50% - 600px)); background: var(--card);
  border-bottom: 1px solid var(--line); }
h1 { font-size: 1.15rem; margin: 0; line-height: 1.3; }
header p { margin: 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tools { display: flex; gap: 8px; }
button { font: inherit; font-size: .88rem; color: var(--ink); background: none; border: 1px solid var(--line);
  border-radius: 99px; padding: 5px 14px; cursor: pointer; }
button:hover { border-color: var(--accent); }
button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--card); }
button:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
main { max-width: 1232px; margin: 0 auto; padding: 8px 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 16px; padding: 16px; margin: 16px 0;
  scroll-margin-top: 96px; }
h2 { font-size: 1rem; margin: 0 0 12px; overflow-wrap: anywhere; }
figure { margin: 0; } figure + figure { margin-top: 18px; }
figcaption { margin-top: 8px; color: var(--soft); font-size: .88rem; font-variant-numeric: tabular-nums; }
.frame { border-radius: 10px; }
.stack { width: min(100%, max(var(--w), 420px), calc(var(--r) * 82vh)); margin: 0 auto; }
body.actual .frame { overflow: auto; max-height: 88vh; } body.actual .stack { width: var(--w); }
body.blocks .stack img { image-rendering: pixelated; }
body.before .stack .top { clip-path: none; } body.before .handle { display: none; }
kbd { border: 1px solid var(--line); border-radius: 5px; padding: 0 6px; font: .85em ui-monospace, monospace; }
footer { max-width: 1232px; margin: 0 auto; padding: 4px 16px 32px; color: var(--soft); font-size: .88rem; }
@media (max-width: 640px) { section { padding: 10px; } header { position: static; } }
"""

_SCRIPT = """
for (const name of ['actual', 'blocks']) {
  const button = document.getElementById(name);
  button.addEventListener('click', () =>
    button.setAttribute('aria-pressed', String(document.body.classList.toggle(name))));
}
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { n: 1, p: -1 }[event.key.toLowerCase()];
  if (event.key.toLowerCase() === 'b') document.body.classList.add('before');
  if (!step) return;
  const next = ranges[Math.min(Math.max(ranges.indexOf(document.activeElement) + step, 0), ranges.length - 1)];
  next.focus({ preventScroll: true });
  next.closest('section').scrollIntoView({ behavior: 'smooth', block: 'start' });
});
addEventListener('keyup', event => {
  if (event.key.toLowerCase() === 'b') document.body.classList.remove('before');
});
addEventListener('blur', () => document.body.classList.remove('before'));
"""
