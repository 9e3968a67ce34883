"""`zoo compress` and `zoo inspect` on a user's own classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from tests.image_sets import image_folder
from zoo.cards import Metric
from zoo.cards.own import write_own_model
from zoo.cli import main
from zoo.data.images import images_for
from zoo.record import record_of

METRIC = Metric(name="Top-1 accuracy", value=50.0, unit="%", dataset="shapes", protocol="made in a test")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ViT of the user's own, and pictures of its two classes."""
    place = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    model = zoo.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=2
    ).eval()
    record = record_of(model).of_own_weights().updated(label_names=("circle", "square"), crop_pct=1.0)
    write_own_model(place / "mine", model, record, metrics=[METRIC], training="Not trained.")
    image_folder(place / "data", 12, 6, size=32)
    return place


@pytest.mark.parametrize("method", ["prune", "low-rank", "repa", "depth"])
def test_a_compressed_folder_is_a_model_like_any_other(
    method: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is rebuilt strictly, says what was done, and gives the accuracy that was measured."""
    out = tmp_path / "small"
    call = ["compress", str(own / "mine"), "--data", str(own / "data"), "--method", method, "-o", str(out), "--json"]
    if method == "prune":
        call += ["--budget", "macs<=0.8", "--recover", "1", "--batch", "8"]
    assert main(call) == 0
    result = json.loads(capsys.readouterr().out)
    model = zoo.create_model(str(out))
    assert [change["technique"] for change in record_of(model).changes] == [method.replace("-", "_")]
    macs = result["report"]["macs"]
    assert macs[1] < macs[0]
    assert main(["classify", str(own / "data" / "val"), "--model", str(out), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["results"]
    right = sum(answer["top"][0]["label"] == Path(answer["file"]).parent.name for answer in answers)
    assert right / len(answers) == pytest.approx(result["accuracy_after"])
    assert main(call) == 2  # nothing is replaced without --force
    assert "--force" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0


def test_labels_are_those_of_the_model(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders sort otherwise than the model's classes, and there is one folder for each class alone."""
    model = zoo.create_model(str(own / "mine"))
    record = record_of(model).updated(label_names=("square", "circle"))
    write_own_model(tmp_path / "mine", model, record, metrics=[METRIC], training="Not trained.")
    image_folder(tmp_path / "data", 10, 1, size=32)
    data = tmp_path / "data" / "train"
    call = ["compress", str(tmp_path / "mine"), "--data", str(data), "-o", str(tmp_path / "small"), "--json"]
    assert main([*call, "--budget", "macs<=0.8"]) == 0
    result = capsys.readouterr()
    assert f"note: {data} has no folder for validation: a fifth of every class is held out." in result.err
    model = zoo.create_model(str(tmp_path / "mine")).eval()
    images = images_for(model, str(data), 4)
    assert images.class_names == ["square", "circle"]
    with torch.no_grad():
        right = [float((model(batch).argmax(1) == labels).double().mean()) for batch, labels in images.val_dataloader()]
    assert json.loads(result.out)["accuracy_before"] == pytest.approx(sum(right) / len(right))
    (data / "square").rename(data / "disc")
    assert main([*call[:4], "-o", str(tmp_path / "other")]) == 2
    assert "has the class 'disc', which is none of the known ones, 'square', 'circle'" in capsys.readouterr().err
    assert main(["inspect", *call[1:4], "--json"]) == 0  # looks at no label


def test_inspection_names_every_layer_and_draws_them(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "layers.png"
    assert main(["inspect", str(own / "mine"), "--data", str(own / "data"), "--plot", str(picture), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in result["layers"]] == [f"blocks.{i}.mlp" for i in range(3)]
    assert "can lose most" in result["advice"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "1.5"], "--keep is a share above 0 and below 1, got 1.5"),
        (["--budget", "macs<=0.01"], "the nearest that can is macs<=0"),
        (["--method", "repa", "--scores", "taylor"], "--scores ranks channels for --method prune"),
        (["--method", "prun"], "Did you mean prune"),
        (["--recover", "-1"], "--recover takes a number of epochs"),
        (["--recover", "1", "--lr", "nan"], "--lr is a learning rate above 0, got nan"),
        (["--lr", "1e-3"], "--lr 0.001 is the rate of --recover EPOCHS, which is not given"),
        (["--budget", "mac<=0.5"], "budget must look like"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], message: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["compress", str(own / "mine"), "--data", str(own / "data"), "-o", str(tmp_path / "x"), *words]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_kind_of_picture_is_checked_before_the_work(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own / "mine"), "--data", str(own / "data"), "--plot", "layers.xyz"]) == 2
    assert "--plot takes a picture whose name ends in " in capsys.readouterr().err


