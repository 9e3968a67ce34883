"""`enable_cache`, `disable_cache`, `cached`: diffusers' caches on models with and without its CacheMixin."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, denoise, dit, flux, pixart, pixel_dit, sd3
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DiffusionPipeline,
    Flux2Transformer2DModel,
    ModelMixin,
)
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from hooked import Count, abort_after, assert_clean, class_pipeline, generate
from torch import nn

import zoo
from zoo.caching import cached, disable_cache, enable_cache, reset_cache
from zoo.caching.hooks import placed_hooks
from zoo.diffusion import PixelDiT
from zoo.diffusion.blocks import attention_modules, transformer_blocks

STEPS = 6


def mag(**changes: Any) -> MagCacheConfig:
    return MagCacheConfig(**{"num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, **changes})


EXACT = {
    "first-block": FirstBlockCacheConfig(threshold=0.0),
    "taylor": TaylorSeerCacheConfig(cache_interval=1),
    "mag": mag(threshold=0.0),
    "pyramid": PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=1),
}
LOSSY = {
    "first-block": FirstBlockCacheConfig(threshold=1e6),
    "taylor": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32),
    "mag": mag(threshold=10.0, retention_ratio=0.0),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
    ),
}
# how often the first attention of the last block is computed in 6 steps
COMPUTED = {"first-block": 1, "taylor": 3, "mag": 2, "pyramid": 3}


def last_attention(model: nn.Module) -> nn.Module:
    last = list(transformer_blocks(model))[-1]
    return model.get_submodule(next(name for name in attention_modules(model) if name.startswith(last)))


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("method", EXACT)
def test_exact_settings_change_nothing(family: str, method: str) -> None:
    """Threshold 0 and interval 1 give the uncached output bit for bit, and so does the model afterwards."""
    model = DENOISERS[family]()
    expected = denoise(model)
    enable_cache(model, EXACT[method])
    assert list(placed_hooks(model))
    assert torch.equal(denoise(model), expected)
    disable_cache(model)
    assert_clean(model)
    assert torch.equal(denoise(model), expected)


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("method", LOSSY)
def test_caches_skip_and_start_anew(family: str, method: str) -> None:
    """A cache leaves computation out; a second run equals the first; afterwards everything is as before."""
    model = DENOISERS[family]()
    expected = denoise(model)
    count = Count(last_attention(model))
    with cached(model, LOSSY[method]):
        first = denoise(model)
        assert count.calls == COMPUTED[method]
        assert first.isfinite().all()
        assert not torch.equal(first, expected)
        assert torch.equal(denoise(model), first)
        assert not torch.equal(denoise(model, seed=1), first)
        assert torch.equal(denoise(model), first)
    del last_attention(model).forward
    assert_clean(model)
    assert torch.equal(denoise(model), expected)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")])
def test_aborted_run_leaves_nothing_behind(stop_after: int, contexts: tuple[str, ...]) -> None:
    """A model on its own: the timestep turns back, or comes to the first one again."""
    model = pixel_dit()
    if not contexts and stop_after == 1:
        pytest.skip("one call outside any context cannot be told from the first of two in a step; reset_cache can")
    with cached(model, LOSSY["first-block"]):
        expected = denoise(model, contexts=contexts)
        with pytest.raises(KeyboardInterrupt):
            denoise(model, seed=1, contexts=contexts, stop_after=stop_after)
        assert torch.equal(denoise(model, contexts=contexts), expected)


def test_reset() -> None:
    model = dit()
    with cached(model, LOSSY["first-block"]):
        expected = denoise(model)
        with pytest.raises(KeyboardInterrupt):
            denoise(model, seed=1, stop_after=1)
        reset_cache(model)
        assert torch.equal(denoise(model), expected)


def test_contexts_do_not_mix() -> None:
    """Each context has a state of its own: reusing everything, either sees only its own first step."""
    model = flux()
    with cached(model, LOSSY["first-block"]):
        both = denoise(model, steps=1, contexts=("cond", "uncond"))
        expected = denoise(model, steps=1, contexts=("cond", "uncond"))
        assert torch.equal(both, expected)
    count = Count(last_attention(model))
    with cached(model, LOSSY["first-block"]):
        denoise(model, contexts=("cond", "uncond"))
    assert count.calls == 2


def test_change_of_batch_starts_anew() -> None:
    """A stored batch of 1 would spread over any batch in silence."""
    model = pixel_dit()
    expected = denoise(model, batch=3)
    with cached(model, TaylorSeerCacheConfig(cache_interval=STEPS, disable_cache_before_step=1)):
        denoise(model, batch=1, steps=2)
        images, inputs = torch.zeros(3, 3, 8, 8), dict(class_labels=torch.zeros(3, dtype=torch.long))
        output = model(images, timestep=torch.full((3,), 100.0), **inputs).sample
    assert torch.equal(output, model(images, timestep=torch.full((3,), 100.0), **inputs).sample)
    assert torch.equal(denoise(model, batch=3), expected)


@pytest.mark.parametrize("kind", ["pixel_dit", "dit"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_pipelines(kind: str, stop_after: int) -> None:
    """Pipelines with and without contexts; runs that are aborted, also at the same timestep as the next begins."""
    pipe = class_pipeline(kind)
    expected = generate(pipe)
    with cached(pipe, FirstBlockCacheConfig(threshold=0.0)):
        assert torch.equal(generate(pipe), expected)
    enable_cache(pipe, LOSSY["first-block"])
    first = generate(pipe)
    assert not torch.equal(first, expected)
    abort_after(pipe, stop_after, seed=1)
    assert torch.equal(generate(pipe), first)
    disable_cache(pipe)
    assert_clean(pipe.transformer)
    assert torch.equal(generate(pipe), expected)


def test_state_is_freed_at_the_end_of_a_call() -> None:
    """Also for models that diffusers' own end-of-call reset passes over."""
    for kind in ("pixel_dit", "dit"):
        pipe = class_pipeline(kind)
        enable_cache(pipe, LOSSY["taylor"])
        generate(pipe)
        assert pipe.transformer._zoo_cache.run.states
        assert not any(states._state_cache for states in pipe.transformer._zoo_cache.run.states)


