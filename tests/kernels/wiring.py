"""Models with their kernels in Triton's interpreter; `test_triton_kernels.py` runs this file by itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import condition, dit, flux, pixel_dit, sd3
from registered import build, images, relative
from torch import Tensor, nn

import zoo
from zoo import kernels
from zoo.diffusion.adaln import adopt_kernels
from zoo.kernels import triton_adaln, triton_experts, triton_frequency, triton_gated, triton_repa, triton_ska
from zoo.moe.experts import MoEFFN

_KERNELS = {
    "adaln": triton_adaln,
    "experts": triton_experts,
    "frequency": triton_frequency,
    "gated": triton_gated,
    "repa": triton_repa,
    "ska": triton_ska,
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of the kernels by file."""
    counts: Counter[str] = Counter()

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return forward(*args, **kwargs)

        return launch

    for name, module in _KERNELS.items():
        monkeypatch.setattr(module, "forward", counting(name, module.forward))
    return counts


def run_both(model: nn.Module, call: Callable[[], Tensor]) -> float:
    """Return the error of a model with its kernels, of the largest number without; its weights keep their names."""
    keys = list(model.state_dict())
    with kernels.use_backend("torch"):
        expected = call()
    with kernels.use_backend("interpret"):
        found = call()
    assert list(model.state_dict()) == keys
    assert found.shape == expected.shape
    return relative(found, expected)


@torch.no_grad()
def test_merged_repavit(launches: Counter[str]) -> None:
    model = build("repavit")
    zoo.reparameterize(model, measure=False)
    assert run_both(model, lambda: model(images("repavit"))) < 1e-5
    assert launches == {"repa": 3}


@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_lsnet(merged: bool, launches: Counter[str]) -> None:
    model = build("lsnet")
    if merged:
        zoo.reparameterize(model, measure=False)
    assert run_both(model, lambda: model(images("lsnet", 1))) < 1e-5
    assert set(launches) == {"ska"}


@torch.no_grad()
def test_affnet(launches: Counter[str]) -> None:
    model = build("affnet", depths=(1, 0, 0))
    assert run_both(model, lambda: model(images("affnet", 1, size=(32, 32)))) < 1e-5
    assert set(launches) == {"frequency"}


def test_every_kernel_is_reached_from_a_model() -> None:
    """A kernel file without a test of a model above would be one that no layer calls."""
    files = {path.stem.removeprefix("triton_") for path in Path(triton_ska.__file__).parent.glob("triton_*.py")}
    assert files == _KERNELS.keys()


def test_restormer(launches: Counter[str]) -> None:
    """Merged, as training form calls its modules. Gradients are on: without them a CPU runs by strips."""
    model = build("restormer")
    zoo.reparameterize(model, measure=False)
    assert run_both(model, lambda: model(images("restormer", 1))) < 1e-5
    assert launches == {"gated": 8}


@pytest.mark.parametrize("free", [0, 1])
def test_experts(free: int, launches: Counter[str]) -> None:
    """In inference with fewer experts than there are; in training their gradients have no kernel."""
    layer = MoEFFN(8, 8, shared_dim=4, expert_dim=4, experts=3, top_k=2, activation="gelu", zero=free, copies=free)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert run_both(layer, lambda: layer(x)) < 1e-5
    assert launches == {"experts": 1}
    assert run_both(layer, lambda: layer(x)) == 0
    layer.set_top_k(layer.outputs)
    with torch.no_grad():
        assert run_both(layer, lambda: layer(x)) == 0
    assert launches == {"experts": 1}


@pytest.mark.parametrize(
    ("make", "count"),
    [(pixel_dit, 6), (dit, 6), (flux, 6), (sd3, 5)],  # two norms a block; FLUX and SD3 keep their second ones
    ids=["pixel_dit", "dit", "flux", "sd3"],
)
@torch.no_grad()
def test_denoisers(make: Callable[[], nn.Module], count: int, launches: Counter[str]) -> None:
    model = make()
    adopt_kernels(model)
    sample, inputs = condition(model, 2)
    timestep = torch.tensor([900.0, 100.0])
    assert run_both(model, lambda: model(sample, timestep=timestep, **inputs, return_dict=False)[0]) < 1e-5
    assert launches == {"adaln": count}


def test_training_of_pixel_dit(launches: Counter[str]) -> None:
    """The gradients of all weights, too."""
    model = pixel_dit(num_layers=1).train()
    sample, inputs = condition(model, 1)
    gradients = []
    for backend in ("torch", "interpret"):
        twin = copy.deepcopy(model)
        with kernels.use_backend(backend):  # type: ignore[arg-type]
            torch.manual_seed(0)  # of the labels that are dropped
            twin(sample, timestep=torch.tensor([500.0]), **inputs, return_dict=False)[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in twin.named_parameters()})
    assert launches == {"adaln": 2}
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        assert float((gradients[1][name] - expected).abs().max()) < 1e-5 * largest, name


@torch.no_grad()
def test_accelerate_says_which_kernels_run() -> None:
    model = build("repavit")
    expected = model(images("repavit"))
    before = kernels.get_backend()
    try:
        zoo.accelerate(model, kernels="interpret")
        assert "interpret, for the whole process: repa_ffn" in str(model.zoo_report)
        assert relative(model(images("repavit")), expected) < 1e-5
    finally:
        kernels.set_backend(before)
