"""A backbone under RetinaNet: data in COCO's format, the shipped config, training, validation, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import picture
from lightning.pytorch.cli import LightningCLI
from PIL import Image

from zoo.data.detection import CocoBoxes, CocoImages
from zoo.notices import Notice
from zoo.tasks.detection import Detection, PyramidBackbone, retinanet

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "detection" / "emov2_1m_retinanet_coco.yaml"


def coco_folder(root: Path, count: int = 4, size: int = 64) -> Path:
    """Write `train2017`, `val2017` and their annotations: discs and squares; one image shows a crowd, one nothing."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count + 2):
            name, label = f"{index:03d}.png", index % 2
            image = picture(label, index, size)
            image.save(root / split / name)
            images.append(dict(id=10 + index, file_name=name, width=size, height=size))
            if index == count:  # this image shows nothing, as far as anybody says
                continue
            inside = np.asarray(image)[..., 0 if label == 0 else 2] > 120
            rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
            left, top = int(columns[0]), int(rows[0])
            box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
            crowd = int(index == count + 1)
            annotations.append(
                dict(
                    id=index,
                    image_id=10 + index,
                    category_id=(3, 7)[label],
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=crowd,
                )
            )
        categories = [dict(id=3, name="disc"), dict(id=7, name="square")]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )
    return root


def test_boxes(tmp_path: Path) -> None:
    root = coco_folder(tmp_path)
    paths = root / "train2017", root / "annotations" / "instances_train2017.json"
    train, val = CocoBoxes(*paths, train=True), CocoBoxes(*paths, train=False)
    assert (len(train), len(val)) == (4, 6)
    image, target = val[1]
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < image.max() <= 1
    assert target["labels"].tolist() == [2]
    left, top, right, bottom = target["boxes"][0].int().tolist()
    shown = image[2] > 120 / 255
    assert shown[top:bottom, left:right].float().mean() > 0.9
    assert not shown.logical_and(~torch.zeros_like(shown).index_fill(0, torch.arange(top, bottom), True)).any()
    assert val[4][1]["boxes"].shape == (0, 4)
    assert val[5][1]["iscrowd"].tolist() == [1]


