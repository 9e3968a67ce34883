"""Tag, folder, file, copy, checkpoint: the same model, whatever way its weights come; and nothing is guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from registered import BACKBONES, TINY, build, images, smallest
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from zoo.export.network import prepare

import zoo
from zoo.factory import image_size_args
from zoo.ffn import parallel, prune
from zoo.record import KEY, attach, record_of, write_config
from zoo.weights import CheckpointError, cards_dir, save_checkpoint, shipped

NAMES = sorted(path.parent.name for path in cards_dir().glob("*/config.json"))
VIT = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=1)


def own(model: nn.Module, **facts: Any) -> nn.Module:
    """Make a model the user's: its classes, size and normalisation."""
    size = tuple(images_of(model).shape[1:])
    names = tuple(f"class {chr(97 + i)}" for i in range(int(model.num_classes)))  # type: ignore[call-overload]
    record = (
        record_of(model)
        .of_own_weights("started.from")
        .updated(
            **{
                "label_names": names,
                "input_size": size,
                "mean": (0.4,) * 3,
                "std": (0.3,) * 3,
                "crop_pct": 0.77,
                **facts,
            }
        )
    )
    attach(model, record)
    return model


def images_of(model: nn.Module) -> Tensor:
    cfg: Any = model.pretrained_cfg
    return torch.randn(2, *cfg["input_size"], generator=torch.Generator().manual_seed(1))


def checkpoint(model: nn.Module, path: Path, **others: Any) -> Path:
    """Write what a training writes."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1, KEY: record_of(model).to_config(), **others}, path)
    return path


def facts_of(model: nn.Module) -> tuple[Any, ...]:
    cfg: Any = model.pretrained_cfg
    return resolve_model_data_config(model), cfg.get("label_names"), record_of(model).task


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_shipped_weights_are_the_same_every_way(name: str, tmp_path: Path) -> None:
    """To the bit; what an exporter writes, the merged network, to 1e-5. Writing it is tests/export's, on small ones."""
    model = zoo.create_model(name, pretrained=True)
    side = 16 if hasattr(model, "scale") else 64  # restorers take any
    copy = shutil.copy(shipped(name), tmp_path / "downloaded.safetensors")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    write_config(tmp_path, record_of(model))
    batch = images_of(model)[..., :side, :side]
    expected = model(batch)
    for source in (
        cards_dir() / name,
        shipped(name),
        copy,
        checkpoint(model, tmp_path / "last.ckpt"),
        tmp_path / "bare.pth",
    ):
        found = zoo.create_model(str(source))
        assert torch.equal(found(batch), expected), source
        assert facts_of(found) == facts_of(model), source
    written = prepare(model).module(image=batch)
    expected = expected if record_of(model).task == "classification" else expected.clamp(0, 1)  # restorers clip
    assert float((written - expected).abs().max() / expected.abs().max().clamp_min(1.0)) <= 1e-5


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_own_models_of_all_families(family: str, tmp_path: Path) -> None:
    model = build(family, num_classes=3)
    batch = images(family)
    own(model, input_size=tuple(batch.shape[1:]))
    save_checkpoint(model.state_dict(), tmp_path / "own.safetensors", record=record_of(model))
    for path in (checkpoint(model, tmp_path / "last.ckpt"), tmp_path / "own.safetensors"):
        found = zoo.create_model(str(path))
        assert torch.equal(found(batch), model(batch))
        assert facts_of(found) == facts_of(model)
        assert record_of(found) == record_of(model)
    other = zoo.create_model(str(tmp_path / "last.ckpt"), num_classes=5, in_chans=1)
    assert other(images(family, channels=1)).shape == (2, 5)
    assert record_of(other).label_names is None
    assert record_of(other).input_size[0] == 1
    zoo.reparameterize(model, measure=False)
    merged = zoo.create_model(str(checkpoint(model, tmp_path / "merged.ckpt")))
    assert torch.equal(merged(batch), model(batch))


@torch.no_grad()
def test_own_timm_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """timm's own architectures too, strictly: timm itself loads a file with a hole when the classes differ."""
    arguments = dict(embed_dim=16, depth=1, num_heads=1, img_size=32, patch_size=8, num_classes=3)
    model = own(zoo.create_model("vit_tiny_patch16_224", **arguments).eval())
    path = checkpoint(model, tmp_path / "last.ckpt")
    found = zoo.create_model(str(path))
    assert torch.equal(found(images_of(model)), model(images_of(model)))
    assert facts_of(found) == facts_of(model)
    other = zoo.create_model(str(path), num_classes=2, label_names=("x", "y"), mean=(0.5, 0.5, 0.5))
    assert other.pretrained_cfg["label_names"] == ("x", "y")
    assert resolve_model_data_config(other)["mean"] == (0.5, 0.5, 0.5)
    assert "classifier (head) is new" in caplog.text
    state = dict(model.state_dict())
    del state["blocks.0.mlp.fc1.bias"]
    save_checkpoint(state, tmp_path / "hole.safetensors", record=record_of(model))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.0\.mlp\.fc1\.bias"):
        zoo.create_model(str(tmp_path / "hole.safetensors"), num_classes=2)


