"""What a cache cannot work with is said in one line, and nothing is left hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, denoise
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    UNet2DConditionModel,
)
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.models.attention import BasicTransformerBlock
from hooked import assert_clean, class_pipeline, generate
from torch import Tensor, nn

import zoo
from zoo.caching.blocks import model_units

CONFIGS: dict[str, Callable[[], Any]] = {
    "cg-taylor": zoo.CGTaylorConfig,
    "taylorseer": zoo.TaylorSeerConfig,
    "first-block": FirstBlockCacheConfig,
    "diffusers-taylorseer": TaylorSeerCacheConfig,
    "pyramid": lambda: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
}


def shared_block(kind: str) -> nn.Module:
    model = DENOISERS[kind]()
    model.transformer_blocks[2] = model.transformer_blocks[1]
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_one_block_in_two_places(config: str) -> None:
    """A state of one place must not be taken for that of the other."""
    model = shared_block("pixel_dit")
    expected = denoise(model, steps=2)
    with pytest.raises(ValueError, match=r"one module in two places, transformer_blocks\.1 and transformer_blocks\.2"):
        zoo.enable_cache(model, CONFIGS[config]())
    assert_clean(model)
    assert torch.equal(denoise(model, steps=2), expected)


def test_one_attention_in_two_blocks() -> None:
    model = DENOISERS["dit"]()
    model.transformer_blocks[2].attn1 = model.transformer_blocks[0].attn1
    with pytest.raises(ValueError, match=r"two places, transformer_blocks\.0\.attn1 and transformer_blocks\.2\.attn1"):
        zoo.enable_cache(model, zoo.TaylorSeerConfig())
    assert_clean(model)
    pipe = class_pipeline()
    pipe.transformer.transformer_blocks[1] = pipe.transformer.transformer_blocks[0]
    with pytest.raises(ValueError, match="two places"):
        zoo.calibrate_cache(pipe, zoo.BACConfig(updates=3), lambda: generate(pipe))
    assert_clean(pipe.transformer)


@pytest.mark.parametrize(
    "config",
    [
        *(zoo.CGTaylorConfig(threshold=value) for value in (True, -0.1, float("nan"), float("inf"), None, "0.1")),
        *(FirstBlockCacheConfig(threshold=value) for value in (True, -0.1)),
        zoo.CGTaylorConfig(warmup_steps=0),
        zoo.TaylorSeerConfig(interval=0),
        zoo.TaylorSeerConfig(interval=True),
        TaylorSeerCacheConfig(cache_interval=2.5),
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=-2),
    ],
    ids=str,
)
def test_numbers_out_of_range(config: Any) -> None:
    model = DENOISERS["pixel_dit"]()
    with pytest.raises(ValueError, match=r"must be .*, got [^\n]*$"):
        zoo.enable_cache(model, config)
    assert_clean(model)


class NoDenoiser(DiffusionPipeline):
    """A pipeline that only decodes."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.register_modules(vae=vae)


