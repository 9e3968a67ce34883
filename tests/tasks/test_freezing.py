"""Frozen parts stand still: parameters, and the statistics of norms, whatever mode Lightning asks for."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from image_sets import image_folder
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.data.images import ImageClassification
from zoo.tasks.classification import Classification
from zoo.tasks.freezing import freeze
from zoo.tasks.optim import OptimConfig


class Stages(nn.Module):
    """Eleven stages, so that one number begins another."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(11))


def test_prefixes_are_whole_parts() -> None:
    model = Stages()
    still = freeze(model, ["stages.1"], "x")
    assert still == [model.stages[1][1]]
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {name for name, _ in model.named_parameters() if name.startswith("stages.1.")}
    assert len(freeze(model, ["stages.10.", "stages.2.1.weight", "stages.2.1.bias"], "x")) == 3
    with pytest.raises(ValueError, match=r"no parameter of x starts with 'stage\.1'\. Did you mean 'stages\.1'"):
        freeze(model, ["stage.1"], "x")


@pytest.mark.slow
def test_statistics_stand_still(tmp_path: Path) -> None:
    """A run with validation and weight averaging changes nothing in frozen stages, and all of the others."""
    parts = ["stem", "stages.0", "stages.1"]
    task = Classification("emov2_1m", 2, freeze=parts, optim=OptimConfig(lr=0.01, warmup=0.0))
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[EMAWeightAveraging(decay=0.5)],
        )  # fmt: skip
        trainer.fit(task, ImageClassification(str(image_folder(tmp_path, 4, 2, size=32)), 32, 4))
    task.train()
    task(torch.randn(4, 3, 32, 32))
    for key, value in task.model.state_dict().items():
        fixed = key.startswith(tuple(f"{part}." for part in parts))
        if fixed or "running" in key:
            assert torch.equal(value, before[key]) == fixed, key
