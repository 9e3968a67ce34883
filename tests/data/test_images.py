"""Image folders, Parquet files and their columns; what is random depends on the seed only; errors say what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from image_sets import CLASSES, image_folder, parquet_folder, picture
from PIL import Image
from torch import Tensor

import zoo
from zoo.data.images import (
    ImageClassification,
    ImageDiffusion,
    LabelledImages,
    has_split,
    images_for,
    images_to_judge,
    open_labelled_images,
)
from zoo.data.labelled_images import VALIDATION_SPLITS
from zoo.data.samplers import ResumableSampler, SeededDataset
from zoo.notices import Notice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("folder"), train=8, val=4)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parquet_folder(tmp_path_factory.mktemp("parquet"), train=8, val=4)


def classification(root: Path, **kwargs: Any) -> ImageClassification:
    return ImageClassification(str(root), **{"image_size": 16, "batch_size": 4, **kwargs})


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    """Each picture is learnt once, whatever links there are in the class folders."""
    image_folder(tmp_path, train=2, val=1)
    for name in CLASSES:
        (tmp_path / "train" / name / "up").symlink_to("..")
        (tmp_path / "train" / name / "top").symlink_to(tmp_path)
    data = open_labelled_images(str(tmp_path), "train")
    assert len(data) == 4
    assert len({os.path.realpath(path) for path, _ in data.samples}) == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_splits(layout: str, request: pytest.FixtureRequest) -> None:
    """Both layouts give the same pixels, labels and class names; "validation" finds "val" and "test"."""
    root = request.getfixturevalue(layout)
    train, val = open_labelled_images(str(root), "train"), open_labelled_images(str(root), "validation")
    assert (len(train), len(val)) == (16, 8)
    assert list(train.classes) == list(CLASSES)
    counts = {0: 0, 1: 0}
    originals = [[picture(label, index).tobytes() for index in range(8)] for label in (0, 1)]
    for image, label in train:
        assert image.mode == "RGB"
        assert image.tobytes() in originals[label]
        counts[label] += 1
    assert counts == {0: 8, 1: 8}


def test_test_split_falls_back_to_validation(folder: Path, parquet: Path) -> None:
    with pytest.warns(Notice, match="has no images for test: those for validation are measured"):
        assert len(list(classification(folder).test_dataloader())) == 2
    assert len(list(classification(parquet).test_dataloader())) == 2  # holds test*.parquet


def test_classes_called_as_splits(tmp_path: Path) -> None:
    """Folders of pictures are classes, whatever they are called: nothing is for validation here."""
    for label, name in enumerate(("test", "val")):
        (tmp_path / name).mkdir()
        picture(label, 0).save(tmp_path / name / "0.png")
    assert not any(has_split(tmp_path, name) for name in VALIDATION_SPLITS)
    model = timm.create_model("test_vit", num_classes=2)
    with pytest.warns(Notice, match=r"all are measured, those that a model has learnt from too"):
        assert sum(len(labels) for _, labels in images_to_judge(model, str(tmp_path), 1, 8)) == 2


def test_validation_of_plain_class_folders(tmp_path: Path) -> None:
    """All are measured where no training is under way; a training says how to hold some out."""
    for label, name in enumerate(CLASSES):
        (tmp_path / name).mkdir()
        for index in range(3):
            picture(label, index).save(tmp_path / name / f"{index}.png")
    data = classification(tmp_path)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))  # type: ignore[assignment]
    with pytest.warns(Notice, match="no images for validation: all are measured"):
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 6
    data.trainer.state.fn = "fit"  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError, match=r"holds neither validation/.*val_fraction holds out a share"):
        data.val_dataloader()
    shares = ImageDiffusion(str(tmp_path), image_size=8, batch_size=1, val_fraction=0.3)
    assert (len(shares.train_dataloader()), len(shares.val_dataloader())) == (4, 2)


def test_loaders(folder: Path) -> None:
    data = classification(folder, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), eval_batch_size=8, crop_pct=1.0)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    (batch,) = list(data.val_dataloader())
    assert batch[0].shape == (8, 3, 16, 16)
    assert batch[0].min() >= -1
    assert batch[0].max() <= 1
    assert len(list(classification(folder, limit=6).train_dataloader())) == 1


def test_diffusion_images(parquet: Path) -> None:
    """Resized, centred, in [-1, 1]; validation is not flipped."""
    data = ImageDiffusion(str(parquet), image_size=8, batch_size=4)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert -1 <= images.min() < 0 < images.max() <= 1
    first, second = (next(iter(data.val_dataloader()))[0] for _ in range(2))
    assert torch.equal(first, second)


def epochs(data: ImageClassification, count: int = 2) -> list[Tensor]:
    loader, found = data.train_dataloader(), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        found += [images for images, _ in loader]
    return found


RANDOM = dict(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, scale=(0.3, 1.0), interpolation="random")


@pytest.mark.slow
def test_workers_change_nothing(folder: Path) -> None:
    """Order and augmentation come from seed, epoch and index, whatever processes draw them."""
    alone = epochs(classification(folder, **RANDOM))
    shared = epochs(classification(folder, num_workers=2, **RANDOM))
    assert len(alone) == 8
    assert all(torch.equal(one, two) for one, two in zip(alone, shared, strict=True))


def test_seed_and_epoch_change_everything(folder: Path) -> None:
    batches = epochs(classification(folder, **RANDOM))
    again = epochs(classification(folder, **RANDOM))
    assert all(torch.equal(one, two) for one, two in zip(batches, again, strict=True))
    others = epochs(classification(folder, seed=1, **RANDOM))
    assert not any(torch.equal(one, two) for one, two in zip(batches, others, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(batches[:4], batches[4:], strict=True))


def test_random_state_of_the_process_is_left_alone(folder: Path) -> None:
    data = SeededDataset(open_labelled_images(str(folder), "train", lambda image: torch.rand(3)), seed=0)
    before = torch.get_rng_state()
    values = [data[0, index][0] for index in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])


def test_processes_share_an_epoch() -> None:
    """Two processes see each sample once together, in one order; a resume continues there."""
    data = range(11)
    alone = [index for _, index in ResumableSampler(data, seed=4)]
    shares = [[index for _, index in ResumableSampler(data, 4, rank, 2)] for rank in (0, 1)]
    assert sorted(alone) == list(data)
    assert [len(share) for share in shares] == [5, 5]
    assert alone[:10] == [index for pair in zip(*shares, strict=True) for index in pair]
    sampler = ResumableSampler(data, seed=4)
    sampler.start = 7
    assert [index for _, index in sampler] == alone[7:]
    assert [index for _, index in sampler] == alone, "the next epoch starts at its beginning"


def test_repeated_augmentation() -> None:
    """Each chosen image appears three times, augmented differently, in an epoch of the same length."""
    sampler = ResumableSampler(range(12), seed=0, repeats=3)
    keys = list(sampler)
    assert len(keys) == len(set(keys)) == len(sampler) == 12
    assert len({key[1] for key in keys}) == 4
    data = SeededDataset([0] * 12, seed=0)
    data.data = _Draws()
    assert len({float(data[key]) for key in keys}) == 12
    shares = [list(ResumableSampler(range(12), 0, rank, 2, repeats=3)) for rank in (0, 1)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == keys


class _Draws:
    """Every sample is a random number."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(())


