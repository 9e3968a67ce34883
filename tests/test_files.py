"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.files import whole


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "text.txt"
    for text in ("first", "second"):
        with whole(target) as temporary:
            temporary.write_text(text)
            assert temporary.name == target.name
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
        assert target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["text.txt"]


def test_a_folder_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with whole(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("before", [None, "kept"])
def test_nothing_is_left_of_what_failed(before: str | None, tmp_path: Path) -> None:
    target = tmp_path / "text.txt"
    if before is not None:
        target.write_text(before)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"), whole(target) as temporary:
        fail(temporary)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if before is None else [before])
