"""Building blocks of a self-contained HTML page: pictures as data, plots as SVG, styles and scripts inline."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zoo.pictures import divider
from zoo.pictures.divider import divided

__all__ = ["Point", "bars", "before_after", "data_uri", "page", "picture", "scatter", "table", "text"]

Pixels = NDArray[np.uint8]


def text(value: object) -> str:
    """Return text with HTML's own characters escaped."""
    return html.escape(str(value))


def data_uri(pixels: Pixels) -> str:
    """Return an image (H, W, 3) or (H, W) as a PNG within an address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture(pixels: Pixels, alt: str, css: str = "") -> str:
    """Return an image element; class "pixels" shows enlarged pixels as squares."""
    height, width = pixels.shape[:2]
    names = f' class="{css}"' if css else ""
    return f'<img{names} src="{data_uri(pixels)}" width="{width}" height="{height}" alt="{text(alt)}">'


def before_after(before: Pixels, after: Pixels, names: tuple[str, str], caption: str) -> str:
    """Return two pictures of one size above each other, with a divider that can be dragged or moved by keys.

    Args:
        before: Shown to the left of the divider.
        after: Shown to the right of it.
        names: Of both.
        caption: HTML below.
    """
    stack = divided(
        picture(before, names[0], "top"), picture(after, names[1]), names, f"Divider between {names[0]} and {names[1]}"
    )
    return f'<figure class="compare">{stack}<figcaption>{caption}</figcaption></figure>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, marked: Sequence[int] = ()) -> str:
    """Return a table whose columns after the first are numbers.

    Args:
        headings: Of the columns; text.
        rows: Cells; text.
        marked: Rows that stand out.
    """
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr{' class=marked' if index in marked else ''}>"
        + "".join(f"<td>{text(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bars(rows: Sequence[tuple[str, float, str]], *, marked: Sequence[int] = (), full: float | None = None) -> str:
    """Return horizontal bars from 0: (name, length, text at its end) each.

    Args:
        rows: Names, lengths in any one unit, and texts.
        marked: Rows that stand out.
        full: Length of a bar over the whole width; None takes the longest.
    """
    longest = full or max(value for _, value, _ in rows)
    lines = (
        f'<div class="bar{" marked" if index in marked else ""}"><span class="name">{text(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * value / longest:.1f}%"></span></span>'
        f'<span class="value">{text(label)}</span></div>'
        for index, (name, value, label) in enumerate(rows)
    )
    return f'<div class="bars">{"".join(lines)}</div>'


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a plot.

    Args:
        x: Horizontal value.
        y: Vertical value.
        series: Points of one series are joined, in order.
        label: What is set at this point.
        marked: Draw it larger.
    """

    x: float
    y: float
    series: str
    label: str
    marked: bool = False


_WIDTH, _HEIGHT = 720, 400  # user units of a plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 18, 58


