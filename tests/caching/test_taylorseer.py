"""Our TaylorSeer: its steps, and what it does on all models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, UNIT_ONLY, denoise, dit, flux, pixel_dit
from diffusers.hooks import TaylorSeerCacheConfig
from goldens import cases
from hooked import Count, assert_clean, class_pipeline, generate
from torch import nn

import zoo
from zoo.caching.blocks import model_units
from zoo.caching.taylorseer import TaylorSeerConfig, is_full_step

STEPS = 6
ALL = {**SKIPPABLE, **UNIT_ONLY}


@pytest.mark.parametrize("case", cases("taylorseer_steps"))
@pytest.mark.parametrize("rule", ["authors", "diffusers"])
def test_golden_steps(case: dict[str, Any], rule: Any) -> None:
    expected = case[f"{rule}_rule"]
    if expected is None:
        pytest.skip("this rule has no end option")
    found = [
        step
        for step in range(case["num_steps"])
        if is_full_step(
            step,
            interval=case["interval"],
            warmup_steps=case["warmup"],
            rule=rule,
            full_from=case["disable_after"] if rule == "diffusers" else None,
        )
    ]
    assert found == expected


@pytest.mark.parametrize("family", ALL)
def test_every_model(family: str) -> None:
    """Interval 1 changes nothing; a longer one computes its own steps in every unit; afterwards all is as before."""
    model = ALL[family]()
    expected = denoise(model)
    with zoo.cached(model, TaylorSeerConfig(interval=1)):
        assert torch.equal(denoise(model), expected)
    units = model_units(model, "test")
    counts = [Count(unit.module) for unit in units]
    with zoo.cached(model, TaylorSeerConfig(interval=3, warmup_steps=2)):
        first = denoise(model)
        assert {count.calls for count in counts} <= {3, 6}  # steps 0, 1, 4; twice a step where a unit is called twice
        assert all(unit.computed == (0, 1, 4) for unit in zoo.cache_summary(model).denoisers[0].units)
        assert not torch.equal(first, expected)
        assert torch.equal(denoise(model), first)
    for unit in units:
        del unit.module.forward
    assert_clean(model)
    assert torch.equal(denoise(model), expected)


def test_same_as_diffusers_under_its_rule() -> None:
    """With the same modules, steps, orders and type of factors the pictures are the same."""
    model = dit()
    theirs = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )  # fmt: skip
    with zoo.cached(model, theirs):
        expected = denoise(model, steps=10)
    with zoo.cached(model, TaylorSeerConfig(interval=3, warmup_steps=2, rule="diffusers")):
        torch.testing.assert_close(denoise(model, steps=10), expected, rtol=1e-5, atol=1e-5)


def test_contexts_and_chosen_units() -> None:
    model = flux()
    config = TaylorSeerConfig(interval=9, warmup_steps=1, units=[r"transformer_blocks\.\d+\.attn"])
    with zoo.cached(model, config):
        first = denoise(model, contexts=("cond", "uncond"))
        summary = zoo.cache_summary(model).denoisers[0]
        assert torch.equal(denoise(model, contexts=("cond", "uncond")), first)
    assert {unit.unit for unit in summary.units} == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}
    assert {unit.context for unit in summary.units} == {"cond", "uncond"}


def test_full_from() -> None:
    pipe = class_pipeline()
    with zoo.cached(pipe, TaylorSeerConfig(interval=9, warmup_steps=1, full_from=4)):
        generate(pipe)
        assert zoo.cache_summary(pipe).denoisers[0].units[0].computed == (0, 4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 0}, "interval must be a whole number from 1, got 0"),
        ({"max_order": -1}, "max_order must be"),
        ({"warmup_steps": 0}, "warmup_steps must be"),
        ({"rule": "mine"}, "rule must be 'authors' or 'diffusers'"),
        ({"full_from": -1}, "full_from must be"),
        ({"units": "attn"}, "units must be None or a list of patterns"),
        ({"units": ["attn"]}, r"match no unit of PixelDiT, whose units are \['transformer_blocks"),
        ({"factors_dtype": "float32"}, "factors_dtype must be"),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    model = pixel_dit()
    with pytest.raises(ValueError, match=message):
        zoo.enable_cache(model, TaylorSeerConfig(**changes))
    assert_clean(model)


def test_refused_models() -> None:
    with pytest.raises(ValueError, match="Conv2d has no list of blocks"):
        zoo.enable_cache(nn.Conv2d(1, 1, 1).eval(), TaylorSeerConfig())
    with pytest.raises(ValueError, match="is for sampling"):
        zoo.enable_cache(pixel_dit().train(), TaylorSeerConfig())
