"""An interrupted run continues exactly: every weight of the resumed run equals that of the uninterrupted one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import image_folder, photo_folder
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

import zoo  # noqa: F401  registers the models
from zoo.data.images import ImageClassification
from zoo.data.paired_images import BicubicDownscale, PairedImages, Phase
from zoo.notices import Notice
from zoo.tasks.callbacks import CheckedCheckpointIO, ExactResume
from zoo.tasks.classification import Classification
from zoo.tasks.optim import OptimConfig
from zoo.tasks.restoration import Restoration
from zoo.weights import CheckpointError

Run = tuple[dict[str, Tensor], dict[tuple[int, int], float]]

EPOCHS, STEPS = 2, 4
TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, drop_path_rate=0.2, drop_rate=0.2)


class Losses(Callback):
    """Record the loss of each batch by (epoch, batch)."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"])


class Checkpoints(Callback):
    """Write a checkpoint under a name of its own wherever Lightning's hooks allow it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"val_{trainer.global_step}.ckpt")


class RandomValidation(Classification):
    """Draws random numbers in validation, as sampling does."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        torch.rand(3)
        super().validation_step(batch, batch_idx)


def fit(
    root: Path, data: Path, *, workers: int = 0, resume: Path | None = None, accumulate: int = 1, val_every: int = 4
) -> Run:
    """Train, or go on training, and return all weights and the loss of each batch."""
    torch.manual_seed(1 if resume is None else 99)  # what happened before in the process must not matter
    module = RandomValidation(
        "repavit_tiny",
        num_classes=2,
        model_args=TINY,
        optim=OptimConfig(lr=1e-2, warmup=0.25),
        mixup=0.5,
        cutmix=0.5,
    )
    images = ImageClassification(
        str(data), image_size=16, batch_size=4, num_workers=workers, auto_augment="rand-m9-mstd0.5", reprob=0.5, seed=3
    )
    losses = Losses()
    every_step = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False)
    callbacks: list[Callback] = [
        ExactResume(), EMAWeightAveraging(decay=0.7, update_starting_at_step=2), losses, every_step, Checkpoints(root)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            accumulate_grad_batches=accumulate,
            val_check_interval=val_every,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            plugins=[CheckedCheckpointIO()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(module, images, ckpt_path=resume, weights_only=False)
    return {key: value.clone() for key, value in module.state_dict().items()}, losses.seen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=STEPS * 2, val=2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Run]:
    """Return the checkpoints and the result of a run with validation at the end of each epoch."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, fit(folder, data)


def assert_same(found: Run, expected: Run) -> None:
    """Every loss after the resume and every weight must be equal, to the bit."""
    for place, loss in found[1].items():
        assert loss == expected[1][place], f"the loss of (epoch, batch) {place} differs"
    for key, value in expected[0].items():
        assert torch.equal(found[0][key], value), f"{key} differs by {(found[0][key] - value).abs().max()}"


def resume_from_all(
    folder: Path, whole: Run, data: Path, out: Path, val_every: int = STEPS, steps: tuple[int, ...] = ()
) -> None:
    """Resume from every checkpoint of a run, or from those of some steps."""
    checkpoints = {path: int(path.stem.split("=")[-1].split("_")[-1]) for path in folder.glob("*.ckpt")}
    assert set(checkpoints.values()) == set(range(1, EPOCHS * STEPS + 1))
    for checkpoint, step in checkpoints.items():
        if step < EPOCHS * STEPS and (not steps or step in steps):
            resumed = fit(out / checkpoint.stem, data, resume=checkpoint, val_every=val_every)
            assert len(resumed[1]) == EPOCHS * STEPS - step, f"{checkpoint.name}: other number of batches"
            assert_same(resumed, whole)


@pytest.mark.slow
def test_resume_from_every_step(tmp_path: Path, data: Path, uninterrupted: tuple[Path, Run]) -> None:
    """From each checkpoint, after a batch or after validation, in mid-epoch or at its end."""
    resume_from_all(*uninterrupted, data, tmp_path)


@pytest.mark.slow
def test_resume_with_validation_in_mid_epoch(tmp_path: Path, data: Path) -> None:
    """Validation after three of four batches, which also draws random numbers; from around the second one."""
    whole = fit(tmp_path / "whole", data, val_every=3)
    resume_from_all(tmp_path / "whole", whole, data, tmp_path, val_every=3, steps=(3, 6, 7))


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_resume_with_workers(tmp_path: Path, data: Path, uninterrupted: tuple[Path, Run], step: int) -> None:
    """Two loader processes give the numbers of none, at an epoch's end and in mid-epoch."""
    folder, whole = uninterrupted
    resumed = fit(tmp_path, data, workers=2, resume=folder / f"step={step}.ckpt")
    assert_same(resumed, whole)


@pytest.mark.slow
def test_resume_with_gradient_accumulation(tmp_path: Path, data: Path) -> None:
    """Steps of two batches; the checkpoint of step 3 lies in the middle of epoch 1."""
    whole = fit(tmp_path / "whole", data, accumulate=2)
    resumed = fit(tmp_path / "resumed", data, accumulate=2, resume=tmp_path / "whole" / "step=3.ckpt")
    assert min(resumed[1]) == (1, 2)
    assert_same(resumed, whole)


def test_without_exact_resume_the_run_differs(
    tmp_path: Path, data: Path, uninterrupted: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: without the callback's work a resumed run goes elsewhere."""
    folder, whole = uninterrupted
    monkeypatch.setattr(ExactResume, "on_load_checkpoint", lambda *args: None)
    resumed = fit(tmp_path, data, resume=folder / "step=6.ckpt")
    assert not all(torch.equal(resumed[0][key], value) for key, value in whole[0].items())


class Seen(Callback):
    """Record the input of every step."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.inputs[trainer.global_step] = batch[0].clone()


@pytest.mark.slow
def test_resume_in_every_phase(tmp_path: Path) -> None:
    """Progressive patches with mixup: a run that is resumed from any step goes on as the uninterrupted one."""
    photos = photo_folder(tmp_path / "photos", 3)
    phases = [Phase(batches=2, patch_size=8, batch_size=4), Phase(batches=2, patch_size=12, batch_size=2)]

    def train(folder: Path, resume: Path | None = None) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        torch.manual_seed(0 if resume is None else 99)
        module = Restoration(
            "cfsr_x2", dict(embed_dim=8, depths=(1,), kernel_size=5), mixup=1.2, optim=OptimConfig(lr=1e-2)
        )
        images = PairedImages(str(photos), BicubicDownscale(2), patches_per_image=5, phases=phases)
        seen = Seen()
        every_step = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu", max_steps=6, max_epochs=-1, callbacks=[ExactResume(), seen, every_step],
                logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(module, images, ckpt_path=resume, weights_only=False)
        return module.state_dict(), seen.inputs

    weights, inputs = train(tmp_path / "whole")
    assert [tuple(inputs[step].shape) for step in range(6)] == [(4, 3, 8, 8)] * 2 + [(2, 3, 12, 12)] * 4
    for step in (1, 2, 4):  # within a phase, between two, within the second
        again, rest = train(tmp_path / f"from{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert sorted(rest) == list(range(step, 6))
        assert all(torch.equal(rest[place], inputs[place]) for place in rest)
        assert all(torch.equal(again[key], value) for key, value in weights.items())


def short(
    folder: Path, data: Path, batch_size: int = 4, resume: Path | None = None, epochs: int = 2, lr: float = 1e-2,
    **kwargs: Any,
) -> tuple[Trainer, Classification, list[float]]:  # fmt: skip
    """Train a tiny model and return the rate of each step."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = Classification("repavit_tiny", 2, TINY, optim=OptimConfig(lr=lr, warmup=0.0, min_lr=0.0, **kwargs))
    rates = Rates()
    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[ExactResume(), rates, every], logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, ImageClassification(str(data), 16, batch_size), ckpt_path=resume)
    return trainer, task, rates.seen


@pytest.mark.slow
def test_other_settings_are_taken_and_said(tmp_path: Path, data: Path) -> None:
    """A rate given on resume holds, from the next step on, and so does a longer run."""
    _, _, rates = short(tmp_path / "a", data)
    checkpoint = tmp_path / "a" / "step=6.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        _, _, same = short(tmp_path / "b", data, resume=checkpoint)
    assert same == rates[6:]
    with pytest.warns(Notice, match=r"with other settings than before: optim\.lr 0\.01 -> 0\.1") as caught:
        _, _, higher = short(tmp_path / "c", data, resume=checkpoint, lr=0.1)
    assert higher == pytest.approx([10 * rate for rate in rates[6:]])
    assert all("\n" not in str(warning.message) for warning in caught)
    with pytest.warns(Notice, match=r"trainer\.max_epochs 2 -> 4"):
        _, _, longer = short(tmp_path / "d", data, resume=checkpoint, epochs=4)
    assert len(longer) == 10
    assert longer[0] > rates[6]
    with pytest.raises(ValueError, match=r"step=6\.ckpt was made with optim\.opt adamw, not sgd"):
        short(tmp_path / "e", data, resume=checkpoint, opt="sgd")
    with pytest.raises(ValueError, match="other groups of parameters"):
        short(tmp_path / "f", data, resume=checkpoint, layer_decay=0.5)


@pytest.mark.slow
def test_another_batch_size(tmp_path: Path, data: Path) -> None:
    """In mid-epoch refused, at an epoch's end taken: the schedule then stands where the epochs stand."""
    short(tmp_path / "a", data)
    with pytest.raises(
        ValueError, match=r"mid-epoch, after 2 of 4 batches: with batch_size 8 instead of 4, samples"
    ) as e:
        short(tmp_path / "b", data, 8, tmp_path / "a" / "step=6.ckpt")
    assert "\n" not in str(e.value)
    for batch_size, steps in ((8, 2), (2, 8)):
        with pytest.warns(Notice, match=f"batch_size 4 -> {batch_size}"):
            trainer, _, rates = short(tmp_path / str(batch_size), data, batch_size, tmp_path / "a" / "step=4.ckpt")
        assert len(rates) == steps
        assert trainer.global_step == 4 + steps
        assert rates[0] == pytest.approx(0.005), "half of the cosine"


def test_checkpoint_of_another_model(tmp_path: Path, data: Path) -> None:
    trainer, _, _ = short(tmp_path, data, epochs=1)
    other = Classification("repavit_tiny", 2, {**TINY, "embed_dim": 32})
    with pytest.raises(
        CheckpointError, match=r"step=4\.ckpt does not fit this Classification: it has in another shape"
    ):
        trainer.test(other, ImageClassification(str(data), 16, 4), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
