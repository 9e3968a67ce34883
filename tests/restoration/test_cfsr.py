"""CFSR: parity with the authors' code and results, forms that are equal, and what is done to make it fast."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity import protocol
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo  # noqa: F401  registers the models
from zoo.bench.plain_restorers import plain_cfsr_block
from zoo.engines.call import torch_threads
from zoo.evaluation.metrics import psnr, ssim
from zoo.restoration import cfsr
from zoo.restoration.cfsr import CFSR, CFSRBlock, checkpoint_filter_fn, detect
from zoo.weights import CheckpointError, load_strict, read_checkpoint

RECORDS = Path(__file__).parents[1] / "parity" / "cfsr"
SCALES = (2, 3, 4)
TRAINING_PARAMS = {2: 298_236, 3: 304_731, 4: 313_824}
MERGED_PARAMS = {2: 291_324, 3: 297_819, 4: 306_912}  # of the authors' published form
GMACS_720P = {2: 65.06, 3: 29.53, 4: 17.16}


def record(form: str) -> tuple[dict[str, Tensor], Tensor, dict[str, np.ndarray]]:
    """State dict, input and outputs of one run of the authors' code, in float64."""
    facts, outputs = protocol.load(RECORDS / f"cfsr_x2_{form}_40x52")
    state_dict = {k: torch.from_numpy(v).double() for k, v in protocol.fill_state_dict(facts["state_dict"]).items()}
    return state_dict, torch.from_numpy(protocol.make_input(**facts["input"])).double(), outputs


def random_model(**kwargs: object) -> CFSR:
    """A small network in float64 whose norms, scales and edges all matter."""
    model = timm.create_model("cfsr_x2", embed_dim=12, depths=(1, 1), layer_scale_init=1.0, **kwargs).double()
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 2 and "weight" not in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


@pytest.mark.parametrize("edges", [True, False], ids=["training form", "merged form"])
@pytest.mark.parametrize("form", ["branches", "merged"])
@torch.no_grad()
def test_parity_with_the_authors(form: str, edges: bool) -> None:
    """Each published form loads into each of ours; all give the authors' output, before and after merging."""
    state_dict, x, outputs = record(form)
    model = timm.create_model("cfsr_x2", edge_branches=edges).double().eval()
    load_strict(model, state_dict, checkpoint_filter_fn)
    for merged in (False, True):
        if merged:
            model.reparameterize()
        found = model(x).numpy()
        for expected in outputs.values():
            assert protocol.rel_error(found, expected) < 1e-10


