"""Training a restorer: it learns, logs and resumes from other weights; scores are those of whole images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_sets import photo_folder
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import zoo  # noqa: F401  registers the models
from zoo.data.paired_images import BicubicDownscale, Degradation, GaussianNoise, PairedImages
from zoo.metrics import psnr
from zoo.tasks.optim import OptimConfig
from zoo.tasks.restoration import Restoration, initialize
from zoo.weights import CheckpointError, read_checkpoint, sha256_of

TINY = dict(embed_dim=8, depths=(1,), kernel_size=5, layer_scale_init=1.0, interpolation_init=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    photo_folder(root / "train", 4)
    photo_folder(root / "val", 2)
    return root


def module(model: str = "cfsr_x2", **kwargs: Any) -> Restoration:
    return Restoration(model, **{"model_args": TINY, **kwargs})


def data(folder: Path, degradation: Degradation | None = None, **kwargs: Any) -> PairedImages:
    options = dict(train_folders=["train"], val_folder="val", patch_size=8, patches_per_image=8, batch_size=8)
    return PairedImages(str(folder), degradation or BicubicDownscale(2), **{**options, **kwargs})


def fit(task: Restoration, images: PairedImages, root: Path, **kwargs: Any) -> Trainer:
    options = dict(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**{**options, **kwargs})
        trainer.fit(task, images)
    return trainer


def test_learns_logs_and_shows(folder: Path, tmp_path: Path) -> None:
    """Better than the interpolation it starts from, in bfloat16; scores are those of the whole images."""
    task, logger = module(optim=OptimConfig(lr=3e-3, weight_decay=0.0)), TensorBoardLogger(str(tmp_path))
    trainer = fit(
        task, data(folder), tmp_path, max_epochs=10, logger=logger, precision="bf16-mixed", log_every_n_steps=1
    )
    scores = EventAccumulator(logger.log_dir)
    scores.Reload()
    values = [event.value for event in scores.Scalars("val/psnr")]
    assert len(values) == 10
    assert values[-1] > values[0] + 0.5
    picture = scores.Images("val/0")[-1]
    assert (picture.height, picture.width) == (48, 3 * 56)
    (tested,) = trainer.test(task, data(folder), verbose=False)
    pairs = list(data(folder).test_dataloader())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [float(psnr(task(low).float(), high, space="y", crop=2)) for low, high in pairs]
    assert tested["test/psnr"] == pytest.approx(sum(expected) / 2, abs=0.01)
    assert 0 < tested["test/ssim"] <= 1


@pytest.mark.parametrize("loss", ["l1", "mse", "charbonnier"])
def test_losses(loss: str) -> None:
    """Each loss is its formula."""
    task, batch = module(loss=loss), (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16))
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    difference = task(batch[0]) - batch[1]
    expected = {
        "l1": difference.abs().mean(),
        "mse": difference.square().mean(),
        "charbonnier": (difference.square() + 1e-6).sqrt().mean(),
    }[loss]
    assert task.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_start_from_another_scale(tmp_path: Path) -> None:
    """All but the upsampler comes from the x2 network; anything else that does not fit stops."""
    first = module()
    digest = first.export_weights(tmp_path / "x2.safetensors")
    assert digest == sha256_of(tmp_path / "x2.safetensors")
    second = module("cfsr_x4", init_from=str(tmp_path / "x2.safetensors"), init_except=["upsample"])
    for name, value in first.model.state_dict().items():
        same = value.shape == second.model.state_dict()[name].shape
        assert same != name.startswith("upsample")
        assert not same or torch.equal(value, second.model.state_dict()[name])
    with pytest.raises(CheckpointError, match=r"wrong shape: upsample.weight"):
        module("cfsr_x4", init_from=str(tmp_path / "x2.safetensors"))
    state_dict = read_checkpoint(tmp_path / "x2.safetensors")
    del state_dict["norm.bias"]
    torch.save(state_dict, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"missing: norm.bias"):
        initialize(second.model, tmp_path / "lacking.pth", ["upsample"])


def test_start_from_a_training_checkpoint(folder: Path, tmp_path: Path) -> None:
    task = module()
    task.hparams["optim"] = vars(task.optim)  # as train.py leaves it: plain values, which are read without pickle
    trainer = fit(task, data(folder), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = module(init_from=str(tmp_path / "run.ckpt"))
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_denoising_measures_colour(folder: Path, tmp_path: Path) -> None:
    """A task of scale 1 works with the same parts; here the pass-through network leaves the noise."""

    class Same(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x

    task = module(metric_space="rgb", metric_crop=0)
    task.model = Same()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (scores,) = trainer.test(task, data(folder, GaussianNoise(25)), verbose=False)
    assert scores["test/psnr"] == pytest.approx(20.17, abs=0.5)  # 20 log10(255 / 25), a little more where clipped


def test_bad_choices() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        module(model_args={"embed_dims": 4})
    assert timm.create_model("cfsr_x2", device="meta", **TINY).scale == 2
