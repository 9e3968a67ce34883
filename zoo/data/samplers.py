"""Data order and augmentation as functions of (seed, epoch, index), so that an interrupted run continues exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

__all__ = ["LateLoader", "ResumableSampler", "SeededDataset"]


class SeededDataset(Dataset[Any]):
    """Draw the random augmentation of every sample from (seed, epoch, index).

    Workers, their number and an interruption then change nothing. The process's own random state is left as it was. A
    third number in the key tells repetitions of a sample within an epoch apart.

    Args:
        data: Map-style data set whose samples may use Python's, NumPy's and PyTorch's global generators.
        seed: Seed of the run.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        index = key[1]
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        draw = np.random.SeedSequence((self.seed, *key)).generate_state(1)[0]
        random.seed(int(draw))
        np.random.seed(draw)
        torch.default_generator.manual_seed(int(draw))
        try:
            return self.data[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class ResumableSampler(DistributedSampler[Any]):
    """Shuffle by (seed, epoch), split over processes, and start where an interrupted epoch stopped.

    Yields (epoch, index) for a `SeededDataset`, and (epoch, index, n) for the n-th repetition.
    `zoo.tasks.callbacks.ExactResume` sets `start` after a resume.

    Args:
        data: The data set; only its length is used.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes; an incomplete last round is dropped.
        repeats: How often each sample appears (repeated augmentation, DeiT); the epoch keeps its length.
    """

    def __init__(self, data: Any, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.size, self.repeats = len(data), repeats
        self.start = 0

    def __len__(self) -> int:
        return self.size // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, ...]]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).repeat_interleave(self.repeats)
        own = order[self.rank :: self.num_replicas][: len(self)].tolist()
        start, self.start = self.start, 0
        for place, index in enumerate(own[start:], start):
            repetition = (self.rank + place * self.num_replicas) % self.repeats
            yield (self.epoch, index, repetition) if repetition else (self.epoch, index)


class LateLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for nothing before its first batch is asked for.

    Lightning creates the loader's iterator before it restores a checkpoint and before it tells the sampler the epoch;
    worker processes would by then have fetched the first batches of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()