def test_number_of_classes_among_the_arguments(tmp_path: Path) -> None:
    """As `timm.models.save_for_hf` writes them; the caller's wins."""
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_args={"num_classes": 3, "in_chans": 3})
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"temperature": 2.5, "threshold": 0.3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = zoo.create_model(str(tmp_path))
    assert (found.num_classes, found.pretrained_cfg["temperature"], found.pretrained_cfg["threshold"]) == (3, 2.5, 0.3)
    assert zoo.create_model(str(tmp_path), num_classes=2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@torch.no_grad()
def test_changed_feed_forward_layers_are_rebuilt(tmp_path: Path) -> None:
    model = own(zoo.create_model("vit_tiny_patch16_224", **VIT, num_classes=3).eval())
    prune.apply(model, prune.PruneConfig(keep=0.5, round_to=1), DATA)
    found = zoo.create_model(str(checkpoint(model, tmp_path / "last.ckpt")))
    assert torch.equal(found(images_of(model)), model(images_of(model)))
    assert record_of(found).changes == record_of(model).changes


def test_maps_of_a_changed_network(tmp_path: Path) -> None:
    """timm's `features_only` builds the network as it was before: blocks side by side would run one after the other."""
    model = own(zoo.create_model("vit_tiny_patch16_224", **VIT, num_classes=3).eval())
    parallel.apply(model)
    path = str(checkpoint(model, tmp_path / "last.ckpt"))
    with pytest.raises(CheckpointError, match=r"changed after construction \(parallel\).*forward_intermediates"):
        zoo.create_model(path, features_only=True)
    batch = images_of(model)
    for found, expected in zip(
        zoo.create_model(path).forward_intermediates(batch)[1], model.forward_intermediates(batch)[1], strict=True
    ):
        assert torch.equal(found, expected)


DATA = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("suffix", ["", ".pth", ".bin", ".SAFETENSORS"])
def test_safetensors_by_any_name(suffix: str, tmp_path: Path) -> None:
    """A copy, or a blob of the Hub's cache, is told by its content; a path may be a `Path`."""
    model, x = build("repavit"), images("repavit")
    own(model, input_size=tuple(x.shape[1:]))
    save_checkpoint(model.state_dict(), tmp_path / "a.safetensors", record=record_of(model))
    copy = (tmp_path / "a.safetensors").rename(tmp_path / f"copy{suffix}")
    with torch.no_grad():
        assert torch.equal(zoo.create_model(copy)(x), model(x))
    assert zoo.model_info(copy)["architecture"] == record_of(model).architecture


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_classes": -1}, "num_classes must be a whole number from 0, got -1"),
        ({"num_classes": "3"}, "num_classes must be a whole number from 0, got '3'"),
        ({"input_size": 64}, r"input_size must be \(channels, height, width\), got 64"),
        ({"input_size": (64, 64)}, r"got \(64, 64\)"),
    ],
)
def test_facts_of_the_wrong_kind(facts: dict[str, Any], message: str) -> None:
    for name in ("repavit_tiny", cards_dir() / "repavit_tiny.cifar10"):
        with pytest.raises(ValueError, match=message):
            zoo.create_model(name, **facts)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    """Windows, strides, normalisation: a bare file of a full-sized model with the user's classes."""
    path = tmp_path / "emo.pth"
    model = timm.create_model("emov2_1m", num_classes=3, window_size=4).eval()
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"emov2_1m.*window_size.*input_size, mean, std") as caught:
        zoo.create_model(str(path))
    assert "--model-args window_size=... input_size=..." in str(caught.value)
    assert "\n" not in str(caught.value)
    facts = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    found = zoo.create_model(str(path), window_size=4, **facts)
    batch = images_of(found)
    with torch.no_grad():
        assert torch.equal(found(batch), model(batch))
    assert resolve_model_data_config(found)["input_size"] == (3, 64, 64)


def test_authors_form_without_idle_ratio_is_asked_for() -> None:
    from zoo.backbones.repavit import untold

    layer = {"fc1.weight": torch.ones(8, 2), "fc2.weight": torch.ones(2, 8), "norm1.running_var": torch.ones(2)}
    assert "idle_ratio" in untold({f"blocks.0.mlp.{key}": value for key, value in layer.items()})
    assert untold(timm.create_model("repavit_tiny", **VIT).state_dict()) == {}


