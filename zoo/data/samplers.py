"""Data order and augmentation as functions of (seed, epoch, index), so that an interrupted run continues exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

__all__ = [
    "BlockSampler", "LateLoader", "PatchBatches", "Phase", "PhasedSampler", "ResumableSampler", "SeededDataset",
    "training_loader",
]  # fmt: skip


@contextmanager
def _drawing_from(*numbers: int) -> Iterator[None]:
    """Seed the global generators for a while; the process's own random state comes back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draw = np.random.SeedSequence(numbers).generate_state(1)[0]
    random.seed(int(draw))
    np.random.seed(draw)
    torch.default_generator.manual_seed(int(draw))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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
        with _drawing_from(self.seed, *key):
            return self.data[key[1]]


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

    def _own(self, generator: torch.Generator) -> Tensor:
        """Return the samples of this process, (len,), in their order."""
        order = torch.randperm(self.size, generator=generator).repeat_interleave(self.repeats)
        return order[self.rank :: self.num_replicas][: len(self)]

    def __iter__(self) -> Iterator[tuple[int, ...]]:  # type: ignore[override]
        own = self._own(torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)).tolist()
        start, self.start = self.start, 0
        for place, index in enumerate(own[start:], start):
            repetition = (self.rank + place * self.num_replicas) % self.repeats
            yield (self.epoch, index, repetition) if repetition else (self.epoch, index)


class BlockSampler(ResumableSampler):
    """Shuffle blocks of neighbours, give each process a part of them, and shuffle samples within a window.

    So a process reads few shards, each of them once, nearly from front to back; what is far apart in the data still
    comes in another order in every epoch.

    Args:
        data: The data set; only its length is used.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes; an incomplete last round is dropped.
        block: Samples that stay together.
        window: Samples among which each is drawn at random.
    """

    def __init__(
        self, data: Any, seed: int, rank: int = 0, world_size: int = 1, *, block: int = 512, window: int = 8192
    ) -> None:
        super().__init__(data, seed, rank, world_size)
        self.block, self.window = block, window

    def _own(self, generator: torch.Generator) -> Tensor:
        blocks = torch.randperm(math.ceil(self.size / self.block), generator=generator)
        order = (blocks[:, None] * self.block + torch.arange(self.block)).flatten()
        order = order[order < self.size]
        parts = order[self.rank * len(self) : (self.rank + 1) * len(self)].split(self.window)
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


@dataclass(kw_only=True)  # not frozen: Lightning's loggers copy hyper-parameters field by field
class Phase:
    """A part of a training with patches that grow (Restormer, section 5).

    Args:
        batches: How long it lasts, in batches of a process: optimizer steps times accumulated batches.
        patch_size: Side of the degraded patch, pixels.
        batch_size: Patches of a step and process.

    Raises:
        ValueError: One of them is less than 1.
    """

    batches: int
    patch_size: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("batches", "patch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a phase must be at least 1, got {getattr(self, name)}.")


class _Patches(Protocol):
    def patch(self, index: int, side: int) -> tuple[Tensor, Tensor]: ...


class PatchBatches(Dataset[Any]):
    """Whole batches of patches, whose number and size the keys of a `PhasedSampler` give.

    Args:
        data: Has `patch(index, side)`, which may use the global generators: each patch gets its own random numbers.
        seed: Seed of the run.
    """

    def __init__(self, data: _Patches, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, keys: list[tuple[int, int, int]]) -> Any:
        pairs = []
        for turn, index, side in keys:
            with _drawing_from(self.seed, turn, index):
                pairs.append(self.data.patch(index, side))
        return default_collate(pairs)


class PhasedSampler(ResumableSampler):
    """Yield batches of patches that grow from phase to phase, and start where an interrupted run stopped.

    The phases together are one epoch; in later epochs the last phase goes on. Samples are taken from one permutation of
    the data after another, split over processes, so that a resumed run gets what the uninterrupted one would have got.

    Args:
        data: The data set; only its length is used.
        phases: At least one.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        ValueError: There is no phase.
    """

    def __init__(self, data: Any, phases: Sequence[Phase], seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, seed, rank, world_size)
        if not phases:
            raise ValueError("phases must have at least one phase.")
        self.phases = list(phases)
        self._order: tuple[int, Tensor] | None = None  # the permutation in use

    def __len__(self) -> int:
        return sum(phase.batches for phase in self.phases)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:  # type: ignore[override]
        first, self.start = self.epoch * len(self) + self.start, 0
        for number in range(first, (self.epoch + 1) * len(self)):
            phase, taken = self._place(number)
            samples = [taken + self.rank + self.num_replicas * place for place in range(phase.batch_size)]
            yield [(*self._sample(sample), phase.patch_size) for sample in samples]

    def _place(self, number: int) -> tuple[Phase, int]:
        """Return the phase of a batch, and how many samples all batches before it take in all processes."""
        taken = 0
        for phase in self.phases[:-1]:
            if number < phase.batches:
                break
            number -= phase.batches
            taken += phase.batches * phase.batch_size
        else:
            phase = self.phases[-1]
        return phase, (taken + number * phase.batch_size) * self.num_replicas

    def _sample(self, number: int) -> tuple[int, int]:
        """Return (turn through the data, index) of a sample in the endless order."""
        turn, place = divmod(number, self.size)
        if self._order is None or self._order[0] != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._order = turn, torch.randperm(self.size, generator=generator)
        return turn, int(self._order[1][place])


class LateLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for nothing before its first batch is asked for.

    Lightning creates the loader's iterator before it restores a checkpoint and before it tells the sampler the epoch;
    worker processes would by then have fetched the first batches of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def training_loader(module: Any, data: Any, sampler: ResumableSampler, what: str, **more: Any) -> LateLoader:
    """Return the batches of a data module's training epoch, in the order of a sampler.

    Raises:
        ValueError: A process has less than a batch of what they are.
    """
    if len(sampler) < module.batch_size:
        raise ValueError(f"batch_size {module.batch_size} exceeds the {len(sampler)} training {what} of a process.")
    more = {"pin_memory": torch.cuda.is_available(), **more}
    return LateLoader(
        data,
        batch_size=module.batch_size,
        sampler=sampler,
        num_workers=module.num_workers,
        drop_last=True,
        persistent_workers=module.num_workers > 0,
        generator=torch.Generator().manual_seed(module.seed),
        **more,
    )
