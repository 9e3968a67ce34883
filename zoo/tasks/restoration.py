"""Train image restorers: pixel losses, PSNR and SSIM of whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.evaluation.metrics import measure
from zoo.evaluation.protocols import ProtocolName, find_protocol, protocol_of_task
from zoo.factory import create_model
from zoo.record import ModelRecord
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import as_config, require_own_places
from zoo.tasks.records import trained_record
from zoo.weights import load_strict, read_checkpoint, save_checkpoint, shipped

__all__ = ["Restoration", "fft_loss", "initialize"]

Loss = Literal["l1", "mse", "charbonnier"]


class Restoration(TimmOptimModule):
    """Pixel-loss training of a restorer.

    Args:
        model: timm name of a restorer: "cfsr_x2", or with a weight tag to start from: "cfsr_x2.bsds".
        model_args: More arguments of the model.
        pretrained: Start from the published weights of `model`.
        init_from: Weight file, training checkpoint or name of shipped weights to start from, also of another scale.
        init_except: Prefixes of parameters that `init_from` may lack or have in another shape ("upsample" for another
            scale); everything else must fit.
        optim: Optimizer and schedule.
        loss: "l1", "mse" or "charbonnier" (square root of squared error plus 1e-6), on [0, 1] pixels.
        fft_weight: Weight of `fft_loss`, added to `loss`; FFNetSR (section 6) has `loss: l1, fft_weight: 0.02`.
        mixup: Parameter of the Beta distribution from which half of the batches are mixed with themselves in another
            order; 0 is off. Restormer's denoisers have 1.2 (section 4).
        protocol: How validation and test measure; see `zoo.evaluation.protocols`. None takes the customary one of the
            model's task. The data module makes or reads the degraded images.
        log_images: Number of validation images written to TensorBoard, input beside output beside truth.
        channels_last: Memory format of model and images.

    Raises:
        CheckpointError: `init_from` does not fit the model.
        ValueError: A weight or `mixup` is negative, or there is no such protocol.
    """

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        init_except: list[str] | None = None,
        optim: OptimConfig = OptimConfig(),
        loss: Loss = "l1",
        fft_weight: float = 0.0,
        *,
        mixup: float = 0.0,
        protocol: ProtocolName | None = None,
        log_images: int = 2,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.keep_plain()
        if fft_weight < 0 or mixup < 0:
            raise ValueError(f"fft_weight and mixup must not be negative, got {fft_weight} and {mixup}.")
        require_own_places(model_args, pretrained=pretrained)
        self.model = create_model(model, pretrained, **(model_args or {})).train()
        if init_from is not None:
            initialize(self.model, init_from, init_except or [])
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.optim, self.loss, self.log_images = as_config(OptimConfig, optim), loss, log_images
        self.scale = int(getattr(self.model, "scale", 1))
        self.fft_weight, self.mixup = fft_weight, mixup
        task = str(getattr(self.model, "pretrained_cfg", {}).get("task", "sr"))
        self.protocol = protocol_of_task(task) if protocol is None else find_protocol(protocol)
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in self.protocol.metrics})

    def model_record(self) -> ModelRecord | None:
        name = self.hparams["model"]
        base = name if self.hparams["pretrained"] or Path(name).exists() else self.hparams["init_from"]
        return trained_record(self.model, base, getattr(self._trainer, "datamodule", None))

    def trained_model(self) -> tuple[nn.Module, ModelRecord | None]:
        """Return the model for use, in evaluation mode, and its record."""
        return self.model.eval(), self.model_record()

    def setup(self, stage: str) -> None:
        """Compare the scale of the data with the model's."""
        degradation = getattr(getattr(self.trainer, "datamodule", None), "degradation", None)
        own = int(getattr(self.model, "scale", 1))
        if degradation is not None and degradation.scale != own:
            raise ValueError(
                f"The model's scale is {own}, that of the data {degradation.scale}: set the scale of its degradation "
                f"to {own}, or take a model of scale {degradation.scale}."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Restore images (B, C, H, W) in [0, 1]; the result is not clamped."""
        return self.model(images.to(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        degraded, target = self._mix(*batch)
        output = self(degraded).float()
        if self.loss == "l1":
            loss = F.l1_loss(output, target)
        elif self.loss == "mse":
            loss = F.mse_loss(output, target)
        else:
            loss = (output - target).square().add(1e-6).sqrt().mean()
        if self.fft_weight:
            loss = loss + self.fft_weight * fft_loss(output, target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _mix(self, degraded: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix half of the batches with themselves in another order."""
        if not self.mixup or degraded.shape[0] == 1 or torch.rand(()) < 0.5:
            return degraded, target
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        order = torch.randperm(degraded.shape[0]).to(degraded.device)
        return degraded.lerp(degraded[order], 1 - share), target.lerp(target[order], 1 - share)

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        degraded, target = batch
        output = self(degraded).float()
        values = measure(self.protocol, output, target, self.scale)
        for name, metric in self.metrics.items():
            assert isinstance(metric, MeanMetric)  # for the type checker: a ModuleDict forgets
            metric(values[name].float())
            self.log(f"{stage}/{name}", metric, prog_bar=True)
        if batch_idx < self.log_images:
            self._log_picture(f"{stage}/{batch_idx}", degraded, output, target)

    def _log_picture(self, tag: str, degraded: Tensor, output: Tensor, target: Tensor) -> None:
        view = degraded[:, : target.shape[1]]  # of two views the left one
        enlarged = F.interpolate(view, size=target.shape[-2:], mode="bicubic", align_corners=False)
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
        return save_checkpoint(self.model.state_dict(), path, dtype=dtype, record=self.model_record())


def fft_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of the real and imaginary parts of both images' spectra.

    The two-dimensional real Fourier transform is not normalised, as in FFNetSR (section 6): values grow with the patch.

    Args:
        output: (B, C, H, W), float32.
        target: The same shape.
    """
    return torch.view_as_real(torch.fft.rfft2(output - target)).abs().mean()


def initialize(model: nn.Module, path: str | Path, exceptions: list[str]) -> None:
    """Load weights of a related model; parameters under the excepted prefixes keep their first values if they differ.

    Args:
        model: Receives the weights.
        path: Weight file, Lightning checkpoint, or name of shipped weights ("cfsr_x2.bsds").
        exceptions: Prefixes of keys that may be missing or have another shape.

    Raises:
        CheckpointError: Another key is missing, unexpected, or has another shape.
    """
    own = model.state_dict()
    named = shipped(str(path))
    given = {
        key: value
        for key, value in read_checkpoint(named if not Path(path).exists() and Path(named).is_file() else path).items()
        if not key.startswith(tuple(exceptions)) or (key in own and own[key].shape == value.shape)
    }
    absent = [key for key in own if key.startswith(tuple(exceptions)) and key not in given]
    load_strict(model, given, allow_missing=absent, source=str(path))
