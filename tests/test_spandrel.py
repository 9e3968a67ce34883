"""Our restorers in programs built on spandrel, and spandrel's file layouts in our own loader."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spandrel
import timm
import torch
from parity import protocol
from PIL import Image
from registered import RESTORERS, build, images, randomize, relative
from safetensors.torch import save_file
from spandrel import ArchRegistry, ArchSupport, ModelLoader
from spandrel.architectures.Compact import Compact, CompactArch
from spandrel.architectures.DAT import DAT, DATArch
from torch import Tensor
from zoo.export.network import capture, prepare

import zoo
import zoo.spandrel
from zoo.pictures.restore import load_restorer
from zoo.weights import CheckpointError, shipped

RECORDS = Path(__file__).parent / "parity"
AUTHORS = {
    "cfsr": "cfsr_x2_merged_40x52",
    "ffnetsr": "ffnetsr_shallow_x2_40x52",
    "restormer": "restormer_biasfree_64",
}
DESCRIBED = {"cfsr": ("SR", 2), "dat": ("SR", 2), "ffnetsr": ("SR", 2), "restormer": ("Restoration", 1)}


def registry(*own: spandrel.Architecture, **options: Any) -> ArchRegistry:
    """Return a registry of all of spandrel's architectures, or of some, and ours."""
    made = spandrel.MAIN_REGISTRY.copy()
    if own:
        made = ArchRegistry()
        made.add(*map(ArchSupport.from_architecture, own))
    zoo.spandrel.install(made, **options)
    return made


def authors(family: str) -> dict[str, Tensor]:
    """Return a state dict with the authors' keys and random numbers."""
    facts, _ = protocol.load(RECORDS / family / AUTHORS[family])
    return {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(facts["state_dict"]).items()}


@pytest.mark.parametrize("family", RESTORERS)
@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
def test_our_files(family: str, merged: bool, tmp_path: Path) -> None:
    """Files of ours load in both forms, give our outputs on any size, and are described as they are."""
    model = build(family)
    if merged:
        zoo.reparameterize(model, measure=False)
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    found = ModelLoader(registry=registry()).load_from_file(tmp_path / "ours.safetensors")
    assert isinstance(found, spandrel.ImageModelDescriptor)
    assert (found.purpose, found.scale) == DESCRIBED[family]
    assert found.architecture.id == f"zoo.{found.architecture.name}"
    assert found.architecture.name.lower() == family
    assert (found.input_channels, found.output_channels) == (3, 3)
    assert found.size_requirements.multiple_of == model.multiple_of
    assert found.tags[0] in RESTORERS[family]
    assert (found.supports_half, found.supports_bfloat16) == (family == "cfsr", True)
    for size in ((16, 16), (21, 34)):
        x = images(family, 1, size=size)
        with torch.no_grad():
            assert relative(found(x), model(x).clamp(0, 1)) < 1e-5
    assert found(torch.rand(1, 3, 5, 1)).shape == (1, 3, 5 * found.scale, found.scale)
    for low in (torch.bfloat16, *([torch.float16] if found.supports_half else [])):
        assert found.to(low)(images(family, 1).to(low)).isfinite().all()


def test_gray_and_two_views() -> None:
    loader = ModelLoader(registry=registry())
    gray = loader.load_from_state_dict(build("restormer", in_chans=1).state_dict())
    assert (gray.input_channels, gray.output_channels) == (1, 1)
    dual = loader.load_from_state_dict(build("restormer", in_chans=6, dual_pixel=True).state_dict())
    assert (dual.input_channels, dual.output_channels, dual.purpose) == (6, 3, "Restoration")
    assert dual.tags == ["restormer_defocus_dual"]


@pytest.mark.parametrize("name", ["cfsr_x2.bsds", "cfsr_x4.bsds"])
def test_shipped_weights(name: str) -> None:
    """The files of our cards, in spandrel's main registry; what it finds there afterwards is its own."""
    theirs = [support.architecture.id for support in spandrel.MAIN_REGISTRY if "zoo." not in support.architecture.id]
    zoo.spandrel.install()
    zoo.spandrel.install()
    ours = [f"zoo.{name}" for name in ("CFSR", "DAT", "FFNetSR", "Restormer")]
    assert [support.architecture.id for support in spandrel.MAIN_REGISTRY] == theirs + ours
    found = ModelLoader().load_from_file(shipped(name))
    x = torch.rand(1, 3, 19, 23)
    expected = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        assert relative(found(x), expected(x).clamp(0, 1)) < 1e-5
    assert found.scale == int(name[6])


