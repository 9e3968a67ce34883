"""Images with boxes in COCO's format, for object detection."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from zoo.data.labelled_images import DamagePolicy, find_damaged
from zoo.data.readable import require_known, tell_absent
from zoo.data.samplers import ResumableSampler, SeededDataset, training_loader
from zoo.notices import notice
from zoo.pictures.eight_bit import read_eight_bit

__all__ = ["CocoBoxes", "CocoImages"]

Target = dict[str, Tensor]


class _Coco(CocoDetection):
    """Pictures read as everywhere, upright, and with the size that the annotations state."""

    def _load_image(self, id: int) -> Image.Image:
        entry = self.coco.loadImgs(id)[0]
        path = Path(self.root, entry["file_name"])
        image = read_eight_bit(path)
        stated = (entry.get("width", image.width), entry.get("height", image.height))
        if image.size != stated:
            raise ValueError(
                f"{path} has {image.width}x{image.height} pixels upright, its annotations say {stated[0]}x{stated[1]}."
            )
        return image


class CocoBoxes(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) in [0, 1] with boxes (x1, y1, x2, y2) in pixels and labels 1 ... N in the order of their ids.

    Args:
        images: Folder of the images.
        annotations: COCO's "instances" file.
        train: Flip at random, and leave out crowds and images without boxes; otherwise crowds are marked by `iscrowd`.
        classes: Names of the labels 1 ... N, of the training images; None takes the categories of this file.

    Raises:
        FileNotFoundError: There is no such file or folder, or an image is missing.
        ValueError: The file is none of COCO's, a box has a category that is not listed or none of `classes`, or no
            image has a box to learn from.
    """

    def __init__(self, images: Path, annotations: Path, train: bool, classes: Sequence[str] | None = None) -> None:
        for path in (images, annotations):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist.")
        try:
            with redirect_stdout(io.StringIO()):  # pycocotools prints what it does
                self.data = _Coco(str(images), str(annotations))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{annotations} is no annotation file of COCO's kind: {error}.") from error
        self.train = train
        self.classes, self.labels = _categories(self.data.coco, classes, annotations)
        files = {entry["file_name"]: None for entry in self.data.coco.loadImgs(self.data.ids)}
        missing = [name for name in files if not (images / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(f"{annotations} names {missing[0]}{more}, which {images} lacks.")
        if train:
            self.data.ids = [image for image in self.data.ids if self.data.coco.getAnnIds(image, iscrowd=False)]
        if not self.data.ids:
            raise ValueError(f"{annotations} has no image{' with a box to learn from' if train else ''}.")
        flips = [v2.RandomHorizontalFlip()] if train else []
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                *flips,
                v2.ConvertBoundingBoxFormat("XYXY"),
                v2.ToDtype(torch.float32, scale=True),
                v2.ToPureTensor(),
            ]
        )

    def image(self, index: int) -> Image.Image:
        """Read one image."""
        return self.data._load_image(self.data.ids[index])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, annotations = self.data[index]
        kept = [
            entry for entry in annotations if min(entry["bbox"][2:]) > 0 and not (self.train and entry.get("iscrowd"))
        ]
        boxes = torch.tensor([entry["bbox"] for entry in kept], dtype=torch.float32).view(-1, 4)
        canvas = (image.height, image.width)
        pixels, moved = self.transform(image, BoundingBoxes(boxes, format="XYWH", canvas_size=canvas))
        labels = torch.tensor([self.labels[entry["category_id"]] for entry in kept], dtype=torch.int64)
        crowds = torch.tensor([int(entry.get("iscrowd", 0)) for entry in kept], dtype=torch.int64)
        return pixels, {"boxes": moved, "labels": labels, "iscrowd": crowds}


def _categories(coco: Any, classes: Sequence[str] | None, annotations: Path) -> tuple[list[str], dict[int, int]]:
    """Return the names of the labels 1 ... N, and the label of every category id."""
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in coco.loadCats(sorted(coco.getCatIds()))}
    if not names:
        raise ValueError(f"{annotations} lists no categories.")
    if len(set(names.values())) < len(names):
        raise ValueError(f"{annotations} lists a category twice: {', '.join(sorted(names.values())[:6])}.")
    used = {entry["category_id"]: entry for entry in coco.anns.values()}
    for category, entry in used.items():
        if category not in names:
            listed = ", ".join(f"{number} ({name})" for number, name in list(names.items())[:6])
            raise ValueError(
                f"{annotations}: annotation {entry.get('id')} has category {category}, which is not listed; "
                f"listed are {listed}."
            )
    known = list(names.values()) if classes is None else list(classes)
    require_known([names[category] for category in used if names[category] not in known], known, annotations)
    tell_absent(classes, {names[category] for category in used}, annotations)
    return known, {category: known.index(name) + 1 for category, name in names.items() if name in known}


class CocoImages(LightningDataModule):
    """COCO, or a data set in its format, for `zoo.tasks.detection.Detection`.

    A category means the same in both files: the name counts, not the id.

    Args:
        data_dir: Folder that the other paths are relative to.
        train_images: Folder of the training images.
        train_annotations: Their "instances" file.
        val_images: Folder of the images for validation and `test`.
        val_annotations: Their "instances" file.
        batch_size: Images of a step and process.
        num_workers: Loader processes.
        seed: Of order and flips.
        damaged: An image that cannot be read ends the run ("stop"), or all images are read once before the first step,
            and those that cannot be are listed and left out ("skip").
    """

    def __init__(
        self,
        data_dir: str,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        batch_size: int = 4,
        num_workers: int = 2,
        seed: int = 0,
        *,
        damaged: DamagePolicy = "stop",
    ) -> None:
        super().__init__()
        root = Path(data_dir)
        self.train_paths = root / train_images, root / train_annotations
        self.val_paths = root / val_images, root / val_annotations
        self.batch_size, self.num_workers, self.seed, self.damaged = batch_size, num_workers, seed, damaged
        self._train: CocoBoxes | None = None

    def _open(self, train: bool) -> CocoBoxes:
        if self._train is None and (train or all(path.exists() for path in self.train_paths)):
            self._train = self._readable(CocoBoxes(*self.train_paths, train=True))
        if train:
            assert self._train is not None  # opened above
            return self._train
        classes = None if self._train is None else self._train.classes
        return self._readable(CocoBoxes(*self.val_paths, train=False, classes=classes))

    def _readable(self, data: CocoBoxes) -> CocoBoxes:
        """Leave out images that cannot be read, where they are to be skipped."""
        bad = find_damaged(data) if self.damaged == "skip" else {}
        if bad:
            listed = "\n  ".join(bad.values())
            notice(f"{len(bad)} of {len(data)} images are left out:\n  {listed}")
            data.data.ids = [number for index, number in enumerate(data.data.ids) if index not in bad]
        return data

    @property
    def class_names(self) -> list[str]:
        """Names of the labels 1 ... N."""
        return (self._train or self._open(train=all(path.exists() for path in self.train_paths))).classes

    def train_dataloader(self) -> DataLoader[Any]:
        data = self._open(train=True)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ResumableSampler(data, self.seed, rank, world)
        seeded = SeededDataset(data, self.seed)
        return training_loader(self, seeded, sampler, "images", collate_fn=_lists, pin_memory=False)

    def val_dataloader(self) -> DataLoader[Any]:
        data = self._open(train=False)
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_lists)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


def _lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Keep images of different sizes apart."""
    return [image for image, _ in samples], [target for _, target in samples]
