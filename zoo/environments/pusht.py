"""PushT: a round pusher brings a T-shaped block into a given pose; coverage counts.

The task of Implicit Behavioral Cloning (Florence et al., CoRL 2021) as Diffusion Policy (Chi et al., RSS 2023,
https://arxiv.org/abs/2303.04137) has it, simulated by gym-pusht, https://github.com/huggingface/gym-pusht (Apache-2.0).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.environments.demonstration import Demonstration, record
from zoo.environments.pusht_expert import PushTExpert

__all__ = ["PushTTask"]

Floats = NDArray[np.float64]
_GOAL = 0.95  # coverage that ends an episode, in gym-pusht


class PushTTask:
    """Many episodes of PushT at once, observed by positions and without pictures.

    An action is where the pusher is drawn to during the next 0.1 s, in pixels of the 512 x 512 table. An observation is
    the position of the pusher and of the 8 corners of the block's two bars: 18 numbers. An episode succeeds when more
    than 95 % of the goal is covered; its seed and the actions decide it.

    Args:
        max_steps: Steps after which an episode is over; published: 300.
        noise: Standard deviation (pixels) by which the expert's actions are disturbed in demonstrations, so that they
            show how to get back on the way.

    Raises:
        ValueError: `max_steps` is not above 0, or `noise` below.
        ImportError: gym-pusht is not installed.
    """

    observation_dim = 18
    action_dim = 2

    def __init__(self, max_steps: int = 300, noise: float = 5.0) -> None:
        if max_steps <= 0:
            raise ValueError(f"max_steps must be above 0, got {max_steps}.")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}.")
        self.max_steps, self.noise = max_steps, noise
        self._planner = PushTExpert()
        self._simulators: list[Any] = []
        weakref.finalize(self, _release, self._simulators)
        self.reset([0])

    def reset(self, seeds: Sequence[int]) -> Floats:
        """Begin one episode for each seed.

        Returns:
            The first observations (E, 18).
        """
        try:
            from gym_pusht.envs import PushTEnv
        except ImportError as error:
            raise ImportError(f"PushT needs gym-pusht: pip install 'ffn-zoo[pusht]' ({error}).") from error
        self._simulators[:] = [PushTEnv(obs_type="environment_state_agent_pos") for _ in seeds]
        count = len(self._simulators)
        self._observations, self._blocks = np.zeros((count, self.observation_dim)), np.zeros((count, 3))
        for index, seed in enumerate(seeds):
            self._see(index, *self._simulators[index].reset(seed=int(seed)))
        self.steps = np.zeros(count, dtype=int)
        self.coverage = np.zeros(count)  # the highest so far
        self.succeeded = np.zeros(count, dtype=bool)
        return self.observe()

    def _see(self, index: int, observation: dict[str, Floats], info: dict[str, Any]) -> None:
        self._observations[index] = np.concatenate([observation["agent_pos"], observation["environment_state"]])
        self._blocks[index] = info["block_pose"]

    def observe(self) -> Floats:
        """Return the current observations (E, 18)."""
        return self._observations.copy()

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which episodes are over (E,)."""
        return self.succeeded | (self.steps >= self.max_steps)

    @property
    def scores(self) -> Floats:
        """Highest reward of each episode (E,), as published: coverage over 0.95, at most 1."""
        return np.minimum(self.coverage / _GOAL, 1.0)

    def step(self, actions: Floats) -> Floats:
        """Act for 0.1 s in all episodes that are not over.

        Args:
            actions: Positions to draw the pusher to (E, 2), brought to [0, 512].

        Returns:
            Observations (E, 18).

        Raises:
            ValueError: The actions have another shape.
        """
        positions = self._observations[:, :2]
        if actions.shape != positions.shape:
            raise ValueError(f"actions must be {positions.shape}, got {actions.shape}.")
        actions = np.clip(np.where(np.isnan(actions), positions, actions), 0.0, 512.0)
        for index in np.flatnonzero(~self.finished).tolist():
            observation, _, done, _, info = self._simulators[index].step(actions[index])
            self._see(index, observation, info)
            self.steps[index] += 1
            self.coverage[index] = max(self.coverage[index], info["coverage"])
            self.succeeded[index] = done
        return self.observe()

    def expert(self) -> Floats:
        """Return the expert's actions (E, 2), those of episodes that are over being where the pusher is."""
        actions = self._observations[:, :2].copy()
        for index in np.flatnonzero(~self.finished).tolist():
            actions[index] = self._planner(actions[index], self._blocks[index])
        return actions

    def demonstrations(self, count: int, seed: int = 0) -> list[Demonstration]:
        """Return those of `count` episodes of the expert in which it succeeded, as good as all.

        Args:
            count: Episodes; one takes about 0.1 s of processor time.
            seed: Of the first episode; further ones have the next numbers.
        """
        self.reset(range(seed, seed + count))
        return record(self, self.expert, self.noise, np.random.default_rng([seed, count]))


def _release(simulators: list[Any]) -> None:
    """Free simulators while Python still runs: at its end pymunk prints an error for each of their parts."""
    simulators.clear()
    gc.collect()  # they refer to themselves
