"""Accuracy against time as a drawing whose points can be clicked: Gradio's own plots tell no click on a point."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from zoo.cli.app.exploring import Row

__all__ = ["CLICKED", "drawing", "unbeaten"]

CLICKED = """
const chosen = event => {
  const point = event.target.closest('[data-model]');
  if (point) { trigger('click', {model: point.dataset.model}); event.preventDefault(); }
};
element.addEventListener('click', chosen);
element.addEventListener('keydown', event => { if (event.key === 'Enter' || event.key === ' ') chosen(event); });
"""
"""Runs in the browser: a click on a point, or Enter, is an event `click` with the name of its model."""

_WIDTH, _HEIGHT = 900, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 44
_TICKS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # ms


def unbeaten(rows: Sequence[Row]) -> list[Row]:
    """Return the models that no other is both as fast as and as accurate as, the fastest first."""
    timed = [row for row in rows if row.time is not None and row.top1 is not None]
    found: list[Row] = []
    for row in sorted(timed, key=lambda row: (row.time or 0, -(row.top1 or 0))):
        if not found or (row.top1 or 0) > (found[-1].top1 or 0):
            found.append(row)
    return found


def drawing(rows: Sequence[Row]) -> str:
    """Return accuracy against the time of one picture as SVG, a point a model; empty where nothing was measured.

    Args:
        rows: Those with a time, ms, and an accuracy, %, are drawn.
    """
    points = [row for row in rows if row.time and row.top1 is not None]
    if not points:
        return ""
    best = unbeaten(points)
    fast, slow = min(row.time or 0 for row in points) / 1.15, max(row.time or 0 for row in points) * 1.15
    low = 2 * math.floor(min(row.top1 or 0 for row in points) / 2)
    high = 2 * math.ceil(max(row.top1 or 0 for row in points) / 2)
    high += 2 * (high == low)

    def x(time: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(time / fast) / math.log(slow / fast)

    def y(top1: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - top1) / (high - low)

    parts = []
    for tick in (tick for tick in _TICKS if fast <= tick <= slow):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for tick in range(low, high + 1, max(2, 2 * math.ceil((high - low) / 12))):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">time of one picture, ms</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">top-1, %</text>')
    line = " ".join(f"{x(row.time or 1):.1f},{y(row.top1 or 0):.1f}" for row in best)
    parts.append(f'<polyline points="{line}"/>')
    for row in sorted(points, key=lambda row: row in best):  # those that matter lie on top
        said = f"{row.name}: {row.time:.1f} ms, {row.top1:g} %"
        parts.append(
            f'<circle class="{"best" if row in best else "other"}" cx="{x(row.time or 1):.1f}" '
            f'cy="{y(row.top1 or 0):.1f}" r="6" tabindex="0" role="button" aria-label="{html.escape(said)}" '
            f'data-model="{html.escape(row.name)}"><title>{html.escape(said)}</title></circle>'
        )
    return f'<svg class="zoo-plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group">{"".join(parts)}</svg>'