def split_of(**columns: Any) -> Dataset:
    image = {"bytes": None, "path": "unread.png"}
    kinds = {"image": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "int": Value("int64")}
    rows = {name: [image] if kind == "image" else [1] for name, kind in columns.items()}
    return Dataset.from_dict(rows, features=Features({name: kinds[kind] for name, kind in columns.items()}))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (dict(picture="image", kind="label"), ("picture", "kind")),
        (dict(img="image", label="int", other="int"), ("img", "label")),
        (dict(image="image", depth="image", fine_label="label", coarse="label"), ("image", "fine_label")),
    ],
)
def test_columns_are_found(columns: dict[str, str], found: tuple[str, str]) -> None:
    images = LabelledImages(split_of(**columns))
    assert (images.image_key, images.label_key) == found


def test_columns_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match=r"Which column holds the label\? .*'x', 'y'.*set image_key and label_key"):
        LabelledImages(split_of(image="image", x="int", y="int"))
    with pytest.raises(ValueError, match="Which column holds the image"):
        LabelledImages(split_of(left="image", right="image", label="label"))
    chosen = LabelledImages(split_of(left="image", right="image", x="int"), image_key="right", label_key="x")
    assert (chosen.image_key, chosen.classes) == ("right", ["0", "1"])
    with pytest.raises(ValueError, match=r"no column 'colour'.*'image', 'label'"):
        LabelledImages(split_of(image="image", label="label"), image_key="colour")


