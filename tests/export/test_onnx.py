"""ONNX files compute what their models do, at other batch and image sizes too, and say what they are."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from denoisers import dit, pixel_dit, sd3
from diffusers import UNet2DModel
from exported import EXPORTED, MultipleOfFour
from registered import BACKBONES, build
from zoo.export import FORMATS, ExportError, target
from zoo.export.network import kind_of, prepare, sample_inputs

import zoo

export = partial(zoo.export.export, format="onnx")
check = partial(zoo.export.check, format="onnx")
LABELS = ["cat", "dog", *map(str, range(8))]


def _small(**kwargs: Any) -> torch.nn.Module:
    return build("repavit", depth=1, **kwargs)


def _facts(path: Path) -> dict[str, str]:
    return target("onnx").metadata(path)


def unet() -> torch.nn.Module:
    kinds = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    return UNet2DModel(sample_size=8, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, **kinds)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    model = _small()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": LABELS}
    return export(model, tmp_path_factory.mktemp("onnx") / "model.onnx", name="repavit_tiny.test"), model


def test_metadata_of_a_classifier(classifier: tuple[Path, torch.nn.Module]) -> None:
    """All that a user of the file needs is in it, as ONNX Runtime reports it."""
    session = onnxruntime.InferenceSession(str(classifier[0]), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["name"] == "repavit_tiny.test"
    assert facts["kind"] == "classifier"
    assert json.loads(facts["mean"]) == list(classifier[1].pretrained_cfg["mean"])
    assert json.loads(facts["std"]) == list(classifier[1].pretrained_cfg["std"])
    assert [node.name for node in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert [node.name for node in session.get_outputs()] == ["logits"]


def test_labels_are_stored_where_they_fit(classifier: tuple[Path, torch.nn.Module]) -> None:
    """As of the other facts, of the file; where they do not fit, of what is written into one."""
    path, model = classifier
    assert json.loads(_facts(path)["labels"]) == LABELS
    assert prepare(model).metadata["labels"] == _facts(path)["labels"]
    other = _small(num_classes=3)
    other.pretrained_cfg = {**other.pretrained_cfg, "label_names": LABELS}
    assert "labels" not in prepare(other).metadata


def test_the_file_is_merged(classifier: tuple[Path, torch.nn.Module]) -> None:
    path, _ = classifier
    names = {node.op_type for node in onnx.load(path).graph.node}
    assert "BatchNormalization" not in names
    merged = zoo.reparameterize(_small()).params_after
    stored = sum(int(np.prod(value.dims)) for value in onnx.load(path).graph.initializer if value.data_type == 1)
    assert stored <= merged + 100  # and a few constants


def test_a_difference_is_noticed(classifier: tuple[Path, torch.nn.Module]) -> None:
    """The check can fail: other weights give another error, another network another shape."""
    path, model = classifier
    assert check(path, model) < 1e-5
    other = _small()
    with torch.no_grad():
        other.head.bias += 1.0
    assert check(path, other) > 1e-2
    with pytest.raises(ExportError, match=r"returns \(1, 10\), the model \(1, 9\)"):
        check(path, _small(num_classes=9))


def test_restored_images_stay_in_range(tmp_path: Path) -> None:
    model = MultipleOfFour()
    with torch.no_grad():
        model.down.bias += 50.0
    path = export(model, tmp_path / "bright.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    restored = session.run(None, {"image": np.ones((1, 3, 8, 12), np.float32)})[0]
    assert restored.max() <= 1.0
    assert json.loads(_facts(path)["multiple_of"]) == 4


def test_features_without_classes_whatever_mode_and_type(tmp_path: Path) -> None:
    """A file is in evaluation mode and in float32; the model stays in training."""
    model = _small(num_classes=0, drop_rate=0.5, proj_drop_rate=0.5).train().double()
    path = export(model, tmp_path / "features.onnx")
    assert model.training
    assert check(path, model) < 1e-5
    assert [output.name for output in onnx.load(path).graph.output] == ["features"]


def test_unwritable_output(tmp_path: Path) -> None:
    """One line, and nothing half-written."""
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path / "file" / "model.onnx", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(OSError, match=reason) as caught:
            export(_small(), out)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that fails neither removes nor damages what was there."""
    out = tmp_path / "model.onnx"
    out.write_bytes(b"old")

    class DataDependent(MultipleOfFour):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="cannot be written as ONNX") as caught:
        export(DataDependent(), out)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for path in (tmp_path / "text.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(ExportError) as caught:
            check(path, _small())
        assert "\n" not in str(caught.value)


def test_unknown_format_and_kind() -> None:
    with pytest.raises(ValueError, match=r"'onx'. Did you mean 'onnx'"):
        target("onx")
    assert all(callable(target(name).write) and target(name).SUFFIX.startswith(".") for name in FORMATS)
    with pytest.raises(ValueError, match="kind must be one of"):
        kind_of(torch.nn.Identity(), "detector")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give kind"):
        kind_of(torch.nn.Identity())


@pytest.mark.parametrize("make", [sd3, dit, unet])
def test_denoisers_that_a_pipeline_calls_in_its_own_way(make: Callable[[], torch.nn.Module]) -> None:
    """Also where they take classes, or are said to be denoisers: their calls are recorded."""
    for kind in (None, "denoiser"):
        with pytest.raises(ValueError, match=r"is no class-conditional denoiser .* zoo\.export\.step\.record_steps"):
            kind_of(make(), kind)


def test_kinds_and_sizes() -> None:
    kinds = {name: kind_of(make()) for name, make in EXPORTED.items()}
    assert kinds["pixel_dit"] == "denoiser"
    assert kinds["cfsr"] == kinds["multiple_of_four"] == "restorer"
    assert {kinds[name] for name in BACKBONES} == {"classifier"}
    sizes = [tuple(inputs["image"].shape) for inputs in sample_inputs(MultipleOfFour())]
    assert len({size[0] for size in sizes}) == 3
    assert len({size[2:] for size in sizes}) == 3
    assert all(side % 4 == 0 for size in sizes for side in size[2:])


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_missing_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model, path = _small(), tmp_path / "model.onnx"
    call = (lambda: export(model, path)) if missing == "onnxscript" else (lambda: check(path, model))
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'ffn-zoo\[export\]'"):
        call()


def test_an_enabled_cache_is_refused(tmp_path: Path) -> None:
    from diffusers import FirstBlockCacheConfig

    model = pixel_dit()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        export(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", ["classifier", "restorer"])
def test_onnx_runtime_quantises_what_we_write(
    kind: str, classifier: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """Both of its ways take the file as it is."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

    path = classifier[0] if kind == "classifier" else export(EXPORTED["cfsr"](), tmp_path / "cfsr.onnx")
    size = (1, 3, 32, 32) if kind == "classifier" else (1, 3, 16, 20)
    feed = {"image": np.random.default_rng(0).random(size, np.float32)}

    class Once(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            self.left = [feed]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    quantize_dynamic(path, tmp_path / "dynamic.onnx")
    quantize_static(path, tmp_path / "static.onnx", Once())
    found = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for file in (path, tmp_path / "dynamic.onnx", tmp_path / "static.onnx")
    ]
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < 0.2 * np.abs(found[0]).max()


class Normalised(torch.nn.Module):
    """Divides by a sum that is zero for a black picture, and drops a dimension that is not 1."""

    scale, in_chans = 1, 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / (x.sum() + 1e-12)).squeeze(1)


def test_the_number_that_guards_a_division_stays(tmp_path: Path) -> None:
    """The exporter takes 1e-8 for 0 and leaves it out, so that black pictures gave NaN; squeezes broke the file."""
    path = export(Normalised(), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in (np.zeros((1, 3, 16, 16), np.float32), np.full((1, 3, 16, 16), 0.5, np.float32)):
        (found,) = session.run(None, {"image": x})
        assert found == pytest.approx(Normalised()(torch.from_numpy(x)).numpy(), rel=1e-5)
