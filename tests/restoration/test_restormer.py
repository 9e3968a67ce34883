"""Restormer: parity with the authors' code, forms that are equal, strips and streams that change nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity import protocol
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo  # noqa: F401  registers the models
from zoo.bench.plain_restorers import PLAIN, plain_restormer_block
from zoo.layers.gated_ffn import GatedFFN
from zoo.layers.pixel_norm import PixelNorm
from zoo.restoration import restormer
from zoo.restoration.restormer import (
    Restormer,
    RestormerBlock,
    checkpoint_filter_fn,
    detect,
)
from zoo.streaming.maps import Workspace
from zoo.streaming.restormer import normed_strip, update_block
from zoo.weights import CheckpointError, load_strict

RECORDS = Path(__file__).parents[1] / "parity" / "restormer"
FORMS = {"biasfree": "restormer_denoise_color", "withbias": "restormer_deblur", "dual_pixel": "restormer_defocus_dual"}
PARAMS = {
    "restormer_denoise_color": 26_111_668,
    "restormer_denoise_gray": 26_109_076,
    "restormer_denoise_real": 26_111_668,
    "restormer_derain": 26_126_644,
    "restormer_deblur": 26_126_644,
    "restormer_defocus": 26_126_644,
    "restormer_defocus_dual": 26_132_548,
    "restormer_tiny_denoise_color": 949_494,
    "restormer_tiny_restore_color": 949_494,
}
KINDS = {"bias-free": dict(bias_free=True), "with bias": {}, "dual pixel": dict(in_chans=6, dual_pixel=True)}


def record(form: str) -> tuple[dict[str, Tensor], Tensor, dict[str, np.ndarray]]:
    """State dict, input and outputs of one run of the authors' code, in float64."""
    facts, outputs = protocol.load(RECORDS / f"restormer_{form}_64")
    state_dict = {k: torch.from_numpy(v).double() for k, v in protocol.fill_state_dict(facts["state_dict"]).items()}
    return state_dict, torch.from_numpy(protocol.make_input(**facts["input"])).double(), outputs


def random_model(dtype: torch.dtype = torch.float64, **kwargs: object) -> Restormer:
    """A small network whose norms, temperatures and blocks all matter; 13, 26, 53 and 106 hidden channels."""
    arguments = dict(dim=8, num_blocks=(2, 1, 2, 1), num_refinement_blocks=1, mlp_ratio=1.66, **kwargs)
    torch.manual_seed(0)
    model = Restormer(**arguments).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
            elif parameter.ndim == 3:
                parameter.uniform_(0.5, 2.0)
            else:
                parameter.mul_(2.0)
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_parity_with_the_authors(form: str) -> None:
    """Both forms give the authors' output; that merging changes no kind, and streams no form, is tested below."""
    state_dict, x, outputs = record(form)
    model = timm.create_model(FORMS[form], device="meta", dtype=torch.float64).to_empty(device="cpu").eval()
    load_strict(model, state_dict, checkpoint_filter_fn)
    model.requires_grad_(False)
    latent: list[Tensor] = []
    hook = model.latent.register_forward_hook(lambda module, args, output: latent.append(output))
    found = [model(x)]
    hook.remove()
    assert protocol.rel_error(latent[0].permute(0, 3, 1, 2).numpy(), outputs["latent"]) < 1e-10
    if form == "biasfree":
        with torch.no_grad():
            model.reparameterize()
            found.append(model(x))
    for output in found:
        assert protocol.rel_error(output.numpy(), outputs["output"]) < 1e-10


