"""Copies among the files of a folder, which make an accuracy too good or teach the wrong thing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.image_sets import image_folder
from zoo.data.images import ImageClassification, tell_copies


def test_copies_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("zoo.data.images.notice", told.append)
    image_folder(tmp_path, 4, 2, size=8)
    data = ImageClassification(str(tmp_path), image_size=8)
    tell_copies(data)
    before = list(told)
    learnt = sorted((tmp_path / "train" / "circle").iterdir())[0]
    measured, wrong = tmp_path / "val" / "circle" / "copy.png", tmp_path / "train" / "square" / "copy.png"
    shutil.copy(learnt, measured)
    tell_copies(data)
    assert told[len(before) :] == [
        "1 picture of the 5 that are measured on can be learnt by heart, since they are among those to learn from too, "
        f"as {measured} is {learnt}: the accuracy is too good."
    ]
    shutil.copy(learnt, wrong)
    tell_copies(data)
    assert told[-1] == f"1 picture in two classes: {learnt} is {wrong}. One of them is wrong."
    assert not before
