"""One model of every family, in every format: the files compute what the models do, at three batch and image sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
import zoo.export.onnx
import zoo.export.torch_export
from exported import EXPORTED, size_of
from torch import nn
from zoo.export.network import capture, prepare, weights_digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=EXPORTED)
def captured(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, int | None]]:
    """Yield a model and its size, while both targets write the same graph: tracing it takes longest."""
    model, size = EXPORTED[request.param](), size_of(request.param)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = capture(prepare(model, image_size=size), "exported")
    with pytest.MonkeyPatch.context() as patch:
        for target in (zoo.export.onnx, zoo.export.torch_export):
            patch.setattr(target, "capture", lambda network, purpose: program)
        yield model, size
    assert before.keys() == model.state_dict().keys(), "the model itself stays as it was"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_torch_export(captured: tuple[nn.Module, int | None], tmp_path: Path) -> None:
    """Within 1e-5 of the unmerged model after loading."""
    model, size = captured
    path = zoo.export.export(model, tmp_path / "model.pt2", image_size=size, format="torch-export")
    assert list(tmp_path.iterdir()) == [path], "one file, nothing left over"
    assert zoo.export.check(path, model, image_size=size, format="torch-export") < 1e-5
    facts = zoo.export.torch_export.metadata(path)
    assert facts["weights_sha256"] == weights_digest(model)
    assert facts["kind"] in ("classifier", "restorer", "denoiser")


def test_onnx(captured: tuple[nn.Module, int | None], tmp_path: Path) -> None:
    """Within 1e-5 of the unmerged model in ONNX Runtime."""
    model, size = captured
    path = zoo.export.export(model, tmp_path / "model.onnx", image_size=size, format="onnx")
    assert list(tmp_path.iterdir()) == [path], "one file, nothing left over"
    assert zoo.export.check(path, model, image_size=size, format="onnx") < 1e-5
    onnx.checker.check_model(path)
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert facts["weights_sha256"] == weights_digest(model)
