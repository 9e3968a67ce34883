"""Exported programs compute what their models do, at other batch and image sizes too, and say what they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo.export
from exported import MultipleOfFour
from registered import build
from zoo.export import ExportError
from zoo.export.torch_export import metadata

export = partial(zoo.export.export, format="torch-export")
check = partial(zoo.export.check, format="torch-export")


def test_a_difference_is_noticed(tmp_path: Path) -> None:
    """The check can fail: other weights give another error, another network another shape."""
    path = export(build("repavit", depth=1), tmp_path / "model.pt2", name="repavit_tiny.test")
    assert metadata(path)["name"] == "repavit_tiny.test"
    assert json.loads(metadata(path)["mean"])
    other = build("repavit", depth=1)
    with torch.no_grad():
        other.head.bias += 1.0
    assert check(path, other) > 1e-2
    with pytest.raises(ExportError, match=r"returns \(1, 10\), the model \(1, 9\)"):
        check(path, build("repavit", depth=1, num_classes=9))
    with pytest.raises(ExportError, match="cannot be run on"):
        check(path, build("repavit", depth=1, img_size=40), image_size=40)


def test_fixed_size(tmp_path: Path) -> None:
    """`dynamic_size=False` leaves only the batch open."""
    path = export(MultipleOfFour(), tmp_path / "fixed.pt2", dynamic_size=False)
    program = torch.export.load(path).module()
    assert program(image=torch.zeros(5, 3, 16, 16)).shape == (5, 3, 16, 16)
    with pytest.raises((RuntimeError, AssertionError)):
        program(image=torch.zeros(1, 3, 16, 20))


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written") as caught:
        export(build("repavit", depth=1), tmp_path / "file" / "model.pt2")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    class DataDependent(MultipleOfFour):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="cannot be exported") as caught:
        export(DataDependent(), tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no program")
    for path in (tmp_path / "text.pt2", tmp_path / "missing.pt2"):
        with pytest.raises(ExportError) as caught:
            check(path, build("repavit", depth=1))
        assert "\n" not in str(caught.value)