@pytest.mark.parametrize("edges", [True, False], ids=["training form", "merged form"])
@torch.no_grad()
def test_block_is_the_plain_block(edges: bool) -> None:
    block = random_model(edge_branches=edges).layers[0].blocks[0]
    x = torch.randn(2, 12, 9, 11, dtype=torch.float64)
    expected = plain_cfsr_block(block, x)
    found = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (found - expected).abs().max() < 1e-12
    block.reparameterize()
    assert (block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_counts(scale: int) -> None:
    """Parameters and multiply-accumulates are the authors'; masks are buffers of the same number of values."""
    training = timm.create_model(f"cfsr_x{scale}", device="meta")
    assert sum(p.numel() for p in training.parameters()) == TRAINING_PARAMS[scale]
    assert sum(b.numel() for name, b in training.named_buffers() if name.endswith("edge_masks")) == 31_104
    merged = timm.create_model(f"cfsr_x{scale}", edge_branches=False, device="meta").eval()
    assert sum(p.numel() for p in merged.parameters()) == MERGED_PARAMS[scale]
    height, width = -(-720 // scale), -(-1280 // scale)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged(torch.empty(1, 3, height, width, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS_720P[scale], rel=3e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 2), (23, 61), (64, 300)])
def test_strips_are_the_whole_map(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the blocks run strip by strip, which changes nothing."""
    monkeypatch.setattr(cfsr, "_STRIP_PIXELS", 256)
    model, x = random_model(), torch.rand(2, 3, *size, dtype=torch.float64)
    whole = model(x)
    with torch.no_grad():
        assert (model(x) - whole).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_is_the_whole_map(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips through all blocks, on one thread and on several, with as little memory as can be: nothing changes."""
    model = random_model()
    model.reparameterize()
    monkeypatch.setattr(cfsr, "_STRIP_PIXELS", 31 * 12)
    for shape in ((2, 3, 45, 31), (1, 3, 1, 40), (1, 3, 9, 2)):
        x = torch.rand(*shape, dtype=torch.float64)
        with torch.enable_grad():
            whole = model(x)  # whole maps
        told: list[tuple[int, int]] = []
        with torch_threads(threads):
            for memory in (None, model.stream_bytes(*shape[2:])):
                told.clear()
                found = model.stream(x, memory=memory, progress=lambda *done, told=told: told.append(done))
                assert (found - whole).abs().max() < 1e-12
                assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
            assert torch.get_num_threads() == threads


def test_a_stream_says_what_it_needs() -> None:
    model, x = random_model(), torch.rand(1, 3, 90, 31, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"layers\.0\.blocks\.0 \(not merged\): call it"):
        model.stream(x)
    model.reparameterize()
    least = model.stream_bytes(90, 31)
    assert model.stream_bytes(90, 310) > 4 * least
    assert model.stream_bytes(9000, 31) < 1.2 * least, "memory depends on the width"
    with pytest.raises(ValueError, match=f"at least {least} bytes for 31x90 pixels, got 10"):
        model.stream(x, memory=10)
    with pytest.raises(RuntimeError, match="training mode"):
        model.train().stream(x)
    model.eval().layers[0].blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"with layers\.0\.blocks\.0 "):
        model.stream(x)


@pytest.mark.parametrize("kernel_size", [5, 7, 9])
def test_gradients_of_the_large_kernel(kernel_size: int) -> None:
    """The weight gradient in strips is autograd's own."""
    conv = cfsr.DepthwiseConv(4, kernel_size).double()
    x = torch.randn(2, 6, 11, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 6, 11, 4, dtype=torch.float64)
    gradients = []
    for training in (True, False):
        conv.train(training).zero_grad()
        x.grad = None
        conv(x).backward(seed)
        gradients.append([x.grad, conv.weight.grad, conv.bias.grad])
    for ours, autograd in zip(*gradients, strict=True):
        assert ours.shape == autograd.shape
        assert (ours - autograd).abs().max() < 1e-12


def test_receptive_field() -> None:
    """An output pixel depends on inputs as far away as is stated, and on none farther."""
    model = random_model().requires_grad_(False)
    reach = model.receptive_field
    assert timm.create_model("cfsr_x2").receptive_field == 63
    x = torch.rand(1, 3, 2 * reach + 7, 2 * reach + 7, dtype=torch.float64, requires_grad=True)
    centre = reach + 3
    model(x)[..., 2 * centre, 2 * centre].sum().backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert int(rows.min()) == centre - reach
    assert int(rows.max()) == centre + reach


@pytest.mark.parametrize("scale", SCALES)
@torch.no_grad()
def test_interpolation_init(scale: int) -> None:
    """The untrained network interpolates quadratically, away from the border and but for small random features."""
    model = timm.create_model(f"cfsr_x{scale}", depths=(1,), interpolation_init=True).double().eval()
    weight = model.upsample.weight.unflatten(0, (3, -1))
    for out_chan in range(3):
        others = [chan for chan in range(48) if chan != out_chan]
        assert 0 < weight[out_chan][:, others].abs().max() < 0.01
        weight[out_chan][:, others] = 0

    def surface(size: int, step: float) -> Tensor:
        at = (torch.arange(size, dtype=torch.float64) + 0.5) * step
        values = 0.2 + 0.01 * at[:, None] + 1e-4 * at**2 + 1e-4 * at * at[:, None]
        return values.expand(1, 3, -1, -1)

    found, expected = model(surface(16, 1)), surface(16 * scale, 1 / scale)
    inner = slice(3 * scale, -3 * scale)
    assert (found - expected)[..., inner, inner].abs().max() < 1e-7  # kernels are float32


def test_authors_masks() -> None:
    """A fresh training form has the authors' filters, slips included."""
    masks = timm.create_model("cfsr_x2", depths=(1,)).layers[0].blocks[0].ffn.edge_masks.view(3, 96, 3, 3)
    assert masks[0, 5].tolist() == [[0, 1, -1], [2, 0, -2], [1, 0, -1]]
    assert masks[1, 5].tolist() == [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]
    assert masks[2, 5].tolist() == [[1, 0, 0], [1, -4, 1], [0, 1, 0]]


@torch.no_grad()
def test_masks_of_a_training_checkpoint_are_used() -> None:
    state_dict, x, _ = record("branches")
    shape = (96, 1, 3, 3)
    for edge in ("sobel_x", "sobel_y", "laplacian"):
        for stage in (0, 1):
            for block in range(6):
                state_dict[f"layers.{stage}.blocks.{block}.mlp.mask_{edge}"] = torch.randn(shape, dtype=torch.float64)
    outputs = []
    for edges in (True, False):
        model = timm.create_model("cfsr_x2", edge_branches=edges).double().eval()
        load_strict(model, state_dict, checkpoint_filter_fn)
        outputs.append(model(x[..., :12, :12]))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-9 * outputs[0].abs().max()
    own = timm.create_model("cfsr_x2").double().eval()
    load_strict(own, record("branches")[0], checkpoint_filter_fn)
    assert (own(x[..., :12, :12]) - outputs[0]).abs().max() > 1e-3


def test_filter_is_idempotent() -> None:
    model = timm.create_model("cfsr_x2")
    once = checkpoint_filter_fn(record("branches")[0], model)
    assert once.keys() == model.state_dict().keys()
    twice = checkpoint_filter_fn(once, model)
    assert twice.keys() == once.keys()
    assert all(torch.equal(value, once[key]) for key, value in twice.items())


@pytest.mark.parametrize("key", ["layers.0.blocks.3.attn.a.0.bias", "layers.1.blocks.0.mlp.pos.weight", "norm.bias"])
def test_a_missing_key_is_named(key: str) -> None:
    state_dict = record("merged")[0]
    del state_dict[key]
    with pytest.raises((CheckpointError, KeyError), match=r"missing|attn"):
        load_strict(timm.create_model("cfsr_x2"), state_dict, checkpoint_filter_fn)


@pytest.mark.parametrize("scale", SCALES)
def test_detect(scale: int) -> None:
    """Our forms and the authors' are recognised from their tensors alone."""
    name = f"cfsr_x{scale}"
    assert detect(timm.create_model(name).state_dict()) == (name, {})
    small = dict(embed_dim=8, depths=(2, 1), kernel_size=5, mlp_ratio=1.5)
    assert detect(timm.create_model(name, **small).state_dict()) == (name, small)
    assert detect(timm.create_model(name, edge_branches=False).state_dict()) == (name, {"edge_branches": False})
    assert detect(timm.create_model(name, in_chans=1).state_dict()) == (name, {"in_chans": 1})
    model = timm.create_model(name).eval()
    model.reparameterize()
    found = detect(model.state_dict())
    assert found == (name, {"edge_branches": False, "merged": True})
    load_strict(timm.create_model(found[0], **found[1]), model.state_dict(), checkpoint_filter_fn)
    assert detect({"conv_first.weight": torch.zeros(48, 3, 3, 3)}) is None


def test_detect_authors() -> None:
    assert detect(record("branches")[0]) == ("cfsr_x2", {})
    assert detect(record("merged")[0]) == ("cfsr_x2", {"edge_branches": False})


def test_reparameterize_says_what_it_did() -> None:
    block = random_model().layers[0].blocks[0]
    assert isinstance(block, CFSRBlock)
    assert block.reparameterize() == ("edge branches", "affine norms", "layer scales")
    assert block.reparameterize() == ()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 5}, "scale must be 2, 3 or 4, got 5"),
        ({"kernel_size": 8}, "kernel_size must be odd, got 8"),
        ({"num_classes": 10}, "num_classes must be 0, got 10"),
    ],
)
def test_bad_arguments(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFSR(**kwargs)


@pytest.fixture(scope="module")
def authors_weights(data_dir: Path) -> Path:
    """Return the folder of the authors' published files; skip where it is not."""
    folder = Path(os.environ.get("ZOO_WEIGHTS", data_dir.parent / "weights")) / "cfsr"
    if not folder.is_dir():
        pytest.skip("the authors' weights are not at hand: ZOO_WEIGHTS names no folder")
    return folder


PUBLISHED = {  # set, scale, one pair of so many: PSNR (dB), SSIM on Y; whole sets by the authors' code, parts by ours
    ("Set5", 2, 1): (38.070, 0.9607),
    ("Set5", 4, 1): (32.328, 0.8964),
    ("Set14", 2, 1): (33.744, 0.9192),
    ("Set14", 4, 1): (28.734, 0.7842),
    ("B100", 2, 1): (32.248, 0.9006),
    ("B100", 4, 1): (27.637, 0.7383),
    ("B100", 2, 20): (32.545, 0.8985),
    ("B100", 4, 20): (28.221, 0.7576),
}
WHOLE = os.environ.get("ZOO_WHOLE_SETS") == "1"
QUICK = [key for key in PUBLISHED if WHOLE or key[0] == "Set5" or key == ("B100", 4, 20)]


def pairs(data_dir: Path, name: str, scale: int, every: int) -> list[tuple[Tensor, Tensor]]:
    """Low- and high-resolution images of a benchmark set, one of so many, (1, 3, H, W) in [0, 1]."""
    found = []
    for path in sorted((data_dir / "sr" / name / "LR_bicubic" / f"X{scale}").glob("*.png"))[::every]:
        stem = path.stem.removesuffix(f"x{scale}")
        high = (
            data_dir / "bsds" / "val" / f"{stem}.jpg"
            if name == "B100"
            else data_dir / "sr" / name / "HR" / f"{stem}.png"
        )
        images = [np.asarray(Image.open(file).convert("RGB")) for file in (path, high)]
        height, width = (side * scale for side in images[0].shape[:2])
        images[1] = images[1][:height, :width]
        low_res, high_res = (torch.from_numpy(i.copy()).permute(2, 0, 1)[None].float() / 255 for i in images)
        found.append((low_res, high_res))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale", "every"), QUICK)
@torch.no_grad()
def test_published_weights(name: str, scale: int, every: int, authors_weights: Path, data_dir: Path) -> None:
    """The authors' files give the paper's PSNR and SSIM: BasicSR's protocol, to 0.02 dB and 0.0003.

    Set5, and every 20th pair of B100 at x4, whose numbers were measured by the code that gives those of the whole set.
    The whole sets take ten minutes: `ZOO_WHOLE_SETS=1 pytest tests/restoration/test_cfsr.py -k published`.
    """
    model = timm.create_model(f"cfsr_x{scale}").eval()
    load_strict(model, read_checkpoint(authors_weights / f"CFSR_x{scale}.pth"), checkpoint_filter_fn)
    model.reparameterize()
    scores = [
        [float(measure(model(low), high, space="y", crop=scale)) for measure in (psnr, ssim)]
        for low, high in pairs(data_dir, name, scale, every)
    ]
    found = np.mean(scores, axis=0)
    print(f"{name} x{scale}, one of {every}: {found[0]:.3f} dB, {found[1]:.4f}")
    assert found[0] == pytest.approx(PUBLISHED[name, scale, every][0], abs=0.02)
    assert found[1] == pytest.approx(PUBLISHED[name, scale, every][1], abs=0.0003)
