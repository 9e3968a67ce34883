"""DAT: parity with the authors' code, forms that are equal, streaming, and what is done to make it fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from parity import protocol
from registered import randomize, relative
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.bench.plain_restorers import PLAIN, plain_dat
from zoo.layers.rectangular_window import DynamicPositionBias, WindowAttention
from zoo.restoration.dat import DAT, checkpoint_filter_fn, detect
from zoo.streaming import maps
from zoo.streaming.dat import window_spans
from zoo.weights import CheckpointError, load_strict, read_checkpoint

RECORDS = Path(__file__).parents[1] / "parity" / "dat"
NAMES = {"dat_light_x2_40x52": "dat_light_x2", "dat_light_x2_64x64": "dat_light_x2", "dat_s_x4_28x44": "dat_s_x4"}
PARAMS = {
    "dat_light": (553_290, 561_405, 572_766),
    "dat_s": (11_064_419, 11_249_059, 11_212_131),
    "dat_2": (11_064_419, 11_249_059, 11_212_131),
    "dat": (14_654_339, 14_838_979, 14_802_051),
}
GMACS_S_X4 = 201.39  # 128x128 input
SIZES = [(1, 1), (1, 23), (37, 2), (8, 16), (19, 33), (40, 24)]


def record(stem: str) -> tuple[dict[str, Tensor], Tensor, dict[str, np.ndarray]]:
    """State dict, input and outputs of one run of the authors' code, in float64; derived tables as in their files."""
    facts, outputs = protocol.load(RECORDS / stem)
    state_dict = {k: torch.from_numpy(v).double() for k, v in protocol.fill_state_dict(facts["state_dict"]).items()}
    for key, (shape, dtype) in facts["state_dict"].items():
        if key.endswith("rpe_biases"):
            window = (8, 32 if "light" in stem else 16)
            sides = window if ".attns.0." in key else window[::-1]
            axes = [torch.arange(1 - side, side) for side in sides]
            state_dict[key] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1).float()
            assert list(state_dict[key].shape) == shape
        elif key not in state_dict:
            state_dict[key] = torch.zeros(shape, dtype=getattr(torch, dtype.split()[-1]))
    return state_dict, torch.from_numpy(protocol.make_input(**facts["input"])).double(), outputs


def random_model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> DAT:
    """A small network of every kind of block whose norms, statistics and position biases all matter."""
    sizes = dict(embed_dim=64, depths=(4, 2), num_heads=4, split_size=(4, 8), expansion=2.0)
    torch.manual_seed(0)
    return randomize(timm.create_model("dat_light_x2", **{**sizes, **kwargs})).to(dtype).eval()  # type: ignore[return-value]


def light(**kwargs: Any) -> DAT:
    """A small network whose position bias is dead."""
    return random_model(embed_dim=24, num_heads=2, **kwargs)


@pytest.mark.parametrize("stem", NAMES)
def test_parity_with_the_authors(stem: str) -> None:
    """Their file gives their output, before and after merging; the small ones by parts and in plain words, too."""
    state_dict, x, outputs = record(stem)
    model = timm.create_model(NAMES[stem]).double().eval()
    load_strict(model, state_dict, checkpoint_filter_fn)
    assert detect(state_dict) == (NAMES[stem], {})
    with torch.no_grad():
        found = [model(x)]
        if "light" in stem:
            found += [plain_dat(model, x), model.upscale(model.forward_features(x))]
        zoo.reparameterize(model, measure=False)
        found.append(model(x))
    for output in found:
        assert protocol.rel_error(output.numpy(), outputs["output"]) < 1e-10


@pytest.mark.parametrize("name", [f"{family}_x{scale}" for family in PARAMS for scale in (2, 3, 4)])
def test_parameters(name: str) -> None:
    family, _, scale = name.rpartition("_x")
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[family][int(scale) - 2]
    assert model.scale == int(scale)
    rank = {"dat_light": 1, "dat_s": 5, "dat_2": 5, "dat": 5}
    biases = [module for module in model.modules() if isinstance(module, DynamicPositionBias)]
    assert {bias.pos1[0].normalized_shape[0] for bias in biases} == {rank[family]}


