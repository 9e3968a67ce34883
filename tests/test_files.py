"""Files and folders that appear whole or not at all, and walks through folders that end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zoo.files import walk, whole


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


# --- walks


def walked(folder: Path) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in walk(folder) for name in names
    )


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    """Each folder is entered once: links to what is walked anyway, or to a folder around it, lead nowhere new."""
    for name in ("in/a/1", "in/b/2", "in/.hidden/3", "in/__MACOSX/4", "other/sub/5", "other/6"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"in/a/up": "..", "in/a/top": "../..", "in/b/a": "../a", "in/c": "../other/sub", "in/d": "../other"}
    links |= {"other/back": "../in", "other/round": ".", "in/shown": ".hidden", "in/gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    assert walked(tmp_path / "in") == ["a/1", "b/2", "c/5", "d/6", "d/sub/5", "gone", "shown/3"]


def test_folders_that_cannot_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("locked", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / "1").touch()
    genuine = os.scandir

    def scandir(path: str) -> object:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return genuine(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="locked"):
        list(walk(tmp_path))
    told: list[OSError] = []
    assert [names for _, _, names in walk(tmp_path, told.append)][-1] == ["1"]
    assert told[0].filename == str(tmp_path / "locked")
