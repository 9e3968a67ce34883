"""Teachers see what the student sees, and what they say counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_sets import image_folder
from lightning import Trainer
from tiny_folders import classifier_folder
from torch import Tensor

import zoo
from zoo.data.images import ImageClassification
from zoo.tasks.classification import Classification
from zoo.tasks.teachers import Teachers

HALF = (0.5, 0.5, 0.5)
LSNET = dict(img_size=64, dims=(16, 24, 32, 48), depths=(1, 1, 1, 1), distillation=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return str(classifier_folder(folder))


def test_own_size_and_normalisation(teacher: str) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    model: Any = zoo.create_model(teacher).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    small = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    wanted = model((small - mean) / std).softmax(-1)
    found = Teachers([teacher], 3)((pixels - 0.5) / 0.5, HALF, HALF)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Teachers([teacher, teacher], 3)((pixels - 0.5) / 0.5, HALF, HALF), found)


def test_gray_images_of_a_student(teacher: str) -> None:
    pixels = torch.rand(2, 1, 32, 32)
    found = Teachers([teacher], 3)(pixels, (0.0,), (1.0,))
    torch.testing.assert_close(found, Teachers([teacher], 3)(pixels.expand(-1, 3, -1, -1), (0.0,) * 3, (1.0,) * 3))


def test_losses(teacher: str) -> None:
    """The student that agrees has no soft loss; the gradient keeps its size at other temperatures; hard is a label."""
    logits = torch.randn(4, 3, dtype=torch.float64)
    soft = Teachers([teacher], 3, temperature=4.0)
    assert float(soft.loss(logits, (logits / 4).softmax(-1))) == pytest.approx(0, abs=1e-12)
    assert float(soft.loss(logits, logits.softmax(-1))) > 0
    hard = Teachers([teacher], 3, kind="hard")
    torch.testing.assert_close(hard.loss(logits, logits.softmax(-1)), F.cross_entropy(logits, logits.argmax(-1)))


def test_classes_are_matched_by_name(teacher: str) -> None:
    """Folders in another order than the teacher's classes; names that it does not know are refused, numbers not."""
    pixels = torch.rand(2, 3, 32, 32)
    names = list(zoo.create_model(teacher).pretrained_cfg["label_names"])
    plain = Teachers([teacher], 3)(pixels, HALF, HALF)
    turned = Teachers([teacher], 3)
    turned.match([names[2], names[0], names[1]])
    torch.testing.assert_close(turned(pixels, HALF, HALF), plain[:, [2, 0, 1]])
    fewer = Teachers([teacher], 3)
    fewer.match([names[1]])
    torch.testing.assert_close(fewer(pixels, HALF, HALF), plain[:, [1, 0, 2]])
    fewer.match(["0", "2", "1"])
    torch.testing.assert_close(fewer(pixels, HALF, HALF), plain[:, [0, 2, 1]])
    with pytest.raises(ValueError, match="the class 'unicorn' of the data but 'red', 'green', 'blue': call"):
        Teachers([teacher], 3).match([*names[:2], "unicorn"])


def test_other_classes(teacher: str) -> None:
    with pytest.raises(ValueError, match="must tell 5 classes as the student, not 3"):
        Teachers([teacher], 5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_second_classifier_learns_from_the_teachers(teacher: str, tmp_path: Path, weight: float) -> None:
    """LSNet's: labels reach the first classifier only, teachers the second only; no checkpoint holds a teacher."""
    task = Classification("lsnet_t", 3, LSNET, teachers=[teacher], distillation="hard", distillation_weight=weight)
    images = image_folder(tmp_path / "images", train=4, val=3)
    for old, new in (("circle", "red"), ("square", "green")):  # the teacher's classes
        for split in ("train", "val"):
            (images / split / old).rename(images / split / new)
    data = ImageClassification(str(images), image_size=64, batch_size=4)
    grads: dict[str, Tensor] = {}
    for name in ("head", "head_dist"):
        parameter = task.model.get_parameter(f"{name}.linear.weight")
        parameter.register_hook(partial(grads.__setitem__, name))
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, data)
    taught, told = ("head_dist", "head") if weight else ("head", "head_dist")
    assert grads[taught].abs().max() > 0
    assert grads[told].abs().max() == 0
    assert "train/distillation" in trainer.callback_metrics
    assert not any("teacher" in key for key in task.state_dict())
