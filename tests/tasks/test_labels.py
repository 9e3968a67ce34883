"""Labels that do not fit the model are refused before the first step, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import image_folder, picture
from lightning import Trainer
from torch.utils.data import DataLoader

from zoo.data.images import ImageClassification
from zoo.notices import Notice
from zoo.tasks.classification import Classification

TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)


def fit(classes: int, data: Any, **kwargs: Any) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Classification("repavit_tiny", classes, TINY, **kwargs), data)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_more_classes_than_the_model_has(mixup: float, tmp_path: Path) -> None:
    root = image_folder(tmp_path, 4, 2)
    (root / "train" / "triangle").mkdir()
    picture(0, 0).save(root / "train" / "triangle" / "0.png")
    with pytest.raises(ValueError, match=r"3 classes \(circle, square, triangle\), the model 2: set num_classes to 3"):
        fit(2, ImageClassification(str(root), 16, 2), mixup=mixup)


def test_fewer_classes_than_the_model_has(tmp_path: Path) -> None:
    with pytest.warns(Notice, match=r"The data has 2 classes \(circle, square\), the model 5"):
        fit(5, ImageClassification(str(image_folder(tmp_path, 4, 2)), 16, 2))


def test_labels_of_another_loader() -> None:
    loader = DataLoader([(torch.zeros(3, 16, 16), 7)] * 4, batch_size=2)
    with pytest.raises(ValueError, match=r"The data has the label 7; the model knows 0 \.\.\. 1: set num_classes"):
        fit(2, loader)
