"""A point that has to pass an obstacle on its left or on its right: the smallest task with two ways to do it right.

A policy that averages over its demonstrations runs into the obstacle; one that models both ways does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zoo.environments.demonstration import Demonstration, record

__all__ = ["PointTask"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class PointTask:
    """Many episodes at once of a point that moves to a goal around a round obstacle.

    The point starts near the lower edge of [-1, 1] x [-1, 1], the goal is near the upper edge, the obstacle between
    them. An action is the position to move to; the point gets there, or as far as `max_move`. An observation is the
    position of the point, of the goal and of the obstacle: 6 numbers. An episode is decided by its seed and the
    actions alone.

    Args:
        max_steps: Steps after which an episode has failed.
        max_move: Longest way of a step.
        radius: Of the obstacle.
        tolerance: Distance to the goal that counts as reached.
        clearance: Distance that the expert keeps from the obstacle.
        noise: Standard deviation by which the expert's moves are disturbed in demonstrations, so that they show how
            to get back on the way.

    Raises:
        ValueError: A number is not above 0, or `noise` below.
    """

    observation_dim = 6
    action_dim = 2

    def __init__(
        self,
        max_steps: int = 40,
        max_move: float = 0.1,
        radius: float = 0.2,
        tolerance: float = 0.1,
        clearance: float = 0.15,
        noise: float = 0.01,
    ) -> None:
        given = dict(max_steps=max_steps, max_move=max_move, radius=radius, tolerance=tolerance, clearance=clearance)
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}.")
        self.max_steps, self.max_move, self.radius = max_steps, max_move, radius
        self.tolerance, self.clearance, self.noise = tolerance, clearance, noise
        self.reset([0])

    def reset(self, seeds: Sequence[int]) -> Floats:
        """Begin one episode for each seed.

        Returns:
            The first observations (E, 6).
        """
        draws = np.stack([np.random.default_rng(seed).uniform(-1, 1, 6) for seed in seeds])
        self.position = np.array([0.0, -0.9]) + draws[:, 0:2] * np.array([0.4, 0.05])
        self.goal = np.array([0.0, 0.9]) + draws[:, 2:4] * np.array([0.4, 0.05])
        # beside the straight way by less than its radius, so that the way is barred
        middle = (self.position + self.goal) / 2
        self.obstacle = middle + draws[:, 4:6] * np.array([0.1, 0.2])
        self.steps = np.zeros(len(draws), dtype=int)
        self.succeeded: Bools = np.zeros(len(draws), dtype=bool)
        self.failed: Bools = np.zeros(len(draws), dtype=bool)
        self.side = np.zeros(len(draws), dtype=int)
        return self.observe()

    def observe(self) -> Floats:
        """Return the current observations (E, 6)."""
        return np.concatenate([self.position, self.goal, self.obstacle], axis=1)

    @property
    def finished(self) -> Bools:
        """Which episodes are over (E,)."""
        return self.succeeded | self.failed

    @property
    def scores(self) -> Floats:
        """1 for each episode that succeeded, 0 for others (E,)."""
        return self.succeeded.astype(np.float64)

    def step(self, actions: Floats) -> Floats:
        """Move in all episodes that are not over.

        Args:
            actions: Positions to move to (E, 2).

        Returns:
            Observations (E, 6).

        Raises:
            ValueError: The actions have another shape.
        """
        if actions.shape != self.position.shape:
            raise ValueError(f"actions must be {self.position.shape}, got {actions.shape}.")
        way = np.nan_to_num(actions - self.position)
        length = np.linalg.norm(way, axis=1, keepdims=True)
        way = way * np.minimum(1.0, self.max_move / np.maximum(length, 1e-12))
        moved = np.where(self.finished[:, None], self.position, self.position + way)
        hit = _distance_to_segment(self.obstacle, self.position, moved) < self.radius
        passed = (self.side == 0) & (self.position[:, 1] <= self.obstacle[:, 1]) & (moved[:, 1] > self.obstacle[:, 1])
        self.side[passed] = np.where(moved[passed, 0] < self.obstacle[passed, 0], 1, -1)
        self.steps += ~self.finished
        self.failed |= hit & ~self.finished
        self.position = moved
        reached = np.linalg.norm(self.goal - moved, axis=1) <= self.tolerance
        self.succeeded |= reached & ~self.failed
        self.failed |= (self.steps >= self.max_steps) & ~self.succeeded
        return self.observe()

    def expert(self, sides: NDArray[np.int_]) -> Floats:
        """Return the expert's actions (E, 2): straight to the goal, or along the tangent of the obstacle.

        Args:
            sides: On which side each episode passes the obstacle: 1 left, -1 right.
        """
        distance_kept = self.radius + self.clearance
        to_goal, to_centre = self.goal - self.position, self.obstacle - self.position
        distance = np.linalg.norm(to_centre, axis=1)
        barred = _distance_to_segment(self.obstacle, self.position, self.goal) < distance_kept - 1e-9
        bend = np.arcsin(np.minimum(1.0, distance_kept / distance))
        angle = np.arctan2(to_centre[:, 1], to_centre[:, 0]) + sides * bend
        around = self.max_move * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        length = np.linalg.norm(to_goal, axis=1, keepdims=True)
        straight = to_goal * np.minimum(1.0, self.max_move / np.maximum(length, 1e-12))
        return self.position + np.where(barred[:, None], around, straight)

    def demonstrations(self, count: int, seed: int = 0) -> list[Demonstration]:
        """Return episodes in which the expert reached the goal, as many to the left as to the right on average.

        Args:
            count: Episodes.
            seed: Of the first episode; further ones have the next numbers.
        """
        seeds = range(seed, seed + count)
        rng = np.random.default_rng([seed, count])
        self.reset(seeds)
        sides = rng.choice(np.array([-1, 1]), size=count)
        return record(self, lambda: self.expert(sides), self.noise, rng)


def _distance_to_segment(points: Floats, starts: Floats, ends: Floats) -> Floats:
    """Return the distance of each point to its segment (E,)."""
    way = ends - starts
    share = ((points - starts) * way).sum(1) / np.maximum((way**2).sum(1), 1e-12)
    return np.linalg.norm(points - (starts + np.clip(share, 0.0, 1.0)[:, None] * way), axis=1)
