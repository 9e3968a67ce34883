"""Stored outputs of units: what a run of left-out blocks adds at once, and what is kept in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, denoise, diffusion_policy, pixel_dit
from hooked import Count, assert_clean
from torch import Tensor, nn

import zoo
import zoo.caching.units
from zoo.caching.bac import BACConfig, uniform_schedule
from zoo.caching.blocks import _TABLE, model_units, summed_blocks
from zoo.caching.taylorseer import TaylorSeerConfig

STEPS = 6
FEATURE = 2 * 6 * 16 * 4  # bytes of an output of `diffusion_policy` for two plans
SUMS = {"diffusion_policy": "DiffusionPolicyTransformer"}


def schedule(model: nn.Module, own: dict[str, tuple[int, ...]], other: tuple[int, ...] = (0,)) -> BACConfig:
    """Return a schedule with steps of its own for some units, by the end of their names."""
    plan = uniform_schedule(model, STEPS, 1)
    units = {unit: next((steps for name, steps in own.items() if unit.endswith(name)), other) for unit in plan.units}
    return BACConfig(schedule=dataclasses.replace(plan, units=units))


PLANS = {
    "all together": ({}, (0, 3)),
    "all but the first block": ({"s.0.attn1": (0, 2, 4), "s.0.ff": (0, 1)}, (0, 4)),
    "a block in the middle": ({"s.1.attn2": (0, 2, 3)}, (0,)),
    "each on its own": ({"attn1": (0, 3), "attn2": (0, 2, 5), "ff": (0, 1, 4)}, (0,)),
}


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.caching.units, "summed_blocks", lambda model, units: [])


def test_table_of_sums() -> None:
    """Blocks so marked return their input plus what their units return."""
    assert {name for name, known in _TABLE.items() if any(each.sums for each in known.lists)} == set(SUMS.values())
    for family, name in SUMS.items():
        model = SKIPPABLE[family]()
        assert type(model).__name__ == name
        found = summed_blocks(model, model_units(model, "test"))
        assert [block.is_last for block in found] == [False, False, True]
        assert [unit for block in found for unit in block.units] == [unit.path for unit in model_units(model, "test")]
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def look(path: str, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> Any:
            return lambda module, args, output: seen.update({path: (args[0], output)})

        for path in [path for block in found for path in (block.placed.path, *block.units)]:
            model.get_submodule(path).register_forward_hook(look(path))
        denoise(model, steps=1)
        for block in found:
            before, after = seen[block.placed.path]
            added = torch.stack([seen[unit][1] for unit in block.units]).sum(0)
            torch.testing.assert_close(before + added, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("contexts", [(), ("cond", "uncond")])
def test_sums_are_the_same_as_one_by_one(plan: str, contexts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and summaries agree; a run of blocks that is left out is not even entered."""
    model = diffusion_policy()
    config = schedule(model, *PLANS[plan])
    expected_calls = {}
    with zoo.cached(model, config):
        found = denoise(model, contexts=contexts)
        summary = zoo.cache_summary(model).denoisers[0]
        assert torch.equal(denoise(model, contexts=contexts), found)
    counts = [Count(block) for block in model.transformer_blocks]
    with zoo.cached(model, config):
        denoise(model, contexts=contexts)
    for index, count in enumerate(counts):
        steps = {step for unit in summary.units if f".{index}." in unit.unit for step in unit.computed}
        expected_calls[index] = len(steps) * max(1, len(contexts))
        assert count.calls == expected_calls[index]
        del model.transformer_blocks[index].forward
    one_by_one(monkeypatch)
    with zoo.cached(model, config):
        expected = denoise(model, contexts=contexts)
        units = zoo.cache_summary(model).denoisers[0].units
    assert {(unit.context, unit.unit): unit for unit in units} == {
        (unit.context, unit.unit): unit for unit in summary.units
    }
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_clean(model)


def test_forecasts_are_summed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffusion_policy()
    config = TaylorSeerConfig(interval=3, max_order=1, warmup_steps=2)
    with zoo.cached(model, config):
        found = denoise(model)
    one_by_one(monkeypatch)
    with zoo.cached(model, config):
        torch.testing.assert_close(denoise(model), found, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_units_is_left_out_one_by_one() -> None:
    """No sums where some units of a block are not in the cache."""
    model = diffusion_policy()
    config = TaylorSeerConfig(interval=3, units=[r".*\.ff"])
    assert not summed_blocks(model, [unit for unit in model_units(model, "test") if unit.path.endswith("ff")])
    counts = [Count(block) for block in model.transformer_blocks]
    with zoo.cached(model, config):
        denoise(model)
    assert {count.calls for count in counts} == {STEPS}


def test_sums_with_a_context_that_starts_late() -> None:
    """It is computed out of turn, then follows the schedule."""
    model = diffusion_policy()
    sample, observed = torch.randn(2, 6, 2), torch.randn(2, 2, 3)
    with zoo.cached(model, schedule(model, {}, (0, 3))), torch.no_grad():
        for step in range(STEPS):
            for name in ("cond", "uncond") if step >= 1 else ("cond",):
                with model.cache_context(name):
                    model(sample, timestep=torch.full((2,), 90 - step), encoder_hidden_states=observed)
        steps = {unit.context: unit.computed for unit in zoo.cache_summary(model).denoisers[0].units}
    assert steps == {"cond": (0, 3), "uncond": (1, 3)}


def test_memory() -> None:
    """Outputs, and the sum of them, while they are of use; the most ever held is told."""
    model = diffusion_policy()

    def held(config: object) -> int | None:
        with zoo.cached(model, config):
            denoise(model)
            return zoo.cache_summary(model).denoisers[0].bytes_held

    assert held(schedule(model, {}, (0, 3))) == (9 + 1) * FEATURE
    assert held(schedule(model, {}, tuple(range(STEPS - 1)))) == (9 + 1) * FEATURE
    assert held(schedule(model, {"s.1.ff": (0, 1, 2, 3, 4, 5)}, (0,))) == (9 + 1) * FEATURE
    assert held(TaylorSeerConfig(interval=1)) == 0
    assert held(TaylorSeerConfig(interval=3, max_order=1, warmup_steps=2, full_from=3)) == 2 * 9 * FEATURE


def test_nothing_is_kept_that_is_of_no_use() -> None:
    """Of the warm-up, a forecast needs one step more than its order."""
    model = pixel_dit()
    with zoo.cached(model, TaylorSeerConfig(interval=9, max_order=1, warmup_steps=4)):
        short = denoise(model)
        bytes_held = zoo.cache_summary(model).denoisers[0].bytes_held
    with zoo.cached(model, TaylorSeerConfig(interval=9, max_order=2, warmup_steps=4)):
        longer = denoise(model)
        more = zoo.cache_summary(model).denoisers[0].bytes_held
    assert bytes_held is not None
    assert more == bytes_held // 2 * 3
    assert not torch.equal(short, longer)
