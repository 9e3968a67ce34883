"""Images with class labels, for classification and for class-conditional diffusion."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from zoo.data.labelled_images import (
    VALIDATION_SPLITS,
    DamagePolicy,
    FolderImages,
    LabelledImages,
    find_damaged,
    has_parquet,
    open_labelled_images,
    stratified_split,
)
from zoo.data.samplers import BlockSampler, ResumableSampler, SeededDataset, training_loader
from zoo.data.shards import ShardImages, find_shards
from zoo.notices import notice
from zoo.pictures.folders import split_folder
from zoo.record import record_of
from zoo.text import counted

__all__ = [
    "DamagePolicy",
    "FolderImages",
    "ImageClassification",
    "ImageDiffusion",
    "LabelledImages",
    "draw",
    "has_split",
    "images_for",
    "images_to_judge",
    "open_labelled_images",
    "opened",
    "require_readable",
    "stratified_split",
    "tell_copies",
]


if TYPE_CHECKING or importlib.util.find_spec("lightning") is not None:
    from lightning import LightningDataModule
else:  # what only reads pictures, zoo bench and zoo compress, does without

    class LightningDataModule:
        trainer = None

        def setup(self, stage: str) -> None:
            pass


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
        *,
        repeats: int = 1,
        val_fraction: float = 0.0,
        damaged: DamagePolicy = "stop",
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if damaged not in ("stop", "skip"):
            raise ValueError(f"damaged is 'stop' or 'skip', got {damaged!r}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction is a share of the training images and must lie in 0 ... 1, got {val_fraction}."
            )
        self.val_fraction = val_fraction
        self.data_dir, self.batch_size, self.eval_batch_size = data_dir, batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.limit, self.repeats = num_workers, seed, limit, repeats
        self.image_key, self.label_key, self.damaged = image_key, label_key, damaged
        self._given = None if classes is None else list(classes)
        self._classes = self._given
        self._good: dict[str, list[int]] = {}  # of splits whose images were all read
        self.keep_bytes = 0  # of memory for decoded images, see LabelledImages

    @property
    def class_names(self) -> list[str]:
        """Name of each label, from the training images; of data without any, from those for validation."""
        if self._classes is None:
            for split in ("train", "validation"):
                try:
                    data = open_labelled_images(self.data_dir, split, None, self.image_key, self.label_key)
                except (FileNotFoundError, ValueError):
                    if split == "train" and not has_split(self.data_dir, "train") and _has_validation(self.data_dir):
                        continue
                    raise
                self._classes = data.classes
                break
        assert self._classes is not None  # the second split was opened, or has raised
        return self._classes

    @property
    def mode(self) -> Literal["RGB", "L"]:
        """Channels that images are read with."""
        return "RGB"

    def take_classes(self, names: Sequence[str]) -> None:
        """Label images by these classes, those of a trained model, whatever the data's own order."""
        self._given = self._classes = list(names)

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        raise NotImplementedError

    def _open(self, split: str, training: bool) -> Any:
        held_out = split == "validation" and self.val_fraction > 0
        source = "train" if held_out else split
        classes = self._given if source == "train" else self.class_names
        data = open_labelled_images(
            self.data_dir, source, self._transform(training), self.image_key, self.label_key, classes
        )
        if self.damaged == "skip":
            data.keep(self._readable(source, data))
        if not len(data):
            raise ValueError(f"{self.data_dir} has no images for {split}.")
        self._classes, data.keep_bytes, data.mode = data.classes, self.keep_bytes, self.mode
        part: Any = data
        if self.val_fraction > 0 and source == "train":
            rest, held = stratified_split(data.targets, self.val_fraction, self.seed)
            part = Subset(data, held if held_out else rest)
        return part if self.limit is None else Subset(part, range(min(self.limit, len(part))))

    def _readable(self, source: str, data: FolderImages | LabelledImages | ShardImages) -> list[int]:
        """Return the images of a split that can be read, and list the others."""
        if source not in self._good:
            bad = find_damaged(data)
            if bad:
                listed = "\n  ".join(bad.values())
                notice(f"{len(bad)} of {len(data)} images for {source} are left out:\n  {listed}")
            self._good[source] = [index for index in range(len(data)) if index not in bad]
        return self._good[source]

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        data = self._open("train", training=True)
        whole = data
        while isinstance(whole, Subset):
            whole = whole.dataset
        if isinstance(whole, ShardImages):
            if self.repeats > 1:
                raise ValueError(f"repeats is for folders and Parquet files; {self.data_dir} holds shards.")
            sampler: ResumableSampler = BlockSampler(data, self.seed, rank, world)
        else:
            sampler = ResumableSampler(data, self.seed, rank, world, self.repeats)
        return training_loader(self, SeededDataset(data, self.seed), sampler, "images")

    def _eval_dataloader(self, split: str) -> DataLoader[Any]:
        return DataLoader(
            self._open(split, training=False),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        if self._judges_all():
            return self._eval_dataloader("train")
        try:
            return self._eval_dataloader("validation")
        except FileNotFoundError as error:
            if self.val_fraction or not Path(self.data_dir).is_dir():
                raise
            raise FileNotFoundError(f"{error} val_fraction holds out a share of the training images.") from error

    def test_dataloader(self) -> DataLoader[Any]:
        if has_split(self.data_dir, "test") and not self._judges_all():
            return self._eval_dataloader("test")
        if _has_validation(self.data_dir) or self.val_fraction:
            notice(f"{self.data_dir} has no images for test: those for validation are measured.")
        return self.val_dataloader()

    def _judges_all(self) -> bool:
        """Tell whether plain class folders are measured on: no training is under way, and nothing is held out."""
        doing = self.trainer.state.fn if self.trainer else None
        if doing not in ("validate", "test") or self.val_fraction:
            return False
        if has_split(self.data_dir, "train") or _has_validation(self.data_dir):
            return False
        notice(f"{self.data_dir} has no images for validation: all are measured.")
        return True


def has_split(data_dir: str | Path, split: str) -> bool:
    """Tell whether a folder has a split of this very name; a data set on the Hub may have any."""
    folder = Path(data_dir)
    return (
        not folder.is_dir()
        or bool(split_folder(folder, (split,)))
        or has_parquet(folder / split)
        or any(folder.rglob(f"{split}*.parquet"))
        or bool(find_shards(folder, (split,)))
    )


def _has_validation(data_dir: str) -> bool:
    return any(has_split(data_dir, name) for name in VALIDATION_SPLITS)


class ImageClassification(_Images):
    """Images and labels for a classifier, with timm's augmentation.

    Args:
        data_dir: Folder of `train/<class>/` and `val/<class>/` (or `test/`) images, of Parquet files, of WebDataset
            shards (`train*.tar`, `val*.tar`), or Hub name.
        image_size: Side of the square network input, or its height and width, pixels.
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
        crop_mode: Evaluation, timm's: "squash" resizes both sides, "border" fills what is missing.
        mean: Per channel, of [0, 1] values: of one channel, images are read as gray.
        std: Per channel, of [0, 1] values.
        repeats: Repeated augmentation (DeiT): each image this often in an epoch of the same length.
        seed: Of order and augmentation.
        image_key: Image column of Parquet or Hub data; None finds it.
        label_key: Label column of Parquet or Hub data; None finds it.
        limit: Use only the first images of each split.
        val_fraction: Share of every class of the training images that is held out for validation, so that the
            validation or test images of the data set can be looked at once, at the end (`train.py test`); 0 validates
            on those.
        damaged: An image that cannot be read ends the run ("stop"), or all images are read once before the first step,
            and those that cannot be are listed and left out ("skip").
        classes: Name of each label; None takes those of the training images.

    Raises:
        ValueError: `val_fraction` is no share, there is no such policy, or images have no so many channels.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        crop_padding: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        *,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic",
        reprob: float = 0.0,
        crop_pct: float = 0.875,
        crop_mode: Literal["center", "squash", "border"] = "center",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        repeats: int = 1,
        seed: int = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        limit: int | None = None,
        val_fraction: float = 0.0,
        damaged: DamagePolicy = "stop",
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            data_dir,
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
            image_key,
            label_key,
            limit,
            repeats=repeats,
            val_fraction=val_fraction,
            damaged=damaged,
            classes=classes,
        )
        if len(mean) not in (1, 3) or len(std) != len(mean):
            raise ValueError(f"Images have 1 or 3 channels; mean is of {len(mean)} and std of {len(std)}.")
        self.image_size, self.crop_padding, self.scale, self.hflip = image_size, crop_padding, scale, hflip
        self.color_jitter, self.auto_augment, self.interpolation = color_jitter, auto_augment, interpolation
        self.reprob, self.crop_pct, self.crop_mode, self.mean, self.std = reprob, crop_pct, crop_mode, mean, std

    @property
    def mode(self) -> Literal["RGB", "L"]:
        return "L" if len(self.mean) == 1 else "RGB"

    def _transform(self, training: bool) -> Callable[[Image.Image], Tensor]:
        if not training:
            return create_transform(
                self.image_size,
                interpolation="bicubic" if self.interpolation == "random" else self.interpolation,
                mean=self.mean,
                std=self.std,
                crop_pct=self.crop_pct,
                crop_mode=self.crop_mode,
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


def opened(data: ImageClassification, split: str) -> tuple[Any, Sequence[int]]:
    """Return the images that a split is drawn from, and the places of its own among them.

    Args:
        data: Without a limit.
        split: "train", "validation" or "test".
    """
    part = data._open(split, training=False)
    return (part.dataset, part.indices) if isinstance(part, Subset) else (part, range(len(part)))


def require_readable(data: ImageClassification, cure: str = "Take them away.") -> None:
    """Name all images to learn from and to validate on that cannot be read, before the work.

    Args:
        data: Every image is read once.
        cure: Last sentence of the error.

    Raises:
        ValueError: There are some.
    """
    bad: list[str] = []
    for split in ("train",) if data.val_fraction else ("train", "validation"):
        bad += find_damaged(opened(data, split)[0]).values()
    if bad:
        more = f" And {len(bad) - 3} more." if len(bad) > 3 else ""
        raise ValueError(f"{counted(len(bad), 'picture')} cannot be read: {' '.join(bad[:3])}{more} {cure}")


def tell_copies(data: ImageClassification) -> None:
    """Say which files to learn from are measured on too, and which lie in two classes; of folders alone."""
    files: dict[str, list[tuple[str, int]]] = {}
    for split in ("train", "validation"):
        whole, places = opened(data, split)
        if not isinstance(whole, FolderImages):
            return
        files[split] = [whole.samples[index] for index in places]
    every = [(path, label, split) for split, found in files.items() for path, label in found]
    sizes = Counter(Path(path).stat().st_size for path, _, _ in every)
    same: dict[bytes, list[tuple[str, int, str]]] = {}
    for path, label, split in every:
        if sizes[Path(path).stat().st_size] > 1:
            same.setdefault(hashlib.sha256(Path(path).read_bytes()).digest(), []).append((path, label, split))
    seen = [group for group in same.values() if len({split for _, _, split in group}) > 1]
    two = [group for group in same.values() if len({label for _, label, _ in group}) > 1]
    if seen:
        measured = sum(split == "validation" for group in seen for _, _, split in group)
        first, last = seen[0][0][0], seen[0][-1][0]
        notice(
            f"{counted(measured, 'picture')} of the {len(files['validation'])} that are measured on can be learnt by "
            f"heart, since they are among those to learn from too, as {last} is {first}: the accuracy is too good."
        )
    if two:
        first, label, _ = two[0][0]
        other = next(path for path, each, _ in two[0] if each != label)
        notice(f"{counted(len(two), 'picture')} in two classes: {first} is {other}. One of them is wrong.")


def images_for(model: nn.Module, data_dir: str, batch_size: int, *, judged: bool = True) -> ImageClassification:
    """Return a folder's images as a classifier takes them; in training cropped from half their area on.

    Labels are those of the model where the names of its classes are known, whatever folders there are. Where nothing is
    for validation, a fifth of every class is held out.

    Args:
        model: Its preprocessing and classes are read.
        data_dir: As for `ImageClassification`.
        batch_size: Images at a time.
        judged: False: labels are not looked at, any folders do, and nothing is held out.

    Raises:
        ValueError: The model is no classifier, or the data have a class that it does not know.
    """
    known = getattr(model, "num_classes", 0)
    if not isinstance(known, int) or known < 1:
        raise ValueError(
            f"{type(model).__name__} is no classifier; in Python zoo.compress takes denoisers and other models too."
        )
    if not judged:
        return _as_taken_by(model, data_dir, batch_size, None)
    held = _has_validation(data_dir)
    names = _names_known_to(model, data_dir)
    data = _as_taken_by(model, data_dir, batch_size, names, 0.0 if held else 0.2)
    if not held:
        notice(f"{data_dir} has no folder for validation: a fifth of every class is held out.")
    return data


def _as_taken_by(
    model: nn.Module, data_dir: str, batch_size: int, classes: Sequence[str] | None, val_fraction: float = 0.0
) -> ImageClassification:
    cfg = resolve_model_data_config(model)
    channels = cfg["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"{type(model).__name__} takes images of {channels} channels; pictures have 1 or 3.")
    return ImageClassification(
        data_dir,
        image_size=cfg["input_size"][1:],
        batch_size=batch_size,
        scale=(0.5, 1.0),
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        val_fraction=val_fraction,
        classes=classes,
    )


def _names_known_to(model: nn.Module, data_dir: str) -> Sequence[str] | None:
    """Return the names of a model's classes; None where it states none and those of the data are taken for them.

    ImageNet's numbers of WordNet are those of a model of 1000 classes, where the data have fewer; numbers are places.
    """
    names = record_of(model).label_names
    if names is not None:
        return names
    known = getattr(model, "num_classes", 0)
    found = ImageClassification(data_dir).class_names
    if len(found) > known:
        raise ValueError(f"{data_dir} has {len(found)} classes, the model knows {known}.")
    if all(name.isdecimal() and int(name) < known for name in found):
        return list(map(str, range(known)))
    imagenet = list(ImageNetInfo().label_names()) if known == 1000 else []
    if imagenet == found:
        return imagenet
    if imagenet and len(found) < known:
        notice("The model states no names for its 1000 classes: they are taken for ImageNet's.")
        return imagenet
    are = "taken for its first, in their order" if len(found) < known else "taken in their order"
    notice(f"The model states no names for its {known} classes: the {len(found)} of {data_dir} are {are}.")
    return None


def images_to_judge(model: nn.Module, data_dir: str, batch_size: int, count: int) -> DataLoader[Any]:
    """Return batches of images and labels that a trained classifier is measured on, drawn with a fixed seed.

    Labels are those of the model where the names of its classes are known, whatever folders there are.

    Args:
        model: Its preprocessing and classes are read.
        data_dir: As for `ImageClassification`; where nothing is for validation, all class folders.
        batch_size: Images at a time.
        count: Images in all; fewer where there are not as many.

    Raises:
        FileNotFoundError: There are no such images.
        ValueError: There is a class that the model does not know.
    """
    names = _names_known_to(model, data_dir)
    held = _has_validation(data_dir)
    drawn = draw(_as_taken_by(model, data_dir, batch_size, names), "validation" if held else "train", count)
    if not held:
        notice(f"{data_dir} has no images for validation: all are measured, those that a model has learnt from too.")
    return drawn


def draw(data: ImageClassification, split: str, count: int) -> DataLoader[Any]:
    """Return batches of images as they are evaluated, drawn from all classes with a fixed seed.

    Args:
        data: Where from, and how many at a time.
        split: "train", "validation", "test".
        count: Images in all; fewer where there are not as many.
    """
    images = data._open(split, training=False)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return DataLoader(Subset(images, chosen), batch_size=data.eval_batch_size)


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
        val_fraction: As for `ImageClassification`.
        damaged: As for `ImageClassification`.
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
        *,
        label_key: str | None = None,
        limit: int | None = None,
        val_fraction: float = 0.0,
        damaged: DamagePolicy = "stop",
    ) -> None:
        super().__init__(
            data_dir, batch_size, eval_batch_size, num_workers, seed, image_key, label_key, limit,
            val_fraction=val_fraction, damaged=damaged,
        )  # fmt: skip
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
