"""One name space over names, files, folders; wrong names get the nearest right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import timm
import torch
from denoisers import pixel_dit
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

import zoo
from zoo import catalog, factory, weights
from zoo.diffusion import PixelDiTPipeline
from zoo.weights import CheckpointError, save_checkpoint

SAMPLE = {
    "repavit_tiny": {"task": "classification", "params": 6e6, "weights": {}},
    "dit": {"task": "generation", "params": 1e5, "weights": {"toy": {"license": "mit"}}},
}


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship one toy denoiser, `dit.toy`, and nothing else."""
    PixelDiTPipeline(pixel_dit(), DDIMScheduler()).save_pretrained(tmp_path / "cards" / "dit.toy")
    monkeypatch.setattr(factory, "cards_dir", lambda: tmp_path / "cards")
    monkeypatch.setattr(catalog, "load", lambda: SAMPLE)
    return tmp_path / "cards"


def test_names_of_ours_and_of_timm() -> None:
    assert type(zoo.create_model("repavit_tiny", depth=1)).__name__ == "RePaViT"
    assert type(zoo.create_model("resnet18", num_classes=2)).__name__ == "ResNet"
    assert zoo.create_model("repavit_tiny.cifar10", depth=1).num_classes == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repavit_tinny", "Did you mean repavit_tiny"),
        ("cfsr_x2.nobody", "'cfsr_x2' has no weights called 'nobody'"),
        ("vit_large_patch16_22", "Did you mean vit_large_patch16_224"),
        ("resnet18.nobody", "timm's 'resnet18' has no weights called 'nobody'. There are: .*a1_in1k"),
        ("qqqqqqqq", "No model is called 'qqqqqqqq'"),
    ],
)
def test_wrong_names_get_the_nearest_right_one(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        zoo.create_model(name)
    assert "\n" not in str(caught.value)


def test_mistyped_argument_is_named() -> None:
    with pytest.raises(TypeError, match="idle_ration"):
        zoo.create_model("repavit_tiny", idle_ration=0.5)


@pytest.mark.parametrize("merged", [False, True])
def test_architecture_of_a_file_is_recognised(tmp_path: Path, merged: bool) -> None:
    """Training form or merged form: the same output, strictly loaded, in evaluation mode."""
    model = timm.create_model("cfsr_x3").eval()
    if merged:
        zoo.reparameterize(model)
    save_checkpoint(model.state_dict(), tmp_path / "a.safetensors")
    torch.save({"params": model.state_dict()}, tmp_path / "b.pth")
    x = torch.rand(1, 3, 8, 8)
    for file in ("a.safetensors", "b.pth"):
        loaded = zoo.create_model(str(tmp_path / file))
        assert not loaded.training
        assert loaded.scale == 3
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


def test_file_of_an_unknown_architecture(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no known architecture; known families are .*repavit"):
        zoo.create_model(str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match="No weight file"):
        zoo.create_model(str(tmp_path / "b.pth"))


def test_file_with_a_missing_key_is_refused(tmp_path: Path) -> None:
    state_dict = timm.create_model("cfsr_x2").state_dict()
    del state_dict["conv_after_body.bias"]
    save_checkpoint(state_dict, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: conv_after_body\.bias"):
        zoo.create_model(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"neither config\.json"),
        ("{", "names no architecture"),
        ("{}", "names no architecture"),
        ('{"architecture": "repavit_tinny"}', "asks for the architecture 'repavit_tinny'.*Did you mean repavit_tiny"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        zoo.create_model(str(tmp_path))


def test_denoiser_by_name_and_by_folder(cards: Path) -> None:
    """The shipped name, its folder, its pipeline: the same weights."""
    expected = load_file(cards / "dit.toy" / "transformer" / "diffusion_pytorch_model.safetensors")
    for model in (
        zoo.create_model("dit.toy", pretrained=True),
        zoo.create_model("dit", pretrained=True),
        zoo.create_model(str(cards / "dit.toy")),
        zoo.create_pipeline("dit.toy").transformer,
    ):
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="pretrained=True"):
        zoo.create_model("dit.toy")
    with pytest.raises(ValueError, match="repavit_tiny' is a classification model"):
        zoo.create_pipeline("repavit_tiny")
    for absent in ("/no/such/pipeline", "./runs/pipeline", "runs/mine/pipeline"):
        with pytest.raises(CheckpointError, match=f"There is no file or folder {absent}"):
            zoo.create_pipeline(absent)
    with pytest.raises(ValueError, match=r"It has dit\.toy"):
        zoo.create_pipeline("dit.cifar10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out_2.bias"), r"missing.*proj_out_2\.bias"),
        (lambda state: state.update(extra=torch.ones(1)), "unexpected.*extra"),
        (lambda state: state.update({"proj_out_2.bias": torch.ones(3)}), "does not load"),
        (lambda state: state["proj_out_2.bias"].fill_(float("nan")), r"not finite in proj_out_2\.bias"),
    ],
)
def test_damaged_denoiser_is_refused(cards: Path, change: Any, message: str) -> None:
    """diffusers itself warns of missing and unexpected keys, and loads."""
    file = cards / "dit.toy" / "transformer" / "diffusion_pytorch_model.safetensors"
    state_dict = load_file(file)
    change(state_dict)
    save_file(state_dict, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        zoo.create_pipeline("dit.toy")
    assert "\n" not in str(caught.value)


def test_truncated_denoiser_is_refused(cards: Path) -> None:
    file = cards / "dit.toy" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        zoo.create_pipeline("dit.toy")


def test_pickled_weights_of_a_pipeline_are_not_loaded(cards: Path) -> None:
    """A .bin file beside no safetensors is not a way in."""
    folder = cards / "dit.toy" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pixel_dit().state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not load"):
        zoo.create_pipeline("dit.toy")


def test_folder_without_pipeline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no diffusers pipeline"):
        zoo.create_pipeline(str(tmp_path))


def test_card_folder_by_path(tmp_path: Path) -> None:
    """A folder laid out as a Hub repository loads through timm and through zoo."""
    size = dict(embed_dim=8, depths=[1])
    model = timm.create_model("cfsr_x2", **size).eval()
    save_checkpoint(model.state_dict(), tmp_path / weights.WEIGHTS_NAME)
    config = {"architecture": "cfsr_x2", "num_classes": 0, "model_args": size, "pretrained_cfg": {"num_classes": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(zoo.create_model(str(tmp_path))(x), model(x))
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_list_models_and_info(cards: Path) -> None:
    assert zoo.list_models() == ["dit", "repavit_tiny"]
    assert zoo.list_models(pretrained=True) == ["dit.toy"]
    assert zoo.list_models("repa*", task="classification", max_params=1e6) == []
    assert zoo.model_info("dit.toy")["tag"] == "toy"
    with pytest.raises(ValueError, match="Did you mean"):
        zoo.model_info("repavit_tinny")


def test_every_family_has_its_parts() -> None:
    """A family module converts checkpoints, names its weights and recognises its own."""
    for family in factory.families():
        assert callable(family.checkpoint_filter_fn), family.__name__
        assert family.default_cfgs, family.__name__
        assert family.detect({"no.such.key": torch.ones(1)}) is None, family.__name__


def test_classifiers_do_without_diffusers() -> None:
    """Its extra is for pipelines: neither loading nor compressing a classifier imports it."""
    code = (
        "import sys; sys.modules['diffusers'] = None; import torch, zoo;"
        "zoo.create_model('repavit_tiny.cifar10', pretrained=True);"
        "sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1);"
        "model = zoo.create_model('vit_tiny_patch16_224', **sizes);"
        "assert zoo.compress(model.eval(), 'prune', [torch.randn(2, 3, 16, 16)]).layers"
    )
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr


def test_parts_are_there_after_import_zoo() -> None:
    """The documents name them so; nothing of them is imported before."""
    code = (
        "import sys, zoo\n"
        "assert not any(name.startswith(('zoo.caching', 'zoo.ffn.s2ft')) for name in sys.modules)\n"
        "zoo.ffn.s2ft.S2FTConfig, zoo.ffn.prune.PruneConfig, zoo.caching.register_blocks\n"
        "assert 'prune' in dir(zoo.ffn) and not hasattr(zoo.ffn, 'prunes')\n"
    )
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [zoo.create_model, zoo.create_pipeline])
@pytest.mark.parametrize("name", [None, 3, ""])
def test_no_name(make: Any, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"A model is named, .*got {name!r}\."):
        make(name)
