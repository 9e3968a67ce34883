"""A backbone under RetinaNet: data in COCO's format, the shipped config, training, validation, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import picture
from lightning.pytorch.cli import LightningCLI

from zoo.data.detection import CocoBoxes, CocoImages
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
