"""From class folders to a model's folder: what is stated is what the saved weights do, for every family."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from image_sets import CLASSES, parquet_folder, picture, shard_folder
from PIL import Image
from registered import BACKBONES, TINY, smallest

import zoo
from zoo.cards import Metric
from zoo.cards.own import write_own_model
from zoo.cli import main
from zoo.data.labelled_images import open_labelled_images
from zoo.record import read_record, record_of
from zoo.tasks.classification import Classification
from zoo.tasks.confusion import draw_confusion
from zoo.tasks.finetuning import _below, finetune
from zoo.tasks.restoration import Restoration
from zoo.weights import read_checkpoint


def shapes(root: Path, count: int = 6, size: int = 32) -> Path:
    """Write `root/CLASS/*.png`, so many a class."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(label, index, size).save(root / name / f"{index}.png")
    return root


def classified(capsys: pytest.CaptureFixture[str], files: list[str], model: Path) -> dict[str, str]:
    """Return what `zoo classify` says of each file."""
    capsys.readouterr()
    assert main(["classify", *files, "--model", str(model), "-q"]) == 0
    return dict(line.split("\t") for line in capsys.readouterr().out.splitlines())


def right(found: dict[str, str]) -> int:
    return sum(Path(file).parent.name == name for file, name in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(BACKBONES))
