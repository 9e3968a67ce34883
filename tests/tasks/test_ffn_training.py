"""Feed-forward techniques as one setting of a training: each learns, is saved, and is the technique itself."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_sets import image_folder
from lightning import Trainer

import zoo
from zoo.data.images import ImageClassification
from zoo.ffn import matformer
from zoo.ffn.structured import SelfGuided
from zoo.ffn.technique import technique_module
from zoo.tasks.classification import Classification
from zoo.tasks.ffn_training import _CONFIGS
from zoo.tasks.own_model import SaveOwnModel

VIT = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg")
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(17, 17, 17, 17), conv_mlp=True)
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_CONFIGS),
    "block_ffn": {"expert_dim": 16},
    "structured": {"guided": True, "structure": "block_shuffle"},
    "matformer": {"sampling": "sandwich"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=4, val=2, size=32)


def task_of(technique: str, **kwargs: Any) -> Classification:
    torch.manual_seed(0)
    name, arguments = ("convnext_atto", CONVNEXT) if technique == "fdconv" else ("vit_tiny_patch16_224", VIT)
    ffn = {"technique": technique, **(SETTINGS[technique] or {})}
    return Classification(name, 2, dict(arguments), ffn=ffn, label_smoothing=0.0, **kwargs)


@pytest.mark.parametrize("technique", SETTINGS)
def test_each_technique_is_one_setting(technique: str, folder: Path, tmp_path: Path) -> None:
    """A step changes its weights, and the checkpoint and the folder are the model that was trained."""
    task = task_of(technique)
    assert [change["technique"] for change in task.model.ffn_changes] == [technique]
    before = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}
    size = 32 if technique == "fdconv" else 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
            callbacks=SaveOwnModel(tmp_path / "model"),
        )  # fmt: skip
        trainer.fit(task, ImageClassification(str(folder), image_size=size, batch_size=4, crop_padding=1))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert any(not torch.equal(value, before[name]) for name, value in task.model.named_parameters())
    x = torch.randn(2, 3, size, size)
    for left in ("last.ckpt", "model"):
        loaded = zoo.create_model(tmp_path / left)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), task.model.eval()(x), rtol=1e-5, atol=1e-5)
        assert not any(isinstance(module, SelfGuided) for module in loaded.modules())


def quiet(task: Classification, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Let training steps run without a trainer, and return what they log."""
    logged: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **kwargs: logged.update({name: float(value.detach())}))
    monkeypatch.setattr(Classification, "trainer", SimpleNamespace(estimated_stepping_batches=10))
    monkeypatch.setattr(Classification, "schedule_step", 5)
    return logged


def test_a_step_of_matformer_is_the_sum_over_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the models cut out at every width; afterwards the model is whole again."""
    monkeypatch.setitem(SETTINGS, "matformer", {"sampling": "all", "widths": (0.25, 0.5, 1.0)})
    task = task_of("matformer").double()
    quiet(task, monkeypatch)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.double), torch.tensor([0, 1, 1, 0])
    loss = task.training_step((images, labels), 0)
    loss.backward()
    expected = 0.0
    for width in (0.25, 0.5, 1.0):
        part = zoo.create_model("vit_tiny_patch16_224", num_classes=2, **VIT).double()
        matformer.apply(part)
        part.load_state_dict(task.model.state_dict())
        matformer.export_width(part, width)
        expected += float(torch.nn.functional.cross_entropy(part(images), labels).detach())
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-10)
    assert task.model.blocks[0].mlp.fc1.width is None
    assert task.model.blocks[0].mlp.fc1.weight.grad is not None


def test_losses_and_schedules_of_techniques_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    task = task_of("block_ffn")
    logged = quiet(task, monkeypatch)
    loss = float(task.training_step(batch, 0).detach())
    assert loss == pytest.approx(sum(logged[f"train/{name}"] for name in ("loss", "locality", "sparsification")))
    task = task_of("sigma_moe")
    logged = quiet(task, monkeypatch)
    loss = float(task.training_step(batch, 0).detach())
    assert loss == pytest.approx(logged["train/loss"] + logged["train/entropy"])
    assert -1e-3 * math.log(16) <= logged["train/entropy"] < -0.9e-3 * math.log(16)
    task = task_of("structured")
    quiet(task, monkeypatch)
    task.training_step(batch, 0)
    assert max(module.share for module in task.modules() if isinstance(module, SelfGuided)) < 1e-9
    monkeypatch.setattr(Classification, "schedule_step", 0)
    task.training_step(batch, 0)
    assert {module.share for module in task.modules() if isinstance(module, SelfGuided)} == {1.0}
    task = task_of("versatile")
    quiet(task, monkeypatch)
    task.training_step(batch, 0)
    assert task.model.blocks[0].mlp.temperature == pytest.approx((5.0 * 0.1) ** 0.5)


def test_techniques_are_those_of_the_package() -> None:
    for technique, config in _CONFIGS.items():
        assert hasattr(technique_module(technique), config)


@pytest.mark.parametrize(
    ("ffn", "said"),
    [
        ("matfromer", "Did you mean matformer?"),
        ("ewa", "AverageExperts"),
        ({"technique": "hourglass", "layer": 3}, "hourglass has no setting 'layer'; it has "),
        ({"widths": (1.0,)}, "no technique to train with is called ''"),
        ({"technique": "block_ffn", "expert_dim": 60}, "64 channels are no whole experts of 60; 64 fits"),
    ],
)
def test_a_wrong_setting_is_one_line(ffn: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Classification("vit_tiny_patch16_224", 2, dict(VIT), ffn=ffn)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_excludes_experts_and_adapters() -> None:
    with pytest.raises(ValueError, match="leave experts and lora out"):
        Classification("vit_tiny_patch16_224", 2, dict(VIT), ffn="matformer", lora=2)


def test_values_of_another_type_are_named() -> None:
    for ffn, message in (
        ({"technique": "matformer", "widths": 0.5}, r"widths must be tuple, got 0\.5"),
        ({"technique": "hourglass", "pattern": "["}, "pattern is no regular expression"),
        ({"technique": "sigma_moe", "entropy": "much"}, "entropy is the weight of a loss, a number of at least 0"),
        ({"technique": "block_ffn", "locality": -1}, "locality is the weight of a loss"),
        ("s2ft", r"s2ft is switched on by zoo\.ffn\.s2ft"),
    ):
        with pytest.raises(ValueError, match=message):
            Classification("vit_tiny_patch16_224", 2, dict(VIT), ffn=ffn)