def test_missing_timestep_callback_is_filled_in() -> None:
    """Pyramid Attention Broadcast and FasterCache ask for the timestep; most pipelines do not offer it."""
    model = dit()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(400, 800)
    )
    count = Count(last_attention(model))
    with cached(model, config):
        denoise(model)  # timesteps 900, 767, 633, 500, 367, 233: the second and fourth are left out
    assert count.calls == 4
    assert config.current_timestep_callback is None


def test_faster_cache_on_batched_guidance() -> None:
    """The unconditional half of the batch is left out in most steps."""
    pipe, batches = class_pipeline("pixel_dit"), []
    generate(pipe)
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    config = FasterCacheConfig(unconditional_batch_timestep_skip_range=(-1, 1001), tensor_format="BCHW")
    with cached(pipe, config):
        images = generate(pipe)
    assert batches == [4, 2, 2, 2, 2, 4]
    assert images.isfinite().all()


def test_taylor_seer_default_takes_the_attention_modules() -> None:
    """diffusers' default matches nothing in DiT, PixArt and Sana, and says nothing."""
    for build in (dit, pixart):
        model = build()
        enable_cache(model, TaylorSeerCacheConfig())
        assert sorted(placed.path for placed in placed_hooks(model)) == sorted(attention_modules(model))
    model = flux()
    enable_cache(model, TaylorSeerCacheConfig())
    assert {placed.path.rsplit(".", 1)[-1] for placed in placed_hooks(model)} == {"attn"}


