"""Demonstrations of scripted experts, made from a seed, as windows of observations and actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.samplers import ResumableSampler, training_loader
from zoo.environments import Demonstration, Task

__all__ = ["Demonstrations", "Windows"]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of some episodes: observations (T_o, D_o) and the actions (T_p, D_a) from the first of them on.

    At both ends of an episode the first observation and the last action are repeated, as in Diffusion Policy, so that
    there is a window for every step.

    Args:
        episodes: At least one.
        horizon: Actions in a window, T_p.
        n_obs_steps: Observations in a window, T_o.
    """

    def __init__(self, episodes: Sequence[Demonstration], horizon: int, n_obs_steps: int) -> None:
        observations, actions = [], []
        for episode in episodes:
            last = len(episode.actions) - 1
            starts = np.arange(last + 1)[:, None] - (n_obs_steps - 1)  # the window's last observation is each step once
            observations.append(episode.observations[np.clip(starts + np.arange(n_obs_steps), 0, last)])
            actions.append(episode.actions[np.clip(starts + np.arange(horizon), 0, last)])
        self.observations = torch.from_numpy(np.concatenate(observations)).float()
        self.actions = torch.from_numpy(np.concatenate(actions)).float()

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return a window; from a `ResumableSampler`, the second number of the key is its index."""
        index = key if isinstance(key, int) else key[1]
        return self.observations[index], self.actions[index]


class Demonstrations(LightningDataModule):
    """Windows of an expert's episodes for a diffusion policy.

    Args:
        environment: The task and its expert: `zoo.environments.PointTask` or `PushTTask`.
        episodes: Episodes to train on, failed ones left out.
        val_episodes: Episodes to validate on.
        horizon: Actions in a window, the policy's `horizon`.
        n_obs_steps: Observations in a window, the policy's `n_obs_steps`.
        batch_size: Windows of a step and process.
        num_workers: Loader processes.
        seed: Of the first training episode, of validation episodes from 1 000 000 on, and of the order.
    """

    def __init__(
        self,
        environment: Task,
        episodes: int = 1000,
        val_episodes: int = 50,
        horizon: int = 16,
        n_obs_steps: int = 2,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.environment, self.episodes, self.val_episodes = environment, episodes, val_episodes
        self.horizon, self.n_obs_steps = horizon, n_obs_steps
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def setup(self, stage: str) -> None:
        """Let the expert act."""
        self.train, self.val = (
            Windows(self.environment.demonstrations(count, seed), self.horizon, self.n_obs_steps)
            for count, seed in ((self.episodes, self.seed), (self.val_episodes, self.seed + 1_000_000))
        )

    def ranges(self) -> tuple[list[list[float]], list[list[float]]]:
        """Return smallest and largest values of the training observations, and of the actions."""
        flat = self.train.observations.flatten(0, 1), self.train.actions.flatten(0, 1)
        observed, done = ([values.amin(0).tolist(), values.amax(0).tolist()] for values in flat)
        return observed, done

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ResumableSampler(self.train, self.seed, rank, world)
        return training_loader(self, self.train, sampler, "windows")

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=self.batch_size, generator=torch.Generator().manual_seed(self.seed))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()
