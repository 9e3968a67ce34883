"""Photos and their degraded versions, made on the fly or read from a second folder, for training restorers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.degradations import BicubicDownscale, Degradation, GaussianNoise, Pixels
from zoo.data.photos import Pair, find_images, pair_folders, read_pair, to_tensor
from zoo.data.samplers import LateLoader, PatchBatches, Phase, PhasedSampler, ResumableSampler, SeededDataset

__all__ = [
    "BicubicDownscale",
    "Degradation",
    "EvaluationPairs",
    "GaussianNoise",
    "PairedImages",
    "Phase",
    "TrainingPatches",
]

_KEPT_BYTES = 2**30  # of photos that a process keeps in memory


class TrainingPatches(Dataset[tuple[Tensor, Tensor]]):
    """Random aligned patches of degraded and clean photos, flipped and turned at random.

    The first gigabyte of photos is kept in memory once read (a 481x321 photo: 0.5 MB). Random choices come from NumPy's
    global generator; a `SeededDataset` around this makes them a function of (seed, epoch, index). Photos that come with
    their degraded version and are smaller than a patch are mirrored to the right and below, as Restormer's authors do.

    Args:
        pairs: Clean photos, each with its degraded version, or to be degraded.
        degradation: How the network's input is made, where it is no file; gives the scale.
        patch_size: Side of the degraded patch, pixels; the largest one that is asked for.
        patches_per_image: Patches of each photo in an epoch.
        mode: "RGB", or "L" for one channel.

    Raises:
        ValueError: A photo is unreadable, no pair with its degraded version, or to be degraded and smaller than a
            patch.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        degradation: Degradation,
        patch_size: int,
        patches_per_image: int = 1,
        mode: Literal["RGB", "L"] = "RGB",
    ) -> None:
        self.degradation, self.patch_size, self.patches_per_image = degradation, patch_size, patches_per_image
        self.pairs, self.mode = list(pairs), mode
        self._photos: dict[int, tuple[Pixels | None, Pixels]] = {}
        self._kept = 0

    def __len__(self) -> int:
        return len(self.pairs) * self.patches_per_image

    def _photo(self, index: int) -> tuple[Pixels | None, Pixels]:
        """Return the degraded photo, or None where each patch is degraded anew, and the clean one."""
        if index in self._photos:
            return self._photos[index]
        pair, least = self.pairs[index], self.patch_size * self.degradation.scale
        degraded, clean = read_pair(pair, self.mode, self.degradation.scale)
        if degraded is None:
            if min(clean.shape[:2]) < least:
                raise ValueError(
                    f"{pair.clean} has {clean.shape[1]}x{clean.shape[0]} pixels, a patch needs {least}x{least}."
                )
            if not self.degradation.random:
                degraded = self.degradation(clean, np.random.default_rng(0))
        size = clean.nbytes + (0 if degraded is None else degraded.nbytes)
        if self._kept + size <= _KEPT_BYTES:
            self._photos[index] = degraded, clean
            self._kept += size
        return degraded, clean

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.patch(index, self.patch_size)

    def patch(self, index: int, side: int) -> tuple[Tensor, Tensor]:
        """Return a degraded patch of `side` x `side` pixels and its clean version."""
        degraded, clean = self._photo(index % len(self.pairs))
        rng = np.random.default_rng(np.random.randint(0, 2**31, 2))
        scale = self.degradation.scale
        if degraded is not None:
            degraded, clean = _at_least(degraded, side), _at_least(clean, side * scale)
        top = int(rng.integers(0, clean.shape[0] // scale - side + 1))
        left = int(rng.integers(0, clean.shape[1] // scale - side + 1))
        target = clean[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
        if degraded is None:
            source = self._degrade(clean, top, left, side, rng)
        else:
            source = degraded[top : top + side, left : left + side]
        turns, flip = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
        source, target = np.rot90(source, turns), np.rot90(target, turns)
        if flip:
            source, target = source[:, ::-1], target[:, ::-1]
        return to_tensor(source), to_tensor(target)

    def _degrade(self, clean: Pixels, top: int, left: int, side: int, rng: np.random.Generator) -> Pixels:
        """Degrade a patch together with the surroundings that it depends on; place and side in degraded pixels."""
        scale = self.degradation.scale
        margin = -(-self.degradation.margin // scale)
        first = [max(0, place - margin) for place in (top, left)]
        last = [place + side + margin for place in (top, left)]
        region = clean[first[0] * scale : last[0] * scale, first[1] * scale : last[1] * scale]
        source = self.degradation(region, rng)[top - first[0] :, left - first[1] :]
        return source[:side, :side]


def _at_least(image: Pixels, side: int) -> Pixels:
    """Mirror an image to the right and below, its last pixels included, until it has `side` x `side` pixels."""
    below, right = (max(0, side - length) for length in image.shape[:2])
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="symmetric") if below or right else image


class EvaluationPairs(Dataset[tuple[Tensor, Tensor]]):
    """Whole degraded and clean images.

    Args:
        pairs: Clean images, each with its degraded version, or to be degraded. They are cut from the top left to a
            multiple of the scale, or to the size of the degraded version times the scale.
        degradation: Makes the network's input, where it is no file; gives the scale.
        mode: "RGB", or "L" for one channel.
        seed: Image i is degraded with the generator (seed, i); noise is the protocol's own.

    Raises:
        ValueError: An image is unreadable, or its degraded version has another size.
    """

    def __init__(
        self, pairs: Sequence[Pair], degradation: Degradation, mode: Literal["RGB", "L"] = "RGB", seed: int = 0
    ) -> None:
        self.pairs, self.degradation, self.mode, self.seed = list(pairs), degradation, mode, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        source, clean = read_pair(self.pairs[index], self.mode, self.degradation.scale)
        if source is None:
            source = self.degradation.evaluate(clean, np.random.default_rng((self.seed, index)))
        return to_tensor(source), to_tensor(clean)


class PairedImages(LightningDataModule):
    """Pairs of degraded and clean images for `zoo.tasks.restoration.Restoration`.

    Degraded versions are files of the same names as the clean ones, see `zoo.data.photos.pair_folders`. Where two
    folders are given for one, they hold the left and the right view of a dual-pixel sensor, which become 6 channels.

    Args:
        data_dir: Folder that the other folders are relative to.
        degradation: How the network's input is made from a clean photo, and the scale. None where all degraded versions
            are files of the clean images' size.
        train_folders: Folders of clean photos, searched with all subfolders.
        train_degraded_folders: Folder, or two, of the degraded versions for each of `train_folders`; None makes them.
        val_folder: Folder of clean images for validation and `test`.
        val_degraded_folder: Folder, or two, of their degraded versions; None makes them.
        patch_size: Side of the degraded training patch, pixels.
        patches_per_image: Patches of each photo in an epoch.
        batch_size: Patches of a step and process.
        num_workers: Loader processes.
        mode: "RGB", or "L" for one channel.
        seed: Of order, patches and training noise.
        limit: Use only the first photos of each split.
        phases: Progressive training, in place of `patch_size` and `batch_size`: patches grow and batches shrink after
            so many batches. The whole training is then one epoch (set `trainer.max_steps`, and `val_check_interval`
            with `check_val_every_n_epoch: null`); the last phase goes on for ever. Restormer's first two are
            `phases: [{batches: 92000, patch_size: 128, batch_size: 64}, {batches: 64000, patch_size: 160,
            batch_size: 40}]`.

    Raises:
        ValueError: There are not as many folders of degraded photos as of clean ones. A loader raises it where a
            degraded version is missing, has another size, or is neither given nor made.
    """

    def __init__(
        self,
        data_dir: str,
        degradation: Degradation | None = None,
        train_folders: list[str] | None = None,
        train_degraded_folders: list[str | list[str]] | None = None,
        val_folder: str | None = None,
        val_degraded_folder: str | list[str] | None = None,
        patch_size: int = 48,
        patches_per_image: int = 16,
        *,
        batch_size: int = 16,
        num_workers: int = 0,
        mode: Literal["RGB", "L"] = "RGB",
        seed: int = 0,
        limit: int | None = None,
        phases: list[Phase] | None = None,
    ) -> None:
        super().__init__()
        self.data_dir, self.degradation = Path(data_dir), degradation
        self.train_folders, self.train_degraded_folders = train_folders or ["."], train_degraded_folders
        self.val_folder, self.val_degraded_folder = val_folder, val_degraded_folder
        if train_degraded_folders is not None and len(train_degraded_folders) != len(self.train_folders):
            raise ValueError(
                f"train_degraded_folders must have one entry for each of the {len(self.train_folders)} train_folders, "
                f"got {len(train_degraded_folders)}."
            )
        self.patch_size, self.patches_per_image, self.batch_size = patch_size, patches_per_image, batch_size
        self.num_workers, self.mode, self.seed, self.limit = num_workers, mode, seed, limit
        self.phases = phases

    def _pairs(self, folder: str, degraded: str | list[str] | None) -> list[Pair]:
        if degraded is not None:
            views = [self.data_dir / view for view in ([degraded] if isinstance(degraded, str) else degraded)]
            scale = 1 if self.degradation is None else self.degradation.scale
            return pair_folders(self.data_dir / folder, views, scale)[: self.limit]
        if self.degradation is None:
            raise ValueError(f"{folder} has no folder of degraded versions, and there is no degradation to make them.")
        return [Pair(path) for path in find_images(self.data_dir / folder)[: self.limit]]

    def train_dataloader(self) -> DataLoader[Any]:
        degraded: Sequence[str | list[str] | None] = self.train_degraded_folders or [None] * len(self.train_folders)
        folders = zip(self.train_folders, degraded, strict=True)
        pairs = [pair for folder, other in folders for pair in self._pairs(folder, other)]
        largest = max((phase.patch_size for phase in self.phases or []), default=self.patch_size)
        data = TrainingPatches(pairs, self.degradation or Degradation(), largest, self.patches_per_image, self.mode)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        common: dict[str, Any] = dict(
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )
        if self.phases:
            phased = PhasedSampler(data, self.phases, self.seed, rank, world)
            return LateLoader(PatchBatches(data, self.seed), batch_size=None, sampler=phased, **common)
        sampler = ResumableSampler(data, self.seed, rank, world)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is more than the {len(sampler)} patches of a process and epoch: "
                f"raise patches_per_image."
            )
        seeded = SeededDataset(data, self.seed)
        return LateLoader(seeded, batch_size=self.batch_size, sampler=sampler, drop_last=True, **common)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.val_folder is None:
            return []
        pairs = self._pairs(self.val_folder, self.val_degraded_folder)
        data = EvaluationPairs(pairs, self.degradation or Degradation(), self.mode, self.seed)
        return DataLoader(data, batch_size=1, generator=torch.Generator().manual_seed(self.seed))

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.val_dataloader()
