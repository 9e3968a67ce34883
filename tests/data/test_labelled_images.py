"""Labels mean the same in every split, what is no picture is left out, and what is damaged has a name."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from image_sets import image_folder, picture
from PIL import Image

from zoo.data.images import ImageClassification, open_labelled_images, stratified_split
from zoo.data.labelled_images import LabelledImages
from zoo.data.readable import placed
from zoo.notices import Notice


def data_module(root: Path, **kwargs: Any) -> ImageClassification:
    return ImageClassification(str(root), **{"image_size": 16, "batch_size": 4, **kwargs})


def add_class(root: Path, name: str, split: str, count: int = 2) -> None:
    (root / split / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(0, index).save(root / split / name / f"{index}.png")


def labels(data: Any) -> list[int]:
    return [label for _, label in data]


def test_a_class_that_val_lacks_shifts_nothing(tmp_path: Path) -> None:
    root = image_folder(tmp_path, train=4, val=2)
    add_class(root, "aardvark", "train")
    data = data_module(root)
    with pytest.warns(Notice, match="has no images of the class 'aardvark'"):
        val = data._open("validation", training=False)
    assert data.class_names == ["aardvark", "circle", "square"]
    assert sorted(labels(val)) == [1, 1, 2, 2]
    assert val.class_to_idx == {"aardvark": 0, "circle": 1, "square": 2}


def test_a_class_that_train_lacks_is_an_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path, train=4, val=2)
    add_class(root, "cirle", "val")
    with pytest.raises(ValueError, match=r"val has the class 'cirle', which is none of .*\. Did you mean 'circle'\?"):
        data_module(root).val_dataloader()


def test_empty_class_folders(tmp_path: Path) -> None:
    """In train an error that says what lies there instead; in val a notice, or nothing where train lacks it too."""
    root = image_folder(tmp_path, train=4, val=2)
    (root / "val" / "zebra").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data_module(root)._open("validation", training=False)) == 4
    (root / "train" / "zebra").mkdir()
    (root / "train" / "zebra" / "1.doc").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"train/zebra holds no picture, but \.doc") as caught:
        data_module(root).train_dataloader()
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"train/zebra holds no picture"):  # class folders alone, too
        print(data_module(root / "train").class_names)


def test_nested_and_capital_folders(tmp_path: Path) -> None:
    """Pictures may lie deeper in a class's folder; "Train" is a part, not a class, and so are "training", "testing"."""
    for name in ("cat", "dog"):
        add_class(tmp_path / "nested", "2020", name)
        add_class(tmp_path / "capital", name, "Train")
        add_class(tmp_path / "capital", name, "Val", 1)
        add_class(tmp_path / "parts", name, "training")
        add_class(tmp_path / "parts", name, "testing")
    assert data_module(tmp_path / "nested").class_names == ["cat", "dog"]
    capital = data_module(tmp_path / "capital")
    assert capital.class_names == ["cat", "dog"]
    assert len(capital._open("validation", training=False)) == 2
    with pytest.raises(ValueError, match="holds testing, training: call the folder of the training images train"):
        data_module(tmp_path / "parts").train_dataloader()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_every_class_is_learnt_from(fraction: float) -> None:
    """However large the part that is held out, and however small the class."""
    labels = [0] * 9 + [1, 1, 2]
    rest, held = stratified_split(labels, fraction)
    assert {labels[index] for index in rest} == {0, 1, 2}
    assert {labels[index] for index in held} == {0, 1}


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    root = image_folder(tmp_path / ".cache", train=4, val=2)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        add_class(root, hidden, "train")
        add_class(root / "train", hidden, "circle")
    (root / "train" / "circle" / "._000.png").write_bytes(b"resource fork")
    (root / "train" / "circle" / "Thumbs.db").write_bytes(b"")
    data = open_labelled_images(str(root), "train")
    assert data.classes == ["circle", "square"]
    assert len(list(data)) == 8


def table(
    root: Path, split: str, names: list[str] | None, values: list[Any], images: list[bytes] | None = None
) -> None:
    """Write one split as Parquet."""
    feature = ClassLabel(names=names) if names else Value("string" if isinstance(values[0], str) else "int64")
    if images is None:
        images = []
        for index in range(len(values)):
            buffer = io.BytesIO()
            picture(0, index).save(buffer, "PNG")
            images.append(buffer.getvalue())
    root.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": data, "path": None} for data in images], "label": values}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": feature})).to_parquet(
        root / f"{split}.parquet"
    )


