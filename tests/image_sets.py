"""Small image sets in real formats, drawn on disk for tests of data modules and training."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("circle", "square")


def picture(label: int, index: int, size: int = 16) -> Image.Image:
    """Draw a red disc (0) or a blue square (1) on noise; the index moves it and changes its shade."""
    rng = np.random.default_rng(1000 * label + index)
    pixels = rng.integers(0, 90, (size, size, 3))
    y, x = np.mgrid[:size, :size] - size / 2 + rng.uniform(-2, 2)
    inside = x**2 + y**2 < (size / 3) ** 2 if label == 0 else np.maximum(abs(x), abs(y)) < size / 3.5
    shade = rng.integers(150, 255), rng.integers(30, 90), rng.integers(30, 90)
    pixels[inside] = shade if label == 0 else shade[::-1]
    return Image.fromarray(pixels.astype(np.uint8))


def image_folder(root: Path, train: int = 8, val: int = 4, size: int = 16, val_name: str = "val") -> Path:
    """Write `root/train/CLASS/*.png` and `root/val/CLASS/*.jpg`, so many images a class."""
    for split, count, suffix in (("train", train, "png"), (val_name, val, "jpg")):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture(label, index, size).save(folder / f"{index:03d}.{suffix}")
    return root


def parquet_folder(
    root: Path,
    train: int = 8,
    val: int = 4,
    size: int = 16,
    val_name: str = "test",
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Write `root/train.parquet` and `root/test.parquet` as the `datasets` library does, so many images a class."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(classes))})
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), (val_name, val)):
        rows: dict[str, list[object]] = {"img": [], "label": []}
        for index in range(count):
            for label in range(len(classes)):
                buffer = io.BytesIO()
                picture(label, index, size).save(buffer, "PNG")
                rows["img"].append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
                rows["label"].append(label)
        Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")
    return root


def shard_folder(root: Path, train: int = 8, size: int = 16, classes: Sequence[str] = CLASSES) -> Path:
    """Write `root/train-0000.tar`, a WebDataset shard, so many images a class."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "train-0000.tar", "w") as archive:
        for index in range(train):
            for label, name in enumerate(classes):
                buffer = io.BytesIO()
                picture(label, index, size).save(buffer, "PNG")
                for suffix, stored in (("png", buffer.getvalue()), ("cls", name.encode())):
                    member = tarfile.TarInfo(f"{name}{index:03d}.{suffix}")
                    member.size = len(stored)
                    archive.addfile(member, io.BytesIO(stored))
    return root


def photo_folder(root: Path, count: int = 2, size: tuple[int, int] = (56, 48)) -> Path:
    """Write smooth random photos (width, height) as PNG."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        small = Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(root / f"photo{index}.png")
    return root
