"""The record of a model: plain data, read from wherever it was written, enough to build the model again."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg

import zoo
from zoo import record as records
from zoo.cfg import ModelCfg, RestorationCfg
from zoo.record import KEY, ModelRecord, RecordError, attach, described, read_record, record_in, record_of, write_config
from zoo.weights import CheckpointError, cards_dir, read_weights, save_checkpoint

TINY = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3)


def _record() -> ModelRecord:
    model = timm.create_model("repavit_tiny", in_chans=1, **TINY)
    return (
        record_of(model)
        .of_own_weights("repavit_tiny.cifar10")
        .updated(label_names=["a", "b", "c"], mean=[0.5], std=[0.25], crop_pct=1.0, interpolation="bilinear")
    )


def test_record_of_a_build_has_what_the_model_was_built_with() -> None:
    record = _record()
    assert record.architecture == "repavit_tiny"
    assert record.model_args == {key: value for key, value in TINY.items() if key != "num_classes"} | {"in_chans": 1}
    assert (record.num_classes, record.label_names) == (3, ("a", "b", "c"))
    assert (record.input_size, record.mean, record.crop_pct) == ((1, 16, 16), (0.5,), 1.0)
    assert record.base == "repavit_tiny.cifar10"
    assert "tag" not in record.pretrained_cfg
    again = timm.create_model(record.architecture, num_classes=3, **record.model_args)
    built = timm.create_model("repavit_tiny", in_chans=1, **TINY).state_dict()
    assert {key: value.shape for key, value in again.state_dict().items()} == {k: v.shape for k, v in built.items()}


def test_arguments_of_a_tag_are_recorded_and_its_label_names_only_with_its_classes() -> None:
    record = record_of(timm.create_model("emov2_1m.cifar10"))
    assert record.model_args == {"window_size": (7, 7, 4, 2)}
    assert record.input_size == (3, 64, 64)
    assert record.label_names is not None
    other = timm.create_model("emov2_1m.cifar10", num_classes=4)
    assert record_of(other).label_names is None
    assert "label_names" not in other.pretrained_cfg


def test_a_new_head_changes_the_record() -> None:
    model = timm.create_model("repavit_tiny", **TINY)
    attach(model, record_of(model).updated(label_names=("a", "b", "c")))
    assert model.pretrained_cfg["label_names"] == ("a", "b", "c")
    model.reset_classifier(5)
    assert (record_of(model).num_classes, record_of(model).label_names) == (5, None)


def test_size_that_timm_takes_from_the_cfg_becomes_an_argument() -> None:
    """Else the input size of a training would build another network."""
    record = record_of(timm.create_model("efficientvit_msra_m0"))
    assert record.updated(input_size=(3, 64, 64)).model_args == {"img_size": (224, 224)}


def test_round_trips(tmp_path: Path) -> None:
    record = _record()
    assert ModelRecord.from_config(json.loads(record.to_text())) == record
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record
    write_config(tmp_path, record)
    assert read_record(tmp_path) == record
    save_checkpoint({"x": torch.zeros(1)}, tmp_path / "w" / "model.safetensors", record=record)
    assert read_record(tmp_path / "w" / "model.safetensors") == record
    assert read_weights(tmp_path / "w" / "model.safetensors")[1] == record
    torch.save({"state_dict": {"model.x": torch.zeros(1)}, KEY: record.to_config()}, tmp_path / "w" / "x.ckpt")
    checkpoint = torch.load(tmp_path / "w" / "x.ckpt", weights_only=True)
    assert record_in(checkpoint) == record
    assert read_weights(tmp_path / "w" / "x.ckpt")[1] == record
    torch.save({"x": torch.zeros(1)}, tmp_path / "bare.pth")
    assert read_weights(tmp_path / "bare.pth")[1] is None
    assert read_record(tmp_path / "bare.pth") == record  # config.json beside it


def test_restorers_keep_scale_and_noise() -> None:
    import zoo.restoration  # noqa: F401

    record = record_of(timm.create_model("restormer_tiny_denoise_color.bsds"))
    again = ModelRecord.from_config(record.to_config())
    assert again == record
    assert (again.task, again.scale, again.num_classes) == ("denoise", 1, 0)
    assert again.sigma == timm.get_pretrained_cfg("restormer_tiny_denoise_color.bsds").sigma  # type: ignore[union-attr]
    assert RestorationCfg(**again.cfg_fields()).value_range == (0.0, 1.0)


@pytest.mark.parametrize("folder", sorted(cards_dir().glob("*/config.json")), ids=lambda path: path.parent.name)
def test_shipped_configs_are_records(folder: Path) -> None:
    name = folder.parent.name
    record, built = read_record(folder.parent), record_of(timm.create_model(name))
    assert record is not None
    assert record == built


def test_every_field_of_timm_has_a_place() -> None:
    fields = {entry.name for entry in dataclasses.fields(PretrainedCfg)}
    assert fields == {*records._TIMM_FIELDS, *records._SOURCES, "num_classes", "label_names"}
    own = {entry.name for entry in dataclasses.fields(RestorationCfg)} - fields
    model = {"task", "sha256", "model_args", "top1", "parity", "hub_search", "temperature", "threshold"}
    assert own == {*records._ZOO_FIELDS, *model}
    assert model == {entry.name for entry in dataclasses.fields(ModelCfg)} - fields


def test_models_of_timm_have_a_record_where_their_cfg_names_them() -> None:
    model = torch.nn.Module()
    for cfg in (None, {}, {"num_classes": 5}):
        model.pretrained_cfg = cfg
        with pytest.raises(RecordError, match="Module was built from its class"):
            record_of(model)
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "num_classes": 5}
    assert (record_of(model).architecture, record_of(model).num_classes) == ("vit_tiny_patch16_224", 5)


def test_arguments_that_are_no_data_are_named() -> None:
    record = described("vit_tiny_patch16_224", {"num_classes": 10}, {"act_layer": torch.nn.ReLU, "qk_norm": True})
    assert record.model_args == {"qk_norm": True}
    assert record.not_recorded == ("act_layer",)
    assert record.input_size == (3, 224, 224)
    assert ModelRecord.from_config(record.to_config()).not_recorded == ("act_layer",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "names no architecture"),
        ({"architecture": 3}, "names no architecture"),
        ({"_class_name": "SD3Transformer2DModel"}, "one part of a diffusers pipeline, SD3Transformer2DModel: give"),
        ({"architecture": "x", "model_args": []}, "mappings"),
        ({"architecture": "x", "pretrained_cfg": 4}, "mappings"),
        ({"architecture": "x", "num_classes": "ten"}, "number"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        ModelRecord.from_config(config)
    torch.save({"state_dict": {"x": torch.zeros(1)}, KEY: config}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_weights(tmp_path / "x.ckpt")


def test_wrong_facts_are_refused() -> None:
    with pytest.raises(RecordError, match="Did you mean 'mean'"):
        _record().updated(maen=(0.5,))
    with pytest.raises(RecordError, match="2 label names for 3 classes"):
        _record().updated(label_names=("a", "b"))


def test_reading_a_record_does_not_import_torch(tmp_path: Path) -> None:
    save_checkpoint({"x": torch.zeros(1)}, tmp_path / "model.safetensors", record=_record())
    code = (
        "import sys, types;"
        "package = sys.modules['zoo'] = types.ModuleType('zoo');"
        f"package.__path__ = [{str(Path(zoo.__file__).parent)!r}];"  # the package itself registers models
        "from zoo.record import read_record;"
        f"assert read_record({str(tmp_path / 'model.safetensors')!r}).num_classes == 3;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
