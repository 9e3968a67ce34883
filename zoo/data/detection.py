"""Images with boxes in COCO's format, for object detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from zoo.data.samplers import LateLoader, ResumableSampler, SeededDataset

__all__ = ["CocoBoxes", "CocoImages"]

Target = dict[str, Tensor]


class CocoBoxes(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) in [0, 1] with boxes (x1, y1, x2, y2) in pixels and labels 1 ... N in the order of their ids.

    Args:
        images: Folder of the images.
        annotations: COCO's "instances" file.
        train: Flip at random, and leave out crowds and images without boxes; otherwise crowds are marked by `iscrowd`.

    Raises:
        FileNotFoundError: There is no such file or folder.
    """

    def __init__(self, images: Path, annotations: Path, train: bool) -> None:
        for path in (images, annotations):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist.")
        self.data, self.train = CocoDetection(str(images), str(annotations)), train
        self.labels = {category: label for label, category in enumerate(sorted(self.data.coco.getCatIds()), 1)}
        if train:
            self.data.ids = [image for image in self.data.ids if self.data.coco.getAnnIds(image, iscrowd=False)]
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


class CocoImages(LightningDataModule):
    """COCO, or a data set in its format, for `zoo.tasks.detection.Detection`.

    Args:
        data_dir: Folder that the other paths are relative to.
        train_images: Folder of the training images.
        train_annotations: Their "instances" file.
        val_images: Folder of the images for validation and `test`.
        val_annotations: Their "instances" file.
        batch_size: Images of a step and process.
        num_workers: Loader processes.
        seed: Of order and flips.
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
    ) -> None:
        super().__init__()
        root = Path(data_dir)
        self.train_paths = root / train_images, root / train_annotations
        self.val_paths = root / val_images, root / val_annotations
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        data = CocoBoxes(*self.train_paths, train=True)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return LateLoader(
            SeededDataset(data, self.seed),
            batch_size=self.batch_size,
            sampler=ResumableSampler(data, self.seed, rank, world),
            num_workers=self.num_workers,
            drop_last=True,
            collate_fn=_lists,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        data = CocoBoxes(*self.val_paths, train=False)
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_lists)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


def _lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Keep images of different sizes apart."""
    return [image for image, _ in samples], [target for _, target in samples]
