"""Distillation tasks: the shipped config on a tiny pipeline, resumed and saved; Flux on stored latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from lightning import Trainer
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file

from tests.data.test_latents import sample
from tests.denoisers import flux, pixel_dit
from tests.image_sets import image_folder
from zoo.data.latents import Latents
from zoo.diffusion import PixelDiTPipeline
from zoo.moe import BlockGroup, MoEConfig, convert
from zoo.moe.distillation import StageSteps
from zoo.tasks.moe_distillation import FlowDistillation, MoEDistillation
from zoo.tasks.optim import OptimConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "diffusion" / "pixeldit_moe_cifar10.yaml"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Return the folders of a student and of its teacher."""
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    teacher = PixelDiTPipeline(pixel_dit(), scheduler, id2label=dict(enumerate(("square", "circle", "c", "d"))))
    teacher.save_pretrained(tmp_path / "teacher")
    moe, _ = convert(teacher.transformer, MoEConfig(scores="random"))
    teacher.register_modules(transformer=moe)
    teacher.save_pretrained(tmp_path / "student")
    return str(tmp_path / "student"), str(tmp_path / "teacher")


@pytest.mark.slow
def test_shipped_config(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_folder(tmp_path / "data", train=16, val=4, size=8)
    monkeypatch.chdir(tmp_path)
    student, teacher = folders
    options = {
        "model.init_args.student": student,
        "model.init_args.teacher": teacher,
        "model.init_args.steps.shared": 1,
        "model.init_args.steps.experts": 2,
        "model.init_args.grid_rows": 1,
        "model.init_args.sample_steps": 2,
        "data.init_args.data_dir": data,
        "data.init_args.image_size": 8,
        "data.init_args.batch_size": 4,
        "trainer.max_steps": 3,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
    }
    cli = LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": False},
        args=[
            "fit",
            "--config",
            str(CONFIG),
            *(part for key, value in options.items() for part in (f"--{key}", str(value))),
        ],
    )
    task: Any = cli.model
    assert cli.trainer.global_step == 3
    assert task.distiller.stage == "experts"
    assert not any(key.startswith("distiller") or "teacher" in key for key in task.state_dict())
    pipe = DiffusionPipeline.from_pretrained("runs/pixeldit_moe_cifar10/pipeline")  # written when training was over
    assert type(pipe.transformer).__name__ == "MoEPixelDiT"
    torch.testing.assert_close(pipe.transformer.state_dict(), task.model.state_dict(), rtol=0, atol=0)
    task.save_pretrained(tmp_path / "half", torch.float16)
    half = DiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.float16).transformer
    assert half.transformer_blocks[0].ff.experts_up.dtype == torch.float16
    assert torch.equal(half.transformer_blocks[0].ff.channel_index, task.model.transformer_blocks[0].ff.channel_index)


def test_flux(tmp_path: Path) -> None:
    teacher = flux()
    teacher.save_pretrained(tmp_path / "teacher")
    convert(teacher, MoEConfig(scores="random"))[0].save_pretrained(tmp_path / "student")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(4):
            save_file(sample(), tmp_path / split / f"{number}.safetensors")
    task = FlowDistillation(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        steps=StageSteps(shared=1, experts=1, blocks=1),
        groups=[BlockGroup(first=0, count=2, active=1)],
        optim=OptimConfig(lr=1e-3, warmup=0.0),
        guidance=None,
    )
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, Latents(str(tmp_path), batch_size=2))
    assert task.distiller.stage == "blocks"
    assert torch.isfinite(trainer.callback_metrics["val/output"])


def test_wrong_student(folders: tuple[str, str]) -> None:
    _, teacher = folders
    with pytest.raises(ValueError, match="has no experts"):
        MoEDistillation(teacher, teacher)