def test_taylor_seer_with_identifiers() -> None:
    model = pixel_dit()
    enable_cache(model, TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"]))
    assert len(list(placed_hooks(model))) == 2 * len(transformer_blocks(model))


def refused(model: Any, config: Any, error: type[Exception] = ValueError) -> str:
    """Return the message of the refusal, having seen that nothing is left behind."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    with pytest.raises(error) as info:
        enable_cache(model, config)
    if parts:
        assert_clean(model)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FirstBlockCacheConfig(threshold=-0.1), "threshold must be a number from 0, got -0.1"),
        (FirstBlockCacheConfig(threshold=float("nan")), "threshold must be"),
        (FirstBlockCacheConfig(threshold="0.1"), "threshold must be"),  # type: ignore[arg-type]
        (mag(threshold=-1.0), "threshold must be"),
        (mag(max_skip_steps=-1), "max_skip_steps must be a whole number from 0, got -1"),
        (TaylorSeerCacheConfig(cache_interval=0), "cache_interval must be a whole number from 1, got 0"),
        (TaylorSeerCacheConfig(max_order=-1), "max_order must be"),
        (TaylorSeerCacheConfig(disable_cache_before_step=0), "disable_cache_before_step must be"),
        (TaylorSeerCacheConfig(disable_cache_after_step=-1), "disable_cache_after_step must be"),
        (PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=0), "must be None or a whole number"),
        (FasterCacheConfig(unconditional_batch_skip_range=0), "unconditional_batch_skip_range must be"),
        (FasterCacheConfig(tensor_format="HWC"), "tensor_format"),
        (
            TaylorSeerCacheConfig(cache_identifiers=["blocks.attn"]),
            r"match no module of DiTTransformer2DModel. Modules",
        ),
        (TaylorSeerCacheConfig(skip_predict_identifiers=["proj_out_2"]), "match no module"),
        (TaylorSeerCacheConfig(use_lite_mode=True), "has none: its blocks would be left out"),
        (PyramidAttentionBroadcastConfig(spatial_attention_block_identifiers=("nowhere",)), "no module to work on"),
        (TextKVCacheConfig(), "no module to work on"),
        (SeaCacheConfig(), "raw_vision_callback"),
    ],
)
def test_refused_configurations(config: Any, message: str) -> None:
    assert message in refused(dit(), config)


def test_suggested_identifiers_work() -> None:
    model = pixart()
    message = refused(model, TaylorSeerCacheConfig(cache_identifiers=["attn"]))
    patterns = eval(message.split("cache_identifiers=")[-1].rstrip("."))
    assert len(patterns) == 3
    enable_cache(model, TaylorSeerCacheConfig(cache_identifiers=patterns))
    assert len(list(placed_hooks(model))) == 3 * 3


def test_refused_models() -> None:
    threshold = FirstBlockCacheConfig()
    assert "at least 2 transformer blocks" in refused(pixel_dit(num_layers=1), threshold)
    aura = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    assert "Blocks of class AuraFlowSingleTransformerBlock are unknown" in refused(aura, threshold)
    flux2 = Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    assert "some return image and text apart" in refused(flux2, threshold)
    assert "no cache configuration; known are BACConfig, CGTaylorConfig, FasterCacheConfig" in refused(
        dit(), 3, TypeError
    )
    assert "pipeline or a model, got str" in refused("pixeldit.cifar10", threshold, TypeError)


def test_one_cache_at_a_time() -> None:
    model = pixel_dit()
    enable_cache(model, EXACT["first-block"])
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match=r"a cache already \(FirstBlockCacheConfig\): call zoo.disable_cache"):
        enable_cache(model, EXACT["taylor"])
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(EXACT["taylor"])
    disable_cache(model)
    disable_cache(model)
    assert_clean(model)
    without_mixin = dit()
    enable_cache(without_mixin, EXACT["mag"])
    with pytest.raises(ValueError, match="a cache already"):
        enable_cache(without_mixin, EXACT["mag"])


def test_mixed_with_the_models_own_calls() -> None:
    """diffusers' own enable and disable may be used on a CacheMixin model as well, in any order."""
    model = pixel_dit()
    expected = denoise(model)
    model.enable_cache(LOSSY["first-block"])
    with pytest.raises(ValueError, match="a cache already"):
        enable_cache(model, LOSSY["taylor"])
    disable_cache(model)
    assert not model.is_cache_enabled
    enable_cache(model, LOSSY["first-block"])
    model.disable_cache()
    enable_cache(model, LOSSY["taylor"])
    disable_cache(model)
    assert_clean(model)
    assert torch.equal(denoise(model), expected)


class Twice(ModelHook):
    """A foreign hook that replaces the forward."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


def test_foreign_hooks() -> None:
    """Hooks from before stay; one placed over the cache has to go first, or diffusers would cut it off."""
    model = pixel_dit()
    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1])
    registry.register_hook(Twice(), "before")
    expected = denoise(model)
    with cached(model, EXACT["first-block"]):
        assert torch.equal(denoise(model), expected)
    assert [placed.name for placed in placed_hooks(model)] == ["before"]
    assert torch.equal(denoise(model), expected)
    enable_cache(model, EXACT["first-block"])
    registry.register_hook(Twice(), "after")
    with pytest.raises(RuntimeError, match=r"Remove the hook 'after' of transformer_blocks.1 first"):
        disable_cache(model)
    registry.remove_hook("after")
    disable_cache(model)
    assert torch.equal(denoise(model), expected)


def test_offloading_may_exchange_the_forward() -> None:
    """accelerate wraps the forward of a whole model anew after each pipeline call, and loses diffusers' hooks on it."""
    from accelerate.hooks import ModelHook as OffloadHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model = pixel_dit()
    add_hook_to_module(model, OffloadHook())
    with pytest.raises(ValueError, match="before offloading: it hooks the whole PixelDiT"):
        enable_cache(model, FasterCacheConfig(tensor_format="BCHW"))
    with cached(model, LOSSY["first-block"]):
        first = denoise(model)
        remove_hook_from_module(model)
        add_hook_to_module(model, OffloadHook())
        assert torch.equal(denoise(model), first)
        with pytest.raises(KeyboardInterrupt):
            denoise(model, seed=1, stop_after=3)
        assert torch.equal(denoise(model), first)


class TwoStages(DiffusionPipeline):
    """Two denoisers, as Wan 2.2 has."""

    def __init__(self, transformer: ModelMixin, transformer_2: ModelMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)


def test_all_denoisers_of_a_pipeline_or_none() -> None:
    pipe = TwoStages(pixel_dit(), dit())
    enable_cache(pipe, EXACT["first-block"])
    assert list(placed_hooks(pipe.transformer))
    assert list(placed_hooks(pipe.transformer_2))
    disable_cache(pipe)
    pipe = TwoStages(pixel_dit(), pixel_dit(num_layers=1))
    with pytest.raises(ValueError, match="at least 2"):
        enable_cache(pipe, EXACT["first-block"])
    assert_clean(pipe.transformer)
    assert_clean(pipe.transformer_2)


def test_pipeline_without_denoiser() -> None:
    class Decoder(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKL) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(ValueError, match="no denoiser among its parts: vae"):
        enable_cache(Decoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)), EXACT["mag"])


