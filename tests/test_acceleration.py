"""`zoo.accelerate`: which steps are taken, in which order, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from caching.hooked import class_pipeline, generate
from denoisers import denoise, dit, flux, pixel_dit
from registered import build, images, relative
from torch import nn

import zoo
from zoo import kernels
from zoo.acceleration import AccelerationReport, AccelerationStep
from zoo.caching.core import active_cache
from zoo.diffusion import adaln


@pytest.fixture(autouse=True)
def _same_backend() -> Iterator[None]:
    """The backend is the process's."""
    before = kernels.get_backend()
    yield
    kernels.set_backend(before)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Record what is to be compiled instead of compiling it."""
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: found.append((self, kwargs)))
    return found


def done(model: Any) -> list[str]:
    """Return the names of the steps that were taken."""
    return [step.name for step in model.zoo_report.steps if step.done]


def said(model: Any, name: str) -> str:
    """Return what is said of a step."""
    return next(step.said for step in model.zoo_report.steps if step.name == name)


@torch.no_grad()
def test_backbone() -> None:
    """Merged before its type changes, in place; as good as merging and rounding by hand."""
    model, twin, sample = build("repavit").train(), build("repavit"), images("repavit")
    zoo.reparameterize(twin, measure=False)
    assert zoo.accelerate(model, dtype="bfloat16") is model
    assert done(model) == ["evaluation mode", "merge", "type"]
    assert "float32 -> bfloat16" in said(model, "type")
    assert "parameters" in said(model, "merge")
    assert list(model.state_dict()) == list(twin.state_dict())
    assert torch.equal(model(sample.bfloat16()), twin.bfloat16()(sample.bfloat16()))
    assert [step.name for step in model.zoo_report.steps] == [
        *("evaluation mode", "merge", "type", "channels last", "kernels", "compile", "cache"),
    ]


@torch.no_grad()
def test_nothing_to_do_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    expected = model(torch.ones(1, 4))
    zoo.accelerate(model)
    assert done(model) == []
    assert torch.equal(model(torch.ones(1, 4)), expected)
    lines = str(model.zoo_report).splitlines()
    assert len(lines) == 7
    assert all("left out" in line for line in lines)
    assert said(model, "channels last") == "not a convolutional network"
    assert said(model, "kernels") == "no layer uses an operator of zoo.kernels"


@torch.no_grad()
def test_convolutional_networks_are_channels_last() -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    expected = model(images("repavit"))
    zoo.accelerate(model)
    assert done(model) == ["channels last"]
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative(model(images("repavit")), expected) < 1e-4
    ours = zoo.accelerate(build("lsnet"))
    assert said(ours, "channels last") == "zoo's models choose it themselves"


@torch.no_grad()
def test_restorer_is_exact() -> None:
    model, sample = build("restormer"), images("restormer")
    expected = model(sample)
    assert relative(zoo.accelerate(model)(sample), expected) < 1e-5
    assert "merge" in done(model)


def test_kernels_are_the_process_s() -> None:
    model = build("lsnet")
    with kernels.use_backend("torch"):
        zoo.accelerate(model)  # None keeps what is set
        assert said(model, "kernels") == "torch: PyTorch computes ska: as asked for"
        zoo.accelerate(model, kernels="auto")
        assert kernels.get_backend() == "auto"
        assert said(model, "kernels").startswith("auto: PyTorch computes ska: no gain was measured")


def test_whole_models_are_compiled_last(compiled: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    model = build("repavit")
    zoo.accelerate(model, compile=True)
    assert compiled == [(model, {"mode": "default"})]
    assert "whole, mode default" in said(model, "compile")
    zoo.accelerate(model, compile="reduce-overhead")
    assert compiled[1][1] == {"mode": "default"}
    assert said(model, "compile").endswith("reduce-overhead needs a CUDA device")
    denoiser = zoo.accelerate(pixel_dit(), compile="max-autotune")
    assert compiled[2:] == [(denoiser, {"mode": "max-autotune"})]  # CUDA graphs: not block by block


@pytest.mark.slow  # traces a model
@torch.no_grad()
def test_compiled_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_of = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compile_of(self, backend="aot_eager"))
    model, sample = build("repavit"), images("repavit")
    keys, expected = list(zoo.accelerate(build("repavit")).state_dict()), model(sample)
    assert relative(zoo.accelerate(model, compile=True)(sample), expected) < 1e-5
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="is compiled already"):
        zoo.accelerate(model)


@pytest.mark.parametrize("make", [pixel_dit, dit, flux])
def test_denoisers_keep_weights_and_numbers(make: Any) -> None:
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    zoo.accelerate(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert torch.equal(denoise(model, 2), denoise(twin, 2))
    assert "modulate" in said(model, "kernels")


def test_adopting_kernels_is_idempotent() -> None:
    model = dit()
    assert adaln.adopt_kernels(model) == adaln.adopt_kernels(model) == 6
    block = model.transformer_blocks[0]
    assert type(block) is adaln.BasicTransformerBlock
    assert type(block.norm1) is adaln.AdaLayerNormZero
    assert adaln.adopt_kernels(nn.Linear(2, 2)) == 0


def test_pipeline(compiled: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Its denoiser is compiled by blocks, then cached; what is cached is refused."""
    pipe = class_pipeline()
    zoo.accelerate(pipe, dtype=torch.bfloat16, compile=True, cache=zoo.TaylorSeerConfig())
    assert done(pipe) == ["type", "compile", "cache"]
    assert [kwargs for _, kwargs in compiled] == [{"mode": "default"}] * 3
    assert all(type(module).__name__ == "BasicTransformerBlock" for module, _ in compiled)
    assert said(pipe, "compile").startswith("PixelDiT: every BasicTransformerBlock")
    assert said(pipe, "cache") == "TaylorSeerConfig"
    assert isinstance(active_cache(pipe), zoo.TaylorSeerConfig)
    assert generate(pipe, steps=3).isfinite().all()
    with pytest.raises(ValueError, match=r"has a cache already: call zoo.disable_cache"):
        zoo.accelerate(pipe)
    zoo.disable_cache(pipe)
    zoo.accelerate(pipe)