@pytest.mark.parametrize("name", PARAMS)
def test_counts(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize(("name", "paper"), [("restormer_denoise_color", 140.99), ("restormer_deblur", 140.99)])
def test_work(name: str, paper: float) -> None:
    """The paper counts convolutions only; merging saves 6 of the 154.9 GMACs: attention and projection are one."""
    model, x = timm.create_model(name, device="meta").eval(), torch.empty(1, 3, 256, 256, device="meta")
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        PLAIN[Restormer](model, x)
    counts = {str(op): flops / 2e9 for op, flops in plain.get_flop_counts()["Global"].items()}
    assert sum(macs for op, macs in counts.items() if "convolution" in op) == pytest.approx(paper, rel=1e-4)
    assert sum(counts.values()) == pytest.approx(154.88, rel=1e-4)
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        model(x)
    assert ours.get_total_flops() / 2e9 == pytest.approx(154.88, rel=1e-4)
    model.reparameterize()
    with FlopCounterMode(display=False) as merged, torch.no_grad():
        model(x)
    assert 148.03 < merged.get_total_flops() / 2e9 < 149  # with hidden channels of zeros


@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 11)])
@pytest.mark.parametrize("bias_free", [True, False])
def test_block_is_the_plain_block(bias_free: bool, size: tuple[int, int], merged: bool) -> None:
    """On whole maps and on strips; with its gradients."""
    block = random_model(bias_free=bias_free).encoder_level3[1]
    assert isinstance(block, RestormerBlock)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    expected = plain_restormer_block(block, x).detach()
    if merged:
        block.reparameterize()
    x.requires_grad_()
    found = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert relative(found.detach(), expected) < 1e-12
    seed = torch.randn_like(x)
    wanted = [x, *block.parameters()]
    ours = torch.autograd.grad(found, wanted, seed)
    theirs = torch.autograd.grad(plain_restormer_block(block, x), wanted, seed)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-10 * largest
    with torch.no_grad(), Workspace(None, dtype=torch.float64) as workspace:
        x = x.detach()
        for keep_values in (False, True):
            feature_map = workspace.new(*size, 32, channels_first=True)
            feature_map.write(0, x[0])
            values = workspace.new(*size, 32, channels_first=True) if keep_values else None
            told: list[int] = []
            update_block(block, feature_map, values, 2, told.append)
            assert relative(feature_map.read(0, size[0]), expected[0]) < 1e-12
            assert sum(told) == 2 * size[0]


