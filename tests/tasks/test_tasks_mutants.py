"""Training tasks: bugs of one line that the other tests would let live."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from zoo.ffn.ewa import EWAConfig
from zoo.moe import MoEConfig, record_balance
from zoo.tasks import callbacks
from zoo.tasks.callbacks import AverageExperts
from zoo.tasks.classification import Classification
from zoo.tasks.optim import OptimConfig
from zoo.tasks.restoration import Restoration, fft_loss, initialize
from zoo.tasks.teachers import Teachers
from zoo.weights import CheckpointError, save_checkpoint

TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=1)


def module(**kwargs: Any) -> Classification:
    return Classification("vit_tiny_patch16_224", **{"num_classes": 4, "model_args": TINY, **kwargs})


@pytest.mark.parametrize("mixing", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_label_smoothing_reaches_mixed_targets(mixing: dict[str, float]) -> None:
    """A class that is on no image of the batch keeps its share of the uniform distribution."""
    task = module(label_smoothing=0.2, **mixing)
    assert task.mix is not None
    _, targets = task.mix(torch.rand(4, 3, 16, 16), torch.tensor([1, 1, 1, 1]))
    expected = F.one_hot(torch.tensor([1, 1, 1, 1]), 4) * 0.8 + 0.05
    torch.testing.assert_close(targets, expected)


def test_label_smoothing_without_mixing() -> None:
    task, logits = module(label_smoothing=0.3), torch.randn(2, 4)
    targets = F.one_hot(torch.tensor([0, 3]), 4) * 0.7 + 0.3 / 4
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task.loss(logits, torch.tensor([0, 3])), expected)


def frozen(task: Classification) -> set[str]:
    return {name for name, parameter in task.model.named_parameters() if not parameter.requires_grad}


def test_frozen_prefixes_are_beginnings_of_names() -> None:
    """ "norm" is the last norm, not blocks.0.norm1."""
    names = frozen(module(freeze=["norm", "patch_embed"]))
    assert names == {"norm.weight", "norm.bias", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    with pytest.raises(ValueError, match="no parameter of vit_tiny_patch16_224 starts with 'attn'"):
        module(freeze=["attn"])


def test_excepted_prefixes_are_beginnings_of_names(tmp_path: Path) -> None:
    """A part in the middle of a name excepts nothing; an excepted weight that fits is loaded all the same."""
    inner = nn.ModuleDict({"up": nn.Linear(2, 2)})
    model = nn.ModuleDict({"up": nn.Linear(2, 3), "body": inner})
    given = {
        **{f"body.{key}": torch.ones_like(value) for key, value in inner.state_dict().items()},
        "up.bias": torch.full((3,), 7.0),
    }
    save_checkpoint(given, tmp_path / "a.safetensors")
    before = model["up"].weight.clone()
    initialize(model, tmp_path / "a.safetensors", ["up"])
    assert torch.equal(model["up"].weight, before)
    assert model["up"].bias.tolist() == [7.0] * 3
    del given["body.up.bias"]
    save_checkpoint(given, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: body\.up\.bias"):
        initialize(model, tmp_path / "b.safetensors", ["up"])


# --- settings, checkpoints, pictures


def test_settings_that_are_not_given() -> None:
    """Recipes rely on them."""
    assert OptimConfig() == OptimConfig(
        opt="adamw",
        lr=1e-3,
        weight_decay=0.05,
        sched="cosine",
        decay_rate=0.1,
        warmup=0.05,
        warmup_lr=1e-6,
        min_lr=1e-6,
    )
    assert (module().hparams["temperature"], module().hparams["distillation_weight"]) == (1.0, 0.5)


def test_rates_are_scaled_by_layers_or_by_kinds() -> None:
    assert OptimConfig(block_lr={"ffn": 2.0}).layer_decay is None
    assert OptimConfig(layer_decay=0.7).block_lr is None
    with pytest.raises(ValueError, match="block_lr and layer_decay both scale learning rates"):
        OptimConfig(block_lr={"ffn": 2.0}, layer_decay=0.7)


def test_a_checkpoint_is_read_without_a_trainer_too() -> None:
    task = module()
    checkpoint = {"state_dict": task.state_dict(), "schedule_shift": 3, "hyper_parameters": {"num_classes": 9}}
    task.on_load_checkpoint(checkpoint)
    assert task._shift == 3
    task._trainer = SimpleNamespace(ckpt_path="a.ckpt", training=False)  # type: ignore[assignment]
    task.on_load_checkpoint(checkpoint)  # only a run that goes on needs the same settings
    task._trainer = None
    with pytest.raises(CheckpointError, match=r"^The checkpoint "):
        task.on_load_checkpoint({"state_dict": {"model.x": torch.ones(1)}})


@pytest.mark.parametrize("rank", [None, 2])
def test_adapters_are_recorded_where_there_are_any(rank: int | None) -> None:
    record = module(lora=rank).model_record()
    assert record is not None
    assert list(record.changes) == ([{"technique": "lora", "rank": 2}] if rank else [])


def test_a_task_trains_when_it_is_told_to() -> None:
    assert module().eval().train().training
    assert not module().train(False).training


def test_low_resolution_is_without_aliases_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the columns are white, those that the nearest pixels alone would show."""
    task, seen = module(low_res=(4, 0.7)), list[torch.Tensor]()
    monkeypatch.setattr(task, "_loss", lambda images, *_: seen.append(images) or images.sum())
    images = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(4).expand(2, 3, 16, 16)
    for step in (0, 6, 7):
        task._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=10)  # type: ignore[assignment]
        task.training_step((images, torch.tensor([0, 1])), step)
    assert [batch.shape[-1] for batch in seen] == [4, 4, 16]
    assert seen[0][..., 1:-1].sub(0.5).abs().max() < 0.2


