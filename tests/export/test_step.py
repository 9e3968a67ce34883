"""The denoisers of any pipeline as files, as a run calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline_folders import saved
from torch import Tensor, nn
from zoo.export import ExportError
from zoo.export.step import compare_step, record_steps
from zoo.export.torch_export import metadata, runner

from zoo.cli import main


class Denoiser(nn.Module):
    """Takes tensors by position, by name and nested, and a setting that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, timestep: Tensor, *, more: dict[str, Tensor], scale: float = 1.0, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (self.layer(x) * scale + timestep + more["text"],)


def run(model: nn.Module, *scales: float, grow: bool = False) -> Callable[[], None]:
    def two_steps() -> None:
        for step, scale in enumerate(scales):
            torch.manual_seed(step)
            size = 2 + step * grow
            model(torch.randn(size, 4), torch.tensor(float(step)), more={"text": torch.randn(1, 4)}, scale=scale)

    return two_steps


def test_inputs_by_name() -> None:
    """Both steps' inputs and outputs are kept; a file that does something else is told by its difference."""
    model = Denoiser()
    (step,) = record_steps(SimpleNamespace(), {"transformer": model}, run(model, 2.0, 2.0))
    assert list(step.network.inputs) == ["x", "timestep", "more_text"]
    assert len(step.calls) == 2
    assert step.network.output == "denoised"

    def right(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return step.network.module(*inputs.values())

    assert compare_step(right, step) < 1e-6
    assert compare_step(lambda inputs: [value + 0.5 for value in right(inputs)], step) > 0.1
    with pytest.raises(ExportError, match="returns"):
        compare_step(lambda inputs: [value[:1] for value in right(inputs)], step)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_what_no_file_can_hold() -> None:
    model = Denoiser()
    with pytest.raises(ExportError, match="another scale at each step"):
        record_steps(SimpleNamespace(), {"transformer": model}, run(model, 1.0, 2.0))
    with pytest.raises(ExportError, match="another x at each step"):
        record_steps(SimpleNamespace(), {"transformer": model}, run(model, 1.0, 1.0, grow=True))
    with pytest.raises(ExportError, match="did not call transformer"):
        record_steps(SimpleNamespace(), {"transformer": model}, lambda: None)


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's Flux: prompts say what is recorded; the file gives what the transformer gives."""
    folder, out = saved("flux", tmp_path / "flux"), tmp_path / "flux.pt2"
    call = ["export", folder, "--format", "torch-export", "-o", str(out)]
    assert main(call) == 2
    assert "needs --prompt" in capsys.readouterr().err
    assert not out.exists()
    assert main([*call, "--prompt", "a cat", "--height", "16", "--width", "16"]) == 0
    assert "hidden_states 1x16x16" in capsys.readouterr().out
    assert metadata(out)["class"] == "FluxTransformer2DModel"
    with pytest.raises(ExportError, match="cannot be run on"):
        runner(out)({"hidden_states": torch.zeros(1, 2, 3)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["repavit_tiny.cifar10", "--prompt", "a cat"], "--prompt is for pipelines; repavit_tiny.cifar10 is a model"),
        (["pixeldit.cifar10", "--device", "cuda"], "written on the CPU"),
        (["PIPELINE", "--precision", "int8"], "--precision int8 is for classifiers and restorers"),
        (["PIPELINE", "--image-size", "64"], "--image-size is for classifiers and restorers"),
        (["PIPELINE", "--with-preprocess"], "--with-preprocess is for classifiers and restorers"),
    ],
)
def test_wrong_calls(
    call: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told apart before anything is loaded."""
    folder = tmp_path / "PIPELINE"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["export", *call, "--format", "onnx", "-o", "x.onnx"]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]
