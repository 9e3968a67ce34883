"""The folder of a user's own model: complete, checked, loadable by zoo and timm, and not said to be ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import zoo
from zoo.cards import Metric, check_card, is_own_folder, write_own_model
from zoo.record import ModelRecord, read_record, record_of

METRIC = Metric(name="Top-1 accuracy", value=97.5, unit="%", dataset="mine/val", protocol="40 pictures, 24x24, centre")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "repavit_tiny", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3
    )


@pytest.fixture
def record(model: nn.Module) -> ModelRecord:
    record = record_of(model).of_own_weights("repavit_tiny.cifar10")
    return record.updated(label_names=("ant", "bee", "fly"), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.8)


def test_folder_is_complete_and_loads(tmp_path: Path, model: nn.Module, record: ModelRecord) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "confusion.png")
    folder = write_own_model(
        tmp_path / "mine",
        model,
        record,
        metrics=[METRIC],
        training="3 epochs on 120 pictures.",
        config={"trainer": {"max_epochs": 3}},
        picture=tmp_path / "confusion.png",
        caption="Confusion matrix",
    )
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "training.yaml", "confusion.png"}
    assert check_card(folder) == []
    assert read_record(folder) == read_record(folder / "model.safetensors") == record
    assert yaml.safe_load((folder / "training.yaml").read_text()) == {"trainer": {"max_epochs": 3}}
    text = (folder / "README.md").read_text()
    assert "model(image[None]).softmax" in text
    assert "97.5 %" in text
    assert "ant, bee, fly" in text
    assert "by the authors of" not in text.replace("\n", " ")
    batch = torch.randn(2, 3, 16, 16)
    model.eval()
    for loaded in (zoo.create_model(str(folder)), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
        assert torch.equal(loaded(batch), model(batch))
        data = timm.data.resolve_model_data_config(loaded)
        assert (data["input_size"], data["mean"], data["crop_pct"]) == ((3, 16, 16), (0.5, 0.5, 0.5), 0.8)
        assert tuple(loaded.pretrained_cfg["label_names"]) == ("ant", "bee", "fly")


def test_only_own_folders_are_replaced(tmp_path: Path, model: nn.Module, record: ModelRecord) -> None:
    arguments = dict(metrics=[METRIC], training="3 epochs.")
    folder = write_own_model(tmp_path / "mine", model, record, **arguments)
    assert is_own_folder(folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_own_model(folder, model, record, **arguments)
    write_own_model(folder, model, record.updated(temperature=0.5), overwrite=True, **arguments)
    assert "(model(image[None]) / 0.5).softmax" in (folder / "README.md").read_text()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a")
    with pytest.raises(FileExistsError, match="no folder of an own model"):
        write_own_model(tmp_path / "photos", model, record, overwrite=True, **arguments)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.txt"]


def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path: Path, model: nn.Module, record: ModelRecord) -> None:
    with pytest.raises(ValueError, match="no metrics"):
        write_own_model(tmp_path / "mine", model, record, metrics=[], training="3 epochs.")
    assert list(tmp_path.iterdir()) == []
    folder = write_own_model(tmp_path / "mine", model, record, metrics=[METRIC], training="3 epochs.")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert any("sha256" in problem for problem in check_card(folder))
