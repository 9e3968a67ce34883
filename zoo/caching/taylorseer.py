"""TaylorSeer: compute every so many steps in full, and forecast attention and feed-forward at the others.

From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (Liu et al., ICCV 2025),
https://arxiv.org/abs/2503.06923. Authors' code: https://github.com/Shenyi-Z/TaylorSeer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from zoo.caching.blocks import model_units
from zoo.caching.registry import is_count, place, require, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.units import Turn, place_units
from zoo.diffusion.blocks import as_patterns

__all__ = ["TaylorSeerConfig", "is_full_step"]

Rule = Literal["authors", "diffusers"]


@dataclass(kw_only=True)
class TaylorSeerConfig:
    """Compute attention and feed-forward at fixed steps, and forecast their outputs by Taylor factors at the others.

    Differs from diffusers' `TaylorSeerCacheConfig`: feed-forwards are forecast as well as attention, on every known
    model; the steps are the authors'; and forecasts are stored in the model's type, not in bfloat16.

    Args:
        interval: One full step in so many; 1 computes everything.
        max_order: Order of the forecast; 0 repeats the last output.
        warmup_steps: Full steps at the start of a run.
        rule: Which steps are full after the warm-up: every `interval`-th from the last of the warm-up ("authors"), or
            from the second after it ("diffusers").
        full_from: Compute all steps from this one on; None never does.
        units: Regular expressions for the names of the modules to forecast; None takes attention and feed-forward of
            all blocks.
        factors_dtype: Type in which forecasts are stored and summed; None is the model's.
    """

    interval: int = 5
    max_order: int = 1
    warmup_steps: int = 3
    rule: Rule = "authors"
    full_from: int | None = None
    units: Sequence[str] | None = None
    factors_dtype: torch.dtype | None = None

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""
        require(is_count(self.interval, 1), self, "interval", "a whole number from 1")
        require(is_count(self.max_order, 0), self, "max_order", "a whole number from 0")
        # nothing can be forecast before a first full step
        require(is_count(self.warmup_steps, 1), self, "warmup_steps", "a whole number from 1")
        require(self.rule in ("authors", "diffusers"), self, "rule", "'authors' or 'diffusers'")
        full_from = self.full_from
        require(full_from is None or is_count(full_from, 0), self, "full_from", "None or a whole number from 0")
        require(self.units is None or not isinstance(self.units, str), self, "units", "None or a list of patterns")
        floating = isinstance(self.factors_dtype, torch.dtype) and self.factors_dtype.is_floating_point
        require(self.factors_dtype is None or floating, self, "factors_dtype", "None or a floating-point type")


def is_full_step(
    step: int, *, interval: int, warmup_steps: int, rule: Rule = "authors", full_from: int | None = None
) -> bool:
    """Return whether a step is computed in full; the arguments are those of `TaylorSeerConfig`."""
    if step < warmup_steps or (full_from is not None and step >= full_from):
        return True
    first = warmup_steps - 1 if rule == "authors" else warmup_steps + 1
    return (step - first) % interval == 0


@place.register
def _taylorseer(config: TaylorSeerConfig, model: nn.Module, run: RunTracker) -> None:
    config.check()
    require_evaluation(config, model)
    units = model_units(model, "TaylorSeerConfig")
    if config.units is not None:
        names = [unit.path for unit in units]
        units = [unit for unit in units if any(re.fullmatch(pattern, unit.path) for pattern in config.units)]
        if not units:
            raise ValueError(
                f"TaylorSeerConfig: units={list(config.units)} match no unit of {type(model).__name__}, whose units "
                f"are {as_patterns(names)}."
            )

    every, none = frozenset(unit.path for unit in units), frozenset[str]()

    def is_full(step: int) -> bool:
        return is_full_step(
            step,
            interval=config.interval,
            warmup_steps=config.warmup_steps,
            rule=config.rule,
            full_from=config.full_from,
        )

    def turn(step: int) -> Turn:
        # a forecast rests on the last full steps, one more than its order
        of_use = any(not is_full(step + later) for later in range(1, config.max_order + 2))
        return Turn(every if is_full(step) else none, every if of_use else none)

    place_units(model, units, run, turn, config.max_order, config.factors_dtype)
