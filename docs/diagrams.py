"""Draws the diagrams of the documents as SVG; building the site runs it."""

from __future__ import annotations

from html import escape
from pathlib import Path

BLUE, ORANGE, GRAY, INK = "#0072b2", "#e69f00", "#d9d9d9", "#333333"
HERE = Path(__file__).resolve().parent


class Drawing:
    """Boxes, arrows and words on a white sheet.

    Args:
        width: Pixels.
        height: Pixels.
        title: For those who hear it read.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="13" role="img"><title>{escape(title)}</title>',
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = "white", ink: str = INK) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="{fill}" stroke="{INK}" stroke-width="1"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 4.5, text, "middle", ink)

    def text(self, x: float, y: float, text: str, anchor: str = "start", ink: str = INK, size: int = 13) -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{ink}" font-size="{size}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#a)"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def reparameterisation() -> Drawing:
    """A RePa FFN in training, and what is left of it."""
    d = Drawing(760, 250, "A feed-forward layer with idle channels, before and after merging")
    d.text(20, 24, "in training", size=15)
    d.arrow((20, 130), (60, 130))
    d.box(60, 114, 70, 32, "norm")
    d.arrow((130, 130), (150, 130), (150, 82), (175, 82))
    d.arrow((150, 130), (150, 178), (175, 178))
    d.box(175, 66, 76, 32, "W₁, active", BLUE, "white")
    d.box(265, 66, 56, 32, "GELU")
    d.box(175, 162, 146, 32, "W₁, idle: no GELU", ORANGE)
    d.arrow((251, 82), (265, 82))
    d.arrow((321, 82), (345, 82), (345, 118), (360, 118))
    d.arrow((321, 178), (345, 178), (345, 142), (360, 142))
    d.box(360, 114, 50, 32, "W₂", BLUE, "white")
    d.arrow((410, 130), (440, 130))
    d.arrow((36, 130), (36, 222), (425, 222), (425, 134))
    d.text(230, 238, "shortcut", "middle")
    d.text(500, 24, "merged, the same output", size=15)
    d.arrow((480, 130), (520, 130), (520, 82), (540, 82))
    d.arrow((520, 130), (520, 178), (540, 178))
    d.box(540, 66, 60, 32, "W₁'", BLUE, "white")
    d.box(612, 66, 52, 32, "GELU")
    d.box(676, 66, 44, 32, "W₂'", BLUE, "white")
    d.arrow((600, 82), (612, 82))
    d.arrow((664, 82), (676, 82))
    d.box(540, 162, 180, 32, "one matrix: idle + shortcut", ORANGE)
    d.arrow((720, 82), (738, 82), (738, 124))
    d.arrow((720, 178), (738, 178), (738, 136))
    d.text(738, 134, "+", "middle")
    return d


def caching() -> Drawing:
    """Which steps a cache computes, and how it decides."""
    d = Drawing(760, 190, "Steps of a sampler: computed ones in blue, forecast ones in gray")
    computed = {0, 1, 2, 5, 9, 14, 19}
    d.text(20, 24, "first block", size=13)
    d.text(20, 64, "other blocks")
    for step in range(20):
        x = 120 + step * 31
        d.box(x, 8, 27, 24, "", BLUE)
        d.box(x, 48, 27, 24, "", (ORANGE if step in (0, 1, 2, 19) else BLUE) if step in computed else GRAY)
        d.text(x + 13, 90, str(step), "middle", size=11)
    for x, color, text in (
        (120, BLUE, "computed"),
        (240, ORANGE, "always computed"),
        (400, GRAY, "forecast from earlier steps"),
    ):
        d.box(x, 108, 16, 14, "", color)
        d.text(x + 24, 120, text)
    d.text(
        20,
        152,
        "The first block is computed at every step. A forecast of it from earlier steps is compared with it: where the",
    )
    d.text(
        20, 172, "error stays under the threshold, the forecast of the other blocks is taken; else they are computed."
    )
    return d


def strips() -> Drawing:
    """How a picture goes through a network in strips."""
    d = Drawing(760, 220, "A picture in strips: what a layer still needs is kept from strip to strip")
    for index, fill in enumerate((BLUE, ORANGE, "white", "white")):
        d.box(20, 20 + index * 44, 150, 44, f"strip {index + 1}", fill, "white" if fill == BLUE else INK)
    for layer in range(3):
        x = 240 + layer * 120
        d.box(x, 42, 84, 44, f"layer {layer + 1}", "white")
        d.box(x, 120, 84, 26, "rows kept", GRAY)
        d.arrow((x + 24, 86), (x + 24, 120))
        d.arrow((x + 60, 120), (x + 60, 86))
        d.arrow((x + 84, 64), (x + 120, 64))
    d.arrow((170, 86), (205, 86), (205, 64), (240, 64))
    for index, fill in enumerate((BLUE, "white", "white", "white")):
        d.box(600, 20 + index * 44, 140, 44, f"result {index + 1}" if not index else "", fill, "white")
    d.text(240, 172, "Each layer keeps the last rows that its next strip")
    d.text(240, 190, "will see: the result is that of the whole picture,")
    d.text(240, 208, "and the memory that of one strip.")
    return d


def experts() -> Drawing:
    """How a dense layer becomes a mixture of experts."""
    d = Drawing(760, 230, "A dense feed-forward layer, and the same channels as a shared expert and eight routed ones")
    d.text(20, 24, "dense", size=15)
    for index in range(12):
        d.box(20 + index * 17, 96, 15, 60, "", BLUE)
    d.text(122, 180, "hidden channels", "middle")
    d.arrow((240, 126), (300, 126))
    d.text(270, 116, "sort", "middle")
    d.text(320, 24, "mixture: shared, and 2 of 8 for each token", size=15)
    for index in range(4):
        d.box(320 + index * 17, 96, 15, 60, "", ORANGE)
    d.text(354, 180, "shared", "middle")
    for index in range(8):
        chosen = index in (1, 5)
        d.box(420 + index * 36, 96, 30, 60, str(index + 1), BLUE if chosen else GRAY, "white" if chosen else INK)
    d.box(520, 42, 90, 28, "router")
    d.arrow((545, 70), (471, 94))
    d.arrow((585, 70), (615, 94))
    d.text(560, 180, "routed", "middle")
    d.text(
        20,
        214,
        "With all experts on, the mixture computes what the dense layer did; with few, distilling closes the gap.",
    )
    return d


DIAGRAMS = {"reparameterisation": reparameterisation, "caching": caching, "strips": strips, "experts": experts}


def write_all(folder: Path = HERE / "diagrams") -> None:
    """Write every diagram."""
    folder.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    write_all()