def test_pictures_are_stretched_and_framed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Darkest is 0 and brightest 1, also where all are equal; red is wrong, green is right."""

    class Board(TensorBoardLogger):
        def __init__(self) -> None:
            self.shown: list[torch.Tensor] = []

        @property
        def experiment(self) -> Any:
            return SimpleNamespace(add_image=lambda name, image, step: self.shown.append(image))

    board, task = Board(), module()
    monkeypatch.setattr(Classification, "loggers", property(lambda self: [board]))
    images = torch.linspace(-2, 3, 2 * 36).view(2, 1, 6, 6)
    task._log_pictures(images, torch.tensor([False, True]))
    task._log_pictures(torch.full((1, 1, 6, 6), 5.0), torch.tensor([True]))
    both, flat = board.shown  # a grid has two pixels between pictures, and around them
    torch.testing.assert_close(both[:, 2, 2], torch.tensor([0.85, 0.1, 0.1]))
    torch.testing.assert_close(both[:, 2, 14], torch.tensor([0.1, 0.7, 0.1]))
    assert (both[0, 4, 4], both[0, 9, 21]) == (0, pytest.approx(1))
    assert (flat[:, 2:-2, 2:-2] == 0).all()


# --- experts


def test_the_balance_loss_counts_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the routers, free experts at 0.75, times `balance`, beside the cross-entropy; logged apart."""
    experts = MoEConfig(shared=1, experts=3, top_k=2, scores="random", zero=1)
    task = module(experts=experts, balance=0.5, label_smoothing=0.0).eval()
    logged: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **kwargs: logged.update({name: float(value)}))
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    with record_balance(task.model) as balances, torch.no_grad():
        loss = F.cross_entropy(task(images), targets)
    mean = float(torch.stack(balances).mean())
    with torch.no_grad():
        total = float(task.training_step((images, targets), 0))
    assert len(balances) == 2
    assert total == pytest.approx(float(loss) + 0.5 * mean, rel=1e-5)
    assert logged == pytest.approx({"train/loss": float(loss), "train/balance": mean}, rel=1e-5)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, 6), (2, 3), (4, 2)])
