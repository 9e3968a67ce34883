"""The diffusion task: what is learned, sampled, measured and written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import dit, pixel_dit
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline
from image_sets import image_folder
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from zoo.data.images import ImageDiffusion
from zoo.diffusion import PixelDiTPipeline
from zoo.notices import Notice
from zoo.tasks import diffusion
from zoo.tasks.diffusion import Diffusion
from zoo.tasks.optim import OptimConfig


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss(prediction_type: str, gamma: float | None) -> None:
    """Plain and min-SNR loss against the formulas of the papers, written out."""
    task = Diffusion(pixel_dit(), prediction_type=prediction_type, snr_gamma=gamma).eval()  # drop no label
    images, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    timesteps, labels = torch.tensor([0, 300, 700, 999]), torch.arange(4)
    alpha = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noisy = (alpha.sqrt() * images + (1 - alpha).sqrt() * noise).float()
    target = {
        "epsilon": noise,
        "sample": images,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * images,
    }[prediction_type]
    snr = (alpha / (1 - alpha)).flatten()
    best = torch.minimum(snr, torch.full_like(snr, 5.0))
    weight = {"epsilon": best / snr, "sample": best, "v_prediction": best / (snr + 1)}[prediction_type]
    expected = (task(noisy, timesteps, labels) - target).square().mean((1, 2, 3)) * (1 if gamma is None else weight)
    loss = task._loss(images, labels, timesteps, noise)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=1e-6)


def test_timesteps_fill_the_range_evenly() -> None:
    task = Diffusion(pixel_dit())
    drawn = task._timesteps(100)
    assert torch.equal((drawn // 10).sort().values, torch.arange(100))
    assert not torch.equal(drawn.sort().values, drawn)
    assert set(task._timesteps(1000).tolist()) == set(range(1000))


def test_logit_normal_timesteps() -> None:
    task = Diffusion(pixel_dit(), timestep_sampling="logit-normal", logit_mean=0.5, logit_std=1.0)
    drawn = (task._timesteps(4000).double() + 0.5) / 1000
    logits = torch.logit(drawn)
    assert abs(logits.mean() - 0.5) < 0.02
    assert abs(logits.std() - 1.0) < 0.03
    assert drawn.min() >= 0


def test_samples_come_from_seeds() -> None:
    task = Diffusion(pixel_dit(), sample_steps=2)
    task.train()
    images = task.sample([0, 1, 2], seeds=[5, 6, 7])
    assert task.model.training
    assert images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(task.sample([1], seeds=[6])[0], images[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_end_to_end(tmp_path: Path) -> None:
    """Fit with EMA; the checkpoint and the saved pipeline hold the averaged weights; grids are drawn with them."""
    data = ImageDiffusion(str(image_folder(tmp_path / "data")), image_size=8, batch_size=4)
    task = Diffusion(pixel_dit(num_classes=2), optim=OptimConfig(lr=1e-2, warmup=0.0), sample_steps=2, grid_rows=1)
    average = EMAWeightAveraging(decay=0.5)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path),
        callbacks=[average, ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    first = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    trainer.fit(task, data)
    assert all(not torch.equal(first[name], parameter) for name, parameter in task.model.named_parameters())
    assert {"train/loss", "val/loss"} <= set(trainer.callback_metrics)
    grids = sorted(Path(trainer.log_dir, "samples").iterdir())
    assert [grid.name for grid in grids] == ["step_000004.png", "step_000008.png"]
    averaged = average._average_model.module.model.state_dict()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "data" / "val" / "square", part / "val" / "square")
    some = ImageDiffusion(str(part), image_size=8, batch_size=4)
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        Diffusion(pixel_dit(num_classes=2), sample_steps=2, grid_rows=0), some, ckpt_path=checkpoint, weights_only=False
    )
    assert some.class_names == ["circle", "square"]
    loaded = Diffusion.load_from_checkpoint(checkpoint, model=pixel_dit(num_classes=2), weights_only=False)
    loaded.save_pretrained(tmp_path / "pipeline", dtype=torch.float16)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float16)
    assert type(pipe) is PixelDiTPipeline
    assert pipe.id2label == {0: "circle", 1: "square"}
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, averaged[name].half()), name
    assert loaded.model.dtype == torch.float32


def test_images_and_classes_are_the_denoisers(tmp_path: Path) -> None:
    """Other sizes would be learnt, and never drawn; names of other classes come with the setting to change."""
    folder = str(image_folder(tmp_path / "data"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"images of 16 pixels, the denoiser draws 8: .*image_size to 8"):
        trainer.fit(Diffusion(pixel_dit(num_classes=2)), ImageDiffusion(folder, image_size=16))
    named = Diffusion(pixel_dit(num_classes=2), class_names=["ant", "bee"])
    with pytest.raises(ValueError, match=r"'circle', 'square'.*none of .*'ant', 'bee'.* set class_names to those of"):
        trainer.fit(named, ImageDiffusion(folder, image_size=8))
    with pytest.raises(ValueError, match=r"class_names has 2 names, the denoiser 4 classes"):
        Diffusion(pixel_dit(), class_names=["ant", "bee"])


def test_training_goes_on_from_a_pipeline(tmp_path: Path) -> None:
    """A pipeline by its folder: weights and names are its own, other settings than its own are refused."""
    names = ["ant", "bee", "cow", "doe"]
    before = Diffusion(pixel_dit(), class_names=names)
    before.save_pretrained(tmp_path / "pipeline", dtype=torch.float16)
    task = Diffusion(str(tmp_path / "pipeline"))
    assert task.class_names == names
    assert task.model.training
    assert task.model.dtype == torch.float32
    weights = {name: value.half().float() for name, value in before.model.state_dict().items()}
    torch.testing.assert_close(dict(task.model.state_dict()), weights, rtol=0, atol=0)
    with pytest.raises(ValueError, match="was trained with prediction_type v_prediction, not epsilon"):
        Diffusion(str(tmp_path / "pipeline"), prediction_type="epsilon")
    DiTPipeline(dit(), AutoencoderKL(), DDIMScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a PixelDiT, .*other holds a DiTTransformer2DModel"):
        Diffusion(str(tmp_path / "other"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    shutil.rmtree(tmp_path / "pipeline")
    loaded = Diffusion.load_from_checkpoint(tmp_path / "own.ckpt")
    torch.testing.assert_close(dict(loaded.model.state_dict()), weights, rtol=0, atol=0)


def test_other_classes_than_the_pipeline_s(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Names choose the embeddings: known ones stay, new ones begin as no class; the rest of the weights stays."""
    before = Diffusion(pixel_dit(), class_names=["ant", "bee", "cow", "doe"])
    before.save_pretrained(tmp_path / "pipeline")
    task = Diffusion(str(tmp_path / "pipeline"), class_names=["elk", "bee", "ant"])
    assert task.class_names == ["elk", "bee", "ant"]
    assert task.model.config.num_classes == 3
    assert "2 of them keep what it knows" in str(recwarn.pop(Notice).message)
    rows = before.model.conditioning.class_embedder.embedding_table.weight
    found = task.model.conditioning.class_embedder.embedding_table.weight
    torch.testing.assert_close(found, rows[[4, 1, 0, 4]])
    noisy, when = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    for own, name in enumerate(task.class_names):
        old = before.class_names.index(name) if name in before.class_names else before.model.null_label
        torch.testing.assert_close(
            task.model.eval()(noisy, when, torch.tensor([own, own])).sample,
            before.model.eval()(noisy, when, torch.tensor([old, old])).sample,
        )
    with pytest.raises(ValueError, match="class_names has 3 names, the denoiser 4 classes"):
        Diffusion(pixel_dit(), class_names=["elk", "bee", "ant"])


