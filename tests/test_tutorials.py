"""Every tutorial runs, offline, and prints what is stored in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_site import module

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))

notebooks = module("notebooks")


def test_there_are_tutorials() -> None:
    assert len(NOTEBOOKS) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    stored = [[shape_of(output) for output in cell["outputs"]] for cell in cells]
    assert [[shape_of(output) for output in found] for found in notebooks.run(path)] == stored
    assert any(stored), "it was never run: python docs/notebooks.py"


def shape_of(output: dict) -> str:
    """Return an output without what depends on the machine: its numbers, and the blanks that follow from them."""
    text = output.get("text") or output["data"]["text/plain"]
    return re.sub(r"[\s─]+", " ", re.sub(r"[-+]?\d[\d.,e+-]*", "0", text))