@pytest.mark.parametrize("replace", [False, True])
def test_dat_of_the_authors(replace: bool) -> None:
    """Their files stay with spandrel's own DAT unless ours is to replace it; both give the same picture."""
    made = registry(DATArch(), replace=replace)
    loader = ModelLoader(registry=made)
    network = DAT(embed_dim=64, split_size=[4, 8], depth=[4, 2], num_heads=[4, 4], expansion_factor=2.0, upscale=3)
    derived = {
        key: value.clone() for key, value in network.state_dict().items() if "rpe_biases" in key or "mask" in key
    }
    state_dict = randomize(network).state_dict() | derived
    found = loader.load_from_state_dict(state_dict)
    assert isinstance(found.architecture, zoo.spandrel.Restorer) == replace
    zoo.spandrel.install(made, replace=not replace)
    other = loader.load_from_state_dict(state_dict)
    assert isinstance(other.architecture, zoo.spandrel.Restorer) != replace
    x = torch.rand(1, 3, 40, 52)
    assert relative(found(x), other(x)) < 1e-5
    assert (found.scale, found.input_channels) == (other.scale, other.input_channels)


@pytest.mark.parametrize(("family", "name"), [("cfsr", "CFSR"), ("ffnetsr", "FFNetSR"), ("restormer", "Restormer")])
def test_authors_files_that_spandrel_does_not_know(family: str, name: str) -> None:
    """Ours alone claims them, so that no order matters."""
    state_dict = authors(family)
    claimed = [support.architecture.id for support in registry() if support.detect(state_dict)]
    assert claimed == [f"zoo.{name}"]


def test_others_are_left_alone() -> None:
    """Foreign weights go where they went; what nobody knows stays unknown; what does not fit is named."""
    made = registry(CompactArch())
    loader = ModelLoader(registry=made)
    assert loader.load_from_state_dict(Compact(num_feat=4, num_conv=1).state_dict()).architecture.id == "Compact"
    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_state_dict({"something.weight": torch.zeros(3), "epoch": 4})
    state_dict = build("cfsr").state_dict()
    del state_dict["norm.bias"]
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias"):
        loader.load_from_state_dict(state_dict)


def test_spandrel_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zoo.spandrel")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ImportError, match=r"pip install 'ffn-zoo\[spandrel\]'"):
        importlib.import_module("zoo.spandrel")


def authors_keys(family: str, **kwargs: Any) -> dict[str, Tensor]:
    """Return the weights of a tiny network under the authors' names: the reverse of the family's filter."""
    out: dict[str, Tensor] = {}
    for key, value in build(family, **kwargs).state_dict().items():
        if family != "dat" and value.ndim == 2 and key.endswith("weight"):
            value = value[:, :, None, None]  # their 1x1 convolutions
        if key.endswith(".window"):
            axes = [torch.arange(1 - side, side) for side in value.tolist()]
            table = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1).float()
            tokens = int(value.prod())
            out[key.replace("window", "rpe_biases")] = table
            out[key.replace("window", "relative_position_index")] = torch.zeros(tokens, tokens, dtype=torch.int64)
        elif ".mixer.expand." in key:
            a, v = value.chunk(2)
            out |= {key.replace(".mixer.expand.", ".attn.a.0."): a, key.replace(".mixer.expand.", ".attn.v."): v}
        else:
            for pattern, theirs in _THEIRS[family]:
                key = re.sub(pattern, theirs, key)
            out[key] = value.clone()
    return out


_THEIRS: dict[str, list[tuple[str, str]]] = {
    "cfsr": [
        (r"\.scale([12])\.gamma$", r".layer_scale_\1"),
        (r"(blocks\.\d+)\.norm1\.", r"\1.attn.norm."),
        (r"(blocks\.\d+)\.norm2\.", r"\1.mlp.norm."),
        (r"\.mixer\.conv\.", ".attn.a.2.lkb_reparam."),
        (r"\.mixer\.proj\.", ".attn.proj."),
        (r"\.ffn\.", ".mlp."),
        (r"^upsample\.", "upsample.0."),
    ],
    "dat": [],
    "restormer": [
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^((up|down)\d_\d)\.weight$", r"\1.body.0.weight"),
        (r"\.norm([12])\.", r".norm\1.body."),
    ],
}
FORMS: dict[str, dict[str, Any]] = {"cfsr": {"edge_branches": False}, "dat": {}, "restormer": {}}
LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda weights: weights,
    **{
        name: lambda weights, name=name: {name: weights, "iter": 5}
        for name in ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net")
    },
    "the only entry": lambda weights: {"restorer": weights},
    "module.": lambda weights: {"params": {f"module.{key}": value for key, value in weights.items()}},
    "netG.": lambda weights: {"state_dict": {f"netG.{key}": value for key, value in weights.items()}},
    "half precision": lambda weights: {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
}