def test_multiply_accumulates() -> None:
    """The plain formulation does the work that was counted with the authors' code, ours hardly more."""
    model, x = timm.create_model("dat_s_x4", device="meta").eval(), torch.empty(1, 3, 128, 128, device="meta")
    found = []
    for forward in (lambda x: plain_dat(model, x), model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(x)
        found.append(counter.get_total_flops() / 2e9)
    assert found[0] == pytest.approx(GMACS_S_X4, rel=3e-3)
    assert found[1] < 1.05 * GMACS_S_X4


def test_which_blocks_are_shifted() -> None:
    model = timm.create_model("dat_2_x2", device="meta")
    shifted = [
        [index for index, block in enumerate(group.blocks) if index % 2 == 0 and any(block.attn.attns[0].shift)]
        for group in model.layers
    ]
    assert shifted == [[2], [0, 4]] * 3
    blocks = timm.create_model("dat_light_x2", device="meta").layers[0].blocks
    assert [index for index in range(0, 18, 2) if any(blocks[index].attn.attns[0].shift)] == [2, 6, 10, 14]
    assert [attn.size for attn in blocks[2].attn.attns] == [(8, 32), (32, 8)]
    assert [attn.shift for attn in blocks[2].attn.attns] == [(4, 16), (16, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [random_model, light])
def test_all_formulations_are_one(size: tuple[int, int], make: Any) -> None:
    """Whole maps, strips, the plain formulation; before and after merging; odd sizes and a batch."""
    model, x = make(), torch.rand(2, 3, *size, dtype=torch.float64)
    whole = model(x).detach()
    with torch.no_grad():
        expected = plain_dat(model, x)
        for merged in (False, True):
            if merged:
                model.reparameterize()
            for found in (whole, model(x), PLAIN[DAT](model, x)):
                assert found.shape == (2, 3, 2 * size[0], 2 * size[1])
                assert relative(found, expected) < 1e-12


def test_gradients_are_those_of_the_plain_formulation() -> None:
    model, x = random_model(), torch.rand(2, 3, 11, 19, dtype=torch.float64)
    gradients = []
    for forward in (model, lambda x: plain_dat(model, x)):
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).abs().max()) < 1e-12 * largest, name


def test_training_in_bfloat16_is_near_float32() -> None:
    """There the scores are plain products on a CPU, with the bias and the masks of shifted windows."""
    model, x = random_model(torch.float32).train(), torch.rand(2, 3, 32, 32)
    out, gradients = [], []
    for low in (False, True):
        model.zero_grad()
        with _Calls() as calls, torch.autocast("cpu", torch.bfloat16, enabled=low):
            out.append(model(x).float())
        assert ("_safe_softmax.default" in calls.names or "flash" in "".join(calls.names)) is not low
        out[-1].square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative(out[1], out[0]) < 0.05
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98


def test_dead_bias_has_a_gradient_of_zeros() -> None:
    """The parameters of DAT-light's position bias change nothing, and training does not stumble over them."""
    model, x = light(dtype=torch.float32).train(), torch.rand(2, 3, 8, 8)
    model(x).square().mean().backward()
    dead = {name: parameter for name, parameter in model.named_parameters() if ".pos." in name}
    assert dead
    assert all(parameter.grad.count_nonzero() == 0 for parameter in dead.values())
    model.eval()
    with torch.no_grad():
        expected = model(x)
        for parameter in dead.values():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(model(x), expected)
        assert relative(plain_dat(model, x), expected) < 1e-5
    model.reparameterize()
    assert not [key for key in model.state_dict() if ".pos." in key]


def test_gradient_checkpointing() -> None:
    model, x = random_model().train(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(relative(*pair) < 1e-9 for pair in zip(*gradients, strict=True))


def test_position_bias_is_kept_but_never_stale() -> None:
    bias = DynamicPositionBias(3, 2, (2, 4)).double().eval()

    def expected() -> Tensor:
        y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(2), torch.arange(4), indexing="ij"))
        offsets = torch.stack([y[:, None] - y, x[:, None] - x], -1).double()
        return bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets)))).permute(2, 0, 1).detach()

    with torch.no_grad():
        assert relative(bias(), expected()) < 1e-14
        for parameter in bias.parameters():
            parameter.add_(torch.randn_like(parameter))
            assert relative(bias(), expected()) < 1e-14
        before = expected()
    assert bias().requires_grad
    assert bias.reparameterize() == ("position bias",)
    assert bias.reparameterize() == ()
    with torch.no_grad():
        assert relative(bias(), before) < 1e-14
        assert bias() is bias()
    assert list(bias.state_dict()) == ["table"]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("length", [1, 3, 8, 13, 16, 17])