def test_missing_data_is_said_before_the_model_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nothing.safetensors", "--data", str(tmp_path / "no")]) == 2
    assert "--data names no folder" in capsys.readouterr().err


def test_layers_that_need_the_size_of_a_map(own: Path, tmp_path: Path) -> None:
    """PVT's: pruned, and rebuilt from the folder."""
    torch.manual_seed(0)
    size = {
        "depths": (1, 1, 1, 1),
        "embed_dims": (8, 16, 16, 16),
        "num_heads": (1, 1, 1, 1),
        "mlp_ratios": (2, 2, 2, 2),
    }
    model = zoo.create_model("pvt_v2_b0", num_classes=2, **size).eval()
    record = record_of(model).of_own_weights().updated(label_names=("circle", "square"))
    write_own_model(tmp_path / "pvt", model, record, metrics=[METRIC], training="Not trained.")
    call = ["compress", str(tmp_path / "pvt"), "--data", str(own / "data"), "--samples", "4", "--keep", "0.5"]
    assert main([*call, "-o", str(tmp_path / "small"), "--json"]) == 0
    small = zoo.create_model(str(tmp_path / "small"))
    assert small.stages[0].blocks[0].mlp.fc1.out_features == 8


def test_weights_without_a_record_take_model_args(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the error about them says, in every command that learns from or changes a model."""
    torch.save(zoo.create_model(str(own / "mine")).state_dict(), tmp_path / "mine.pth")
    facts = ["architecture=vit_tiny_patch16_224", "num_classes=2", "img_size=32", "patch_size=8", "embed_dim=32"]
    facts += ["depth=3", "num_heads=2", "input_size=3,32,32", "mean=0.5,0.5,0.5", "std=0.5,0.5,0.5"]
    given = [str(tmp_path / "mine.pth"), "--data", str(own / "data"), "--model-args"]
    assert main(["inspect", *given, *facts, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 3
    assert main(["compress", *given, *facts, "-o", str(tmp_path / "small"), "--json"]) == 0
    assert zoo.create_model(str(tmp_path / "small")).num_classes == 2
    learnt: dict[str, object] = {}
    monkeypatch.setattr("zoo.cli.finetune._report", lambda *_: None)
    monkeypatch.setattr("zoo.tasks.finetuning.finetune", lambda *_, **given: learnt.update(given["model_args"]))
    call = ["finetune", str(own / "data"), "--model", given[0], "-o", str(tmp_path / "new"), "--model-args", *facts]
    assert main(call) == 0
    assert learnt["depth"] == 3
    assert main(["inspect", *given, "depth"]) == 2
    assert "--model-args takes KEY=VALUE" in capsys.readouterr().err


def test_what_cannot_be_done_is_said_before_all_images_are_run(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A technique that finds no layer, and a damaged picture that only the recovery would read."""
    monkeypatch.setattr("zoo.cli.compress._accuracy", lambda *_: pytest.fail("the validation images are run"))
    model = zoo.create_model("test_resnet", num_classes=2)
    record = record_of(model).of_own_weights().updated(label_names=("circle", "square"), input_size=(3, 32, 32))
    write_own_model(tmp_path / "mine", model, record, metrics=[METRIC], training="Not trained.")
    out = ["-o", str(tmp_path / "small"), "--batch", "2"]
    assert main(["compress", str(tmp_path / "mine"), "--data", str(own / "data"), *out]) == 2
    assert "has no feed-forward layer" in capsys.readouterr().err
    image_folder(tmp_path / "data", 12, 2, size=32)
    cut = sorted((tmp_path / "data" / "train" / "square").iterdir())[-1]
    cut.write_bytes(cut.read_bytes()[:100])
    call = ["compress", str(own / "mine"), "--data", str(tmp_path / "data"), *out, "--samples", "2", "--recover", "1"]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert f"1 picture cannot be read: {cut}" in error
    assert error.count("\n") == 1