def test_class_names_in_another_order(tmp_path: Path) -> None:
    """The name counts, not the number that a split has given it."""
    table(tmp_path / "a", "train", ["cat", "dog"], [0, 1, 1])
    table(tmp_path / "b", "test", ["dog", "cat"], [0, 0, 1])
    train = open_labelled_images(str(tmp_path / "a"), "train")
    test = open_labelled_images(str(tmp_path / "b"), "test", classes=train.classes)
    assert (train.targets, test.targets) == ([0, 1, 1], [1, 1, 0])
    table(tmp_path / "c", "test", ["dog", "horse"], [0, 1])
    with pytest.raises(ValueError, match=r"c \(test\) has the class 'horse'"):
        open_labelled_images(str(tmp_path / "c"), "test", classes=train.classes)


def test_labels_without_names(tmp_path: Path) -> None:
    table(tmp_path / "words", "train", None, ["dog", "cat", "dog"])
    words = open_labelled_images(str(tmp_path / "words"), "train")
    assert (words.classes, words.targets) == (["cat", "dog"], [1, 0, 1])
    table(tmp_path / "numbers", "train", None, [2, 0, 2])
    numbers = open_labelled_images(str(tmp_path / "numbers"), "train")
    assert (numbers.classes, numbers.targets) == (["0", "1", "2"], [2, 0, 2])
    with pytest.warns(Notice, match="numbers for classes, taken as places among the model's: '0' for 'fox'"):
        known = open_labelled_images(str(tmp_path / "numbers"), "train", classes=["fox", "dog", "cat", "owl"])
    assert known.targets == [2, 0, 2]
    for name in ("10", "9"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "folders" / name / "a.png")
    letters = open_labelled_images(str(tmp_path / "folders"), "train", classes=list("abcdefghijkl"))
    assert letters.targets == [10, 9]
    with pytest.raises(ValueError, match=r"has the classes '2', '0', which are none of the known ones, 'fox', 'dog'"):
        open_labelled_images(str(tmp_path / "numbers"), "train", classes=["fox", "dog"])
    table(tmp_path / "unknown", "train", ["a", "b"], [0, -1])
    with pytest.raises(ValueError, match=r"Row 1 of .*unknown \(train\) has no class: its 'label' is -1"):
        open_labelled_images(str(tmp_path / "unknown"), "train")


def test_folder_and_parquet_see_the_same(tmp_path: Path) -> None:
    """Orientation and depth are handled alike, wherever the bytes lie."""
    folder = tmp_path / "folder" / "train" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 0, 32).crop((0, 0, 32, 16)).save(folder / "a.jpg", exif=exif)
    Image.fromarray(np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))).save(folder / "b.png")
    table(tmp_path / "table", "train", ["a"], [0, 0], [(folder / name).read_bytes() for name in ("a.jpg", "b.png")])
    stored = open_labelled_images(str(tmp_path / "table"), "train")
    for (one, _), (two, _) in zip(open_labelled_images(str(tmp_path / "folder"), "train"), stored, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    assert stored[0][0].size == (16, 32)


def test_damaged_images(tmp_path: Path) -> None:
    """They stop the run with their name, or are listed and left out in both parts of a split set."""
    root = image_folder(tmp_path / "images", train=8, val=2)
    for name in ("001", "005"):
        file = root / "train" / "circle" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"circle/00[15]\.png is damaged"):
        list(data_module(root).train_dataloader())
    data = data_module(root, damaged="skip", val_fraction=0.25)
    with pytest.warns(Notice, match=r"(?s)2 of 16 images for train are left out:.*001\.png.*005\.png"):
        train = data._open("train", training=True)
    assert len(train) + len(data._open("validation", training=False)) == 14
    assert len(list(train)) == len(train)
    with pytest.raises(ValueError, match="damaged is 'stop' or 'skip', got 'ignore'"):
        data_module(root, damaged="ignore")
    table(tmp_path / "table", "train", ["a"], [0, 0], [file.read_bytes(), b"nothing"])
    with pytest.raises(ValueError, match=r"row 1 of .*table \(train\) is not an image"):
        open_labelled_images(str(tmp_path / "table"), "train")[1]