def scatter(points: Sequence[Point], x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> str:
    """Return a plot of points in series, with a legend; it takes the page's colours.

    Args:
        points: What to draw.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        mark: Horizontal value to mark by a dashed line, and its name.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("A plot needs points.")
    x_ticks = _ticks([point.x for point in points] + ([mark[0]] if mark else []))
    y_ticks = _ticks([point.y for point in points])

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(y_label)}">']
    for tick in x_ticks:
        x, bottom = place(tick, y_ticks[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        left, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{text(x_label)}</text>')
    parts.append(
        f'<text class="axis" transform="rotate(-90)" x="{-(_HEIGHT - _BOTTOM + _TOP) / 2}" y="14"'
        f' text-anchor="middle">{text(y_label)}</text>'
    )
    if mark:
        x, top = place(mark[0], y_ticks[-1])
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{_HEIGHT - _BOTTOM - 8}">{text(mark[1])}</text>')
    series = list(dict.fromkeys(point.series for point in points))
    taken: list[tuple[float, float]] = []  # where labels are
    for index, name in enumerate(series):
        own = [point for point in points if point.series == name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point.x, point.y) for point in own))
        parts.append(f'<polyline class="s{index}" points="{path}"/>')
        for point in own:
            x, y = place(point.x, point.y)
            size = 8 if point.marked else 5
            title = f"{name}, {point.label}: {point.x:.2f}, {point.y:.1f}"
            parts.append(
                f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"><title>{text(title)}</title></circle>'
            )
            end = x > _WIDTH - 130
            label_x, label_y = x + (-9 if end else 9), y - 8
            if any(abs(label_x - other_x) < 90 and abs(label_y - other_y) < 15 for other_x, other_y in taken):
                label_y = y + 17
            taken.append((label_x, label_y))
            anchor = "end" if end else "start"
            where = f'x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text class="label" {where}>{text(point.label)}</text>')
    parts.append("</svg>")
    legend = "".join(f'<span class="key s{index}">{text(name)}</span>' for index, name in enumerate(series))
    return f'<div class="legend">{legend}</div>{"".join(parts)}'


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers that enclose all values, in four to eight equal steps."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return [round(index * step, 10) for index in range(first, last + 1)]


def page(
    *, title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]], foot: str
) -> str:
    """Return the whole page.

    Args:
        title: Heading.
        lead: HTML below it.
        tiles: Key numbers: (value, what it is); text.
        sections: (heading, HTML); the heading is text.
        foot: HTML at the end.
    """
    shown = "".join(f"<div><strong>{text(value)}</strong><span>{text(what)}</span></div>" for value, what in tiles)
    links = "".join(f'<a href="#s{index}">{text(name)}</a>' for index, (name, _) in enumerate(sections, 1))
    body = "".join(
        f'<section id="s{index}"><h2><span class="no">{index}</span>{text(name)}</h2>{content}</section>'
        for index, (name, content) in enumerate(sections, 1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="zoo demo">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{divider.STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>{lead}"
        f'<div class="tiles">{shown}</div><nav>{links}</nav></header>\n<main>{body}</main>\n<footer>{foot}</footer>\n'
        f"<script>{divider.SCRIPT}</script>\n</body>\n</html>\n"
    )


_STYLE = """
:root {
  --paper: #f6f7f9; --card: #ffffff; --ink: #17202b; --soft: #5b6878; --line: #dfe4ea; --accent: #0b6e5f;
  --tint: #e3f3ef; --good: #14804a; --bad: #b3372f;
  --c0: #0b6e5f; --c1: #c2551b; --c2: #4459c7; --c3: #a0348c; --c4: #7a6a00; --c5: #5b6878;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f141a; --card: #171e27; --ink: #e6ebf1; --soft: #98a6b6; --line: #2a3440; --accent: #5fd3bd;
    --tint: #16332f; --good: #5dd394; --bad: #ff8b80;
    --c0: #5fd3bd; --c1: #ff9e64; --c2: #8ea2ff; --c3: #e58bd4; --c4: #e0cf5a; --c5: #98a6b6;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: clamp(1.9rem, 5vw, 2.9rem); line-height: 1.1; letter-spacing: -.02em; margin: 0 0 12px; }
h2 { font-size: 1.4rem; letter-spacing: -.01em; margin: 0 0 10px; display: flex; gap: 12px; align-items: center; }
h3 { font-size: 1rem; margin: 26px 0 8px; }
.no { flex: none; width: 1.9rem; height: 1.9rem; border-radius: 50%; background: var(--accent); color: var(--card);
  font-size: .95rem; display: grid; place-items: center; }
p { max-width: 72ch; margin: 0 0 12px; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0 18px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px; }
.tiles strong { display: block; font-size: 1.75rem; letter-spacing: -.02em; color: var(--accent); line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .88rem; line-height: 1.35; display: block; margin-top: 4px; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 8px; }
nav a { color: var(--accent); text-decoration: none; border: 1px solid var(--line); border-radius: 99px;
  padding: 3px 13px; font-size: .9rem; }
nav a:hover, nav a:focus-visible { background: var(--tint); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 18px; padding: 24px; margin: 18px 0; }
figure { margin: 0; }
figcaption { margin-top: 8px; }
img { max-width: 100%; height: auto; display: block; }
.pixels { image-rendering: pixelated; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px; }
.samples { display: grid; gap: 6px; align-items: center; }
.samples .class { font-size: .82rem; font-weight: 600; overflow-wrap: anywhere; }
.samples img { width: 100%; border-radius: 6px; background: var(--line); }
.samples small { display: block; text-align: center; font-size: .68rem; line-height: 1.3; color: var(--bad);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.samples small.hit { color: var(--good); font-weight: 600; }
.crops { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; margin: 16px 0 30px; }
.crops img { width: 100%; border-radius: 8px; }
.crops figcaption { margin-top: 4px; font-size: .8rem; line-height: 1.35; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); vertical-align: bottom; }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); }
tr.marked td { background: var(--tint); font-weight: 600; }
.bars { margin: 16px 0; display: grid; gap: 10px; }
.bar { display: grid; grid-template-columns: minmax(9em, 15em) 1fr minmax(7em, auto); gap: 12px; align-items: center;
  font-size: .92rem; }
