"""Which steps compute the whole denoiser, and how its outputs at the others follow from the last two computed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.caching.schedules import StoredSchedule

__all__ = ["StepSchedule", "plan_steps"]

_MOST_STEPS = 256  # the plan takes steps³ numbers
_RIDGE = 1e-6  # of two outputs that are nearly the same

Forecasts = dict[int, dict[int, float]]


def plan_steps(products: Tensor, effects: Tensor, updates: int) -> tuple[tuple[int, ...], Forecasts]:
    """Choose the steps to compute, and the weights of the last two of them that forecast each other one best.

    For each pair of computed steps the weights are those of least squares. A stretch of forecast steps costs the square
    of the sum of their errors, each times its effect on the result: errors of one stretch are much alike and add up.
    The dynamic programme over pairs of computed steps finds the least sum, O(updates * steps³).

    Args:
        products: (steps, steps), mean products of the denoiser's outputs at any two steps.
        effects: (steps,), how much an error of each output changes the result.
        updates: Steps to compute, the first among them; more than there are steps means all.

    Returns:
        The steps; and by each other step the weights by computed step.

    Raises:
        ValueError: There is no update, or there are too many steps to plan.
    """
    steps = len(products)
    if updates < 1:
        raise ValueError(f"updates must be at least 1, since the first step is computed, got {updates}.")
    if steps > _MOST_STEPS:
        raise ValueError(f"Step forecasts are planned for at most {_MOST_STEPS} steps, got {steps}.")
    if updates >= steps:
        return tuple(range(steps)), {}
    products, effects = products.double(), effects.double()
    infinite = torch.tensor(torch.inf, dtype=torch.float64)
    # costs[p, q, e]: of the steps between q and e, forecast from p and q; p = q = 0 is the first step alone
    costs = infinite.repeat(steps, steps, steps + 1)
    for last in range(steps):
        for before in range(last) if last else (0,):
            costs[before, last, last + 1 :] = _costs(products, effects, before, last)
    best, origins = costs[0, 0].clone().repeat(steps, 1), []
    best[1:] = torch.inf  # best[q, e]: all costs up to e, where q was computed last
    for _ in range(updates - 1):
        ahead = best[:, :steps, None] + costs
        ahead[0, 0] = torch.inf
        best, froms = ahead.min(0)
        origins.append(froms)
    chosen, end = [], steps
    last = int(best[:, steps].argmin())
    for froms in reversed(origins):
        chosen.append(last)
        end, last = last, int(froms[last, end])
    computed = tuple(sorted({0, *chosen}))
    forecasts: Forecasts = {}
    for step in range(steps):
        if step not in computed:
            used = [other for other in computed if other < step][-2:]
            forecasts[step] = dict(zip(used, _weights(products, used)[:, step].tolist(), strict=True))
    return computed, forecasts


def _weights(products: Tensor, used: list[int]) -> Tensor:
    """Return the weights (used, steps) that forecast every step from those that are used."""
    own = products[used][:, used]
    return torch.linalg.solve(
        own + _RIDGE * own.diagonal().mean().clamp_min(1e-30) * torch.eye(len(used)), products[used]
    )


def _costs(products: Tensor, effects: Tensor, before: int, last: int) -> Tensor:
    """Return the cost of forecasting the steps after `last` up to, and not including, each one after it."""
    used = sorted({before, last})
    left = products - products[:, used] @ _weights(products, used)  # products of what the forecasts miss
    weighed = (left * effects[:, None] * effects)[last + 1 :, last + 1 :]
    sums = weighed.cumsum(0).cumsum(1).diagonal().clamp_min(0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), sums])


@dataclass(frozen=True, kw_only=True)
class StepSchedule(StoredSchedule):
    """Which steps compute the whole denoiser, and from what its outputs at the others are forecast.

    Args:
        model: Class of the denoiser.
        num_steps: Calls of the denoiser in a run, for each branch of guidance.
        steps: Those that compute it, from 0.
        forecasts: By each other step the weights of the outputs of computed steps, by step.
        scheduler: Class of the scheduler, None if unknown.
        timesteps: Of the scheduler, empty if unknown.
        guidance: Scale of classifier-free guidance in the calibration, None if not said.
    """

    _kind, _called = "forecast", "schedule of step forecasts"

    model: str
    num_steps: int
    steps: tuple[int, ...]
    forecasts: Mapping[int, Mapping[int, float]]
    scheduler: str | None = None
    timesteps: tuple[float, ...] = ()
    guidance: float | None = None

    def __str__(self) -> str:
        return f"Step forecasts of {self.model} for {self.num_steps} steps: {len(self.steps)} computed"

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        forecasts = {
            int(step): {int(used): float(weight) for used, weight in weights.items()}
            for step, weights in values["forecasts"].items()
        }
        tuples = {name: tuple(values[name]) for name in ("steps", "timesteps")}
        return {**values, **tuples, "forecasts": forecasts}

    def check(self, name: str = "The schedule") -> None:
        """Raise ValueError where the schedule contradicts itself."""
        steps, forecasts = set(self.steps), self.forecasts
        if not self.steps or self.steps[0] != 0 or list(self.steps) != sorted(steps):
            raise ValueError(f"{name}: computed steps must rise from 0, got {list(self.steps)}.")
        if steps & set(forecasts) or steps | set(forecasts) != set(range(self.num_steps)):
            raise ValueError(f"{name}: each of the {self.num_steps} steps must be computed or forecast, and not both.")
        for step, weights in forecasts.items():
            if not weights or not all(used in steps and used < step for used in weights):
                raise ValueError(f"{name}: step {step} must be forecast from computed steps before it.")
