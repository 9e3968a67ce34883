"""Photos and their degraded versions, made on the fly or read from a second folder, for training restorers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.resize import imresize
from zoo.data.samplers import LateLoader, ResumableSampler, SeededDataset

__all__ = [
    "BicubicDownscale",
    "Degradation",
    "EvaluationPairs",
    "GaussianNoise",
    "PairedImages",
    "TrainingPatches",
    "find_images",
]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
_Array = NDArray[Any]


class Degradation:
    """Turns a clean image into the one that a network restores.

    Attributes:
        scale: Clean pixels per degraded pixel along each side.
        random: Each patch is degraded anew; otherwise the whole photo is degraded once.
    """

    scale: int = 1
    random: bool = False

    def __call__(self, image: NDArray[np.uint8], rng: np.random.Generator) -> _Array:
        """Return the degraded version of an (H, W, C) image: uint8, or float32 in units of 1/255."""
        raise NotImplementedError


class BicubicDownscale(Degradation):
    """Shrink with MATLAB's bicubic `imresize`, bit for bit the low-resolution files of the benchmarks.

    Args:
        scale: Integer factor.

    Raises:
        ValueError: `scale` is less than 2.
    """

    def __init__(self, scale: int = 2) -> None:
        if scale < 2:
            raise ValueError(f"scale must be at least 2, got {scale}.")
        self.scale = scale

    def __call__(self, image: NDArray[np.uint8], rng: np.random.Generator) -> _Array:
        return imresize(image, 1 / self.scale)


class GaussianNoise(Degradation):
    """Add white Gaussian noise, neither clipped nor rounded.

    Args:
        sigma: Standard deviation in units of 1/255; a pair draws it uniformly between the two for every patch.

    Raises:
        ValueError: `sigma` is negative or the pair is not ordered.
    """

    random = True

    def __init__(self, sigma: float | tuple[float, float] = 25.0) -> None:
        low, high = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)
        if not 0 <= low <= high:
            raise ValueError(f"sigma must be at least 0, a pair in rising order, got {sigma}.")
        self.low, self.high = low, high

    def __call__(self, image: NDArray[np.uint8], rng: np.random.Generator) -> _Array:
        sigma = rng.uniform(self.low, self.high)
        return (image + sigma * rng.standard_normal(image.shape)).astype(np.float32)


def find_images(folder: str | Path) -> list[Path]:
    """Return all image files under a folder, sorted by path.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"No image ({', '.join(_IMAGE_SUFFIXES)}) under {folder}.")
    return files


def _read(path: Path, mode: str) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(mode))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _tensor(pixels: _Array) -> Tensor:
    """(H, W, C) of 0..255 -> (C, H, W) of [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)


class TrainingPatches(Dataset[tuple[Tensor, Tensor]]):
    """Random aligned patches of degraded and clean photos, flipped and turned at random.

    Photos are kept in memory once read (a 481x321 photo: 0.5 MB). Random choices come from NumPy's global generator;
    a `SeededDataset` around this makes them a function of (seed, epoch, index).

    Args:
        files: Clean photos.
        degradation: How the network's input is made.
        patch_size: Side of the degraded patch, pixels.
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
        self._photos: dict[int, tuple[NDArray[np.uint8], _Array | None]] = {}

    def __len__(self) -> int:
        return len(self.files) * self.patches_per_image

    def _photo(self, index: int) -> tuple[NDArray[np.uint8], _Array | None]:
        if index not in self._photos:
            scale, least = self.degradation.scale, self.patch_size * self.degradation.scale
            clean = _read(self.files[index], self.mode)
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
        clean, degraded = self._photo(index % len(self.files))
        rng = np.random.default_rng(np.random.randint(0, 2**31, 2))
        scale, side = self.degradation.scale, self.patch_size
        top = int(rng.integers(0, clean.shape[0] // scale - side + 1))
        left = int(rng.integers(0, clean.shape[1] // scale - side + 1))
        target = clean[top * scale : (top + side) * scale, left * scale : (left + side) * scale]
        if degraded is None:
            source = self.degradation(target, rng)
        else:
            source = degraded[top : top + side, left : left + side]
        turns, flip = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
        source, target = np.rot90(source, turns), np.rot90(target, turns)
        if flip:
            source, target = source[:, ::-1], target[:, ::-1]
        return _tensor(source), _tensor(target)


class EvaluationPairs(Dataset[tuple[Tensor, Tensor]]):
    """Whole degraded and clean images.

    Args:
        files: Clean images, cut from the top left to a multiple of the scale, or to a degraded file's size x scale.
        degradation: Makes the network's input, and gives the scale.
        degraded_files: The network's input, one a clean image, instead of making it.
        mode: "RGB", or "L" for one channel.
        seed: Image i gets the noise of generator (seed, i).

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
        clean, scale = _read(self.files[index], self.mode), self.degradation.scale
        if self.degraded_files is None:
            clean = clean[: clean.shape[0] // scale * scale, : clean.shape[1] // scale * scale]
            source = self.degradation(clean, np.random.default_rng((self.seed, index)))
        else:
            source = _read(self.degraded_files[index], self.mode)
            clean = clean[: source.shape[0] * scale, : source.shape[1] * scale]
            if clean.shape[:2] != (source.shape[0] * scale, source.shape[1] * scale):
                raise ValueError(
                    f"{self.degraded_files[index]} times {scale} is larger than {self.files[index]}: not a pair."
                )
        return _tensor(source), _tensor(clean)


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
        seed: Of order, patches and noise.
        limit: Use only the first photos of each split.
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
    ) -> None:
        super().__init__()
        self.data_dir, self.degradation = Path(data_dir), degradation
        self.train_folders, self.val_folder, self.val_degraded_folder = train_folders, val_folder, val_degraded_folder
        self.patch_size, self.patches_per_image, self.batch_size = patch_size, patches_per_image, batch_size
        self.num_workers, self.mode, self.seed, self.limit = num_workers, mode, seed, limit

    def _files(self, folder: str) -> list[Path]:
        return find_images(self.data_dir / folder)[: self.limit]

    def train_dataloader(self) -> DataLoader[Any]:
        files = [path for folder in self.train_folders or ["."] for path in self._files(folder)]
        data = TrainingPatches(files, self.degradation, self.patch_size, self.patches_per_image, self.mode)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ResumableSampler(data, self.seed, rank, world)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is more than the {len(sampler)} patches of a process and epoch: "
                f"raise patches_per_image."
            )
        return LateLoader(
            SeededDataset(data, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.val_folder is None:
            return []
        degraded = None if self.val_degraded_folder is None else self._files(self.val_degraded_folder)
        data = EvaluationPairs(self._files(self.val_folder), self.degradation, degraded, self.mode, self.seed)
        return DataLoader(data, batch_size=1, generator=torch.Generator().manual_seed(self.seed))

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self.val_dataloader()