@pytest.mark.parametrize(
    ("kind", "size"),
    [*(("bias-free", size) for size in ((1, 1), (1, 30), (37, 3))), *((kind, (19, 26)) for kind in KINDS)],
)
def test_streams_are_the_whole_map(kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, whole, by strips of one row and of several, in memory and in files; any size; two images."""
    model = random_model(**KINDS[kind])
    x = torch.rand(2, model.in_chans, *size, dtype=torch.float64)
    whole = model(x).detach()
    assert whole.shape == (2, 3, *size)
    with torch.no_grad():
        assert relative(PLAIN[Restormer](model, x), whole) < 1e-12
        least = model.stream_bytes(*size)
        for memory in (None, least, 3 * least, 40 * least):
            assert relative(model.stream(x, memory=memory), whole) < 1e-12
        for strip_bytes, rows in ((1, 1), (20_000, 1), (1, 3)):
            monkeypatch.setattr(restormer, "_STRIP_BYTES", strip_bytes)
            monkeypatch.setattr(restormer, "_FEWEST_ROWS", rows)
            assert relative(model.stream(x), whole) < 1e-12
        model.reparameterize()
        assert relative(model(x), whole) < 1e-12
        monkeypatch.undo()
        assert relative(model(x), whole) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_stream_in_float32(kind: str) -> None:
    """The claim: less than 1e-5 of the largest value between a stream from files and whole maps."""
    model = random_model(torch.float32, **KINDS[kind])
    x = torch.rand(1, model.in_chans, 120, 88)
    expected = model(x).detach()
    assert relative(model.stream(x, memory=model.stream_bytes(120, 88)), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model.stream(x), expected) < 1e-5


def test_progress() -> None:
    model, x = random_model(), torch.rand(2, 3, 19, 26, dtype=torch.float64)
    calls: list[tuple[int, int]] = []
    model.stream(x, memory=model.stream_bytes(19, 26), progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert {call[1] for call in calls} == {done[-1]}


def test_maps_go_to_files_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = random_model(torch.float32), torch.rand(1, 3, 64, 64)
    held: list[tuple[int, bool]] = []
    new = Workspace.new

    def spy(self: Workspace, *args: object, **kwargs: object) -> object:
        feature_map = new(self, *args, **kwargs)  # type: ignore[arg-type]
        held.append((self.held, feature_map.in_memory))
        return feature_map

    monkeypatch.setattr(Workspace, "new", spy)
    for memory in (model.stream_bytes(64, 64), model.stream_bytes(64, 64) + 100_000, None):
        held.clear()
        model.stream(x, memory=memory)
        if memory is None:
            assert all(in_memory for _, in_memory in held)
        else:
            assert max(size for size, _ in held) <= memory
            assert not all(in_memory for _, in_memory in held)


def test_stream_says_what_it_needs() -> None:
    model, x = random_model(), torch.rand(1, 3, 16, 40, dtype=torch.float64)
    least = model.stream_bytes(16, 40)
    assert model.stream_bytes(4000, 40) == least, "strips do not depend on the height"
    assert model.stream_bytes(16, 80) > least
    with pytest.raises(ValueError, match=f"memory must be at least {least} bytes for 40x16 pixels, got 5"):
        model.stream(x, memory=5)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        model.stream(x[:, :1])


def test_rows_beyond_the_image_are_its_mirror() -> None:
    """Padding is the authors': mirrored to the right and below; a side that is too short repeats its last pixels."""
    model, x = random_model(), torch.rand(1, 3, 13, 22, dtype=torch.float64)
    mirrored = nn.functional.pad(x, (0, 2, 0, 3), "reflect")
    assert torch.equal(model(x), model(mirrored)[..., :13, :22])
    x = x[..., :3, :4]
    repeated = nn.functional.pad(x, (0, 4, 0, 5), "replicate")
    assert torch.equal(model(x), model(repeated)[..., :3, :4])


@pytest.mark.parametrize("bias_free", [True, False])
def test_strip_norm_is_the_norm(bias_free: bool) -> None:
    norm = PixelNorm(12, bias_free).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    x = torch.randn(12, 3, 5, dtype=torch.float64) + 3
    with torch.no_grad():
        found, expected = normed_strip(norm, x), norm(x.permute(1, 2, 0))
    assert relative(found.unflatten(1, (3, 5)).permute(1, 2, 0), expected) < 1e-13
    if bias_free:  # about the mean, which stays in: neither layer norm nor RMS norm
        pixel = x[:, 0, 0]
        assert relative(expected[0, 0], pixel / (pixel.var(correction=0) + 1e-5).sqrt() * norm.weight.detach()) < 1e-12


def test_hidden_channels_are_aligned() -> None:
    """Zeros are added to both halves, once, and change nothing."""
    ffn, x = GatedFFN(6, 13).double().eval(), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = ffn(x)
        assert ffn.pad_hidden()
        assert ffn.hidden_dim == 16
        assert not ffn.pad_hidden()
        assert relative(ffn(x), expected) < 1e-14


def test_reparameterize_says_what_it_did() -> None:
    model = random_model()
    assert model.latent[0].reparameterize() == ("affine norms", "hidden channels aligned")
    assert model.latent[0].reparameterize() == ()
    assert model.reparameterize() == ("affine norms", "hidden channels aligned")
    assert model.reparameterize() == ()
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        random_model().train().reparameterize()


def test_gradient_checkpointing() -> None:
    x = torch.rand(1, 3, 16, 8, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model = random_model().train()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert (first - second).abs().max() <= 1e-12 * first.abs().max()


def authors_shapes(form: str) -> dict[str, Tensor]:
    """The authors' state dict without its numbers."""
    facts, _ = protocol.load(RECORDS / f"restormer_{form}_64")
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in facts["state_dict"].items()}


@pytest.mark.parametrize("form", FORMS)
def test_authors_keys_round_trip(form: str) -> None:
    """Every tensor of the authors' files has one place, and the filter leaves our own names alone."""
    state_dict = authors_shapes(form)
    model = timm.create_model(FORMS[form], device="meta")
    once = checkpoint_filter_fn(state_dict, model)
    assert len(once) == len(state_dict)
    assert once.keys() == model.state_dict().keys()
    twice = checkpoint_filter_fn(once, model)
    assert all(twice[key] is value for key, value in once.items())
    assert twice.keys() == once.keys()
    del state_dict["latent.3.ffn.dwconv.weight"]
    with pytest.raises(CheckpointError, match=r"missing: latent\.3\.ffn\.dwconv\.weight"):
        load_strict(model, state_dict, checkpoint_filter_fn)


@pytest.mark.parametrize("form", FORMS)
def test_detect_authors(form: str) -> None:
    assert detect(authors_shapes(form)) == (FORMS[form], {})


@pytest.mark.parametrize("name", PARAMS)
def test_detect_ours(name: str) -> None:
    """The network is recognised; of the tasks that share one, the first."""
    same = {"restormer_denoise_real": "restormer_denoise_color"}
    same["restormer_tiny_restore_color"] = "restormer_tiny_denoise_color"
    same |= dict.fromkeys(("restormer_derain", "restormer_defocus"), "restormer_deblur")
    state_dict = timm.create_model(name, device="meta").state_dict()
    assert detect(state_dict) == (same.get(name, name), {})


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 8, "num_blocks": (1, 2, 1, 1), "num_refinement_blocks": 3, "num_heads": (2, 2, 4, 8)},
        {"dim": 12, "mlp_ratio": 2.0, "bias_free": True, "num_blocks": (1, 1, 1, 1)},
        {"dim": 10, "mlp_ratio": 1.37, "num_heads": (1, 1, 2, 5), "num_blocks": (1, 1, 1, 1)},
        {"dim": 8, "in_chans": 1, "bias_free": True, "num_blocks": (1, 1, 1, 1)},
        {"dim": 8, "in_chans": 2, "out_chans": 3, "dual_pixel": True, "num_blocks": (1, 1, 1, 1)},
    ],
)
def test_detect_variants(arguments: dict[str, object], merged: bool) -> None:
    """Small networks of one's own come back as they were, and take their weights."""
    model = Restormer(**arguments, merged=merged)
    found = detect(model.state_dict())
    assert found is not None
    assert found[1].get("merged", False) == merged
    load_strict(timm.create_model(found[0], **found[1]), model.state_dict(), checkpoint_filter_fn)