def restored(family: str, weights: Any, path: Path) -> Tensor:
    """Return what a file makes of a picture, through the loader of `zoo restore --weights`."""
    torch.save(weights, path)
    with torch.no_grad():
        return load_restorer(weights=path)(images(family, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FORMS)
def test_our_loader_reads_what_spandrel_reads(family: str, layout: str, tmp_path: Path) -> None:
    """Every wrapper and prefix that spandrel removes, with the authors' keys."""
    weights = authors_keys(family, **FORMS[family])
    with torch.no_grad():
        expected = build(family, **FORMS[family])(images(family, 1))
    found = restored(family, LAYOUTS[layout](weights), tmp_path / "file.pth")
    assert relative(found, expected) < (2e-2 if layout == "half precision" else 1e-5)
    assert ModelLoader().load_state_dict_from_file(tmp_path / "file.pth").keys() == weights.keys()


@pytest.mark.parametrize("variant", ["no bias", "no tables", "one block a group"])
def test_kinds_of_dat_that_spandrel_reads(variant: str, tmp_path: Path) -> None:
    """Projections without bias, files without derived tables (whose windows are 8x32), groups without temperature."""
    sizes = {"one block a group": {"depths": (1, 1)}, "no tables": {"split_size": (8, 32)}}.get(variant, {})
    network, weights = build("dat", **sizes), authors_keys("dat", **sizes)
    if variant == "no tables":
        weights = {key: value for key, value in weights.items() if not key.endswith(("rpe_biases", "position_index"))}
    if variant == "no bias":
        weights = {key: value for key, value in weights.items() if not key.endswith(".qkv.bias")}
        for name, value in network.state_dict().items():
            if name.endswith(".qkv.bias"):
                value.zero_()
    with torch.no_grad():
        expected = network(images("dat", 1))
    assert relative(restored("dat", weights, tmp_path / "file.pth"), expected) < 1e-5


def _others() -> dict[str, Callable[[], torch.nn.Module]]:
    """Return builders of small networks of other people, by the names that spandrel gives them."""
    from spandrel.architectures.ESRGAN import ESRGAN
    from spandrel.architectures.NAFNet import NAFNet
    from spandrel.architectures.PLKSR import RealPLKSR
    from spandrel.architectures.SAFMN import SAFMN
    from spandrel.architectures.SCUNet import SCUNet
    from spandrel.architectures.SPAN import SPAN
    from spandrel.architectures.SwinIR import SwinIR

    return {
        "ESRGAN": lambda: ESRGAN(num_filters=8, num_blocks=1, scale=4),
        "SwinIR": lambda: SwinIR(
            img_size=16,
            window_size=8,
            depths=[2],
            embed_dim=12,
            num_heads=[2],
            mlp_ratio=2.0,
            upscale=2,
            upsampler="pixelshuffle",
        ),
        "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
        "RealPLKSR": lambda: RealPLKSR(dim=16, n_blocks=2, upscaling_factor=2, kernel_size=5),
        "NAFNet": lambda: NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]),
        "SCUNet": lambda: SCUNet(config=[1, 1, 1, 1, 1, 1, 1], dim=64),
        "SAFMN": lambda: SAFMN(dim=8, n_blocks=2, upscaling_factor=2),
    }


