"""Training a restorer: it learns, logs and resumes from other weights; scores are those of whole images."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_sets import photo_folder
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageFilter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import zoo  # noqa: F401  registers the models
from zoo.data.paired_images import BicubicDownscale, Degradation, GaussianNoise, PairedImages
from zoo.evaluation.metrics import psnr
from zoo.tasks.optim import OptimConfig
from zoo.tasks.restoration import Restoration, fft_loss, initialize
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


def test_scales_must_agree(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"The model's scale is 2, that of the data 3: set the scale of its degradation"
    ):
        fit(module(), data(folder, BicubicDownscale(3)), tmp_path)


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


def test_fft_loss_is_its_formula() -> None:
    """Real and imaginary parts of the whole transforms, not normalised, as FFNetSR's recipe has it."""
    output, target = torch.rand(2, 3, 6, 9), torch.rand(2, 3, 6, 9)
    expected = [
        np.abs(part(np.fft.rfft2(output.double())) - part(np.fft.rfft2(target.double()))).mean()
        for part in (np.real, np.imag)
    ]
    assert float(fft_loss(output, target)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(fft_loss(output + 1, output)) == pytest.approx(6 * 9 / (6 * 5 * 2), rel=1e-4)  # all in one coefficient
    task, batch = module(fft_weight=0.02), (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16))
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    difference = (task(batch[0]) - batch[1]).detach()
    total = difference.abs().mean() + 0.02 * fft_loss(difference, torch.zeros(()))
    assert task.training_step(batch, 0).item() == pytest.approx(total.item(), rel=1e-5)


def test_mixup_mixes_pairs_alike() -> None:
    """Input and truth are mixed with the same share and partner, half of the time, and never in a batch of one."""
    task = module(mixup=1.2)
    target = torch.rand(4, 3, 8, 8)
    changed = 0
    for _ in range(40):
        degraded, mixed = task._mix(target / 2, target)
        assert torch.allclose(degraded, mixed / 2, atol=1e-6)
        assert torch.allclose(mixed.sum(0), target.sum(0), atol=1e-4)  # a permutation keeps the sum
        changed += not torch.equal(mixed, target)
    assert 8 < changed < 32
    alone = target[:1]
    assert all(task._mix(alone, alone)[0] is alone for _ in range(8))
    assert module()._mix(target, target)[0] is target


def test_the_protocol_is_that_of_the_task() -> None:
    assert module().protocol.name == "y-crop"
    assert module(protocol="dpdd").metrics.keys() == {"psnr", "ssim", "mae"}
    with pytest.raises(ValueError, match=r"No protocol is called 'psnr'; there are y-crop, rgb"):
        module(protocol="psnr")
    with pytest.raises(ValueError, match=r"must not be negative, got 0\.0 and -1"):
        module(mixup=-1)


def rates(folder: Path, root: Path, **options: Any) -> list[float]:
    """Return the learning rate of each of 12 steps."""
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = module(optim=OptimConfig(weight_decay=0.0, **options))
    fit(task, data(folder, batch_size=4), root, max_epochs=-1, max_steps=12, callbacks=[Watch()])
    return seen


def test_halved_at_milestones(folder: Path, tmp_path: Path) -> None:
    """DAT's schedule: the rate of step m is the first halved one, as PyTorch's MultiStepLR has it."""
    found = rates(folder, tmp_path, lr=2e-4, sched="multistep", milestones=[6, 9, 11], decay_rate=0.5, warmup=0.0)
    assert found == pytest.approx([2e-4] * 6 + [1e-4] * 3 + [5e-5] * 2 + [2.5e-5])
    for wrong in (dict(milestones=[3]), dict(sched="multistep"), dict(sched="multistep", milestones=[4, 2])):
        with pytest.raises(ValueError, match="milestones are rising steps"):
            OptimConfig(**wrong)


def test_held_then_cosine(folder: Path, tmp_path: Path) -> None:
    """Restormer's schedule: constant, then one cosine over the rest."""
    found = rates(folder, tmp_path, lr=3e-4, warmup=4 / 12, warmup_lr=3e-4, warmup_prefix=True, min_lr=1e-6)
    expected = [1e-6 + (3e-4 - 1e-6) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert found == pytest.approx([3e-4] * 4 + expected)


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
    named = module("cfsr_x3", init_from="cfsr_x2.bsds", init_except=["upsample"], model_args={})
    assert named.model_record().base == "cfsr_x2.bsds"
    with pytest.raises(CheckpointError, match=r"cfsr_x2\.bsd"):
        module("cfsr_x3", init_from="cfsr_x2.bsd", init_except=["upsample"], model_args={})
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

    task = module(protocol="rgb")
    task.model = Same()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (scores,) = trainer.test(task, data(folder, GaussianNoise(25)), verbose=False)
    assert scores["test/psnr"] == pytest.approx(20.17, abs=0.5)  # 20 log10(255 / 25), a little more where clipped
    blind = data(folder, GaussianNoise((0, 50), test_sigma=25))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (again,) = trainer.test(task, blind, verbose=False)
    assert again == scores  # the protocol's noise depends on nothing but its strength


@pytest.mark.parametrize("views", [["input"], ["inputL", "inputR"]], ids=["one view", "two views"])
def test_learns_from_degraded_folders(views: list[str], folder: Path, tmp_path: Path) -> None:
    """Deblurring, deraining and defocus data are files; two steps, validation and its pictures."""
    for view in views:
        (tmp_path / "data" / view).mkdir(parents=True)
        for path in (folder / "train").iterdir():
            Image.open(path).filter(ImageFilter.BoxBlur(1)).save(tmp_path / "data" / view / path.name)
    (tmp_path / "data" / "target").symlink_to(folder / "train")
    images = PairedImages(
        str(tmp_path / "data"), train_folders=["target"], train_degraded_folders=[views], val_folder="target",
        val_degraded_folder=views, patch_size=16, batch_size=2,
    )  # fmt: skip
    sizes = dict(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)
    name = "restormer_defocus_dual" if len(views) == 2 else "restormer_defocus"
    task, logger = Restoration(name, model_args=sizes), TensorBoardLogger(str(tmp_path / "log"))
    trainer = fit(task, images, tmp_path, max_epochs=-1, max_steps=2, logger=logger, val_check_interval=2)
    assert trainer.global_step == 2
    assert task.protocol.name == "dpdd"
    assert float(trainer.callback_metrics["val/psnr"]) > 0
    scores = EventAccumulator(logger.log_dir)
    scores.Reload()
    assert scores.Images("val/0")


def test_bad_choices() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        module(model_args={"embed_dims": 4})
    assert timm.create_model("cfsr_x2", device="meta", **TINY).scale == 2