def test_classify_gives_the_stated_accuracy(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the picture, in every family: weights, statistics, names, size and normalisation have all come along."""
    data = shapes(tmp_path / "data")
    tiny = TINY[family]
    result = finetune(
        data, smallest(family), tmp_path / "mine", epochs=1, val_fraction=0.5, pretrained=False,
        model_args=tiny.kwargs, image_size=None if "img_size" in tiny.kwargs else tiny.size, lr=5e-3,
    )  # fmt: skip
    assert (result.trained_on, len(result.files), result.classes) == (6, 6, list(CLASSES))
    found = classified(capsys, result.files, result.folder)
    assert set(found) == set(result.files)
    assert right(found) == result.right
    record = read_record(result.folder)
    assert record is not None
    assert record.label_names == CLASSES
    assert record.input_size[-1] == tiny.size


@pytest.mark.parametrize(("key", "value", "own"), [("num_classes", 7, 3), ("pretrained", True, False)])
def test_what_training_itself_says_is_no_argument_of_the_model(key: str, value: object, own: object) -> None:
    """Python's own words named neither the value nor what to do."""
    with pytest.raises(ValueError, match=f"model_args: leave out {key}={value}, it is {own} here"):
        Classification("repavit_tiny", 3, {key: value}, pretrained=False)
    if key == "pretrained":
        with pytest.raises(ValueError, match=f"model_args: leave out {key}={value}, it is {own} here"):
            Restoration("cfsr_x2", {key: value}, pretrained=False)


@pytest.mark.slow
def test_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, from a folder to a model to a second one; every other command takes the folder."""
    data = shapes(tmp_path / "data", 8)
    told: list[dict[str, float]] = []
    first = finetune(
        data, "repavit_tiny", tmp_path / "first", epochs=2, pretrained=False, tell=told.append,
        model_args=dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1),
    )  # fmt: skip
    assert [row["epoch"] for row in told] == [1, 2]
    names = {path.name for path in first.folder.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "training.yaml",
        "confusion.png",
        "validation.txt",
    }
    listed = [str(data / line) for line in (first.folder / "validation.txt").read_text().splitlines()]
    assert listed == first.files
    mine = tmp_path / "mine"
    arguments = ["finetune", str(data), "--model", str(first.folder), "-o", str(mine), "--epochs", "1", "--lora", "2"]
    assert main([*arguments, "-q"]) == 0
    assert capsys.readouterr().out.strip() == str(mine)
    assert set(read_checkpoint(mine / "model.safetensors")) == set(read_checkpoint(first.folder / "model.safetensors"))
    assert main([*arguments]) == 2
    assert f"{mine} exists; --force replaces it" in capsys.readouterr().err
    assert main(["verify", str(mine)]) == 0
    assert main(["publish", str(mine), "--repo-id", "me/mine", "--dry-run"]) == 0
    card = (mine / "README.md").read_text()
    assert "rank 2" in card
    assert "confusion.png" in card


@pytest.mark.parametrize("form", ["parquet", "parquet-validation", "shards"])
def test_parquet_and_shards(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `zoo train` reads, this reads; a split for validation is taken, one for tests is left alone."""
    data = tmp_path / "data"
    if form == "shards":
        shard_folder(data, 8)
    else:
        parquet_folder(data, 8, 3, val_name="validation" if form == "parquet-validation" else "test")
    output = tmp_path / "mine"
    call = ["finetune", str(data), "--model", "emov2_1m.cifar10", "--image-size", "32", "--epochs", "1", "--json"]
    assert main([*call, "-o", str(output)]) == 0
    printed = capsys.readouterr()
    assert ("test images are left alone" in printed.err) == (form == "parquet")
    told = json.loads(printed.out)
    assert told["classes"] == list(CLASSES)
    held = 3 if form == "parquet-validation" else 2
    assert (told["trained_on"], told["measured"]) == (16 if held == 3 else 12, 2 * held)
    listed = (output / "validation.txt").read_text().splitlines()
    assert len(listed) == 2 * held
    assert not any(str(tmp_path) in line for line in listed)
    assert shlex.split(told["next"][0]) == ["zoo", "classify", "PICTURE", "--model", str(output)]


@pytest.mark.parametrize("root", [".", "my data"])
def test_names_of_pictures_do_not_say_where_they_lie(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of class folders, shards and Parquet files, also where they are the folder that one is in."""
    place = tmp_path / "my data"
    shapes(place, 1)
    shard_folder(place, 1)
    monkeypatch.chdir(place if root == "." else tmp_path)
    for stored, name in (
        (str(Path(root, "circle", "0.png")), "circle/0.png"),
        (f"sample 3 of {Path(root, 'train-0000.tar')}", "sample 3 of train-0000.tar"),
        (f"row 3 of {root} (validation)", "row 3 of my data (validation)"),
    ):
        assert _below(stored, Path(root)) == name


@pytest.mark.parametrize("form", ["parquet", "shards"])
def test_one_class_is_none(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data", tmp_path / "mine"
    if form == "shards":
        shard_folder(data, 4, classes=CLASSES[:1])
    else:
        parquet_folder(data, 4, 2, classes=CLASSES[:1])
    assert main(["finetune", str(data), "--model", "emov2_1m.cifar10", "-o", str(output)]) == 2
    assert "has one class, 'circle': a classifier takes two or more" in capsys.readouterr().err
    assert not output.exists()


def test_what_cannot_be_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is said in one line before anything is loaded or written."""
    good = shapes(tmp_path / "good", 2)
    single = shapes(tmp_path / "single", 2)
    (single / "square" / "1.png").unlink()
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    picture(0, 0).save(one / "cat" / "0.png")
    picture(0, 1).save(one / "cat" / "1.png")
    loose = tmp_path / "loose"
    loose.mkdir()
    picture(0, 0).save(loose / "0.png")
    hollow = shapes(tmp_path / "hollow", 2)
    (hollow / "zebra").mkdir()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("dear")
    broken = shapes(tmp_path / "broken", 2)
    (broken / "circle" / "0.png").write_bytes(b"none")
    for part in ("training", "testing"):
        shapes(tmp_path / "parts" / part, 2)
    cards = Path(__file__).parents[2] / "model_cards"
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path / "parts", [], "holds testing, training: call the folder of the training pictures train"),
        (good, ["-o", str(good / "mine")], "mine lies in .*good, whose folders are classes"),
        (good, ["--model", str(cards / "cfsr_x2.bsds")], "is a model for sr"),
        (good, ["--model", "none.pth"], "No weight file at none.pth"),
        (good, ["--batch-size", "1"], "--batch-size must be at least 2"),
        (tmp_path / "none", [], "There is no folder"),
        (single, [], "'square' has one picture"),
        (one, [], "has one class, 'cat'"),
        (loose, [], "holds 1 pictures outside of class folders: expected DIR/CLASS"),
        (hollow, [], "zebra holds no pictures"),
        (good, ["-o", str(taken)], "taken exists; --force replaces it"),
        (good, ["-o", str(taken), "--force"], "not replaced"),
        (good, ["--model", "cfsr_x2.bsds"], "is a model for sr"),
        (good, ["--model", "emov2_1n.cifar10"], "emov2_1m"),
        (good, ["--model", "emov2_5m.in1k"], "HF_HUB_OFFLINE|no weights|not published|cannot"),
        (good, ["--lora", "2", "--freeze", "stem"], "leave --freeze out"),
        (good, ["--lr", "0"], "--lr must be above 0"),
        (broken, [], r"circle/0\.png is not an image"),
    ]
    for data, extra, message in cases:
        output = tmp_path / "out"
        code = main(["finetune", str(data), "--model", "emov2_1m.cifar10", "-o", str(output), *extra])
        error = capsys.readouterr().err
        assert code == (1 if "HF_HUB_OFFLINE" in error else 2), error
        assert len(error.strip().splitlines()) == 1, error
        assert re.search(message, error), error
        assert not output.exists()
    assert (taken / "letter.txt").read_text() == "dear"
    assert not (good / "mine").exists()


