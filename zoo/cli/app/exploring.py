"""The page's fourth tab: every model in one table, with measured times, and the card behind each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.cli.app.offers import Offers
from zoo.cli.listing import info_lines
from zoo.cli.output import joined
from zoo.sources import cards_dir, find

__all__ = ["HEADINGS", "Row", "benchmarks_dir", "card_of", "measured", "rows", "search"]

HEADINGS = ("model", "task", "parameters, M", "GMACs", "quality", "time, ms", "weights", "licence")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of a model.

    Args:
        name: NAME or NAME.TAG.
        task: Its task.
        params: Parameters as it is used: merged where it can be.
        macs: Multiply-accumulates for one input, likewise.
        quality: Number with metric and data set, for people.
        top1: Accuracy on ImageNet-1k as the authors give it, %.
        time: Of one picture, median, ms; None where it was not measured.
        weights: "shipped", "the authors'", "" for none.
        license: Of the weights.
        family: Name of its family.
    """

    name: str
    task: str
    params: int | None = None
    macs: int | None = None
    quality: str = ""
    top1: float | None = None
    time: float | None = None
    weights: str = ""
    license: str = ""
    family: str = ""

    def cells(self) -> list[Any]:
        """Return the row under `HEADINGS`."""
        params = None if self.params is None else round(self.params / 1e6, 2)
        macs = None if self.macs is None else round(self.macs / 1e9, 3)
        time = None if self.time is None else round(self.time, 1)
        return [self.name, self.task, params, macs, self.quality, time, self.weights, self.license]


def benchmarks_dir() -> Path:
    """Return the folder of the benchmark records: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "benchmarks"
    return inside if inside.is_dir() else package.parent / "docs" / "benchmarks"


@cache
def measured() -> tuple[dict[str, float], str]:
    """Return the measured time of each model, ms, and under which conditions; empty where the record is missing."""
    file = benchmarks_dir() / "models.json"
    if not file.is_file():
        return {}, ""
    found: dict[str, float] = {}
    said = ""
    for benchmark in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
        conditions = benchmark["conditions"]
        said = (
            f"batch {conditions['batch']}, {conditions['dtype']}, {conditions['threads']} threads of "
            f"{benchmark['environment']['device']}, torch {benchmark['environment']['torch']}, merged"
        )
        for entry in benchmark["entries"]:
            if entry["time"] is not None:
                found[entry["name"].removesuffix(" (merged)")] = entry["time"]["median"]
    return found, said


def rows(offers: Offers | None = None) -> list[Row]:
    """Return the user's own models, then those of the catalogue, each of its weights in a row of its own."""
    found = [_own(name) for name in (offers.own if offers else ())]
    times, _ = measured()
    for name, facts in catalog.load().items():
        top1 = facts.get("top1")
        found.append(
            Row(
                name=name,
                task=facts["task"],
                params=facts.get("merged_params", facts["params"]),
                macs=facts.get("merged_macs", facts["macs"]),
                quality="" if top1 is None else f"{top1:g} % top-1, ImageNet-1k (authors)",
                top1=top1,
                time=times.get(name),
                family=facts["family"],
            )
        )
        for tag, weight in facts["weights"].items():
            metric = (weight.get("metrics") or [None])[0]
            quality = f"{metric['value']:g} {metric['unit']} {metric['name']}, {metric['dataset']}" if metric else ""
            found.append(
                Row(
                    name=f"{name}.{tag}",
                    task=facts["task"],
                    params=weight.get("merged_params", weight.get("params", facts["params"])),
                    macs=weight.get("merged_macs", weight.get("macs", facts["macs"])),
                    quality=quality,
                    weights="shipped" if weight["source"] == "shipped" else "the authors'",
                    license=weight["license"] or "not stated",
                    family=facts["family"],
                )
            )
    return found


def _own(name: str) -> Row:
    source = find(name)
    return Row(name=name, task=source.task or "yours", weights="yours", family=source.architecture or "yours")


def search(text: str, task: str = "all", offers: Offers | None = None) -> list[Row]:
    """Return the rows with all words of a text, in any column."""
    words = text.lower().split()
    return [
        row
        for row in rows(offers)
        if task in ("all", row.task)
        and all(any(word in str(cell).lower() for cell in (*row.cells(), row.family)) for word in words)
    ]


def card_of(name: str, offers: Offers | None = None) -> str:
    """Return the card of a model as Markdown: what `zoo info` says, and the text that came with weights or family.

    Args:
        name: A name of `rows`.
        offers: With the user's own.
    """
    if offers is not None and name in offers.own:
        path = find(name).path
        readme = path / "README.md" if path is not None and path.is_dir() else None
        text = _text(readme) if readme is not None and readme.is_file() else "It came without a card."
        return f"## {name}\n\n{text}"
    facts = catalog.entry(name)
    tag = facts.get("tag")
    shown = facts | facts["weights"][tag] if tag else facts
    table = "\n".join(f"| {label} | {_cell(value)} |" for label, value in info_lines(facts, shown, tag) if value)
    own = cards_dir() / name / "README.md"
    file = own if own.is_file() else cards_dir() / f"{facts['family']}.md"
    text = _text(file) if file.is_file() else ""
    weights = joined([f"`{facts['name']}.{key}`" for key in facts["weights"]], "")
    more = f"\n\nWeights: {weights}" if weights and not tag else ""
    return f"## {name}\n\n{facts['summary']}\n\n| | |\n| --- | --- |\n{table}{more}\n\n{text}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(card: Path) -> str:
    """Return a card without its front matter, its pictures under addresses that the page serves."""
    text = card.read_text(encoding="utf-8", errors="replace")
    if text.startswith("---\n"):
        text = text.partition("\n---")[2].partition("\n")[2]
    served = f"/gradio_api/file={card.parent.resolve()}/"
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|/)", rf"\g<1>{served}", text)
    return re.sub(r"^# ", "### ", text, count=1, flags=re.M)
