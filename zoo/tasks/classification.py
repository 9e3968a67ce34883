"""Train image classifiers: timm models by name, timm's mixing and schedules, torchmetrics' accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.utils import make_grid

from zoo.factory import create_model
from zoo.ffn.ewa import ExpertsWeightsAveraging
from zoo.layers.init import mimetic_init_
from zoo.moe import MoEConfig, record_balance
from zoo.moe.dense2moe import to_experts
from zoo.notices import notice
from zoo.record import KEY, ModelRecord, record_of
from zoo.tasks.ffn_training import FFNTraining
from zoo.tasks.freezing import fixed_norms
from zoo.tasks.labels import are_classes_of, check_classes, check_labels, label_by, tell_other_pictures
from zoo.tasks.lora import add_lora, idle_adapters, merge_lora
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import as_config, require_own_places
from zoo.tasks.records import trained_record
from zoo.tasks.teachers import DistillationKind, Teachers
from zoo.weights import save_checkpoint

__all__ = ["Classification"]


class Classification(TimmOptimModule):
    """Cross-entropy training of a classifier.

    Args:
        model: timm name, ours included: "repavit_tiny"; with a weight tag to start from: "repavit_tiny.cifar10"; or a
            file, folder or Hub id that `zoo.create_model` takes.
        num_classes: Number of classes.
        model_args: More arguments of the model: img_size, patch_size, idle_ratio, drop_path_rate, ...
        pretrained: Start from the published weights of `model`.
        optim: Optimizer and schedule.
        label_smoothing: Weight of the uniform distribution in the targets.
        mixup: Beta parameter of mixup; 0 is off.
        cutmix: Beta parameter of CutMix; 0 is off.
        freeze: Parts that stay as they are, with the statistics of their norms: ["stem", "stages.0"].
        channels_last: Memory format of model and images.
        mimetic_init: Start attention layers as `zoo.layers.init.mimetic_init_` does.
        low_res: (side in pixels, share of all steps): train on images shrunk to this side first, which is cheaper, then
            at full size. The model must take both, for example by `dynamic_img_size`. Validation is at full size, which
            says little until then: statistics of norms are those of small images. Sides whose last maps are as large as
            at full size (96 of 128 for a network that halves six times) suffer less.
        teachers: Trained classifiers to learn from beside the labels, as `zoo.create_model` takes them, for example
            "emov2_1m.cifar10". A model with a second classifier for it (LSNet's `distillation`) learns from them there.
        distillation: "soft": the teachers' probabilities, "hard": their decision.
        distillation_weight: Of the loss against the teachers, 0 ... 1; the labels' has the rest.
        temperature: Softmax temperature of "soft".
        experts: Train the feed-forward layers as mixtures of experts (Dense2MoE's division, MoE++'s experts without
            computation); `scores` must be "random". The cross-entropy alone is logged as train/loss.
        balance: Weight of the experts' balance loss.
        log_images: Number of validation images written to TensorBoard, framed green where the class is right, else red.
        lora: Rank of low-rank adapters: only these and the classifier learn, see `zoo.tasks.lora`.
        ffn: Technique of `zoo.ffn` that the feed-forward layers are trained with: its name, or {"technique":
            "matformer", "sampling": "sandwich"}, see `zoo.tasks.ffn_training`.

    Raises:
        ValueError: There is no such model, technique or setting of it, `freeze` names no parameter, two of `freeze`,
            `lora`, `experts` and `ffn` exclude each other, or a feed-forward layer cannot be changed.
        CheckpointError: The weights do not exist or do not fit.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        optim: OptimConfig = OptimConfig(),
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        *,
        freeze: list[str] | None = None,
        channels_last: bool = False,
        mimetic_init: bool = False,
        low_res: tuple[int, float] | None = None,
        teachers: list[str] | None = None,
        distillation: DistillationKind = "soft",
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        experts: MoEConfig | None = None,
        balance: float = 1e-2,
        log_images: int = 16,
        lora: int | None = None,
        ffn: str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.keep_plain()
        optim, experts = as_config(OptimConfig, optim), as_config(MoEConfig, experts)
        require_own_places(model_args, pretrained=pretrained, num_classes=num_classes)
        self.model = create_model(model, pretrained, num_classes=num_classes, **(model_args or {})).train()
        if mimetic_init:
            mimetic_init_(self.model)
        if experts is not None:
            to_experts(self.model, experts)
        if ffn is not None and (experts is not None or lora is not None):
            raise ValueError("ffn changes the feed-forward layers: leave experts and lora out.")
        self.technique = None if ffn is None else FFNTraining(self.model, ffn)
        self.freeze_parts(self.model, freeze, model)
        self._adapted: tuple[Any, ...] = ()  # no module of its own: its layers are those of the model
        if lora is not None:
            if freeze or experts is not None:
                raise ValueError("lora fixes all weights but the classifier's: leave freeze and experts out.")
            self._adapted = (add_lora(self.model, lora),)
            self._asked: bool = False
            self._still = fixed_norms(self.model)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.num_classes = num_classes
        self.optim, self.low_res, self.log_images = optim, low_res, log_images
        self.balance = balance if experts is not None else None
        self.teachers: Teachers | None = None
        self.distillation_weight = distillation_weight
        if teachers:
            self.teachers = Teachers(teachers, num_classes, distillation, temperature)
            if hasattr(self.model, "set_distilled_training"):
                cast(Any, self.model).set_distilled_training()
        self.mix = None
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        self.loss = SoftTargetCrossEntropy() if self.mix else nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        metrics = {"acc1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict(metrics),
            nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()}),
        )

    def model_record(self) -> ModelRecord | None:
        hparams = self.hparams
        started = hparams["pretrained"] or Path(hparams["model"]).exists()
        record = trained_record(
            self.model, hparams["model"] if started else None, getattr(self._trainer, "datamodule", None)
        )
        changes: list[dict[str, Any]] = [{"technique": "lora", "rank": hparams["lora"]}] if hparams["lora"] else []
        if any(isinstance(module, ExpertsWeightsAveraging) for module in self.model.modules()):
            changes.append({"technique": "ewa"})
        return record if record is None or not changes else record.updated(changes=[*record.changes, *changes])

    def trained_model(self) -> tuple[nn.Module, ModelRecord | None]:
        """Return the model for use, in evaluation mode and without adapters, and its record."""
        record = self.model_record()
        if not self._adapted:
            return self.model.eval(), record
        model = merge_lora(self._adapted[0]).eval()
        if record is not None:
            record = record.updated(changes=[change for change in record.changes if change["technique"] != "lora"])
        return model, record

    def on_after_backward(self) -> None:
        """Ask once whether the adapters take part."""
        if self._adapted and self.global_step == 0 and not self._asked:
            self._asked = True
            idle = idle_adapters(self.model)
            if idle:
                more = f" and {len(idle) - 1} more" if idle[1:] else ""
                notice(f"LoRA has no effect on {idle[0]}{more}, whose weights the model reads by itself.")

    def setup(self, stage: str) -> None:
        """Compare channels and classes of the data with those of the model, and of its teachers."""
        data = getattr(self.trainer, "datamodule", None)
        own, given = record_of(self.model).input_size, getattr(data, "mean", None)
        if own and given and own[0] != len(given):
            raise ValueError(
                f"The model takes images of {own[0]} channels, the data give {len(given)}: set mean and std "
                "of the data to as many values, or in_chans of the model."
            )
        size = getattr(data, "image_size", None)
        least = min(size) if isinstance(size, Sequence) else size
        if self.low_res and least is not None and self.low_res[0] >= least:
            raise ValueError(
                f"low_res has {self.low_res[0]} pixels, no fewer than the images' {least}: set it to fewer, or to null."
            )
        if self.trainer.ckpt_path is None:  # else the checkpoint tells the classes
            names = record_of(self.model).label_names
            if stage != "fit" or are_classes_of(data, names):
                label_by(data, names)
            if stage != "fit" and names is not None:  # weights that were trained elsewhere
                tell_other_pictures(data, self.model)
            check_classes(data, self.num_classes)
        if self.teachers is not None and (names := getattr(data, "class_names", None)) is not None:
            self.teachers.match(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        label_by(getattr(self._trainer, "datamodule", None), checkpoint.get(KEY, {}).get("label_names"))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        check_labels(batch[1], 0, self.num_classes - 1, wait=batch_idx == 0)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_labels(batch[1], 0, self.num_classes - 1, wait=batch_idx == 0)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of normalised images (B, C, H, W)."""
        return self.model(images.to(memory_format=self.memory_format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            if len(images) % 2:
                raise ValueError(f"mixup and cutmix pair images: batch_size must be even, got {len(images)}.")
            images, targets = self.mix(images, targets)
        probabilities = None if self.teachers is None else self._ask(self.teachers, images)
        if self.low_res and self.schedule_step < self.low_res[1] * self.trainer.estimated_stepping_batches:
            images = nn.functional.interpolate(images, size=self.low_res[0], mode="bilinear", antialias=True)
        if self.technique is None:
            return self._loss(images, targets, probabilities)
        steps = int(self.trainer.estimated_stepping_batches)
        losses = []
        for _ in self.technique.passes(self.model, self.schedule_step, steps):
            with self.technique.watch(self.model) as seen:
                total = self._loss(images, targets, probabilities)
            for name, loss in self.technique.losses(seen).items():
                self.log(f"train/{name}", loss)
                total = total + loss
            losses.append(total)
        return torch.stack(losses).sum()

    def _loss(self, images: Tensor, targets: Tensor, probabilities: Tensor | None) -> Tensor:
        """Run the model once and return its loss, with all that is added to it."""
        watch: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.balance is not None:
            watch = record_balance(self.model)
        with watch as balances:
            output = self(images)
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        loss = total = self.loss(logits, targets)
        self.log("train/loss", loss, prog_bar=True)
        if self.teachers is not None and probabilities is not None:
            taught = self.teachers.loss(distilled, probabilities)
            self.log("train/distillation", taught)
            total = torch.lerp(loss, taught, self.distillation_weight)
        if self.balance is not None:
            balance = torch.stack(balances).mean()
            self.log("train/balance", balance)
            total = total + self.balance * balance
        return total

    def _ask(self, teachers: Teachers, images: Tensor) -> Tensor:
        """Return what the teachers say of images that were normalised for the student."""
        data = cast(Any, self.trainer).datamodule
        return teachers(images, data.mean, data.std)

    def on_fit_start(self) -> None:
        if self.low_res:
            side, share = self.low_res
            notice(
                f"The first {100 * share:.0f} % of the steps train at {side} pixels, validation is at full size: "
                "it says little until they are over."
            )
        if self.teachers is not None:
            self.teachers.to(self.device)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, metrics: nn.ModuleDict) -> Tensor:
        """Measure a batch and return the predicted classes (B,)."""
        images, targets = batch
        logits = self(images).float()
        self.log(f"{stage}/loss", nn.functional.cross_entropy(logits, targets), sync_dist=True)
        for name, metric in metrics.items():
            metric(logits, targets)
            self.log(f"{stage}/{name}", cast(Metric, metric), prog_bar=name == "acc1")
        return logits.argmax(1)

    @rank_zero_only
    def _log_pictures(self, images: Tensor, right: Tensor) -> None:
        """Write images (B, C, H, W) to TensorBoard, in frames that say whether their class was right (B,)."""
        loggers = [logger for logger in self.loggers if isinstance(logger, TensorBoardLogger)]
        images, right = images[: self.log_images].float().cpu(), right[: self.log_images].long().cpu()
        if not loggers or not len(images):
            return
        low, high = images.amin(), images.amax()
        shown = ((images - low) / (high - low).clamp_min(1e-6)).expand(-1, 3, -1, -1)
        frames = torch.tensor([[0.85, 0.1, 0.1], [0.1, 0.7, 0.1]])[right]  # red, green
        framed = frames[:, :, None, None].repeat(1, 1, images.shape[2] + 4, images.shape[3] + 4)
        framed[:, :, 2:-2, 2:-2] = shown
        for logger in loggers:
            logger.experiment.add_image("val/images", make_grid(framed, nrow=8), self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        predicted = self._evaluate(batch, "val", self.val_metrics)
        if batch_idx == 0 and not self.trainer.sanity_checking and batch[0].shape[1] in (1, 3):
            self._log_pictures(batch[0], predicted == batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def export_weights(self, path: str | Path, dtype: torch.dtype | None = None) -> str:
        """Write the model's weights as safetensors and return the file's SHA-256 digest."""
        return save_checkpoint(self.model.state_dict(), path, dtype=dtype, record=self.model_record())