def test_wrong_folders(tmp_path: Path, folder: Path, parquet: Path) -> None:
    """One line each, with what was looked for."""
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "nowhere", "train", r"There is no folder .*nowhere"),
        (tmp_path / "empty", "train", r"holds neither train/<class>/ folders of images nor Parquet files"),
        (folder, "extra", r"holds neither extra/<class>/ folders"),
        (parquet, "extra", r"has no split 'extra'; it has train, test"),
    ]
    for root, split, message in cases:
        with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
            open_labelled_images(str(root), split)
        assert "\n" not in str(caught.value)


def test_hub_data_set_without_network() -> None:
    with pytest.raises(FileNotFoundError, match="The data set some/where cannot be opened") as caught:
        open_labelled_images("some/where", "train")
    assert "\n" not in str(caught.value)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path, train=4, val=1)
    damaged = root / "train" / "circle" / "001.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"circle/001\.png is (damaged|not an image)"):
        list(classification(root).train_dataloader())
    damaged.write_text("no image")
    with pytest.raises(ValueError, match=r"circle/001\.png is (damaged|not an image)"):
        list(classification(root).train_dataloader())


def test_batch_that_is_too_large(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 32 exceeds the 16 training images"):
        classification(folder, batch_size=32).train_dataloader()


def test_real_images(data_dir: Path) -> None:
    """A Parquet file as the `datasets` library wrote it, gray PNGs: labels and RGB pixels come out."""
    data = open_labelled_images(str(data_dir / "fashion_mnist_mini"), "test")
    assert len(data) == 300
    assert data.classes[0] == "T-shirt/top"
    image, label = data[0]
    assert image.size == (28, 28)
    assert image.mode == "RGB"
    assert 0 <= label < 10


def test_a_model_of_imagenet_is_judged_by_the_names_of_its_classes(tmp_path: Path) -> None:
    """It states no names; folders of three of its classes, in words and in numbers, are not its first three."""
    for name in ("tench", "golf ball", "n03000684"):
        (tmp_path / name).mkdir()
        picture(0, 0).save(tmp_path / name / "0.png")
    model = timm.create_model("test_resnet")
    with pytest.warns(Notice, match="'golf ball' for 'n03445777'"):
        loader = images_to_judge(model, str(tmp_path), 3, 3)
    assert sorted(int(label) for _, labels in loader for label in labels) == [0, 491, 574]
    with pytest.warns(Notice, match=r"no names for its 7 classes: the 3 of .* are taken for its first"):
        images_to_judge(timm.create_model("test_resnet", num_classes=7), str(tmp_path), 3, 3)


def test_what_a_model_sees_is_what_timm_prepares(folder: Path) -> None:
    """Sides of different lengths, and pictures that are squashed into them."""
    model = zoo.create_model("test_resnet", num_classes=2, input_size=(3, 24, 40), crop_mode="squash", crop_pct=1.0)
    file = folder / "val" / "circle" / "000.jpg"
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(Image.open(file).convert("RGB"))
    assert expected.shape == (3, 24, 40)
    data = images_for(model, str(folder), 2)
    assert torch.equal(next(iter(data.val_dataloader()))[0][0], expected)
    assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, 24, 40)


def test_gray_images_for_models_of_one_channel(folder: Path, parquet: Path) -> None:
    """The channels of mean and std are those of the images, in training too; others than 1 and 3 are refused."""
    for root in (folder, parquet):
        data = classification(root, mean=(0.5,), std=(0.25,), auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert next(iter(loader))[0].shape == (4, 1, 16, 16)
    model = zoo.create_model("test_resnet", num_classes=2, in_chans=1).eval()
    assert next(iter(images_to_judge(model, str(folder), 2, 4)))[0].shape[:2] == (2, 1)
    assert next(iter(images_for(model, str(folder), 2).train_dataloader()))[0].shape[:2] == (2, 1)
    with pytest.raises(ValueError, match="takes images of 4 channels; pictures have 1 or 3"):
        images_for(zoo.create_model("test_resnet", num_classes=2, in_chans=4), str(folder), 2)
    with pytest.raises(ValueError, match="have 1 or 3 channels; mean is of 2 and std of 3"):
        classification(folder, mean=(0.5, 0.5))


def test_labels_of_a_validation_folder_are_those_of_the_training_folder(tmp_path: Path) -> None:
    """Also for a model without names, where a class is missing from the validation images."""
    for split, names in (("train", ("ant", "bee", "cat")), ("val", ("bee", "cat"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            picture(0, 0).save(tmp_path / split / name / "0.png")
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.warns(Notice, match="no images of the class 'ant'"):
        loader = images_to_judge(model, str(tmp_path), 2, 2)
    assert sorted(int(label) for _, labels in loader for label in labels) == [1, 2]
