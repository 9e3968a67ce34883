"""Images with class labels, for classification and for class-conditional diffusion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from zoo.data.samplers import LateLoader, ResumableSampler, SeededDataset

__all__ = ["ImageClassification", "ImageDiffusion", "LabelledImages", "open_labelled_images", "stratified_split"]

_VALIDATION_SPLITS = ("validation", "val", "valid", "test")


class LabelledImages(Dataset[tuple[Any, int]]):
    """A `datasets` split as (transformed image, label) pairs.

    Args:
        split: A `datasets.Dataset` with one image column and one label column.
        transform: Applied to the RGB PIL image.
        image_key: Image column; None takes the only one of type `Image`.
        label_key: Label column; None takes the only one of type `ClassLabel`, else "label".

    Raises:
        ValueError: There is no such column, or several that could be meant.
    """

    def __init__(
        self,
        split: Any,
        transform: Callable[[Image.Image], Any] | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.image_key = _column(split, image_key, "Image", ("image", "img"))
        self.label_key = _column(split, label_key, "ClassLabel", ("label", "labels", "fine_label"))
        self.split, self.transform = split.select_columns([self.image_key, self.label_key]), transform
        feature = split.features[self.label_key]
        self.classes: list[str] = list(getattr(feature, "names", None) or map(str, sorted(set(split[self.label_key]))))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.split[index]
        image = row[self.image_key].convert("RGB")
        return (self.transform(image) if self.transform else image), int(row[self.label_key])


def _column(split: Any, chosen: str | None, kind: str, usual: Sequence[str]) -> str:
    if chosen is not None:
        if chosen not in split.column_names:
            raise ValueError(f"The data set has no column {chosen!r}; it has {split.column_names}.")
        return chosen
    of_kind = [name for name, feature in split.features.items() if type(feature).__name__ == kind]
    if len(of_kind) == 1:
        return of_kind[0]
    named = [name for name in usual if name in split.column_names]
    if len(named) != 1:
        raise ValueError(
            f"Which column holds the {'image' if kind == 'Image' else 'label'}? The data set has {split.column_names}; "
            f"set image_key and label_key."
        )
    return named[0]


def _read_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise OSError(f"{path} cannot be read as an image: {error}.") from error


def open_labelled_images(
    data_dir: str,
    split: str,
    transform: Callable[[Image.Image], Any] | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> LabelledImages | ImageFolder:
    """Open one split of a folder of class folders, a folder of Parquet files, or a data set on the Hub.

    Args:
        data_dir: `DIR` with `DIR/<split>/<class>/*.jpg`, `DIR` with `<split>*.parquet`, or a Hub name `org/name`. A
            folder wins over a Hub name.
        split: "train", "test", ...; "validation" also finds the usual other names ("val", "valid", "test").
        transform: Applied to each RGB PIL image.
        image_key: Image column of Parquet or Hub data.
        label_key: Label column of Parquet or Hub data.

    Raises:
        FileNotFoundError: The folder does not exist, or holds neither.
        ValueError: The data set has no such split, or a column cannot be told.
    """
    wanted = _VALIDATION_SPLITS if split == "validation" else (split,)
    folder = Path(data_dir)
    if folder.is_dir():
        for name in wanted:
            if (folder / name).is_dir():
                return ImageFolder(str(folder / name), transform, loader=_read_rgb)
        if not any(folder.rglob("*.parquet")):
            raise FileNotFoundError(
                f"{folder} holds neither {wanted[0]}/<class>/ folders of images nor Parquet files of that split."
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", data_dir) or data_dir.startswith("."):
        raise FileNotFoundError(f"There is no folder {data_dir}, and a data set on the Hub is called org/name.")
    from datasets import load_dataset

    try:
        splits = load_dataset(data_dir)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"The data set {data_dir} cannot be opened: {reason}") from error
    for name in wanted:
        if name in splits:
            return LabelledImages(splits[name], transform, image_key, label_key)
    raise ValueError(f"{data_dir} has no split {split!r}; it has {', '.join(splits)}.")


def _labels(data: Any) -> list[int]:
    """Return the label of every image without reading one."""
    return list(data.split[data.label_key]) if isinstance(data, LabelledImages) else list(data.targets)


def stratified_split(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices of (the rest, the part held out): `fraction` of each class, at least one image of two.

    Args:
        labels: Class of every image.
        fraction: Share of each class that is held out.
        seed: The same seed and labels give the same parts.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(int(labels[index]), []).append(index)
    held: set[int] = set()
    for members in by_class.values():
        count = max(round(fraction * len(members)), 1) if len(members) > 1 else 0
        held.update(members[:count])
    return [index for index in range(len(labels)) if index not in held], sorted(held)


class _Images(LightningDataModule):
    """What both data modules share: opening, seeded training order, loaders."""

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        image_key: str | None,
        label_key: str | None,
        limit: int | None,
        repeats: int = 1,
        val_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction is a share of the training images and must lie in 0 ... 1, got {val_fraction}."
            )
        self.val_fraction = val_fraction
        self.data_dir, self.batch_size, self.eval_batch_size = data_dir, batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.limit, self.repeats = num_workers, seed, limit, repeats
        self.image_key, self.label_key = image_key, label_key

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        raise NotImplementedError

    def _open(self, split: str, training: bool) -> Any:
        held_out = split == "validation" and self.val_fraction > 0
        source = "train" if held_out else split
        data = open_labelled_images(self.data_dir, source, self._transform(training), self.image_key, self.label_key)
        if self.val_fraction > 0 and source == "train":
            rest, held = stratified_split(_labels(data), self.val_fraction, self.seed)
            data = torch.utils.data.Subset(data, held if held_out else rest)
        return data if self.limit is None else torch.utils.data.Subset(data, range(min(self.limit, len(data))))

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        data = self._open("train", training=True)
        sampler = ResumableSampler(data, self.seed, rank, world, self.repeats)
        if len(sampler) < self.batch_size:
            raise ValueError(f"batch_size {self.batch_size} exceeds the {len(sampler)} training images of a process.")
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

    def _eval_dataloader(self, split: str) -> DataLoader[Any]:
        return DataLoader(
            self._open(split, training=False),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test" if _has_split(self.data_dir, "test") else "validation")


def _has_split(data_dir: str, split: str) -> bool:
    folder = Path(data_dir)
    return not folder.is_dir() or (folder / split).is_dir() or any(folder.rglob(f"{split}*.parquet"))


class ImageClassification(_Images):
    """Images and labels for a classifier, with timm's augmentation.

    Args:
        data_dir: Folder of `train/<class>/` and `val/<class>/` (or `test/`) images, of Parquet files, or Hub name.
        image_size: Side of the square network input, pixels.
        batch_size: Images of a step and process.
        eval_batch_size: Images of a validation step; None takes `batch_size`.
        num_workers: Loader processes.
        crop_padding: Random crop after zero padding by this many pixels, for images that already have the network's
            size; None crops and resizes at random (Inception style).
        scale: Area range of the random resized crop.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation jitter; None is off. RandAugment replaces it.
        auto_augment: timm policy string such as "rand-m9-mstd0.5-inc1"; None is off.
        interpolation: Of resizing.
        reprob: Probability of random erasing.
        crop_pct: Evaluation: the short side is resized to `image_size / crop_pct`, then cropped.
        mean: Per channel, of [0, 1] values.
        std: Per channel, of [0, 1] values.
        repeats: Repeated augmentation (DeiT): each image this often in an epoch of the same length.
        seed: Of order and augmentation.
        image_key: Image column of Parquet or Hub data; None finds it.
        label_key: Label column of Parquet or Hub data; None finds it.
        limit: Use only the first images of each split.
        val_fraction: Share of every class of the training images that is held out for validation, so that the
            validation or test images of the data set can be looked at once, at the end (`train.py test`); 0 validates
            on those.

    Raises:
        ValueError: `val_fraction` is no share.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int = 224,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        crop_padding: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic",
        reprob: float = 0.0,
        crop_pct: float = 0.875,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        repeats: int = 1,
        seed: int = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        limit: int | None = None,
        val_fraction: float = 0.0,
    ) -> None:
        super().__init__(
            data_dir, batch_size, eval_batch_size, num_workers, seed, image_key, label_key, limit, repeats, val_fraction
        )
        self.image_size, self.crop_padding, self.scale, self.hflip = image_size, crop_padding, scale, hflip
        self.color_jitter, self.auto_augment, self.interpolation = color_jitter, auto_augment, interpolation
        self.reprob, self.crop_pct, self.mean, self.std = reprob, crop_pct, mean, std

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        if not training:
            return create_transform(
                self.image_size,
                interpolation="bicubic" if self.interpolation == "random" else self.interpolation,
                mean=self.mean,
                std=self.std,
                crop_pct=self.crop_pct,
            )
        transform = create_transform(
            self.image_size,
            is_training=True,
            scale=self.scale,
            hflip=self.hflip,
            color_jitter=self.color_jitter,  # type: ignore[arg-type]  # None is off, also in timm
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=self.reprob,
            re_mode="pixel",
        )
        if self.crop_padding is not None:
            transform.transforms[0] = transforms.RandomCrop(self.image_size, padding=self.crop_padding)
        return transform


class ImageDiffusion(_Images):
    """Images in [-1, 1] and labels for a diffusion model: centre crop, resize, flip.

    Args:
        data_dir: As for `ImageClassification`.
        image_size: Side of the square images, pixels.
        batch_size: Images of a step and process.
        eval_batch_size: Images of a validation step; None takes `batch_size`.
        num_workers: Loader processes.
        hflip: Probability of a horizontal flip in training.
        seed: Of order and flips.
        image_key: Image column of Parquet or Hub data; None finds it.
        label_key: Label column of Parquet or Hub data; None finds it.
        limit: Use only the first images of each split.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int = 32,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        hflip: float = 0.5,
        seed: int = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, seed, image_key, label_key, limit)
        self.image_size, self.hflip = image_size, hflip

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        return transforms.Compose(
            [
                transforms.Resize(self.image_size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(self.image_size),
                transforms.RandomHorizontalFlip(self.hflip if training else 0.0),
                transforms.ToTensor(),
                transforms.Normalize(0.5, 0.5),
            ]
        )