def test_spans_cover_the_map_once(length: int, most: int, shift: bool) -> None:
    padded, offset = -(-length // 8) * 8, 2 if shift else 0
    spans = window_spans(length, padded, 4, offset, most)
    pixels = [pixel for span in spans for _, first, count in span.pieces for pixel in range(first, first + count)]
    assert sorted(pixels) == list(range(length))
    assert sum(span.last for span in spans) == int(shift)
    for span in spans:
        assert span.count <= most
        inside = [at for at, _, count in span.pieces for at in range(at, at + count)]
        assert min(inside) >= (span.queries.start if span.count == 1 else 0)
        assert max(inside) < (span.queries.stop if span.count == 1 else 4 * span.count)


class _Calls(TorchDispatchMode):
    """Collects the names of the operators that run, and the largest tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@torch.no_grad()
def test_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scores in memory, with biases and masks and without; the largest tensors are the maps."""
    monkeypatch.setattr("zoo.restoration.dat._STRIP", 64 * 1024)
    for model in (random_model(torch.float32), light(dtype=torch.float32)):
        model.reparameterize()  # as built, maps are computed whole
        model(torch.rand(1, 3, 16, 16))  # the position bias is made
        with _Calls() as calls, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model(torch.rand(1, 3, 200, 48))
        assert "_scaled_dot_product_flash_attention_for_cpu.default" in calls.names
        assert calls.largest <= 200 * 48 * model.embed_dim + 1


@pytest.mark.parametrize("upsampler", ["pixelshuffle", "pixelshuffledirect"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (61, 5), (44, 37)])
def test_stream_is_the_whole(size: tuple[int, int], upsampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of few rows, maps in memory and in files: up to rounding the output of whole maps, also in a batch."""
    kinds = dict(upsampler=upsampler, resi_connection="1conv" if upsampler == "pixelshuffle" else "3conv")
    model, x = random_model(torch.float32, scale=4, depths=(4, 1), **kinds), torch.rand(2, 3, *size)
    whole = model(x).detach()
    monkeypatch.setattr("zoo.restoration.dat.FEWEST_PIXELS", 64)
    monkeypatch.setattr("zoo.restoration.dat.TILE_PIXELS", 64)
    monkeypatch.setattr("zoo.streaming.dat.TILE_PIXELS", 64)
    made: list[bool] = []
    new = maps.Workspace.new
    monkeypatch.setattr(maps.Workspace, "new", lambda *a, **k: [made.append((m := new(*a, **k)).in_memory), m][1])
    told: list[tuple[int, int]] = []
    for memory in (None, 2 * model.stream_bytes(*size), model.stream_bytes(*size)):
        made.clear()
        told.clear()
        found = model.stream(x, memory=memory, progress=lambda *done: told.append(done))
        assert relative(found, whole) < 1e-5
        assert all(made) if memory is None else memory != model.stream_bytes(*size) or not any(made)
        assert told == [(done, 12) for done in range(1, 13)]
    monkeypatch.setattr("zoo.restoration.dat._STRIP", 64 * 64)
    assert relative(model.stream(x), whole) < 1e-5


def test_stream_refuses() -> None:
    model = random_model(torch.float32)
    least = model.stream_bytes(40, 40)
    with pytest.raises(ValueError, match=f"at least {least} bytes for 40x40 pixels, got {least - 1}"):
        model.stream(torch.rand(1, 3, 40, 40), memory=least - 1)
    with pytest.raises(RuntimeError, match="training mode"):
        model.train().stream(torch.rand(1, 3, 8, 8))


def test_filter_keeps_what_cannot_be_derived() -> None:
    """Tables and masks go, the shape of the windows stays; files without tables are taken for the model's windows."""
    state_dict, _, _ = record("dat_s_x4_28x44")
    model = timm.create_model("dat_s_x4")
    once = checkpoint_filter_fn(state_dict, model)
    assert once.keys() == model.state_dict().keys()
    assert once["layers.0.blocks.0.attn.attns.1.window"].tolist() == [16, 8]
    twice = checkpoint_filter_fn(once, model)
    assert all(torch.equal(value, once[key]) for key, value in twice.items())
    with pytest.raises(ValueError, match=r"windows of 8x16 .* the model has 8x32"):
        checkpoint_filter_fn(state_dict, timm.create_model("dat_2_x4"))
    bare = {key: value for key, value in state_dict.items() if "rpe_biases" not in key and "attn_mask" not in key}
    load_strict(timm.create_model("dat_s_x4"), bare, checkpoint_filter_fn)
    other_size = {**state_dict, "layers.0.blocks.2.attn.attn_mask_0": torch.zeros(2, 128, 128)}
    load_strict(model, other_size, checkpoint_filter_fn)
    del state_dict["layers.3.blocks.2.ffn.sg.conv.weight"]
    with pytest.raises(CheckpointError, match=r"missing: layers\.3\.blocks\.2\.ffn\.sg\.conv\.weight"):
        load_strict(model, state_dict, checkpoint_filter_fn)


@pytest.mark.parametrize("wrapper", ["params", "params_ema", None])
def test_authors_file(wrapper: str | None, tmp_path: Path) -> None:
    """A file as the authors or a community trainer writes it is recognised and loaded."""
    state_dict, x, outputs = record("dat_light_x2_40x52")
    state_dict = {key: value.float() if value.is_floating_point() else value for key, value in state_dict.items()}
    path = tmp_path / "DAT_light_x2.pth"
    torch.save({wrapper: state_dict} if wrapper else state_dict, path)
    model = zoo.create_model(str(path))
    assert isinstance(model, DAT)
    with torch.no_grad():
        assert protocol.rel_error(model.eval()(x.float()).numpy(), outputs["output"]) < 1e-3
    assert detect(read_checkpoint(path)) == ("dat_light_x2", {})


@pytest.mark.parametrize("name", [f"{family}_x{scale}" for family in PARAMS for scale in (2, 3, 4)])
def test_detect(name: str) -> None:
    """Every variant is recognised by its tensors, DAT-S by its windows; also what is none of the variants."""
    model = timm.create_model(name)
    assert detect(model.state_dict()) == (name, {})
    if name == "dat_light_x3":
        model.eval().reparameterize()
        assert detect(model.state_dict()) == (name, {"merged": True})
        other = timm.create_model(name, merged=True)
        load_strict(other, model.state_dict(), checkpoint_filter_fn)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(scale=1, upsampler="pixelshuffle", resi_connection="1conv"),
        dict(scale=8, upsampler="pixelshuffle", resi_connection="1conv", in_chans=1),
        dict(scale=3, num_heads=2, depths=(2, 3), merged=True),
    ],
)
@torch.no_grad()
def test_detect_others(kwargs: dict[str, Any]) -> None:
    model = random_model(torch.float32, **kwargs)
    name, found = detect(model.state_dict())
    other = timm.create_model(name, **found).eval()
    load_strict(other, model.state_dict(), checkpoint_filter_fn)
    x = torch.rand(1, kwargs.get("in_chans", 3), 9, 6)
    assert torch.equal(other(x), model(x))
    assert other.scale == kwargs["scale"]
    assert detect({"conv_first.weight": torch.zeros(48, 3, 3, 3)}) is None


