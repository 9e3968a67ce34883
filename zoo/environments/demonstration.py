"""Episodes of a scripted expert, to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.environments.evaluation import Environment

__all__ = ["Demonstration", "Task", "record"]


@dataclass(frozen=True)
class Demonstration:
    """One episode of the expert.

    Args:
        observations: What was observed before each action (L, D_o).
        actions: What the expert did (L, D_a).
    """

    observations: NDArray[np.float64]
    actions: NDArray[np.float64]


class Task(Environment, Protocol):
    """An environment with an expert: `zoo.environments.PointTask`, `zoo.environments.PushTTask`."""

    def demonstrations(self, count: int, seed: int = 0) -> list[Demonstration]:
        """Return those of `count` episodes of the expert in which it succeeded.

        Args:
            count: Episodes.
            seed: Of the first episode; further ones have the next numbers.
        """


def record(
    task: Environment, expert: Callable[[], NDArray[np.float64]], noise: float, rng: np.random.Generator
) -> list[Demonstration]:
    """Let an expert act until all episodes are over, and return those in which it succeeded.

    Args:
        task: Its episodes have begun.
        expert: Returns its actions (E, D_a) in the present state.
        noise: Standard deviation by which the actions are disturbed once they are recorded, so that demonstrations
            show how to get back on the way.
        rng: Of the noise.
    """
    observations, actions = [], []
    while not task.finished.all():
        observations.append(task.observe())
        actions.append(expert())
        task.step(actions[-1] + rng.normal(0.0, noise, size=actions[-1].shape))
    observed, done = np.stack(observations, axis=1), np.stack(actions, axis=1)
    return [
        Demonstration(observed[index, : task.steps[index]], done[index, : task.steps[index]])
        for index in np.flatnonzero(task.succeeded)
    ]
