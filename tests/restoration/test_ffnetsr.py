"""FFNetSR: parity with the authors' code, forms that are equal, strips of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from parity import protocol
from registered import randomize, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.bench.plain_restorers import plain_ffnetsr
from zoo.restoration.ffnetsr import FFNetSR, checkpoint_filter_fn, detect
from zoo.weights import CheckpointError, load_strict

RECORDS = Path(__file__).parents[1] / "parity" / "ffnetsr"
PARAMS = {"ffnetsr_light_x2": 1_789_452, "ffnetsr_light_x4": 1_820_592, "ffnetsr_x2": 2_381_580}
GMACS_720P = {"ffnetsr_light_x2": 406.7, "ffnetsr_x2": 541.3}
NORMS = (None, "LN", "BN")


def record(stem: str) -> tuple[dict[str, Tensor], Tensor, dict[str, np.ndarray]]:
    """State dict, input and outputs of one run of the authors' code, in float64."""
    facts, outputs = protocol.load(RECORDS / stem)
    state_dict = {k: torch.from_numpy(v).double() for k, v in protocol.fill_state_dict(facts["state_dict"]).items()}
    return state_dict, torch.from_numpy(protocol.make_input(**facts["input"])).double(), outputs


def random_model(dtype: torch.dtype = torch.float64, **kwargs: Any) -> FFNetSR:
    """A small network whose norms and statistics all matter."""
    torch.manual_seed(0)
    model = timm.create_model("ffnetsr_light_x2", **{"dim": 12, "depth": 3, **kwargs})
    return randomize(model).to(dtype).eval()  # type: ignore[return-value]


@pytest.mark.parametrize(("stem", "depth"), [("ffnetsr_light_x2_40x52", 36), ("ffnetsr_shallow_x2_40x52", 2)])
@torch.no_grad()
def test_parity_with_the_authors(stem: str, depth: int) -> None:
    """Their file gives their output: whole maps, strips, the plain formulation."""
    state_dict, x, outputs = record(stem)
    model = timm.create_model("ffnetsr_light_x2", depth=depth).double().eval()
    load_strict(model, state_dict, checkpoint_filter_fn)
    with torch.enable_grad():
        whole = model(x).detach()
    for found in (whole, model(x), plain_ffnetsr(model, x)):
        assert protocol.rel_error(found.numpy(), outputs["output"]) < 1e-10


@pytest.mark.parametrize("name", PARAMS)
def test_counts(name: str) -> None:
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]
    if name in GMACS_720P:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 360, 640, device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS_720P[name], rel=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 2), (2, 7), (23, 61)])