def test_flips_move_boxes(tmp_path: Path) -> None:
    root = coco_folder(tmp_path)
    paths = root / "train2017", root / "annotations" / "instances_train2017.json"
    plain, train = CocoBoxes(*paths, train=False)[0], CocoBoxes(*paths, train=True)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = train[0]
        flipped = not torch.equal(image, plain[0])
        seen.add(flipped)
        box = plain[1]["boxes"][0]
        expected = torch.stack([64 - box[2], box[1], 64 - box[0], box[3]]) if flipped else box
        assert torch.equal(target["boxes"][0], expected)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("backbone", "indices"), [("lsnet_t", (0, 1, 2)), ("efficientvit_msra_m0", (0, 1, 2)), ("emov2_1m", (2, 3, 4))]
)
@torch.no_grad()
def test_levels(backbone: str, indices: tuple[int, ...]) -> None:
    """Each level has its stride, also where the image's sides are no multiples of the last."""
    model = retinanet(backbone, 2, out_indices=indices).eval()
    pyramid = model.backbone
    assert isinstance(pyramid, PyramidBackbone)
    levels = list(pyramid(torch.rand(1, 3, 96, 160)).values())
    assert len(levels) == len(pyramid.strides) == 5
    for level, stride in zip(levels, pyramid.strides, strict=True):
        assert level.shape[:2] == (1, 256)
        assert level.shape[2:] == (-(-96 // stride), -(-160 // stride))


@pytest.mark.slow
def test_shipped_config_trains_and_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = coco_folder(tmp_path / "coco")
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=[
            "fit",
            f"--config={CONFIG}",
            f"--data.init_args.data_dir={root}",
            "--data.init_args.batch_size=2",
            "--data.init_args.num_workers=0",
            "--model.init_args.pretrained=false",
            "--model.init_args.num_classes=2",
            "--model.init_args.min_size=64",
            "--model.init_args.max_size=64",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.precision=32",
            "--trainer.max_epochs=1",
        ],
    )
    metrics = cli.trainer.callback_metrics
    assert cli.trainer.global_step == 2
    assert 0 <= float(metrics["val/map"]) <= 1
    assert float(metrics["train/loss"]) > 0
    model = cli.model
    assert isinstance(model, Detection)
    frozen = {name for name, parameter in model.model.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith(("body.model.stem", "body.model.stages.0")) for name in frozen)


def test_frozen_norms_stay() -> None:
    model = Detection("emov2_1m", 2, out_indices=(2, 3, 4)).train()
    modes = {module.training for module in model.model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert modes == {False}
    assert model.training
    assert model.model.head.training


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'head'.*stages\.0"):
        Detection("emov2_1m", 2, out_indices=(2, 3, 4), freeze=["head"])
    with pytest.raises(FileNotFoundError, match="train2017"):
        CocoImages(str(tmp_path)).train_dataloader()


def change(root: Path, split: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit an annotation file."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_category_means_the_same_in_both_files(tmp_path: Path) -> None:
    """The name counts: ids may differ, categories may be absent, and strange ones are refused."""
    root = coco_folder(tmp_path)

    def renumber(content: dict[str, Any]) -> None:
        new = {3: 9, 7: 1}
        for entry in content["annotations"]:
            entry["category_id"] = new[entry["category_id"]]
        for entry in content["categories"]:
            entry["id"] = new[entry["id"]]

    before = [target["labels"].tolist() for _, target in CocoImages(str(root), num_workers=0)._open(train=False)]
    change(root, "val2017", renumber)
    data = CocoImages(str(root), num_workers=0)
    assert [target["labels"].tolist() for _, target in data._open(train=False)] == before
    assert data.class_names == ["disc", "square"]
    change(root, "val2017", lambda content: content["categories"][0].update(name="dics"))
    with pytest.raises(ValueError, match=r"val2017\.json has the class 'dics', which .* Did you mean 'disc'"):
        CocoImages(str(root)).val_dataloader()


def test_annotations_that_do_not_fit(tmp_path: Path) -> None:
    """Each in one line, when the data is opened."""
    root = coco_folder(tmp_path)
    with pytest.raises(ValueError, match="batch_size 5 exceeds the 4 training images"):
        CocoImages(str(root), batch_size=5).train_dataloader()
    change(root, "train2017", lambda content: content["annotations"][0].update(category_id=5))
    with pytest.raises(ValueError, match=r"annotation 0 has category 5, which is not listed; listed are 3 \(disc\), 7"):
        CocoImages(str(root)).train_dataloader()
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"train2017\.json is no annotation file of COCO's kind"):
        CocoImages(str(root)).train_dataloader()
    (root / "val2017" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"val2017\.json names 001\.png, which .*val2017 lacks"):
        CocoBoxes(root / "val2017", root / "annotations" / "instances_val2017.json", train=False)


def test_pictures_are_read_as_everywhere(tmp_path: Path) -> None:
    """Upright, and of the size that the annotations state; damaged ones are named, or left out."""
    root = coco_folder(tmp_path)
    paths = root / "val2017", root / "annotations" / "instances_val2017.json"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 0, 64).crop((0, 0, 64, 32)).save(root / "val2017" / "000.png", exif=exif)
    with pytest.raises(ValueError, match=r"000\.png has 32x64 pixels upright, its annotations say 64x64"):
        CocoBoxes(*paths, train=False)[0]
    change(root, "val2017", lambda content: content["images"][0].update(width=32))
    assert CocoBoxes(*paths, train=False)[0][0].shape == (3, 64, 32)
    (root / "val2017" / "002.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"002\.png is not an image"):
        CocoBoxes(*paths, train=False)[2]
    with pytest.warns(Notice, match=r"(?s)1 of 6 images are left out:.*002\.png"):
        assert len(CocoImages(str(root), damaged="skip")._open(train=False)) == 5
