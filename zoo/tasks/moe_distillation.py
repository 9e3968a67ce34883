"""Distil a mixture of experts from the dense diffusion transformer that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

import zoo
from zoo.diffusion.pixel_dit import PixelDiT
from zoo.moe import BlockGroup, MoBConfig, block_groups
from zoo.moe.calibration import flow_inputs
from zoo.moe.distillation import Distiller, StageSteps
from zoo.tasks.diffusion import Diffusion, names_of
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import as_config

__all__ = ["FlowDistillation", "MoEDistillation"]


class _Staged(LightningModule):
    """Stages by optimizer step. The teacher lies behind an object that is no module: no checkpoint holds it."""

    distiller: Distiller

    def on_fit_start(self) -> None:
        self.distiller.teacher.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.distiller.enter(self.global_step)

    def _compare(self, call: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return the loss of a batch and log its parts."""
        losses = self.distiller.compare(call)
        self.log("train/output", losses.output, prog_bar=True)
        self.log_dict({f"train/{name}": error for name, error in losses.features.items()})
        if losses.balance is not None:
            self.log("train/balance", losses.balance)
        return losses.total


class MoEDistillation(_Staged, Diffusion):
    """Distil a class-conditional `PixelDiT` with experts from the dense one.

    Both see the same noisy images, timesteps and labels; a share of the labels is dropped for both. Validation is that
    of `Diffusion`: the diffusion loss and samples.

    Args:
        student: Folder that `zoo convert-moe` wrote, or a Hub id.
        teacher: The dense model: shipped name, folder or Hub id of a pipeline.
        steps: Optimizer steps of each stage; `trainer.max_steps` is their sum.
        groups: Blocks of which some run in the last stage.
        balance: Weight of the balance loss.
        freeze_shared: Shared experts learn in the first stage alone, as published; otherwise in the second too.
        optim: Optimizer and schedule over all stages.
        timestep_sampling: As of `Diffusion`.
        sample_steps: As of `Diffusion`.
        guidance_scale: As of `Diffusion`.
        grid_rows: As of `Diffusion`.
        test_classifier: As of `Diffusion`.
        test_samples: As of `Diffusion`.

    Raises:
        ValueError: The student has no experts, or student and teacher do not fit together.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        steps: StageSteps = StageSteps(),
        groups: list[BlockGroup] | None = None,
        balance: float = 1e-2,
        freeze_shared: bool = True,
        optim: OptimConfig = OptimConfig(),
        timestep_sampling: Literal["uniform", "logit-normal"] = "uniform",
        *,
        sample_steps: int = 25,
        guidance_scale: float = 3.0,
        grid_rows: int = 4,
        test_classifier: str | None = None,
        test_samples: int = 1000,
    ) -> None:
        steps, groups = as_config(StageSteps, steps), _groups(groups)
        pipe: Any = zoo.create_pipeline(teacher)
        model = _load_student(student, groups)
        if not isinstance(model, PixelDiT):
            raise ValueError(f"The student must be a PixelDiT with experts, {student} holds a {type(model).__name__}.")
        super().__init__(
            model,
            class_names=names_of(pipe),
            optim=optim,
            beta_schedule=pipe.scheduler.config.beta_schedule,
            prediction_type=pipe.scheduler.config.prediction_type,
            timestep_sampling=timestep_sampling,
            sample_steps=sample_steps,
            guidance_scale=guidance_scale,
            grid_rows=grid_rows,
            test_classifier=test_classifier,
            test_samples=test_samples,
        )
        self.distiller = Distiller(model, pipe.transformer, steps, balance, freeze_shared)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        timesteps = self._timesteps(len(images))
        noisy = self.scheduler.add_noise(images, torch.randn_like(images), timesteps)
        dropped = torch.rand(len(labels), device=labels.device) < self.model.config.class_dropout_prob
        labels = torch.where(dropped, self.model.config.num_classes, labels)
        self.model.conditioning.eval()  # in training it would drop labels of the student alone
        return self._compare(lambda model: model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0])


class FlowDistillation(_Staged, TimmOptimModule):
    """Distil a flow-matching transformer with experts (Flux) from the dense one, on stored latents and prompts.

    A batch is what `zoo.data.latents.Latents` gives: clean latents, embedded prompts and positions. The input is
    (1 - t) latents + t noise with t from a logit-normal (https://arxiv.org/abs/2403.03206).

    Args:
        student: Folder that `zoo convert-moe` wrote, or a Hub id.
        teacher: Folder or Hub id of the dense pipeline or transformer.
        steps: Optimizer steps of each stage; `trainer.max_steps` is their sum.
        groups: Blocks of which some run in the last stage.
        balance: Weight of the balance loss.
        freeze_shared: Shared experts learn in the first stage alone, as published; otherwise in the second too.
        optim: Optimizer and schedule over all stages.
        guidance: Guidance that a guidance-distilled model is told; None for others.

    Raises:
        ValueError: The student has no experts, or student and teacher do not fit together.
    """

    model: Any
    val_output: MeanMetric

    def __init__(
        self,
        student: str,
        teacher: str,
        steps: StageSteps = StageSteps(),
        groups: list[BlockGroup] | None = None,
        balance: float = 1e-2,
        freeze_shared: bool = True,
        optim: OptimConfig = OptimConfig(),
        guidance: float | None = 3.5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.keep_plain()
        steps, groups = as_config(StageSteps, steps), _groups(groups)
        optim = as_config(OptimConfig, optim)
        self.model, self.optim, self.guidance = _load_student(student, groups).train(), optim, guidance
        self.distiller = Distiller(self.model, _load_transformer(teacher), steps, balance, freeze_shared)
        self.val_output = MeanMetric()

    def _call(self, batch: dict[str, Tensor], times: Tensor, noise: Tensor) -> Callable[[nn.Module], Tensor]:
        """Return a function that runs a model on the noisy latents of a batch."""
        inputs: dict[str, Any] = {**flow_inputs(batch, times, noise, self.guidance)}
        return lambda model: model(**inputs, return_dict=False)[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        times = torch.sigmoid(torch.randn(len(batch["latents"]), device=self.device))
        return self._compare(self._call(batch, times, torch.randn_like(batch["latents"])))

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(batch_idx)
        latents = batch["latents"]
        times = torch.sigmoid(torch.randn(len(latents), generator=generator)).to(self.device)
        call = self._call(batch, times, torch.randn(latents.shape, generator=generator).to(latents))
        self.val_output.update(F.mse_loss(call(self.model).float(), call(self.distiller.teacher).float()))
        self.log("val/output", self.val_output, prog_bar=True)

    def save_pretrained(self, path: str) -> None:
        """Write the student as a diffusers folder."""
        self.model.save_pretrained(path)


def _load_transformer(name: str) -> Any:
    """Load the transformer of a pipeline or a folder of its own."""
    if (Path(name) / "config.json").is_file():
        return zoo.moe.load_transformer(name)
    return DiffusionPipeline.from_pretrained(name).transformer


def _groups(groups: list[BlockGroup] | None) -> list[BlockGroup] | None:
    return None if groups is None else [as_config(BlockGroup, group) for group in groups]


def _load_student(name: str, groups: list[BlockGroup] | None) -> Any:
    model = _load_transformer(name)
    if groups and not block_groups(model):
        model.mix_blocks(MoBConfig(groups=tuple(groups)))
    return model