def test_classes_under_their_names_in_wordnet(tmp_path: Path) -> None:
    """ImageNet's folders are called n01440764: the same class as "tench", in every kind of data, and never guessed."""
    classes = ["tench", "English springer", "church"]
    for name, count in (("n03028079", 2), ("n01440764", 1)):
        add_class(tmp_path, name, "val", count)
    with (
        pytest.warns(Notice, match="no images of the class 'English springer'"),
        pytest.warns(Notice, match=r"other names for classes: 'n01440764' for 'tench', 'n03028079' for 'church'\."),
    ):
        data = open_labelled_images(str(tmp_path), "validation", classes=classes)
    assert labels(data) == [0, 2, 2]
    assert data.classes == classes
    rows = {"image": [picture(0, 0)] * 2, "label": [1, 0]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["n02102040", "n03028079"])})
    with pytest.warns(Notice, match="'tench'"):
        assert LabelledImages(Dataset.from_dict(rows, features), classes=classes).targets == [2, 1]
    named = Features({"image": ImageFeature(), "label": ClassLabel(names=["church", "tench"])})
    wnids = ["n01440764", "n03028079"]
    with pytest.warns(Notice, match="'church' for 'n03028079'"):  # the other way round
        assert LabelledImages(Dataset.from_dict(rows, named), classes=wnids).targets == [0, 1]
    add_class(tmp_path, "n02084071", "val")  # dog
    with pytest.raises(ValueError, match="the class 'n02084071', which is none of the known ones, 'tench'"):
        open_labelled_images(str(tmp_path), "validation", classes=classes)


def test_splits_of_one_folder_have_names_of_their_own(tmp_path: Path) -> None:
    """`datasets` reads all of them with the names of the first."""
    table(tmp_path, "train", ["cat", "dog"], [0, 1, 1])
    table(tmp_path, "test", ["dog", "cat"], [0, 0, 1])
    train = open_labelled_images(str(tmp_path), "train")
    test = open_labelled_images(str(tmp_path), "test", classes=train.classes)
    assert (train.targets, test.targets) == ([0, 1, 1], [1, 1, 0])
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        table(tmp_path / "parts", f"train-{number}", names, [0, 1])
    with pytest.raises(ValueError, match=r"train-1\.parquet has other names for its labels than .*train-0\.parquet"):
        open_labelled_images(str(tmp_path / "parts"), "train")


def test_other_spellings_of_classes(tmp_path: Path) -> None:
    """Capitals, signs between words, one of several names, WordNet's number before a word; never where two fit."""
    classes = ["golf ball", "airplane, aeroplane, plane", "tench", "French horn", "crane, bird", "crane, machine"]
    for name in ("Golf_Ball", "plane", "n01440764-tench", "french horn"):
        add_class(tmp_path, name, "train")
    with pytest.warns(Notice, match="'Golf_Ball' for 'golf ball', 'french horn' for 'French horn'"):
        data = open_labelled_images(str(tmp_path), "train", classes=classes)
    assert sorted(set(data.targets)) == [0, 1, 2, 3]
    add_class(tmp_path, "Crane", "train")
    with pytest.raises(ValueError, match="has the class 'Crane', which may be 'crane, bird' or 'crane, machine'"):
        open_labelled_images(str(tmp_path), "train", classes=classes)
    wnids = ["n01729322", "n01753488", "n03710637", "n03710721"]
    with pytest.warns(Notice, match="'maillot' for 'n03710637'"):
        assert placed(["hognose snake, puff adder, sand viper", "maillot"], wnids, "it") == [wnids[0], wnids[2]]
    vipers = [
        "hognose snake, puff adder, sand viper",
        "horned viper, cerastes, sand viper, horned asp, Cerastes cornutus",
    ]
    with pytest.warns(Notice, match="'n01753488' for 'horned viper"):
        assert placed(["n01753488"], vipers, "it") == vipers[1:]
    with pytest.raises(ValueError, match="it has the class 'sand viper', which may be 'n01729322' or 'n01753488'"):
        placed(["sand viper"], wnids, "it")