class Plain(nn.Module):
    """A network without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stuff = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])


@pytest.mark.parametrize("config", CONFIGS)
def test_unknown_blocks(config: str) -> None:
    model = Plain().eval()
    with pytest.raises(ValueError, match="Plain"):
        zoo.enable_cache(model, CONFIGS[config]())
    assert_clean(model)


def test_no_denoiser() -> None:
    pipe = NoDenoiser(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    for call in (lambda: zoo.enable_cache(pipe, zoo.CGTaylorConfig()), lambda: zoo.cache_summary(pipe)):
        with pytest.raises(ValueError, match="NoDenoiser has no denoiser among its parts: vae"):
            call()


def test_a_unet() -> None:
    """Its transformer blocks do not follow one another: the line says so, and what does work."""
    kinds = {f"{way}_block_types": (f"CrossAttn{way.title()}Block2D",) * 2 for way in ("down", "up")}
    model = UNet2DConditionModel(
        block_out_channels=(4, 8), norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
        transformer_layers_per_block=2, **kinds,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is a UNet.*TaylorSeerConfig on its attention\.$"):
        zoo.enable_cache(model, zoo.CGTaylorConfig())
    assert_clean(model)
    units = [unit.path for unit in model_units(model, "test")]  # those of all its blocks, not of the middle one alone
    assert len(units) == sum(isinstance(part, BasicTransformerBlock) for part in model.modules()) * 3
    call = dict(timestep=torch.tensor(5), encoder_hidden_states=torch.randn(1, 3, 8))
    with zoo.cached(model, zoo.TaylorSeerConfig(interval=1)), torch.no_grad():
        model(torch.randn(1, 4, 8, 8), **call)
        assert {unit.unit for unit in zoo.cache_summary(model).denoisers[0].units} == set(units)


def test_an_engine_in_the_way() -> None:
    """An engine runs a denoiser whole; it is taken off by the call that the line says."""
    pytest.importorskip("onnxruntime")
    model = zoo.accelerate(DENOISERS["pixel_dit"](), engine="onnxruntime")
    with pytest.raises(
        ValueError, match=r'an engine runs this PixelDiT whole: choose one; .+\(\.\.\., engine="eager"\)'
    ):
        zoo.enable_cache(model, zoo.CGTaylorConfig())
    assert_clean(model)
    zoo.enable_cache(zoo.accelerate(model, engine="eager"), zoo.CGTaylorConfig())
    zoo.disable_cache(model)


def test_schedule_of_other_steps() -> None:
    """The run is refused, and one with the right number of steps works afterwards."""
    pipe = class_pipeline()
    config = zoo.calibrate_cache(pipe, zoo.BACConfig(updates=3), lambda: generate(pipe, steps=6))
    with zoo.cached(pipe, config):
        with pytest.raises(ValueError, match="is for 6 steps, this run has 8"):
            generate(pipe, steps=8)
        assert generate(pipe, steps=6).isfinite().all()
    assert_clean(pipe.transformer)


class Layer(nn.Module):
    """Attention and feed-forward whose weights the model reads past their forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)


class Fused(nn.Module):
    """A denoiser that calls none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(2)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the images, changed."""
        for layer in self.layers:
            sample = sample + sample @ layer.attention.weight @ layer.mlp.weight
        return sample


@torch.no_grad()
def fused_run(model: nn.Module) -> None:
    for step in range(4):
        model(torch.randn(2, 3, 4), torch.full((2,), 900.0 - step))


def test_parts_that_the_model_does_not_call() -> None:
    """They would be computed at every step in silence."""
    model, match = Fused().eval(), r"Fused calls none of the 4 parts .* such as layers\.0\.attention, [^\n]*$"
    with zoo.cached(model, zoo.TaylorSeerConfig()), pytest.raises(ValueError, match=match):
        fused_run(model)
    with pytest.raises(ValueError, match=match):
        zoo.calibrate_cache(model, zoo.BACConfig(), lambda: fused_run(model))
    assert_clean(model)


def test_calibrations_of_images_that_change_their_form() -> None:
    """Guidance that goes off in mid-run halves the batch; the caches that need no calibration take it."""
    model = DENOISERS["dit"]()
    sample, labels = torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 2, 3])

    @torch.no_grad()
    def run() -> None:
        for step in range(6):
            batch = 4 if step < 3 else 2
            model(sample[:batch], timestep=torch.full((batch,), 900 - 50 * step), class_labels=labels[:batch])

    for config in (zoo.BACConfig(), zoo.StepForecastConfig()):
        with pytest.raises(ValueError, match=r"cannot be calibrated: .* change their form within the run, [^\n]*$"):
            zoo.calibrate_cache(model, config, run)
        assert_clean(model)


class TwoDenoisers(DiffusionPipeline):
    """A pipeline with a transformer for each branch, a prior, a ControlNet and what denoises nothing."""

    def __init__(self, transformer: Any, unconditional_transformer: Any, prior: Any, controlnet: Any, vae: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, unconditional_transformer=unconditional_transformer, prior=prior,
            controlnet=controlnet, vae=vae,
        )  # fmt: skip


def test_every_denoiser_of_a_pipeline() -> None:
    """What takes a time is a denoiser, whatever its name; a ControlNet is none."""
    models = [DENOISERS["pixel_dit"](), DENOISERS["pixel_dit"](), DENOISERS["dit"]()]
    pipe = TwoDenoisers(*models, DENOISERS["sd3"](), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    with zoo.cached(pipe, zoo.CGTaylorConfig()):
        assert [each.model for each in zoo.cache_summary(pipe).denoisers] == [type(model).__name__ for model in models]
    for config in (zoo.BACConfig(), zoo.StepForecastConfig()):
        with pytest.raises(ValueError, match=r"one denoiser: give it .*transformer or .*transformer or pipe\.prior\.$"):
            zoo.calibrate_cache(pipe, config, lambda: None)
