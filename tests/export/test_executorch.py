"""ExecuTorch programs do what their models do, or are refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from exported import MultipleOfFour
from torch import nn

executorch = pytest.importorskip("zoo.export.executorch", reason="needs ffn-zoo[executorch]")
pytest.importorskip("executorch", reason="needs ffn-zoo[executorch]")

from zoo.export import ExportError, check, export  # noqa: E402  after the extra was found
from zoo.export.artefact import write_artefact  # noqa: E402


def test_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MultipleOfFour()
    found = write_artefact(model, tmp_path / "model.pte", format="executorch", image_size=16, name="mine")
    assert found.max_error is not None
    assert found.max_error < 1e-4
    assert executorch.metadata(found.path)["name"] == "mine"
    assert check(found.path, model, format="executorch", image_size=16) < 1e-4
    other = MultipleOfFour()
    with torch.no_grad():
        other.down.bias += 1.0
    assert check(found.path, other, format="executorch", image_size=16) > 1e-2, "the check can fail"
    with pytest.raises(ExportError, match=r"takes \{'image': \[1, 3, 16, 16\]\}, got image \(2, 3, 16, 16\)"):
        executorch.runner(found.path)({"image": torch.zeros(2, 3, 16, 16)})
    (code,) = re.findall(r"^```python\n(.*?)^```", found.readme.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "restored.png").is_file()


def test_what_is_not_lowered_is_named(tmp_path: Path) -> None:
    class Bicubic(MultipleOfFour):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(super().forward(x), scale_factor=0.5, mode="bicubic", antialias=True)

    with pytest.raises(ExportError, match=r"cannot lower this model.*upsample_bicubic2d_aa") as caught:
        export(Bicubic(), tmp_path / "model.pte", format="executorch", image_size=16)
    assert "\n" not in str(caught.value)
    (tmp_path / "text.pte").write_text("no program")
    with pytest.raises(ExportError, match="is not an ExecuTorch program"):
        executorch.runner(tmp_path / "text.pte")
    assert [path.name for path in tmp_path.iterdir()] == ["text.pte"]