@torch.no_grad()
def test_small_models_need_their_architecture_named(tmp_path: Path) -> None:
    model = timm.create_model("repavit_tiny", num_classes=1000, **VIT).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"no known architecture.*architecture=NAME"):
        zoo.create_model(str(tmp_path / "bare.pth"))
    found = zoo.create_model(str(tmp_path / "bare.pth"), architecture="repavit_tiny", **VIT)
    assert torch.equal(found(images_of(model)), model(images_of(model)))
    three = timm.create_model("repavit_tiny", num_classes=3, **VIT)
    torch.save(three.state_dict(), tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match="3 classes, and nothing tells input_size, mean, std"):
        zoo.create_model(str(tmp_path / "three.pth"), architecture="repavit_tiny", **VIT)


def test_checkpoint_of_an_older_training(tmp_path: Path) -> None:
    """Lightning kept name and arguments; the normalisation has to be given."""
    model = timm.create_model("emov2_1m.cifar10", num_classes=2)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    kept = {"model": "emov2_1m.cifar10", "num_classes": 2, "model_args": None}
    torch.save({"state_dict": state, "hyper_parameters": kept}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="does not tell input_size, mean, std"):
        zoo.create_model(str(tmp_path / "last.ckpt"))
    facts = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    record = record_of(zoo.create_model(str(tmp_path / "last.ckpt"), **facts))
    assert record.model_args["window_size"] == (7, 7, 4, 2)
    assert record.num_classes == 2


def test_config_of_something_else_beside_a_file_is_not_taken(tmp_path: Path) -> None:
    shutil.copy(shipped("emov2_1m.cifar10"), tmp_path / "a.safetensors")
    write_config(tmp_path, record_of(timm.create_model("repavit_tiny")))
    assert record_of(zoo.create_model(str(tmp_path / "a.safetensors"))).architecture == "emov2_1m"


@pytest.mark.parametrize(
    ("name", "argument", "near"),
    [
        ("repavit_tiny", "idel_ratio", "idle_ratio"),
        ("vit_tiny_patch16_224", "img_sise", "img_size"),
        ("cfsr_x2", "embed_dims", "embed_dim"),
        *((smallest(family), "in_chan", "in_chans") for family in TINY if family in BACKBONES),
    ],
)
def test_mistyped_arguments_get_the_nearest(name: str, argument: str, near: str) -> None:
    with pytest.raises(TypeError, match=rf"no argument {argument!r}\. Did you mean {near!r}") as caught:
        zoo.create_model(name, **{argument: 1})
    assert "\n" not in str(caught.value)


def test_one_mean_a_channel_or_one_for_all(tmp_path: Path) -> None:
    """As timm takes them; a first layer for other channels has means for them."""
    model = own(zoo.create_model("vit_tiny_patch16_224", **VIT, num_classes=2))
    path = str(checkpoint(model, tmp_path / "last.ckpt"))
    assert zoo.create_model(path, mean=(0.5,), std=0.25).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert zoo.create_model(path, in_chans=1, mean=(0.5,)).pretrained_cfg["mean"] == (0.5,)
    gray = zoo.create_model(path, in_chans=1)
    assert resolve_model_data_config(gray)["mean"] == (0.4,)
    assert len(zoo.create_model("repavit_tiny", in_chans=4, **VIT).pretrained_cfg["std"]) == 4
    for facts in (dict(mean=(0.5, 0.5)), dict(std=(0.0,)), dict(std="0.5"), dict(in_chans=1, mean=(0.1, 0.2))):
        with pytest.raises(ValueError, match="one a channel, or one for all"):
            zoo.create_model(path, **facts)


def test_image_size() -> None:
    """Networks for one size are built for another; the others are only told; too small a size is one line."""
    assert image_size_args("repavit_tiny", 16, **{**VIT, "img_size": 32}) == {"img_size": 16}
    tiny = TINY["ffnet"].kwargs
    assert image_size_args("ffnet_1", 64, **tiny) == {"input_size": (3, 64, 64)}
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot take images of 1 pixels .*its own have 224"):
        image_size_args("vit_tiny_patch16_224", 1, embed_dim=16, depth=1, num_heads=1)


def test_info_of_files_and_folders(tmp_path: Path) -> None:
    model = own(timm.create_model("repavit_tiny", num_classes=3, **VIT))
    path = checkpoint(model, tmp_path / "last.ckpt")
    facts = zoo.model_info(str(path))
    assert (facts["architecture"], facts["num_classes"], facts["base"]) == ("repavit_tiny", 3, "started.from")
    assert facts["label_names"] == ("class a", "class b", "class c")
    assert zoo.model_info(str(cards_dir() / "emov2_1m.cifar10"))["metrics"][0]["value"] == 85.63
    assert zoo.model_info("resnet18")["num_classes"] == 1000
