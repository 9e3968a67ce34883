"""Train image restorers: pixel losses, PSNR and SSIM of whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.factory import create_model
from zoo.metrics import ColorSpace, psnr, ssim
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.weights import load_strict, read_checkpoint, save_checkpoint

__all__ = ["Restoration"]

Loss = Literal["l1", "mse", "charbonnier"]


class Restoration(TimmOptimModule):
    """Pixel-loss training of a restorer.

    Args:
        model: timm name of a restorer: "cfsr_x2", or with a weight tag to start from: "cfsr_x2.bsds".
        model_args: More arguments of the model.
        pretrained: Start from the published weights of `model`.
        init_from: Weight file or training checkpoint to start from, for example of another scale.
        init_except: Prefixes of parameters that `init_from` may lack or have in another shape ("upsample" for another
            scale); everything else must fit.
        optim: Optimizer and schedule.
        loss: "l1", "mse" or "charbonnier" (square root of squared error plus 1e-6), on [0, 1] pixels.
        metric_space: Colour space of PSNR and SSIM.
        metric_crop: Border pixels left out of PSNR and SSIM; None takes the scale of the model.
        log_images: Number of validation images written to TensorBoard, input beside output beside truth.
        channels_last: Memory format of model and images.

    Raises:
        CheckpointError: `init_from` does not fit the model.
    """

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        init_except: list[str] | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008  frozen
        loss: Loss = "l1",
        metric_space: ColorSpace = "y",
        metric_crop: int | None = None,
        log_images: int = 2,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = create_model(model, pretrained, **(model_args or {})).train()
        if init_from is not None:
            initialize(self.model, init_from, init_except or [])
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.optim, self.loss, self.log_images = optim, loss, log_images
        self.scale = int(getattr(self.model, "scale", 1))
        self.metric_space, self.metric_crop = metric_space, self.scale if metric_crop is None else metric_crop
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("psnr", "ssim")})

    def forward(self, images: Tensor) -> Tensor:
        """Restore images (B, C, H, W) in [0, 1]; the result is not clamped."""
        return self.model(images.to(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        degraded, target = batch
        output = self(degraded).float()
        if self.loss == "l1":
            loss = F.l1_loss(output, target)
        elif self.loss == "mse":
            loss = F.mse_loss(output, target)
        else:
            loss = (output - target).square().add(1e-6).sqrt().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        degraded, target = batch
        output = self(degraded).float()
        values = {
            name: measure(output, target, space=self.metric_space, crop=self.metric_crop)
            for name, measure in (("psnr", psnr), ("ssim", ssim))
        }
        for name, metric in self.metrics.items():
            assert isinstance(metric, MeanMetric)  # for the type checker: a ModuleDict forgets
            metric(values[name].float())
            self.log(f"{stage}/{name}", metric, prog_bar=True)
        if batch_idx < self.log_images:
            self._log_picture(f"{stage}/{batch_idx}", degraded, output, target)

    def _log_picture(self, tag: str, degraded: Tensor, output: Tensor, target: Tensor) -> None:
        enlarged = F.interpolate(degraded, size=target.shape[-2:], mode="bicubic", align_corners=False)
        row = torch.cat([enlarged[0], output[0], target[0]], dim=-1).clamp(0, 1).cpu()
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, row, self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def export_weights(self, path: str | Path, dtype: torch.dtype | None = None) -> str:
        """Write the model's weights as safetensors and return the file's SHA-256 digest."""
        return save_checkpoint(self.model.state_dict(), path, dtype=dtype)


def initialize(model: nn.Module, path: str | Path, exceptions: list[str]) -> None:
    """Load weights of a related model; parameters under the excepted prefixes keep their first values if they differ.

    Args:
        model: Receives the weights.
        path: Weight file or Lightning checkpoint.
        exceptions: Prefixes of keys that may be missing or have another shape.

    Raises:
        CheckpointError: Another key is missing, unexpected, or has another shape.
    """
    own = model.state_dict()
    given = {
        key: value
        for key, value in read_checkpoint(path).items()
        if not key.startswith(tuple(exceptions)) or (key in own and own[key].shape == value.shape)
    }
    absent = [key for key in own if key.startswith(tuple(exceptions)) and key not in given]
    load_strict(model, given, allow_missing=absent, source=str(path))