class Brightness(nn.Module):
    """A classifier of known answers: class 1 where the normalised image is bright."""

    num_classes = 2
    pretrained_cfg: dict[str, Any] = {  # noqa: RUF012
        "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0
    }  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-2:] == (16, 16)
        level = images.mean((1, 2, 3))
        return torch.stack([-level, level], dim=1)


def test_class_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py test` reports how many samples a classifier recognises; here: bright ones."""
    task = Diffusion(pixel_dit(num_classes=2), sample_steps=2, test_classifier="stub", test_samples=10)
    created = []

    def create(name: str, pretrained: bool) -> nn.Module:
        created.append((name, pretrained))
        return Brightness()

    monkeypatch.setattr(diffusion.timm, "create_model", create)
    monkeypatch.setattr(
        task, "sample", lambda labels, seeds: torch.tensor([0.9 if s < 8 else 0.1 for s in seeds]).view(-1, 1, 1, 1)
        .expand(-1, 3, 8, 8)
    )  # fmt: skip
    data = ImageDiffusion(str(image_folder(tmp_path, train=1, val=2)), image_size=8, batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    results = trainer.test(task, data, verbose=False)[0]
    # bright are 0..7; asked for are classes 0 1 0 1 ...: right are 1 3 5 7 and the dark 8
    assert results["test/class_accuracy"] == pytest.approx(0.5)
    assert created == [("stub", True)]
    assert results["test/loss"] > 0


def test_classifier_must_know_the_same_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Diffusion(pixel_dit(num_classes=4), test_classifier="stub")
    monkeypatch.setattr(diffusion.timm, "create_model", lambda name, pretrained: Brightness())
    with pytest.raises(ValueError, match="stub knows 2 classes, the denoiser 4"):
        task._measure_class_accuracy("stub")


def test_labels_of_the_data_are_those_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders sort otherwise than `class_names`, a classifier has another order again, and others are refused."""
    data = ImageDiffusion(str(image_folder(tmp_path, train=1, val=2)), image_size=8, batch_size=2)
    task = Diffusion(
        pixel_dit(num_classes=2), ["square", "circle"], sample_steps=2, test_samples=4, test_classifier="x"
    )
    judge = Brightness()
    judge.pretrained_cfg = {**judge.pretrained_cfg, "label_names": ("circle", "square")}
    monkeypatch.setattr(diffusion.timm, "create_model", lambda name, pretrained: judge)
    monkeypatch.setattr(
        task, "sample", lambda labels, seeds: torch.tensor([0.9 if number == 0 else 0.1 for number in labels])
        .view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    results = trainer.test(task, data, verbose=False)[0]
    assert results["test/class_accuracy"] == 1.0  # squares, class 0, are bright: the classifier's second class
    assert sorted(set(data._open("train", training=False).targets)) == [0, 1]
    assert data.class_names == ["square", "circle"]
    other = Diffusion(pixel_dit(num_classes=2), ["disc", "square"])
    with pytest.raises(ValueError, match="has the class 'circle', which is none of the known ones, 'disc', 'square'"):
        trainer.validate(other, ImageDiffusion(data.data_dir, image_size=8, batch_size=2), verbose=False)