def test_reparameterize_says_what_it_did() -> None:
    model = random_model()
    assert model.reparameterize() == ("affine norms", "batch norms", "position bias")
    assert model.reparameterize() == ()
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with pytest.raises(RuntimeError, match="eval"):
        random_model().train().layers[0].blocks[0].attn.reparameterize()


def test_bias_and_masks_do_not_grow_with_the_map() -> None:
    """In training too there is one mask for each of the four kinds of windows."""
    attn = WindowAttention(8, 2, (4, 8), shift=True, bias_dim=1)
    with _Calls() as calls:
        attn(torch.rand(1, 64, 64, 3, 8, requires_grad=True))
    assert calls.largest <= 64 * 64 * 3 * 8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 5}, "scale must be 1, 2, 3, 4 or 8, got 5"),
        ({"num_heads": 3}, "num_heads must be even and divide embed_dim, got 3 for 180 channels"),
        ({"split_size": (8, 12)}, "split_size must be two even sides, one a multiple of the other"),
        ({"resi_connection": "2conv"}, "resi_connection must be '1conv' or '3conv', got '2conv'"),
        ({"upsampler": "nearest"}, "upsampler must be 'pixelshuffle' or 'pixelshuffledirect', got 'nearest'"),
        ({"expansion": 1.65}, "expansion must give an even number"),
        ({"num_classes": 10}, "num_classes must be 0, got 10"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DAT(device="meta", **kwargs)