def test_all_formulations_are_one(size: tuple[int, int], norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole maps, strips of one row and more, the plain formulation; before and after merging; a batch."""
    model, x = random_model(norm=norm), torch.rand(2, 3, *size, dtype=torch.float64)
    whole = model(x).detach()
    with torch.no_grad():
        for merged in (False, True):
            if merged:
                assert model.body[0].reparameterize() == (("batch norms",) if norm == "BN" else ())
                zoo.reparameterize(model, measure=False)
            assert relative(plain_ffnetsr(model, x), whole) < 1e-12
            for pixels in (1, 2 * size[1], 5 * size[1], 4096):
                monkeypatch.setattr("zoo.restoration.ffnetsr._PIXELS", pixels)
                assert relative(model(x), whole) < 1e-12
    assert relative(model(x), whole) < 1e-12


def test_gradients_are_those_of_the_plain_formulation() -> None:
    model, x = random_model(norm="LN"), torch.rand(2, 3, 11, 19, dtype=torch.float64)
    gradients = []
    for forward in (model, lambda x: plain_ffnetsr(model, x)):
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(relative(*pair) < 1e-12 for pair in zip(*gradients, strict=True))


def test_gradient_checkpointing() -> None:
    model, x = random_model().train(), torch.rand(1, 3, 9, 9, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(relative(*pair) < 1e-12 for pair in zip(*gradients, strict=True))


@torch.no_grad()
def test_stream_needs_memory_for_the_width_only() -> None:
    model = random_model(torch.float32)
    x = torch.rand(2, 3, 90, 31)
    whole = plain_ffnetsr(model, x)
    least = model.stream_bytes(90, 31)
    assert least == model.stream_bytes(9000, 31) < model.stream_bytes(90, 310)
    told: list[tuple[int, int]] = []
    for memory in (None, least):
        told.clear()
        found = model.stream(x, memory=memory, progress=lambda *done: told.append(done))
        assert relative(found, whole) < 1e-5
        assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert len(told) == 180
    with pytest.raises(ValueError, match=f"at least {least} bytes for 31x90 pixels, got 10"):
        model.stream(x, memory=10)
    with pytest.raises(RuntimeError, match="training mode"):
        model.train().stream(x)


def test_receptive_field() -> None:
    """An output pixel depends on inputs as far away as is stated, and on none farther."""
    assert timm.create_model("ffnetsr_light_x2", device="meta").receptive_field == 110
    assert timm.create_model("ffnetsr_x2", device="meta").receptive_field == 146
    model = random_model().requires_grad_(False)
    reach = model.receptive_field
    x = torch.rand(1, 3, 2 * reach + 7, 9, dtype=torch.float64, requires_grad=True)
    model(x)[..., 2 * (reach + 3), 8].sum().backward()
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (3, 2 * reach + 3)


def test_short_training_init() -> None:
    """Blocks add nothing at first, whatever their norm, and learn all the same."""
    model = timm.create_model("ffnetsr_light_x2", dim=12, depth=3, short_training_init=True)
    x = torch.rand(1, 3, 9, 6)
    torch.testing.assert_close(model.forward_features(x), model.proj(x))
    model(x).square().mean().backward()
    assert all(
        mixer[-1].weight.grad.abs().max() > 0 for mixer in (model.body[0].token_mixer, model.body[2].channel_mixer)
    )


@pytest.mark.parametrize("name", PARAMS)
def test_detect(name: str) -> None:
    state_dict = timm.create_model(name).state_dict()
    assert detect(state_dict) == (name, {})
    assert detect({key: value for key, value in state_dict.items() if key != "conv_bef_up.weight"}) is None


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_detect_others(norm: str | None) -> None:
    """Other sizes, norms, scales and channels are read from the tensors; a merged BatchNorm is as if it never was."""
    model = random_model(torch.float32, norm=norm, scale=3, in_chans=1, expansion_ratio=1.5)
    x = torch.rand(1, 1, 9, 6)
    expected = model(x)
    for merged in (False, True):
        if merged:
            zoo.reparameterize(model, measure=False)
        name, kwargs = detect(model.state_dict())
        other = timm.create_model(name, **kwargs).eval()
        load_strict(other, model.state_dict(), checkpoint_filter_fn)
        assert other.scale == 3
        assert relative(other(x), expected) < 1e-5
    assert detect({"proj.weight": torch.zeros(96, 3, 3, 3), "conv_bef_up.weight": torch.zeros(12, 96, 3, 3)}) is None


def test_detect_authors(tmp_path: Path) -> None:
    state_dict, _, _ = record("ffnetsr_light_x2_40x52")
    assert detect(state_dict) == ("ffnetsr_light_x2", {})
    torch.save({"params": {key: value.float() for key, value in state_dict.items()}}, tmp_path / "net_g.pth")
    assert isinstance(zoo.create_model(str(tmp_path / "net_g.pth")), FFNetSR)
    del state_dict["body.7.token_mixer.3.bias"]
    with pytest.raises(CheckpointError, match=r"missing: body\.7\.token_mixer\.3\.bias"):
        load_strict(timm.create_model("ffnetsr_light_x2"), state_dict, checkpoint_filter_fn)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 5}, "scale must be 1, 2, 3, 4 or 8, got 5"),
        ({"norm": "GN"}, "norm must be None, 'LN' or 'BN', got 'GN'"),
        ({"num_classes": 10}, "num_classes must be 0, got 10"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FFNetSR(device="meta", **kwargs)
