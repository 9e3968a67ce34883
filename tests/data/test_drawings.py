"""Drawn pictures: the same for a seed, flat between their edges, and read as photos are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from zoo.data.drawings import draw, main
from zoo.data.photos import find_images


def test_a_seed_gives_one_picture() -> None:
    picture = np.asarray(draw(3, 96, 64))
    assert picture.shape == (64, 96, 3)
    assert (picture == np.asarray(draw(3, 96, 64))).all()
    assert (picture != np.asarray(draw(4, 96, 64))).any()


def test_pictures_are_flat_with_many_edges() -> None:
    """Most neighbours are equal; edges go up and down by more than noise would."""
    steps = np.concatenate([np.abs(np.diff(np.asarray(draw(seed)).astype(int), axis=1)).max(2) for seed in range(4)])
    assert (steps == 0).mean() > 0.8
    assert (steps > 20).mean() > 0.01


def test_a_folder_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It must be new or empty: nothing is written over."""
    folder = tmp_path / "data" / "drawings"
    monkeypatch.setattr(sys, "argv", ["drawings", str(folder), "--count", "2"])
    main()
    assert [path.name for path in find_images(folder)] == ["000.png", "001.png"]
    with pytest.raises(SystemExit):
        main()
    assert "is there already: take a new or empty folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["drawings", str(tmp_path / "none"), "--count", "0"])
    with pytest.raises(SystemExit):
        main()
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(sys, "argv", ["drawings", str(folder / "000.png" / "inside")])
    with pytest.raises(SystemExit):  # one line, no traceback
        main()
    assert "cannot be written: Not a directory" in capsys.readouterr().err