def test_convolutional_parts_of_a_pipeline() -> None:
    pipe = class_pipeline("dit")
    zoo.accelerate(pipe)
    assert done(pipe) == ["evaluation mode", "channels last"]
    assert "AutoencoderKL" in said(pipe, "channels last")


def test_diffusers_own_cache_knows_the_blocks() -> None:
    """As a class of its own, the block has to be registered."""
    from diffusers import FirstBlockCacheConfig

    model = zoo.accelerate(pixel_dit())
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with model.cache_context("one"):
        assert denoise(model, 1).isfinite().all()
    model.disable_cache()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat"}, r"got 'bfloat'\. Did you mean bfloat16\?"),
        ({"dtype": torch.int8}, r"dtype must be one of float32, .*, got torch.int8"),
        ({"compile": "reduce-overheads"}, r"got 'reduce-overheads'\. Did you mean reduce-overhead\?"),
        ({"kernels": "tritn"}, r"got 'tritn'\. Did you mean triton\?"),
        ({"cache": "auto"}, r"A cache needs a diffusers model or pipeline; Linear has no steps to skip"),
    ],
)
def test_refused_before_anything_is_done(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        zoo.accelerate(model, **arguments)
    assert model.training
    assert not hasattr(model, "zoo_report")


def test_refused_models() -> None:
    with pytest.raises(TypeError, match="takes a torch module or a diffusers pipeline, got str"):
        zoo.accelerate("repavit_small")
    with pytest.raises(ValueError, match="CUDA graphs, which overwrite what a cache keeps"):
        zoo.accelerate(pixel_dit(), compile="reduce-overhead", cache=zoo.CGTaylorConfig())
    with pytest.raises(ValueError, match="is compiled already"):
        zoo.accelerate(torch.compile(nn.Linear(2, 2), backend="eager"))


def test_report_is_a_table() -> None:
    steps = (
        AccelerationStep(name="merge", done=True, said="2 layers"),
        AccelerationStep(name="channels last", done=False, said="not asked for"),
    )
    lines = str(AccelerationReport(steps=steps)).splitlines()
    assert lines == ["merge          done      2 layers", "channels last  left out  not asked for"]


def test_integer_weights_are_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pixel_dit()
    with pytest.raises(ValueError, match=r"int8 or int8-dynamic, got 'int4'\. Did you mean int8"):
        zoo.accelerate(model, quantize="int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'ffn-zoo"):
        zoo.accelerate(model, quantize="int8")
    assert not hasattr(model, "zoo_report")


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_integer_weights(kind: Any) -> None:
    """Near to the model; a cache over them is exact where it is exact, and goes away."""
    pytest.importorskip("torchao", reason="the extra quantize is not installed")
    model = pixel_dit()
    expected = denoise(model)
    zoo.accelerate(model, quantize=kind)
    assert "int8" in str(model.zoo_report)
    found = denoise(model)
    assert 0 < (found - expected).abs().max() / expected.abs().max() < 0.01
    with zoo.cached(model, zoo.CGTaylorConfig(threshold=0.0)):
        assert torch.equal(denoise(model), found)
    assert torch.equal(denoise(model), found)
