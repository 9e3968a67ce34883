"""Two pictures of one size above each other, with a divider that can be dragged: for pages that are one file."""

from __future__ import annotations

import html

__all__ = ["SCRIPT", "STYLE", "divided"]


def divided(before: str, after: str, names: tuple[str, str], label: str, style: str = "") -> str:
    """Return the two with their divider, which the arrow keys move as well.

    Args:
        before: Image element with the class "top", shown to the left of the divider.
        after: Image element, shown to the right of it.
        names: Of both.
        label: What screen readers say of the divider.
        style: CSS of the whole.
    """
    left, right = map(html.escape, names)
    attribute = f' style="{style}"' if style else ""
    return (
        f'<div class="stack"{attribute}>{after}{before}'
        f'<span class="tag left">{left}</span><span class="tag right">{right}</span><span class="handle"></span>'
        f'<input type="range" min="0" max="100" value="50" step="0.5" aria-label="{html.escape(label)}"></div>'
    )


STYLE = """
.stack { position: relative; --at: 50%; overflow: hidden; border-radius: 10px; line-height: 0; }
.stack img { width: 100%; height: auto; display: block; }
.stack .top { position: absolute; inset: 0; height: 100%; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.stack .tag { position: absolute; top: 10px; background: #000a; color: #fff; font-size: .75rem; line-height: 1;
  padding: 6px 10px; border-radius: 99px; pointer-events: none; }
.stack .left { left: 10px; } .stack .right { right: 10px; }
.stack .handle { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 4px #000a; pointer-events: none; }
.stack .handle::after { content: "\\2194"; position: absolute; top: 50%; left: 50%; translate: -50% -50%;
  width: 36px; height: 36px; border-radius: 50%; background: #fff; color: #17202b; font: 700 18px/36px sans-serif;
  text-align: center; box-shadow: 0 1px 6px #0008; }
.stack input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y; }
.stack:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
"""
"""Of the page; `--accent` is a colour of its."""

SCRIPT = """
const ranges = [...document.querySelectorAll('.stack input')];
for (const range of ranges) {
  const move = () => range.parentElement.style.setProperty('--at', range.value + '%');
  range.addEventListener('input', move);
  move();
}
"""
"""At the end of the page."""
