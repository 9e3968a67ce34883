"""Train object detectors: a backbone's features under torchvision's feature pyramid and RetinaNet."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from zoo.record import ModelRecord
from zoo.tasks.labels import check_classes, check_labels
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import as_config

__all__ = ["Detection", "PyramidBackbone", "retinanet"]

Target = dict[str, Tensor]


class PyramidBackbone(nn.Module):
    """A timm backbone's feature maps under a feature pyramid with two more levels (RetinaNet, section 4).

    Args:
        body: Made with `features_only=True`.
        out_channels: Channels of all levels.

    Shape:
        (B, 3, H, W) -> levels (B, out_channels, H / s, W / s): the strides s of `body`, and two more, each doubled.
    """

    def __init__(self, body: nn.Module, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        info: Any = body.feature_info
        strides = info.reduction()
        self.strides = [*strides, 2 * strides[-1], 4 * strides[-1]]
        extra = LastLevelP6P7(out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(info.channels(), out_channels, extra_blocks=extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return self.fpn(OrderedDict((str(level), feature_map) for level, feature_map in enumerate(maps)))


def retinanet(
    backbone: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    out_indices: Sequence[int] = (1, 2, 3),
    min_size: int = 800,
    max_size: int = 1333,
    model_args: dict[str, Any] | None = None,
) -> RetinaNet:
    """Return torchvision's RetinaNet on a backbone of timm's registry, ours included.

    Focal Loss for Dense Object Detection (ICCV 2017), https://arxiv.org/abs/1708.02002. Anchors of each level are 4,
    5.04 and 6.35 times its stride, in three shapes.

    Args:
        backbone: timm name, with a tag for one of several published weights.
        num_classes: Classes; labels are 1 ... num_classes, since 0 is torchvision's background.
        pretrained: Start from the published weights of `backbone`.
        out_indices: Stages whose maps the pyramid takes.
        min_size: Shorter side to which images are resized, pixels.
        max_size: Most that the longer side may then have, pixels.
        model_args: More arguments of the backbone.

    Raises:
        ValueError: `out_indices` names a stage that there is not.
    """
    body = timm.create_model(
        backbone, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), **(model_args or {})
    )
    pyramid = PyramidBackbone(body)
    sizes = tuple(tuple(int(4 * stride * 2 ** (step / 3)) for step in range(3)) for stride in pyramid.strides)
    cfg: Any = timm.get_pretrained_cfg(backbone)
    return RetinaNet(
        pyramid,
        num_classes + 1,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(cfg.mean),
        image_std=list(cfg.std),
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
    )


class Detection(TimmOptimModule):
    """RetinaNet training of a detector.

    Args:
        backbone: timm name, with a tag for one of several published weights.
        num_classes: Classes; labels are 1 ... num_classes.
        pretrained: Start from the published weights of `backbone`.
        out_indices: Stages whose maps the pyramid takes.
        min_size: Shorter side to which images are resized, pixels.
        max_size: Most that the longer side may then have, pixels.
        model_args: More arguments of the backbone.
        optim: Optimizer and schedule.
        freeze: Parts of the backbone that stay as they are, for example ["stem", "stages.0"].
        frozen_norms: Keep the statistics of the backbone's BatchNorms.

    Raises:
        ValueError: `freeze` names no parameter, or `out_indices` a stage that there is not.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        pretrained: bool = False,
        out_indices: tuple[int, ...] = (1, 2, 3),
        min_size: int = 800,
        max_size: int = 1333,
        model_args: dict[str, Any] | None = None,
        optim: OptimConfig = OptimConfig(),
        *,
        freeze: list[str] | None = None,
        frozen_norms: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.keep_plain()
        self.num_classes = num_classes
        self.model = retinanet(
            backbone,
            num_classes,
            pretrained=pretrained,
            out_indices=out_indices,
            min_size=min_size,
            max_size=max_size,
            model_args=model_args,
        )
        self.optim, self.frozen_norms = as_config(OptimConfig, optim), frozen_norms
        body = cast(PyramidBackbone, self.model.backbone).body
        inner = getattr(body, "model", body)  # timm wraps models that are asked for features
        self.freeze_parts(inner, freeze, backbone)
        self.val_map, self.test_map = MeanAveragePrecision(), MeanAveragePrecision()

    def train(self, mode: bool = True) -> Self:
        """Change the mode of all but frozen norms."""
        super().train(mode)
        if self.frozen_norms:
            for module in cast(PyramidBackbone, self.model.backbone).body.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def model_record(self) -> ModelRecord:
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        arguments = {
            key: value for key, value in self.hparams.items() if key in inspect.signature(retinanet).parameters
        }
        record = ModelRecord(architecture="retinanet", task="detection", num_classes=self.num_classes)
        own = {"model_args": {**arguments, "pretrained": False}, "base": arguments["backbone"]}
        fitting = list(names) if names is not None and len(names) == self.num_classes else None
        return record.updated(**own, label_names=fitting)

    def setup(self, stage: str) -> None:
        """Compare the classes of the data with those of the model."""
        check_classes(getattr(self.trainer, "datamodule", None), self.num_classes)

    def on_train_batch_start(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        for target in batch[1]:
            check_labels(target["labels"], 1, self.num_classes, wait=batch_idx == 0)

    def forward(self, images: list[Tensor]) -> list[Target]:
        """Detect objects in images (3, H, W) in [0, 1]: boxes (x1, y1, x2, y2) in pixels, labels and scores of each."""
        return self.model(images)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(images))
        self.log("train/loss", total, prog_bar=True, batch_size=len(images))
        return total

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        images, targets = batch
        self.val_map.update(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        self._log_map("val", self.val_map)

    def test_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        images, targets = batch
        self.test_map.update(self(images), targets)

    def on_test_epoch_end(self) -> None:
        self._log_map("test", self.test_map)

    def _log_map(self, stage: str, metric: MeanAveragePrecision) -> None:
        found = metric.compute()
        self.log_dict({f"{stage}/{name}": found[name] for name in ("map", "map_50", "map_75")}, prog_bar=True)
        metric.reset()
