"""The golden cases of the caching algorithms; see tests/parity/caching/README.md for how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).resolve().parents[1] / "parity" / "caching"


def cases(name: str) -> list[Any]:
    """Return the cases of a file, for `pytest.mark.parametrize`."""
    found = json.loads((_FOLDER / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case.get("name", str(index))) for index, case in enumerate(found)]