def test_names_with_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands to type next can be typed; a rate that is too high leaves nothing behind."""
    data, output = shapes(tmp_path / "my data", 4), tmp_path / "it's mine ü"
    (data / "circle" / "9.png").write_bytes(b"none")
    call = ["finetune", str(data), "--model", "emov2_1m.cifar10", "--image-size", "32", "--epochs", "1", "--json"]
    call.append("--skip-damaged")
    assert main([*call, "-o", str(output)]) == 0
    printed = capsys.readouterr()
    left_out = next(line for line in printed.err.splitlines() if "9.png" in line)
    assert left_out.startswith("  "), "one line each"
    classify, _, publish = (shlex.split(line) for line in json.loads(printed.out)["next"])
    assert classify == ["zoo", "classify", str(data), "--model", str(output)]
    assert main([*publish[1:4], publish[4].replace("YOU", "me"), *publish[5:]]) == 0
    capsys.readouterr()
    assert main([*call, "-o", str(tmp_path / "high"), "--lr", "1e9"]) == 2
    assert "take a lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "high").exists()


def test_a_class_called_train(tmp_path: Path) -> None:
    """A folder of pictures is a class, whatever its name; a folder of folders may be a split."""
    for name in ("train", "car"):
        (tmp_path / name).mkdir()
        picture(0, 0).save(tmp_path / name / "0.png")
    assert open_labelled_images(str(tmp_path), "train").classes == ["car", "train"]


@pytest.mark.parametrize("count", [2, 12, 60])
def test_confusion_picture(count: int, tmp_path: Path) -> None:
    counts = torch.randint(0, 9, (count, count)).tolist()
    draw_confusion([f"a class with a long name {number}" for number in range(count)], counts, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert min(image.size) > 100
        assert max(image.size) < 2500


def test_a_model_that_knows_the_classes_keeps_its_head(tmp_path: Path) -> None:
    """In the order of its outputs, whatever that of the folders."""
    data = shapes(tmp_path / "data")
    tiny = TINY["repavit"]
    first = finetune(
        data, smallest("repavit"), tmp_path / "one", epochs=1, val_fraction=0.5, pretrained=False,
        model_args=tiny.kwargs, lr=1e-6,
    )  # fmt: skip
    model = zoo.create_model(str(first.folder))
    record = record_of(model).updated(label_names=CLASSES[::-1])
    metric = Metric(name="Top-1 accuracy", value=50.0, unit="%", dataset="shapes", protocol="made in a test")
    write_own_model(tmp_path / "turned", model, record, metrics=[metric], training="Not trained.")
    again = finetune(data, str(tmp_path / "turned"), tmp_path / "two", epochs=1, val_fraction=0.5, lr=1e-9)
    assert again.classes == list(CLASSES[::-1])
    tuned = zoo.create_model(str(again.folder))
    assert record_of(tuned).label_names == CLASSES[::-1]
    torch.testing.assert_close(tuned.get_classifier().weight, model.get_classifier().weight, atol=1e-4, rtol=0)