@pytest.mark.parametrize("name", ["ESRGAN", "SwinIR", "SPAN", "RealPLKSR", "NAFNet", "SCUNet", "SAFMN"])
def test_restorers_of_others(name: str, tmp_path: Path) -> None:
    """Any file that spandrel knows restores pictures: the same numbers as by spandrel, on sizes that it pads."""
    torch.manual_seed(0)
    network = _others()[name]().eval()
    wrapped = {"params_ema": {f"_orig_mod.{key}": value for key, value in network.state_dict().items()}}
    torch.save(wrapped, tmp_path / "x.pth")
    model = load_restorer(weights=tmp_path / "x.pth")
    assert not zoo.reparameterize(model).layers, "merged already"
    x = torch.rand(1, 3, 45, 61)
    expected = ModelLoader().load_from_state_dict(network.state_dict()).eval()(x)
    found = zoo.pictures.restore.restore_tensor(model, x)
    assert found.shape == expected.shape
    assert (found.clamp(0, 1) - expected).abs().max() < 2e-3 + (0.02 if model.multiple_of > 1 else 0)
    picture = Image.new("RGBA", (61, 45), (200, 90, 30, 128))
    result = zoo.restore(picture, weights=tmp_path / "x.pth", tile=48, budget="4GB")
    assert (result.size, result.mode) == ((61 * model.scale, 45 * model.scale), "RGBA")
    assert isinstance(zoo.create_model(str(tmp_path / "x.pth")), zoo.spandrel.Foreign)


def test_branches_are_folded_once() -> None:
    torch.manual_seed(0)
    model = zoo.spandrel.foreign(_others()["SPAN"]().state_dict())
    assert model is not None
    x = torch.rand(1, 3, 20, 30)
    before, parameters = model.eval()(x), sum(each.numel() for each in model.parameters())
    report = zoo.reparameterize(model, sample=x)
    assert "branches of 20 convolutions" in str(report)
    assert torch.equal(model(x), before)
    assert sum(each.numel() for each in model.parameters()) < 0.7 * parameters
    assert not zoo.reparameterize(model).layers


@pytest.mark.parametrize(("name", "size"), [("RealPLKSR", None), ("NAFNet", 32), ("SPAN", None)])
def test_restorers_of_others_as_graphs(name: str, size: int | None) -> None:
    """Engines and files hold them, too: any batch, and any size, but of those that pad inside."""
    torch.manual_seed(0)
    model = zoo.spandrel.foreign(_others()[name]().state_dict())
    assert model is not None
    network = prepare(model.eval(), image_size=size, dynamic_size=size is None)
    x = torch.rand(3, 3, size or 24, size or 40)
    assert (capture(network, "exported").module()(image=x) - model(x)).abs().max() < 1e-5


def test_what_spandrel_says_is_kept() -> None:
    others = _others()
    models = {name: zoo.spandrel.foreign(others[name]().state_dict()) for name in ("SwinIR", "SCUNet", "SAFMN")}
    with pytest.raises(ValueError, match="SwinIR does not run in float16; take float32"):
        load_restorer(model=models["SwinIR"], dtype="float16")
    half = load_restorer(model=models["SwinIR"], dtype="bfloat16")  # which spandrel holds to run
    with pytest.raises(ValueError, match="SwinIR does not run in bfloat16; take float32"):
        zoo.restore(Image.new("RGB", (21, 17)), model=half)
    said: list[str] = []
    zoo.pictures.restore.restore_tensor(models["SCUNet"], torch.rand(1, 3, 24, 120), tile=96, inform=said.append)
    assert "tiles are discouraged for SCUNet" in said[0]
    assert models["SAFMN"].multiple_of == 8
    assert models["SwinIR"].bytes_per_pixel > models["SAFMN"].bytes_per_pixel >= 1024
    weights = others["SAFMN"]().state_dict()
    broken = {key: value[..., :1] if value.ndim == 4 else value for key, value in weights.items()}
    with pytest.raises(CheckpointError, match="looks like SAFMN and does not load as that"):
        zoo.spandrel.foreign(broken)


def test_gray_and_opaque_networks() -> None:
    """One channel: each channel apart; four: the picture is opaque."""
    from spandrel.architectures.ESRGAN import ESRGAN

    for channels in (1, 4):
        made = ESRGAN(in_nc=channels, out_nc=channels, num_filters=8, num_blocks=1, scale=2)
        model = zoo.spandrel.foreign(made.state_dict())
        assert model is not None
        assert model.in_chans == channels
        assert zoo.restore(Image.new("RGB", (20, 16)), model=model).size == (40, 32)
        assert zoo.restore(Image.new("L", (20, 16)), model=model).mode == "L"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <HTML>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"\x08\x07\x12\x07pytorch\x1a", "an ONNX model"),
        (b'{"a": 1}', "JSON text"),
    ],
)
def test_what_is_no_weight_file(content: bytes, words: str, tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"is no weight file: it is {words}"):
            load_restorer(weights=tmp_path / name)
