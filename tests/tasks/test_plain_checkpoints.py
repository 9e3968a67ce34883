"""Checkpoints are plain data that say what the model is, and load without running code from them."""

from __future__ import annotations

import errno
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import image_folder, photo_folder
from lightning import LightningDataModule, LightningModule, Trainer

import zoo
from zoo.data.images import ImageClassification, ImageDiffusion
from zoo.data.paired_images import GaussianNoise, PairedImages
from zoo.diffusion.pixel_dit import PixelDiT
from zoo.ffn import ewa
from zoo.moe import MoEConfig
from zoo.record import KEY, record_in, record_of, write_config
from zoo.tasks.callbacks import CheckedCheckpointIO
from zoo.tasks.checkpoints import read_training_checkpoint, why_not_written
from zoo.tasks.classification import Classification
from zoo.tasks.diffusion import Diffusion
from zoo.tasks.optim import OptimConfig
from zoo.tasks.plain import differences, plain
from zoo.tasks.restoration import Restoration
from zoo.weights import CheckpointError

TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)


def trainer(folder: Path, epochs: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0,
    )  # fmt: skip


def saved(task: LightningModule, data: LightningDataModule, folder: Path) -> dict[str, Any]:
    """Train a step or two and return what the checkpoint holds for a reader that runs no code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(folder)
        run.fit(task, data)
        run.save_checkpoint(folder / "x.ckpt")
    return torch.load(folder / "x.ckpt", weights_only=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images", 4, 2)


def test_classification(images: Path, tmp_path: Path) -> None:
    """Resumed, tested and loaded with Lightning's own calls; the record has classes and preprocessing of the data."""
    task = Classification("repavit_tiny", 2, TINY, optim=OptimConfig(lr=1e-2, betas=(0.9, 0.95)))
    data = ImageClassification(str(images), 16, 4, crop_pct=0.9, mean=(0.5, 0.5, 0.5), interpolation="random")
    checkpoint = saved(task, data, tmp_path)
    path = str(tmp_path / "x.ckpt")
    again = Classification.load_from_checkpoint(path)
    assert again.optim == task.optim
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
    trainer(tmp_path, 2).fit(Classification("repavit_tiny", 2, TINY, optim=task.optim), data, ckpt_path=path)
    trainer(tmp_path).test(Classification("repavit_tiny", 2, TINY), data, ckpt_path=path, verbose=False)
    record = record_in(checkpoint)
    assert record is not None
    assert (record.architecture, record.num_classes, record.label_names) == ("repavit_tiny", 2, ("circle", "square"))
    assert (record.input_size, record.mean, record.crop_pct) == ((3, 16, 16), (0.5, 0.5, 0.5), 0.9)
    assert (record.interpolation, record.base, record.model_args["embed_dim"]) == ("bicubic", None, 16)


def test_experts(images: Path, tmp_path: Path) -> None:
    config = MoEConfig(experts=4, top_k=1, scores="random")
    checkpoint = saved(
        Classification("vit_tiny_patch16_224", 2, TINY, experts=config),
        ImageClassification(str(images), 16, 4),
        tmp_path,
    )
    assert checkpoint["hyper_parameters"]["experts"]["experts"] == 4
    Classification.load_from_checkpoint(tmp_path / "x.ckpt")
    assert checkpoint[KEY]["zoo"]["changes"][0]["technique"] == "moe"


@pytest.mark.parametrize("how", ["moe", "ewa", "lora"])
@torch.no_grad()
def test_models_of_trained_layers_come_back(how: str, images: Path, tmp_path: Path) -> None:
    """Experts are rebuilt; averaged experts and adapters are dense, as in evaluation. From checkpoint and folder."""
    experts = MoEConfig(shared=1, experts=3, top_k=2, scores="random", zero=1, copies=1) if how == "moe" else None
    task = Classification("vit_tiny_patch16_224", 2, TINY, experts=experts, lora=2 if how == "lora" else None)
    if how == "ewa":
        ewa.apply(task.model, ewa.EWAConfig(experts=2, every=1, noise=0.1))
    with torch.enable_grad():
        saved(task, ImageClassification(str(images), 16, 4), tmp_path)
    record = task.model_record()
    assert record is not None
    write_config(tmp_path, record)
    task.export_weights(tmp_path / "model.safetensors")
    batch = torch.randn(2, 3, 16, 16)
    expected = task.eval().model(batch)
    for source in (tmp_path / "x.ckpt", tmp_path):
        found = zoo.create_model(source)
        torch.testing.assert_close(found(batch), expected, rtol=1e-5, atol=1e-6)
        assert [change["technique"] for change in record_of(found).changes] == (["moe"] if how == "moe" else [])


def test_restoration(tmp_path: Path) -> None:
    args = dict(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)
    task = Restoration("restormer_denoise_color", args)
    data = PairedImages(
        str(photo_folder(tmp_path / "photos", 2)), GaussianNoise((5.0, 50.0)), patch_size=16, batch_size=1
    )
    record = record_in(saved(task, data, tmp_path))
    assert record is not None
    assert (record.task, record.sigma) == ("denoise", (5.0, 50.0))
    assert Restoration.load_from_checkpoint(tmp_path / "x.ckpt").optim == task.optim


def test_diffusion(images: Path, tmp_path: Path) -> None:
    """The denoiser that Python has built comes back without being given again."""
    model = PixelDiT(
        sample_size=8, patch_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8, num_classes=2
    )
    task = Diffusion(model, ["circle", "square"], grid_rows=0)
    checkpoint = saved(task, ImageDiffusion(str(images), 8, 4), tmp_path)
    again = Diffusion.load_from_checkpoint(tmp_path / "x.ckpt")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
    assert checkpoint[KEY]["label_names"] == ["circle", "square"]


def test_what_is_wrong_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the file and the cure, and nothing that leads to running its code."""
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {"a": torch.ones(500)}, "loops": {}, "optimizer_states": []}, good)
    assert set(read_training_checkpoint(good, resume=True)) == {"state_dict", "loops", "optimizer_states"}
    data = good.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("nothing")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.ckpt")
    messages = {
        "half": "damaged or was not written to its end: take an earlier",
        "empty": "damaged",
        "text": "damaged",
        "evil": "could run code when read: it is refused",
        "pickle": "could run code when read: it is refused|damaged",
        "weights": "no checkpoint of a training",
        "missing": "There is no checkpoint",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read_training_checkpoint(tmp_path / f"{name}.ckpt", resume=True)
        assert f"{name}.ckpt" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    full = OSError(errno.ENOSPC, "x")
    assert "No space left" in why_not_written({}, good, full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert "0.0 MB and 0.0 MB are needed" in why_not_written(
        {"a": torch.ones(100)}, good, RuntimeError("writer failed")
    )


def test_plain_data() -> None:
    value = {"a": OptimConfig(), "b": [Path("x"), torch.float16], "c": object()}
    assert plain(value)["a"]["lr"] == 1e-3
    assert plain(value)["b"] == ["x", torch.float16]
    assert plain(value)["c"] == "builtins.object"
    old, new = {"a": {"x": 1, "y": (1, 2)}, "gone": 1}, {"a": {"x": 2, "y": [1, 2]}, "new": 1}
    assert differences(old, new) == {"a.x": (1, 2)}