def test_experts_are_averaged_after_optimizer_steps_only(
    monkeypatch: pytest.MonkeyPatch, accumulate: int, expected: int
) -> None:
    """Batches that only add up gradients leave the experts alone; the last step of an epoch may be a short one."""
    rates: list[float] = []
    monkeypatch.setattr(callbacks, "average", lambda model, rate: rates.append(rate))
    task = module(label_smoothing=0.0)
    data = DataLoader([(torch.randn(3, 16, 16), index % 4) for index in range(6)], batch_size=1)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate,
        callbacks=[AverageExperts(EWAConfig(every=1, share_rate=0.25))],
    ).fit(task, data)  # fmt: skip
    assert rates == [0.25] * expected


# --- teachers


def test_soft_teachers_are_weighed_by_the_square_of_the_temperature() -> None:
    """Hinton's loss: T² KL(teacher || student) of both softened, a mean over the batch."""
    teachers = Teachers([], 5, "soft", temperature=3.0)
    logits, told = torch.randn(4, 5), torch.randn(4, 5).softmax(-1)
    student = (logits / 3).log_softmax(-1)
    expected = 9 * (told * (told.log() - student)).sum(-1).mean()
    torch.testing.assert_close(teachers.loss(logits, told), expected)
    hard = Teachers([], 5, "hard")
    torch.testing.assert_close(hard.loss(logits, told), F.cross_entropy(logits, told.argmax(-1)))


class Fixed(nn.Module):
    """Gives the mean of each channel as logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def test_teachers_see_their_own_size_and_normalisation() -> None:
    teachers = Teachers([], 3, "soft", temperature=2.0)
    teachers.models = [Fixed(), Fixed()]
    data = dict(input_size=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    plain = dict(input_size=(3, 4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    teachers._data = [data, plain]
    pixels = torch.rand(3).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    own = (pixels[:, :, 0, 0] - torch.tensor(data["mean"])) / torch.tensor(data["std"])
    expected = ((own / 2).softmax(-1) + (pixels[:, :, 0, 0] / 2).softmax(-1)) / 2
    torch.testing.assert_close(teachers(images, mean, std), expected)


def test_distillation_has_its_share_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - w) of the labels' loss and w of the teachers'."""
    task = module(label_smoothing=0.0, distillation_weight=0.25).eval()
    task.teachers = Teachers([], 4)
    told = torch.randn(2, 4).softmax(-1)
    monkeypatch.setattr(task, "_ask", lambda teachers, images: told)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    images, targets = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    with torch.no_grad():
        logits, total = task(images), task.training_step((images, targets), 0)
    labels, taught = F.cross_entropy(logits, targets), task.teachers.loss(logits, told)
    torch.testing.assert_close(total, 0.75 * labels + 0.25 * taught)


# --- restoration


def restoration(**kwargs: Any) -> Restoration:
    return Restoration("cfsr_x2", dict(embed_dim=8, depths=(1,), kernel_size=3), **kwargs)


@pytest.mark.parametrize("loss", ["l1", "mse", "charbonnier"])
def test_losses_of_restoration(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    task = restoration(loss=loss, fft_weight=0.05)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    small, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        difference = task(small) - target
        found = task.training_step((small, target), 0)
    expected = {
        "l1": difference.abs().mean(),
        "mse": difference.square().mean(),
        "charbonnier": (difference.square() + 1e-6).sqrt().mean(),
    }[loss]
    spectrum = torch.fft.rfft2(difference)
    fourier = torch.stack([spectrum.real, spectrum.imag]).abs().mean()
    torch.testing.assert_close(fft_loss(difference, torch.zeros_like(difference)), fourier)
    torch.testing.assert_close(found, expected + 0.05 * fourier)


def test_mixed_pairs_belong_together() -> None:
    """Input and target are mixed in one order with one share."""
    task = restoration(mixup=1.2)
    target = torch.rand(4, 3, 4, 4)
    mixed = 0
    for seed in range(6):
        torch.manual_seed(seed)
        small, large = task._mix(target[..., ::2, ::2].clone(), target.clone())
        torch.testing.assert_close(small, large[..., ::2, ::2])
        mixed += not torch.equal(large, target)
    assert 0 < mixed < 6
