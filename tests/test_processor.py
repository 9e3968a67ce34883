"""What Linux lists of the processor, for compiled code, and 16-bit types that it lacks: said at every door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_sets import image_folder
from PIL import Image

import zoo
from zoo import processor
from zoo.cli import main
from zoo.notices import Notice

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu smep sse2 avx2 hypervisor avx512f ssse3\n",
            "Some CPU @ 2 GHz",
            ("avx2", "avx512f", "sse2", "ssse3"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", "", ("asimd", "sve")),
    ],
)
def test_what_linux_lists(
    text: str, name: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor.instructions.__wrapped__() == found
    assert processor.processor_name() == name or not name


def test_elsewhere_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert processor.instructions.__wrapped__() == ()
    assert processor.processor_name()


@pytest.fixture(params=[False, True], ids=["without", "with"])
def supported(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor of laptops, without 16-bit floating-point instructions, or one with them."""
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: request.param)
    return bool(request.param)


def test_emulated_types(supported: bool) -> None:
    assert processor.emulates(torch.bfloat16) is processor.emulates(torch.float16) is (not supported)
    assert not processor.emulates(torch.float32)
    assert not processor.emulates(None)


def test_other_architectures_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    assert not processor.emulates(torch.bfloat16)


def test_accelerate_tells_of_emulation(supported: bool, recwarn: pytest.WarningsRecorder) -> None:
    model = zoo.accelerate(timm.create_model("repavit_small", depth=1, img_size=32), dtype="bfloat16")
    told = [str(warning.message) for warning in recwarn if warning.category is Notice]
    assert ("emulates" in str(model.zoo_report)) is (not supported)
    assert len(told) == (not supported)
    assert supported or "no instructions for bfloat16" in told[0]


def test_restore_tells_of_emulation(supported: bool, recwarn: pytest.WarningsRecorder) -> None:
    zoo.restore(Image.new("RGB", (8, 8)), task="sr", scale=2, dtype="float16")
    told = [str(warning.message) for warning in recwarn if warning.category is Notice]
    assert len(told) == (not supported)
    assert supported or ("float16" in told[0] and "Take float32" in told[0])


@pytest.mark.slow
def test_commands_tell_of_emulation(supported: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(picture)
    for command in (
        ["classify", str(picture), "--model", "repavit_tiny.cifar10"],
        ["restore", str(picture), "-o", str(tmp_path / "b.png"), "--scale", "2"],
    ):
        assert main([*command, "--dtype", "bfloat16", "--device", "cpu"]) == 0
        assert capsys.readouterr().err.count("has no instructions for bfloat16") == (not supported)
        assert main([*command, "--device", "cpu", *(["--force"] if "-o" in command else [])]) == 0
        assert "no instructions" not in capsys.readouterr().err


@pytest.mark.slow
def test_training_tells_of_emulation(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = image_folder(tmp_path / "data")
    config = [
        "fit",
        "--config",
        str(ROOT / "configs" / "smoke" / "repavit.yaml"),
        "--data.init_args.data_dir",
        str(data),
    ]
    config += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    assert main(["train", *config, "--trainer.precision", "bf16-mixed"]) == 0
    assert capsys.readouterr().err.count("--trainer.precision 32-true") == (not supported)
    assert main(["train", *config, "--trainer.precision", "32-true", "--trainer.default_root_dir", "other"]) == 0
    assert "no instructions" not in capsys.readouterr().err