.track { background: var(--line); border-radius: 99px; overflow: hidden; }
.fill { display: block; height: 14px; border-radius: 99px; background: var(--c5); }
.marked .fill { background: var(--accent); } .bar.marked .name { font-weight: 600; }
.bar .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.photos { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 22px; }
.photos .views { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; margin-bottom: 10px; }
.photos .views img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 10px; }
.photos .bar { grid-template-columns: 5.5em 1fr 3.4em; font-size: .85rem; }
.plot { width: 100%; height: auto; font: 12px system-ui, sans-serif; margin: 6px 0 12px; }
.plot text { fill: var(--soft); } .plot .label { fill: var(--ink); font-size: 11px; } .plot .axis { font-size: 13px; }
.plot .grid { stroke: var(--line); }
.plot .mark { stroke: var(--soft); stroke-dasharray: 5 5; }
.plot polyline { fill: none; stroke-width: 1.6; opacity: .65; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .88rem; margin-top: 14px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px;
  background: currentColor; }
.key { color: var(--ink); }
.plot .s0 { stroke: var(--c0); } .plot .s1 { stroke: var(--c1); } .plot .s2 { stroke: var(--c2); }
.plot .s3 { stroke: var(--c3); } .plot .s4 { stroke: var(--c4); } .plot .s5 { stroke: var(--c5); }
circle.s0, .key.s0::before { fill: var(--c0); background: var(--c0); }
circle.s1, .key.s1::before { fill: var(--c1); background: var(--c1); }
circle.s2, .key.s2::before { fill: var(--c2); background: var(--c2); }
circle.s3, .key.s3::before { fill: var(--c3); background: var(--c3); }
circle.s4, .key.s4::before { fill: var(--c4); background: var(--c4); }
circle.s5, .key.s5::before { fill: var(--c5); background: var(--c5); }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; font: .85rem/1.5 ui-monospace, monospace; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--accent); }
footer { padding: 10px 20px 48px; } footer p { max-width: none; }
@media (max-width: 720px) {
  header { padding-top: 28px; } section { padding: 18px 14px; border-radius: 14px; }
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  .pair { grid-template-columns: 1fr; } .crops { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles strong { font-size: 1.4rem; }
  .bar { grid-template-columns: 1fr auto; gap: 2px 12px; } .bar .track { grid-column: 1 / -1; grid-row: 2; }
  .photos .bar { grid-template-columns: 5.5em 1fr 3.4em; } .photos .bar .track { grid-column: auto; grid-row: auto; }
  .plot { font-size: 21px; } .plot .axis { font-size: 21px; } .plot .label { font-size: 19px; }
  td:first-child { white-space: normal; min-width: 8.5em; }
}
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
