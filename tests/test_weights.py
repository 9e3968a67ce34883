"""Reading, verifying, converting and saving weights: what is wrong with a file is said before it is used."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

import zoo  # noqa: F401  registers the models
from zoo import hub
from zoo.cfg import ModelCfg, RestorationCfg
from zoo.weights import (
    CheckpointError,
    card_sha256,
    cards_dir,
    front_matter,
    load_strict,
    read_checkpoint,
    save_checkpoint,
    sha256_of,
    shipped,
    verify_component,
)

TINY = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=8)


def tiny(**changes: Any) -> nn.Module:
    """Return a RePaViT of two blocks for 16x16 images of 5 classes."""
    return timm.create_model("repavit_tiny", **{"num_classes": 5, **TINY, **changes}).eval()


def pretrained(file: Path, sha256: str | None = None, **changes: Any) -> nn.Module:
    """Return the same, with the weights of a file loaded as published weights are."""
    cfg = ModelCfg(
        file=str(file),
        sha256=sha256,
        num_classes=5,
        input_size=(3, 16, 16),
        first_conv="patch_embed.proj",
        classifier="head",
    )
    model = timm.create_model("repavit_tiny", pretrained=True, pretrained_cfg=cfg, **{**TINY, **changes})
    return model.eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return a file with the weights of `tiny()`."""
    save_checkpoint(tiny().state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the state dict in a file."""
    state_dict = load_file(file)
    change(state_dict)
    save_file(state_dict, file)
    return file


class _Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    """Safetensors out, strict in, same output, same digest."""
    model, x = tiny(), torch.rand(2, 3, 16, 16)
    digest = save_checkpoint(model.state_dict(), tmp_path / "m.safetensors", metadata={"note": "tiny"})
    assert digest == sha256_of(tmp_path / "m.safetensors")
    assert torch.equal(pretrained(tmp_path / "m.safetensors", digest)(x), model(x))
    assert torch.equal(pretrained(tmp_path / "m.safetensors", digest.upper())(x), model(x))


def test_saving_in_half_precision_keeps_counters(tmp_path: Path) -> None:
    save_checkpoint({"w": torch.ones(2), "n": torch.tensor(7)}, tmp_path / "m.safetensors", dtype=torch.float16)
    read = read_checkpoint(tmp_path / "m.safetensors")
    assert read["w"].dtype == torch.float16
    assert read["n"].dtype == torch.int64


def test_saving_copies_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    save_checkpoint({"a": base, "b": base.t(), "c": base[:, :2]}, tmp_path / "m.safetensors")
    read = read_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(read["b"], base.t())
    assert torch.equal(read["c"], base[:, :2])


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves the old file and nothing else."""
    target = tmp_path / "m.safetensors"
    save_checkpoint({"w": torch.ones(1)}, target)
    before = target.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("zoo.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"w": torch.zeros(1)}, target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("wrapper", ["params_ema", "params-ema", "params", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "netG.", "module.netG.", "_orig_mod."])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str, prefix: str) -> None:
    torch.save({wrapper: {f"{prefix}w": torch.ones(1)}, "epoch": 3}, tmp_path / "c.pth")
    assert list(read_checkpoint(tmp_path / "c.pth")) == ["w"]


def test_the_only_entry_is_unwrapped(tmp_path: Path) -> None:
    """Whatever it is called; but a state dict of one tensor is itself."""
    torch.save({"my_network": {"w": torch.ones(1), "v": torch.ones(1)}}, tmp_path / "c.pth")
    assert list(read_checkpoint(tmp_path / "c.pth")) == ["w", "v"]
    torch.save({"w": torch.ones(1)}, tmp_path / "c.pth")
    assert list(read_checkpoint(tmp_path / "c.pth")) == ["w"]


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    torch.save({"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1)}}, tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth")["w"] == 1


def test_unsafe_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code from a file is run, in the new format or the old."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(1)}, "hook": _Evil()}, "zip.pth")
    torch.save({"w": torch.ones(1), "hook": _Evil()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("raw.pth").write_bytes(pickle.dumps(_Evil()))
    for name in ("zip.pth", "old.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match=r"unsafe unpickling|not a readable weight file") as caught:
            read_checkpoint(name)
        assert "\n" not in str(caught.value)
    assert not Path("evil").exists()


def test_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"script.pt is a TorchScript program, which is refused: a file of its"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.ckpt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all" * 9, b"\x00" * 64, b"PK\x03\x04broken"])
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.safetensors", "t.pth"])
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    state_dict = tiny().state_dict()
    torch.save(state_dict, path) if name.endswith("pth") else save_file(state_dict, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "list, not a state dict"), ({"epoch": 3, "lr": 0.1}, "no tensors; its entries are epoch, lr")],
)
def test_files_without_weights_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "c.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No weight file at .*none\.pth"):
        read_checkpoint(tmp_path / "none.pth")
    for other in (tmp_path, "ffnetsr_light_x4.bsds"):  # a folder, or a name, where a file is asked for
        with pytest.raises(CheckpointError, match=r"No weight file at .*`--model` .* takes names and folders"):
            read_checkpoint(other)


def test_flipped_byte_is_found(weights: Path) -> None:
    """A changed byte in the last tensor still loads as safetensors; the digest tells."""
    digest = sha256_of(weights)
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert read_checkpoint(weights)
    with pytest.raises(CheckpointError, match="damaged or not the published file"):
        pretrained(weights, digest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(weights: Path, value: float) -> None:
    rewrite(weights, lambda state: state["blocks.1.norm1.weight"][0].fill_(value))
    with pytest.raises(CheckpointError, match=r"not finite in blocks\.1\.norm1\.weight"):
        pretrained(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.0.attn.qkv.bias"), r"missing: blocks\.0\.attn\.qkv\.bias"),
        (lambda state: state.update({"extra.weight": torch.ones(1)}), r"unexpected: extra\.weight"),
        (lambda state: state.update({"head.bias": torch.ones(7)}), r"wrong shape: head\.bias \(7,\) for \(5,\)"),
    ],
)
def test_keys_that_do_not_fit_are_named(
    weights: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        pretrained(rewrite(weights, change))


def test_restorer_weights_are_as_strict(tmp_path: Path) -> None:
    """The same for a family of another task."""
    size = dict(embed_dim=8, depths=(1,))
    model = timm.create_model("cfsr_x2", **size).eval()
    file = tmp_path / "m.safetensors"
    cfg = RestorationCfg(file=str(file), sha256=save_checkpoint(model.state_dict(), file), scale=2)
    same = timm.create_model("cfsr_x2", pretrained=True, pretrained_cfg=cfg, **size).eval()
    x = torch.rand(1, 3, 9, 7)
    assert torch.equal(same(x), model(x))
    cfg.sha256 = None
    rewrite(file, lambda state: state.pop("conv_first.bias"))
    with pytest.raises(CheckpointError, match=r"missing: conv_first\.bias"):
        timm.create_model("cfsr_x2", pretrained=True, pretrained_cfg=cfg, **size)


def test_head_may_differ_only_when_the_classes_do(weights: Path) -> None:
    """Other classes: a new head, everything else loaded. Same classes: a missing head is an error."""
    model = pretrained(weights, num_classes=9)
    assert model.head.weight.shape[0] == 9
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_file(weights)["blocks.0.attn.qkv.weight"])
    assert pretrained(weights, num_classes=0)(torch.rand(1, 3, 16, 16)).shape == (1, 16)
    rewrite(weights, lambda state: [state.pop(key) for key in ("head.weight", "head.bias")])
    assert pretrained(weights, num_classes=9).num_classes == 9
    with pytest.raises(CheckpointError, match=r"missing: head\.weight, head\.bias"):
        pretrained(weights)


def test_other_keys_may_not_hide_behind_a_new_head(weights: Path) -> None:
    """timm loads such a file with a log line and leaves the layer random."""
    rewrite(weights, lambda state: state.pop("blocks.1.attn.proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.attn\.proj\.weight"):
        pretrained(weights, num_classes=9)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_stem_is_adapted_to_other_channels(weights: Path, in_chans: int) -> None:
    model = pretrained(weights, in_chans=in_chans)
    assert model(torch.rand(1, in_chans, 16, 16)).shape == (1, 5)
    if in_chans == 1:
        stem = load_file(weights)["patch_embed.proj.weight"]
        torch.testing.assert_close(model.patch_embed.proj.weight, stem.sum(1, keepdim=True))


def test_features_only_loads_too(weights: Path) -> None:
    features = pretrained(weights, features_only=True, out_indices=(0, 1))(torch.rand(1, 3, 16, 16))
    assert [tuple(feature.shape) for feature in features] == [(1, 16, 2, 2)] * 2


def test_mistyped_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="idle_ration"):
        tiny(idle_ration=0.5)


def test_model_args_of_the_weights_yield_to_the_caller() -> None:
    cfg = ModelCfg(num_classes=4, model_args=dict(TINY))
    assert timm.create_model("repavit_tiny", pretrained_cfg=cfg).num_classes == 4
    assert len(timm.create_model("repavit_tiny", pretrained_cfg=cfg).blocks) == 2
    assert len(timm.create_model("repavit_tiny", pretrained_cfg=cfg, depth=3).blocks) == 3


def test_a_models_own_cfg_builds_it_again(weights: Path) -> None:
    """timm stores cfgs as dicts, ours with fields that its own class does not have."""
    model = pretrained(weights)
    assert timm.create_model("repavit_tiny", pretrained_cfg=dict(model.pretrained_cfg), **TINY).num_classes == 5
    with pytest.raises(TypeError, match="no_such_field"):
        timm.create_model("repavit_tiny", pretrained_cfg={"no_such_field": 1})


def test_weights_that_nobody_published() -> None:
    said = r"No weights are published for repamlpmixer_s16\.untrained.*pretrained=False"
    with pytest.raises(CheckpointError, match=said):
        timm.create_model("repamlpmixer_s16.untrained", pretrained=True, num_blocks=1)


def test_weights_given_as_a_state_dict() -> None:
    model, x = tiny(), torch.rand(1, 3, 16, 16)
    cfg = PretrainedCfg(state_dict=model.state_dict(), num_classes=5, input_size=(3, 16, 16), classifier="head")
    same = timm.create_model("repavit_tiny", pretrained=True, pretrained_cfg=cfg, **TINY).eval()
    assert torch.equal(same(x), model(x))
    assert "state_dict" not in {key for key, value in same.pretrained_cfg.items() if value is not None}


def test_weights_at_an_address(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached file is used; without it, offline and unreachable hosts say what to fetch."""
    url = "https://weights.example/tiny.safetensors"
    cfg = ModelCfg(url=url, sha256=sha256_of(weights), num_classes=5, input_size=(3, 16, 16), classifier="head")
    create = dict(pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path / "cache", **TINY)
    monkeypatch.setattr("zoo.hub.is_offline", lambda: True)
    with pytest.raises(hub.HubError, match=f"HF_HUB_OFFLINE .* Fetch {url}"):
        timm.create_model("repavit_tiny", **create)
    monkeypatch.setattr("zoo.hub.is_offline", lambda: False)

    def no_network(*args: Any, **kwargs: Any) -> str:
        raise OSError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.weights.urllib.request.urlopen", no_network)
        with pytest.raises(hub.HubError, match=f"Name or service not known.*Fetch {url}"):
            timm.create_model("repavit_tiny", **create)
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "tiny.safetensors").write_bytes(weights.read_bytes())
    assert timm.create_model("repavit_tiny", **create).num_classes == 5


def test_load_strict_leaves_a_model_that_does_not_fit_untouched() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"The state dict does not fit Linear \(missing: bias; unexpected: c\)"):
        load_strict(model, {"weight": torch.ones(2, 2), "c": torch.ones(1)})
    assert torch.equal(model.weight, before)


def test_verify_component(tmp_path: Path) -> None:
    """A component of a diffusers folder: files there, digest of the card, keys of the module."""
    module = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        verify_component(tmp_path, "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = save_checkpoint(module.state_dict(), file)
    verify_component(tmp_path, "transformer", module)
    with pytest.raises(CheckpointError, match=r"wrong shape: weight"):
        verify_component(tmp_path, "transformer", nn.Linear(3, 2))
    (tmp_path / "README.md").write_text(f"---\nsha256: {{transformer/{file.name}: {digest}}}\n---\n")
    verify_component(tmp_path, "transformer")
    save_checkpoint(nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(CheckpointError, match="not the published file"):
        verify_component(tmp_path, "transformer")


def test_front_matter(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\nsha256: {model.safetensors: abc}\n---\n# text\n---\n")
    assert front_matter(card) == {"license": "mit", "sha256": {"model.safetensors": "abc"}}
    assert card_sha256(tmp_path) == "abc"
    assert card_sha256(tmp_path, "other.safetensors") is None
    for text, message in (
        ("# no front", "does not begin"),
        ("---\na: b", "does not begin"),
        ("---\na: [\n---\n", "not YAML"),
        ("---\n- a\n---\n", "not a mapping"),
    ):
        card.write_text(text)
        with pytest.raises(ValueError, match=message):
            front_matter(card)
    card.write_text("# a card without front matter")
    assert card_sha256(tmp_path) is None


def test_shipped_weights_lie_with_their_card() -> None:
    assert Path(shipped("repavit_tiny.cifar10")) == cards_dir() / "repavit_tiny.cifar10" / "model.safetensors"