def test_cached_ends_after_an_exception() -> None:
    model = sd3()
    with pytest.raises(KeyboardInterrupt), cached(model, LOSSY["first-block"]):
        denoise(model, stop_after=2)
    assert_clean(model)


def test_gate_computes_where_the_change_is_not_a_number() -> None:
    """A first block that changes nothing has a relative change of 0 / 0; diffusers' gate then skips for ever."""
    model = pixel_dit()
    gate = model.transformer_blocks[0].norm1.linear
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    expected = denoise(model)
    with cached(model, FirstBlockCacheConfig(threshold=0.5)):
        assert torch.equal(denoise(model), expected)


def test_model_can_be_copied_and_pickled_afterwards() -> None:
    model = pixel_dit()
    expected = denoise(model)
    with cached(model, LOSSY["taylor"]):
        denoise(model, contexts=("cond",))
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(denoise(twin), expected)
    assert torch.equal(denoise(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """Compile first, enable the cache second: the same result as eagerly."""
    eager, compiled = pixel_dit(num_layers=2), pixel_dit(num_layers=2)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_repeated_blocks(backend="eager")
    with cached(eager, LOSSY["taylor"]), cached(compiled, LOSSY["taylor"]):
        torch.testing.assert_close(denoise(compiled, 4), denoise(eager, 4), rtol=1e-4, atol=1e-5)
    assert isinstance(compiled, PixelDiT)


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "kind"), [("first-block", "pixel_dit"), ("cg-taylor", "sd3")])
def test_compiled_model(cache: str, kind: str) -> None:
    """Within the graphs that the compiler makes of one function: it warns at length where there are more."""
    config = zoo.CGTaylorConfig(threshold=1e6) if cache == "cg-taylor" else LOSSY[cache]
    model = DENOISERS[kind]()
    with cached(model, config):
        expected = denoise(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    enable_cache(compiled, config)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.testing.assert_close(denoise(compiled), expected, rtol=1e-4, atol=1e-5)
    disable_cache(compiled)
    assert_clean(model)


def test_public_names() -> None:
    assert zoo.enable_cache is enable_cache
    assert zoo.disable_cache is disable_cache
    assert zoo.cached is cached
