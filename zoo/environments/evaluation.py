"""How often a policy succeeds, and how fast it plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Environment", "PolicyResults", "evaluate_policy", "first_plans", "wilson_interval"]


class Environment(Protocol):
    """Episodes of a task that run side by side: `zoo.environments.PointTask`, `zoo.environments.PushTTask`.

    `succeeded` says which episodes reached their goal, and `steps` how long each has been: (E,).
    """

    observation_dim: int
    action_dim: int
    succeeded: NDArray[np.bool_]
    steps: NDArray[np.int_]

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which episodes are over (E,)."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """How near each episode has come to its goal (E,): 1 if it succeeded, 0 at worst."""

    def observe(self) -> NDArray[np.float64]:
        """Return the current observations (E, D_o)."""

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Begin one episode for each seed, and return the first observations (E, D_o)."""

    def step(self, actions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Act (E, D_a) in the episodes that are not over, and return the observations (E, D_o)."""


@dataclass(frozen=True, kw_only=True)
class PolicyResults:
    """What `evaluate_policy` found.

    Args:
        seeds: Of the episodes.
        succeeded: Whether each reached its goal.
        scores: How near each came to it, 0 to 1.
        first_plans: The actions planned first in each (E, T_a, D_a), where all policies see the same.
        calls: Calls of the pipeline; one plans for all episodes that are not over.
    """

    seeds: tuple[int, ...]
    succeeded: tuple[bool, ...]
    scores: tuple[float, ...]
    first_plans: Tensor
    calls: int

    @property
    def success_rate(self) -> float:
        """Share of episodes that succeeded, 0 to 1."""
        return sum(self.succeeded) / len(self.succeeded)

    @property
    def mean_score(self) -> float:
        """How near episodes came to their goal on average, 0 to 1."""
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the success rate lies with 95 % confidence (Wilson)."""
        return wilson_interval(sum(self.succeeded), len(self.succeeded))

    def action_error(self, other: PolicyResults) -> float:
        """Return the root mean square difference of the first plans from those of another run of the same episodes.

        Raises:
            ValueError: The episodes are others.
        """
        if self.seeds != other.seeds:
            raise ValueError("Action errors compare the same episodes: give both evaluations the same seeds.")
        return float((self.first_plans - other.first_plans).square().mean().sqrt())

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{sum(self.succeeded)} of {len(self.succeeded)} episodes succeeded: {100 * self.success_rate:.1f} % "
            f"(95 % confidence: {100 * low:.1f} to {100 * high:.1f} %)"
        )


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval in which a rate lies, after Wilson (1927): right near 0 and 1 too.

    Args:
        successes: How often it happened.
        trials: Out of how many.
        confidence: That the interval holds the true rate, 0 to 1.

    Raises:
        ValueError: The numbers contradict each other.
    """
    if not (0 <= successes <= trials and trials > 0 and 0 < confidence < 1):
        raise ValueError(f"There is no rate of {successes} in {trials} trials at a confidence of {confidence}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, scale = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def first_plans(pipe: Any, environment: Environment, seeds: Sequence[int], **arguments: Any) -> Tensor:
    """Plan the first actions of episodes (E, T_a, D_a): what a cache is calibrated on, for example.

    Args:
        pipe: A `DiffusionPolicyPipeline`.
        environment: The task.
        seeds: Of the episodes and of their noise.
        **arguments: Of the pipeline.
    """
    first = environment.reset(seeds)
    history = np.repeat(first[:, None], pipe.transformer.config.n_obs_steps, axis=1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(torch.from_numpy(history), generator=generators, **arguments).actions.cpu()


def evaluate_policy(
    pipe: Any,
    environment: Environment,
    episodes: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Any,
) -> PolicyResults:
    """Let a policy act in many episodes.

    Every episode has a seed of its own for its task and for its noise, and does not depend on the others: evaluations
    with and without a cache, or with another scheduler, are of the same episodes from the same noise.

    Args:
        pipe: A `DiffusionPolicyPipeline`.
        environment: The task.
        episodes: How many; they run side by side.
        seed: Of the first episode; further ones have the next numbers.
        progress: Told how many episodes are over, and of how many.
        **arguments: Of the pipeline, for example `num_inference_steps`.

    Raises:
        ValueError: There are no episodes, or the policy was made for another task.
    """
    config = pipe.transformer.config
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}.")
    sizes, own = (environment.observation_dim, environment.action_dim), (config.observation_dim, config.action_dim)
    if sizes != own:
        raise ValueError(
            f"The policy takes observations of {own[0]} numbers and gives actions of {own[1]}, the task has {sizes}."
        )
    seeds = tuple(range(seed, seed + episodes))
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    history = np.repeat(environment.reset(seeds)[:, None], config.n_obs_steps, axis=1)  # (E, T_o, D_o)
    plans: Tensor | None = None
    calls = 0
    while not environment.finished.all():
        active = np.flatnonzero(~environment.finished)
        own_generators = [generators[index] for index in active]
        planned = pipe(torch.from_numpy(history[active]), generator=own_generators, **arguments).actions.cpu()
        plans = planned if plans is None else plans
        calls += 1
        for number in range(planned.shape[1]):
            actions = np.zeros((episodes, config.action_dim))
            actions[active] = planned[:, number].numpy()
            observations = environment.step(actions)
            history = np.concatenate([history[:, 1:], observations[:, None]], axis=1)
        if progress is not None:
            progress(int(environment.finished.sum()), episodes)
    assert plans is not None  # no episode is over before its first step
    succeeded = tuple(bool(each) for each in environment.succeeded)
    scores = tuple(environment.scores.tolist())
    return PolicyResults(seeds=seeds, succeeded=succeeded, scores=scores, first_plans=plans, calls=calls)
