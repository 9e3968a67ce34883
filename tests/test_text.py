"""Tables as plain text."""

from __future__ import annotations

from zoo.text import table_lines


def test_columns_are_aligned_and_text_is_kept() -> None:
    """Neither folded nor read as markup; wide characters count twice; no spaces at the ends of lines."""
    rows = [("layer", "load", ""), ("blocks[0]", "12.5 %", "x" * 300), ("層", "3 %", "[bold]")]
    assert table_lines(rows, right=(1,)) == [
        "layer        load",
        f"blocks[0]  12.5 %  {'x' * 300}",
        "層            3 %  [bold]",
    ]
