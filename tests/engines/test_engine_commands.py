"""`--engine` of the commands: the same results, what was done is said, wrong calls are one line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main

pytestmark = [
    pytest.mark.slow,  # exports
    pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the export extra"),
]


@pytest.fixture(scope="module", autouse=True)
def picture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A picture; engines go to a folder of their own."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder))
        path = folder / "picture.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)).save(path)
        yield path


def test_classify(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["classify", str(picture), "--model", "repavit_tiny.cifar10", "--topk", "10", "--json"]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)["results"][0]["top"]
    assert main([*command, "--engine", "onnxruntime"]) == 0
    out, said = capsys.readouterr()
    found = json.loads(out)["results"][0]["top"]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert found[0]["probability"] == pytest.approx(expected[0]["probability"], abs=1e-4)
    assert "ONNX Runtime: differs from RePaViT itself by" in said


def test_restore(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default stays eager for a small picture; tiles of an engine give the same picture but for rounding."""
    command = ["restore", str(picture), "--model", "cfsr_x2.bsds", "-q"]
    assert main([*command, "-o", str(picture.parent / "eager.png")]) == 0
    assert "engine" not in capsys.readouterr().err
    assert main([*command, "--engine", "onnxruntime", "-o", str(picture.parent / "engine.png")]) == 0
    pixels = [np.asarray(Image.open(picture.parent / f"{name}.png")).astype(int) for name in ("eager", "engine")]
    assert pixels[0].shape == (48, 80, 3)
    assert abs(pixels[0] - pixels[1]).max() <= 1


def test_generate(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--classes", "cat", "--count", "1", "--steps", "2", "-q", "--force"]
    pixels = []
    for name in ("eager", "onnxruntime"):
        assert main([*command, "--engine", name, "-o", str(picture.parent / name)]) == 0, capsys.readouterr().err
        pixels += [np.asarray(Image.open(file)).astype(int) for file in sorted((picture.parent / name).iterdir())]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    assert main([*command, "--engine", "onnxruntime", "--cache", "cg-taylor", "-o", "no.png"]) == 2
    assert "choose one" in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """Each model on each engine, the first being the reference; what cannot run is left out with a note."""
    command = ["bench", "repavit_tiny", "--size", "32", "--batch", "1", "--threads", "1", "--rounds", "2", "--json"]
    assert main([*command, "--engine", "eager,onnxruntime"]) == 0
    (benchmark,) = json.loads(capsys.readouterr().out)["benchmarks"]
    names = [entry["name"] for entry in benchmark["entries"]]
    assert names == ["repavit_tiny (merged), eager", "repavit_tiny (merged), onnxruntime"]
    assert benchmark["reference"] == "repavit_tiny (merged), eager"
    assert main([*command, "--engine", "eager,onnxruntime,auto", "--precision", "fp32,bf16"]) == 0
    (benchmark,) = json.loads(capsys.readouterr().out)["benchmarks"]
    chosen = [(entry["settings"]["engine"], entry["settings"]["precision"]) for entry in benchmark["entries"]]
    assert chosen == [("eager", "fp32"), ("eager", "bf16"), ("onnxruntime", "fp32"), ("auto", "fp32")]
    assert benchmark["entries"][2]["values"]["difference from eager fp32"] < 1e-4
    assert "onnxruntime runs fp32, int8, not bf16: left out." in benchmark["notes"]
    assert any(note.startswith("repavit_tiny: auto takes") for note in benchmark["notes"])
    assert main([*command, "--engine", "eager,onnx"]) == 2
    assert "Did you mean onnxruntime?" in capsys.readouterr().err


def test_wrong_calls(picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["classify", str(picture), "--engine", "onnx"]) == 2
    assert "Did you mean onnxruntime?" in capsys.readouterr().err
    assert main(["classify", str(picture), "--engine", "onnxruntime", "--dtype", "bfloat16"]) == 2
    assert "runs float32" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else real(name, *more)
    )
    assert main(["classify", str(picture), "--engine", "openvino"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'ffn-zoo[openvino]'" in error
    assert error.count("\n") == 1
