"""Which cache works on which transformer of diffusers: tried on tiny instances, written as docs/caching_support.md.

`PYTHONPATH=tests python tests/caching/support.py` writes the table; `test_support.py` compares each row with it.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from tiny_transformers import SPECS, all_transformers, build, steps
from torch import Tensor, nn

import zoo
from zoo.caching.blocks import model_units
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.step_calibration import calibrate_steps
from zoo.caching.taylorseer import TaylorSeerConfig

TABLE = Path(__file__).resolve().parents[2] / "docs" / "caching_support.md"
STEPS = 4
_HEAD = """# Which cache works on which transformer

Every model class of `diffusers.models.transformers` (diffusers {version}) that has lists of blocks, tried on a tiny
random instance. For ours, yes says that the output is bit for bit that of the model where nothing may be left out, and
close to it where steps are left out. For diffusers' own (First Block Cache, MagCache, Pyramid Attention Broadcast,
TaylorSeer; by `zoo.enable_cache`), those are named that leave something out and give finite numbers.
`PYTHONPATH=tests python tests/caching/support.py` writes this file.

| class | CG-Taylor | TaylorSeer | BAC | step forecast | diffusers' own | note |
| --- | --- | --- | --- | --- | --- | --- |
"""


def _differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(each.isfinite().all() for each in found) and not all(map(torch.equal, found, expected))


def _run(model: nn.Module, name: str, config: Any) -> tuple[list[Tensor], int]:
    with zoo.cached(model, config):
        found = steps(model, name, STEPS)
        skipping = zoo.cache_summary(model).denoisers[0].skipping_calls
    return found, sum(skipping.values())


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative difference at a step."""
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True))


def _works(model: nn.Module, name: str, expected: list[Tensor], none: Any, much: Any) -> None:
    """Raise AssertionError unless a cache is exact where it leaves nothing out, and close where it leaves out steps."""
    found, skipped = _run(model, name, none)
    assert all(map(torch.equal, found, expected)), f"{type(none).__name__} changes {name} though it skips nothing"
    assert skipped == 0
    found, skipped = _run(model, name, much)
    assert skipped > 0, f"{type(much).__name__} skips nothing of {name}"
    assert difference(found, expected) < 0.25, f"{type(much).__name__} is off on {name}"


def _bac(model: nn.Module, name: str, expected: list[Tensor]) -> None:
    much = zoo.calibrate_cache(model, zoo.BACConfig(updates=2), lambda: steps(model, name, STEPS))
    schedule: Any = much.schedule
    every = dict.fromkeys(schedule.units, tuple(range(STEPS)))
    none = zoo.BACConfig(schedule=dataclasses.replace(schedule, units=every))
    _works(model, name, expected, none, much)


def _step_forecast(model: nn.Module, name: str, expected: list[Tensor]) -> None:
    calibration = calibrate_steps(model, zoo.StepForecastConfig(), lambda: steps(model, name, STEPS))
    none, much = (
        zoo.StepForecastConfig(schedule=calibration.plan(zoo.StepForecastConfig(updates=count), None))
        for count in (STEPS, 2)
    )
    _works(model, name, expected, none, much)


def _theirs() -> dict[str, Any]:
    return {
        "First Block": FirstBlockCacheConfig(threshold=1e9),
        "Mag": MagCacheConfig(
            threshold=1e9, max_skip_steps=3, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
        ),
        "Pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=2,
            cross_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            temporal_attention_timestep_skip_range=(-1, 1001),
            cross_attention_timestep_skip_range=(-1, 1001),
        ),
        "TaylorSeer": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    }


def _do_theirs(model: nn.Module, name: str, expected: list[Tensor]) -> list[str]:
    found = []
    for method, config in _theirs().items():
        try:
            with zoo.cached(model, config):
                if _differs(steps(model, name, STEPS), expected):
                    found.append(method)
        except Exception:  # whatever it stumbles over, it does not work
            continue
    return found


def row(name: str) -> str:
    """Return the line of the table for a class.

    Args:
        name: Of the class.
    """
    model = build(name)
    expected = steps(model, name, STEPS)
    cells, notes = [], []
    ours: list[Callable[[], None]] = [
        lambda: _works(
            model,
            name,
            expected,
            CGTaylorConfig(threshold=0),
            CGTaylorConfig(threshold=1e9, warmup_steps=2, last_order=0, force_last=False),
        ),
        lambda: _works(
            model,
            name,
            expected,
            TaylorSeerConfig(interval=1),
            TaylorSeerConfig(interval=3, warmup_steps=2, max_order=0),
        ),
        lambda: _bac(model, name, expected),
        lambda: _step_forecast(model, name, expected),
    ]
    if name in SPECS and not SPECS[name].time:
        notes, cells, ours = ["no denoiser: it is called without a time, by which steps are told apart"], ["no"] * 4, []
    for check in ours:
        try:
            check()
            cells.append("yes")
        except ValueError as error:
            cells.append("no")
            notes.append(str(error).split(": ", 1)[-1].removesuffix(". TaylorSeerConfig and BACConfig work on it."))
    theirs = _do_theirs(model, name, expected)
    assert all(map(torch.equal, steps(model, name, STEPS), expected)), f"something is left on {name}"
    units = model_units(model, "test")
    lists = list(dict.fromkeys(".".join(unit.path.split(".")[:1]) for unit in units))
    found = f"{', '.join(f'`{each}`' for each in lists)}; {len(units)} units in {len(_blocks(units))} blocks here"
    cells += [", ".join(theirs) or "none", "; ".join([*notes, found])]
    return f"| `{name}` | {' | '.join(cells)} |"


def _blocks(units: Any) -> set[str]:
    return {".".join(unit.path.split(".")[:2]) for unit in units}


def main() -> None:
    """Write the table."""
    import diffusers

    rows = [row(name) for name in all_transformers()]
    TABLE.write_text(_HEAD.format(version=diffusers.__version__) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    main()
