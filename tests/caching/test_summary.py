"""What is said of a run, and diffusers' own calls with our configurations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from denoisers import denoise, flux, pixel_dit
from diffusers import CacheMixin, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from hooked import assert_clean, class_pipeline, generate
from rich.console import Console

import zoo
from zoo.caching import CGTaylorConfig, TaylorSeerConfig, diffusers_bridge
from zoo.caching.summary import _quantile, _ranges


def test_summary_of_a_run() -> None:
    """It outlives the end of the run, tells of the last one only, and prints."""
    pipe = class_pipeline()
    zoo.enable_cache(pipe, CGTaylorConfig(threshold=0.5))
    assert str(zoo.cache_summary(pipe)) == "CGTaylorConfig on PixelDiT: not run yet"
    generate(pipe, steps=9)
    generate(pipe, steps=8)
    summary = zoo.cache_summary(pipe)
    one = summary.denoisers[0]
    assert one.calls == {"cond_uncond": 8}
    first, rest = one.units
    assert (first.unit, first.computed, first.skipped) == ("first block", tuple(range(8)), ())
    assert sorted(rest.computed + rest.skipped) == list(range(8))
    assert one.skipping_calls["cond_uncond"] == len(rest.skipped) > 0
    assert [error.step for error in one.errors] == list(range(3, 7))
    assert [error.step for error in one.errors if error.skipped] == list(rest.skipped)
    assert list(one.error_quantiles) == [0, 0.25, 0.5, 0.75, 1]
    assert one.bytes_held == 4 * (4 * 16 * 16 * 4)  # four features of batch, tokens, channels, bytes
    assert one.seconds
    assert one.seconds_saved is not None
    assert one.computed_share == (8 + len(rest.computed)) / 16
    assert one.computed_steps == len(rest.computed)
    text = str(summary)
    assert "other blocks: computed" in text
    assert "gate error, least / quartiles / largest of 4:" in text
    assert "MiB" in text
    console = Console(record=True, width=200)
    console.print(summary)
    assert "first block: computed 8 (0-7), skipped 0" in console.export_text()


def test_summary_of_many_units() -> None:
    model = flux()
    with zoo.cached(model, TaylorSeerConfig(interval=2, warmup_steps=1)):
        denoise(model, contexts=("cond", "uncond"))
        text = str(zoo.cache_summary(model))
    assert "uncond: 6 steps, 3 with something left out" in text
    assert "8 units: computed 3 (0, 2, 4), skipped 3" in text


def test_summary_of_diffusers_caches() -> None:
    """What their states tell is told; of the others it is said that they do not."""
    pipe = class_pipeline()
    model = pipe.transformer
    names = [f"transformer_blocks.{index}.attn1" for index in range(len(model.transformer_blocks))]
    zoo.enable_cache(pipe, FirstBlockCacheConfig(threshold=1e9))
    generate(pipe)
    (one,) = zoo.cache_summary(pipe).denoisers
    assert [(unit.unit, unit.computed, unit.skipped) for unit in one.units] == [("other blocks", (0,), (1, 2, 3, 4, 5))]
    assert one.computed_steps == 1
    assert one.bytes_held == 3 * (4 * 16 * 16 * 4)  # residuals of head and tail, output of the head
    zoo.disable_cache(pipe)
    zoo.enable_cache(pipe, TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32))
    generate(pipe)
    (one,) = zoo.cache_summary(pipe).denoisers
    assert [unit.unit for unit in one.units] == names
    assert {unit.computed for unit in one.units} == {(0, 1, 2, 4)}
    assert one.bytes_held == len(names) * 2 * (4 * 16 * 16 * 4)
    zoo.disable_cache(pipe)
    zoo.enable_cache(pipe, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))
    generate(pipe)
    (one,) = zoo.cache_summary(pipe).denoisers
    assert (one.bytes_held, one.computed_share, one.computed_steps) == (None, None, None)
    assert "this cache of diffusers does not tell what it skips" in "\n".join(one.lines())


def test_no_cache_no_summary() -> None:
    with pytest.raises(ValueError, match=r"PixelDiT has no cache of zoo's: call zoo\.enable_cache"):
        zoo.cache_summary(pixel_dit())


def test_words() -> None:
    assert _ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert _ranges(()) == "none"
    assert _quantile([1.0, 2.0, 4.0], 0.25) == 1.5
    assert _quantile([1.0, float("inf")], 1.0) == float("inf")


@pytest.fixture
def bridge() -> Iterator[None]:
    diffusers_bridge.install()
    yield
    diffusers_bridge.uninstall()


def test_bridge(bridge: None) -> None:
    """diffusers' own calls take our configurations and still take theirs."""
    model = pixel_dit()
    expected = denoise(model)
    diffusers_bridge.install()  # once more changes nothing
    for config in (CGTaylorConfig(threshold=1e9), TaylorSeerConfig(interval=3), FirstBlockCacheConfig(threshold=1e9)):
        model.enable_cache(config)
        assert model.is_cache_enabled
        with pytest.raises(ValueError, match="already"):
            model.enable_cache(CGTaylorConfig())
        assert not torch.equal(denoise(model, contexts=("cond",)), expected)
        model.disable_cache()
        assert not model.is_cache_enabled
        assert torch.equal(denoise(model), expected)
    model.enable_cache(CGTaylorConfig())
    zoo.disable_cache(model)
    assert_clean(model)


def test_bridge_is_reversible() -> None:
    before = CacheMixin.enable_cache, CacheMixin.disable_cache
    with pytest.raises(ValueError, match="not supported"):
        pixel_dit().enable_cache(CGTaylorConfig())
    for _ in range(2):
        diffusers_bridge.install()
        diffusers_bridge.install()
        assert CacheMixin.enable_cache is not before[0]
        diffusers_bridge.uninstall()
        diffusers_bridge.uninstall()
        assert (CacheMixin.enable_cache, CacheMixin.disable_cache) == before


def test_public_names() -> None:
    for name in ("BACConfig", "CGTaylorConfig", "TaylorSeerConfig", "cache_summary", "calibrate_cache"):
        assert getattr(zoo, name) is getattr(zoo.caching, name)