def test_detect_refuses_others() -> None:
    state_dict = dict(timm.create_model("restormer_deblur", device="meta").state_dict())
    assert detect({**state_dict, "prompt1.prompt_param": torch.zeros(1)}) is None
    for key in ("output.weight", "latent.0.attn.temperature", "decoder_level2.0.attn.temperature"):
        assert detect({name: value for name, value in state_dict.items() if name != key}) is None
    assert detect({"conv_first.weight": torch.zeros(48, 3, 3, 3)}) is None


def test_weight_tags() -> None:
    """Each file of the authors has a tag with its task, noise level and licence note."""
    cfgs = {full: cfg for name in PARAMS for full, cfg in get_arch_pretrained_cfgs(name).items()}
    published = [cfg.url for cfg in cfgs.values() if cfg.url]
    assert len(published) == len(set(published)) == 13
    assert all(cfg.notes for cfg in cfgs.values() if cfg.url)
    assert cfgs["restormer_denoise_color.sigma25"].sigma == 25
    assert cfgs["restormer_denoise_gray.blind"].sigma == (0, 50)
    assert cfgs["restormer_derain.rain13k"].url.endswith("/v1.0/deraining.pth")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"dim": 10, "num_heads": (1, 2, 3, 4)},
            "dim must be even and divisible by the heads (1, 2, 3, 4) of its levels, got 10",
        ),
        ({"dim": 7, "num_heads": (1, 1, 1, 1)}, "dim must be even"),
        ({"num_blocks": (1, 2, 3)}, "num_blocks and num_heads must have four numbers"),
        ({"num_blocks": (1, 0, 1, 1)}, "num_blocks and num_refinement_blocks must be at least 1"),
        ({"out_chans": 1}, "out_chans must be in_chans, which is added to it, got 1 and 3"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must leave at least one hidden channel"),
        ({"num_classes": 10}, "num_classes must be 0, got 10"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Restormer(**kwargs)
