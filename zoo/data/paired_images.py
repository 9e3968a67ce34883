"""Photos and their degraded versions, made on the fly or read from a second folder, for training restorers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.degradations import BicubicDownscale, Degradation, GaussianNoise, Pixels
from zoo.data.photos import find_images, read_pixels, to_tensor
from zoo.data.samplers import LateLoader, PatchBatches, Phase, PhasedSampler, ResumableSampler, SeededDataset

__all__ = [
    "BicubicDownscale",
    "Degradation",
    "EvaluationPairs",
    "GaussianNoise",
    "PairedImages",
    "Phase",
    "TrainingPatches",
    "find_images",
]


class TrainingPatches(Dataset[tuple[Tensor, Tensor]]):
    """Random aligned patches of degraded and clean photos, flipped and turned at random.

    Photos are kept in memory once read (a 481x321 photo: 0.5 MB). Random choices come from NumPy's global generator;
    a `SeededDataset` around this makes them a function of (seed, epoch, index).

    Args:
        files: Clean photos.
        degradation: How the network's input is made.
        patch_size: Side of the degraded patch, pixels; the largest one that is asked for.
        patches_per_image: Patches of each photo in an epoch.
        mode: "RGB", or "L" for one channel.

    Raises:
        ValueError: A photo is unreadable or smaller than a patch.
    """

    def __init__(
        self,
        files: Sequence[Path],
        degradation: Degradation,
        patch_size: int,
        patches_per_image: int = 1,
        mode: Literal["RGB", "L"] = "RGB",
    ) -> None:
        self.degradation, self.patch_size, self.patches_per_image = degradation, patch_size, patches_per_image
        self.files, self.mode = list(files), mode
        self._photos: dict[int, tuple[NDArray[np.uint8], Pixels | None]] = {}

    def __len__(self) -> int:
        return len(self.files) * self.patches_per_image

    def _photo(self, index: int) -> tuple[NDArray[np.uint8], Pixels | None]:
        if index not in self._photos:
            scale, least = self.degradation.scale, self.patch_size * self.degradation.scale
            clean = read_pixels(self.files[index], self.mode)
            height, width = clean.shape[0] // scale * scale, clean.shape[1] // scale * scale
            if min(height, width) < least:
                raise ValueError(
                    f"{self.files[index]} has {clean.shape[1]}x{clean.shape[0]} pixels, a patch needs {least}x{least}."
                )
            clean = clean[:height, :width]
            degraded = None if self.degradation.random else self.degradation(clean, np.random.default_rng(0))
            self._photos[index] = clean, degraded
        return self._photos[index]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.patch(index, self.patch_size)

    def patch(self, index: int, side: int) -> tuple[Tensor, Tensor]:
        """Return a degraded patch of `side` x `side` pixels and its clean version."""
        clean, degraded = self._photo(index % len(self.files))
        rng = np.random.default_rng(np.random.randint(0, 2**31, 2))
        scale = self.degradation.scale
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


class EvaluationPairs(Dataset[tuple[Tensor, Tensor]]):
    """Whole degraded and clean images.

    Args:
        files: Clean images, cut from the top left to a multiple of the scale, or to a degraded file's size x scale.
        degradation: Makes the network's input, and gives the scale.
        degraded_files: The network's input, one a clean image, instead of making it.
        mode: "RGB", or "L" for one channel.
        seed: Image i is degraded with the generator (seed, i); noise is the protocol's own.

    Raises:
        ValueError: The two lists differ in length, or a pair in size.
    """

    def __init__(
        self,
        files: Sequence[Path],
        degradation: Degradation,
        degraded_files: Sequence[Path] | None = None,
        mode: Literal["RGB", "L"] = "RGB",
        seed: int = 0,
    ) -> None:
        if degraded_files is not None and len(degraded_files) != len(files):
            raise ValueError(f"{len(files)} clean images have {len(degraded_files)} degraded ones; each needs one.")
        self.files, self.degraded_files = list(files), degraded_files
        self.degradation, self.mode, self.seed = degradation, mode, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clean, scale = read_pixels(self.files[index], self.mode), self.degradation.scale
        if self.degraded_files is None:
            clean = clean[: clean.shape[0] // scale * scale, : clean.shape[1] // scale * scale]
            source = self.degradation.evaluate(clean, np.random.default_rng((self.seed, index)))
        else:
            source = read_pixels(self.degraded_files[index], self.mode)
            clean = clean[: source.shape[0] * scale, : source.shape[1] * scale]
            if clean.shape[:2] != (source.shape[0] * scale, source.shape[1] * scale):
                raise ValueError(
                    f"{self.degraded_files[index]} times {scale} is larger than {self.files[index]}: not a pair."
                )
        return to_tensor(source), to_tensor(clean)


class PairedImages(LightningDataModule):
    """Pairs of degraded and clean images for `zoo.tasks.restoration.Restoration`.

    Args:
        data_dir: Folder that the other folders are relative to.
        degradation: How the network's input is made from a clean photo.
        train_folders: Folders of clean photos, searched with all subfolders.
        val_folder: Folder of clean images for validation and `test`.
        val_degraded_folder: Folder of their degraded versions, paired in sorted order; None makes them.
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
    """

    def __init__(
        self,
        data_dir: str,
        degradation: Degradation,
        train_folders: list[str] | None = None,
        val_folder: str | None = None,
        val_degraded_folder: str | None = None,
        patch_size: int = 48,
        patches_per_image: int = 16,
        batch_size: int = 16,
        num_workers: int = 0,
        mode: Literal["RGB", "L"] = "RGB",
        seed: int = 0,
        limit: int | None = None,
        phases: list[Phase] | None = None,
    ) -> None:
        super().__init__()
        self.data_dir, self.degradation = Path(data_dir), degradation
        self.train_folders, self.val_folder, self.val_degraded_folder = train_folders, val_folder, val_degraded_folder
        self.patch_size, self.patches_per_image, self.batch_size = patch_size, patches_per_image, batch_size
        self.num_workers, self.mode, self.seed, self.limit = num_workers, mode, seed, limit
        self.phases = phases

    def _files(self, folder: str) -> list[Path]:
        return find_images(self.data_dir / folder)[: self.limit]

    def train_dataloader(self) -> DataLoader[Any]:
        files = [path for folder in self.train_folders or ["."] for path in self._files(folder)]
        largest = max((phase.patch_size for phase in self.phases or []), default=self.patch_size)
        data = TrainingPatches(files, self.degradation, largest, self.patches_per_image, self.mode)
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
        degraded = None if self.val_degraded_folder is None else self._files(self.val_degraded_folder)
        data = EvaluationPairs(self._files(self.val_folder), self.degradation, degraded, self.mode, self.seed)
        return DataLoader(data, batch_size=1, generator=torch.Generator().manual_seed(self.seed))

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.val_dataloader()
