"""The table of what works on which transformer of diffusers is true, and leaves none out."""

from __future__ import annotations

import re

import pytest
from support import TABLE, row
from tiny_transformers import all_transformers

ROWS = dict(re.findall(r"^(?=\| `(\w+)`)(.*)$", TABLE.read_text(encoding="utf-8"), re.M)) if TABLE.is_file() else {}


def test_no_class_is_left_out() -> None:
    assert sorted(ROWS) == sorted(all_transformers())
    assert all("|  |" not in line for line in ROWS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ROWS))
def test_row(name: str) -> None:
    assert row(name) == ROWS[name]
