"""Train diffusion policies on demonstrations, and let them act."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.data.demonstrations import Demonstrations
from zoo.diffusion.diffusion_policy import DiffusionPolicyPipeline, DiffusionPolicyTransformer, normalize
from zoo.environments import evaluate_policy
from zoo.record import ModelRecord
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import arguments_of, as_config

__all__ = ["DiffusionPolicy"]

Ranges = tuple[list[list[float]], list[list[float]]]


class DiffusionPolicy(TimmOptimModule):
    """Train a `DiffusionPolicyTransformer` to undo noise on the actions of an expert.

    As published (https://arxiv.org/abs/2303.04137): mean square error of the noise, 100 timesteps of the squared cosine
    schedule, observations and actions brought to [-1, 1] by their range in the training data.

    Args:
        model: The denoiser.
        optim: Optimizer and schedule; published: AdamW, rate 1e-4, betas (0.9, 0.95), weight decay 1e-3.
        num_train_timesteps: Steps of the noise schedule.
        n_action_steps: Actions taken before the policy plans anew.
        eval_episodes: Episodes in which the policy acts at each validation and test; 0 for none.
        eval_steps: Steps of the sampler in them: DDIM, or DDPM where they are all of the noise schedule.
    """

    model: DiffusionPolicyTransformer

    def __init__(
        self,
        model: DiffusionPolicyTransformer,
        optim: OptimConfig = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-3),
        num_train_timesteps: int = 100,
        n_action_steps: int = 8,
        eval_episodes: int = 50,
        eval_steps: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if isinstance(model, Mapping):  # as a checkpoint keeps it
            model = DiffusionPolicyTransformer.from_config(dict(model))
        if isinstance(self.hparams.get("model"), nn.Module):
            # in Python it is the model itself, which the state dict has; from the command line it is a description
            self.hparams["model"] = dict(model.config)
        self.keep_plain()
        self.model, self.optim = model.train(), as_config(OptimConfig, optim)
        self.scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon"
        )
        self.n_action_steps, self.eval_episodes, self.eval_steps = n_action_steps, eval_episodes, eval_steps
        self.ranges: Ranges | None = None
        self.val_loss = MeanMetric()

    def model_record(self) -> ModelRecord:
        return ModelRecord(architecture=type(self.model).__name__, task="policy").updated(
            model_args=arguments_of(self.model),
        )

    def setup(self, stage: str) -> None:
        """Take the ranges of the training data, where no checkpoint has brought them."""
        if self.ranges is None:
            self.ranges = self._data().ranges()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # no buffers: weight averaging would average them with what they were before the data was known
        super().on_save_checkpoint(checkpoint)
        checkpoint["ranges"] = self.ranges

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ranges = checkpoint["ranges"]

    def _data(self) -> Demonstrations:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Demonstrations):
            raise ValueError(f"DiffusionPolicy trains on zoo.data.demonstrations.Demonstrations, got {data!r}.")
        return data

    def forward(self, noisy: Tensor, timesteps: Tensor, observations: Tensor) -> Tensor:
        """Predict the noise from noisy actions (B, T_p, D_a), timesteps (B,) and observations (B, T_o, D_o)."""
        return self.model(noisy, timestep=timesteps, encoder_hidden_states=observations, return_dict=False)[0]

    def _loss(self, batch: tuple[Tensor, Tensor], timesteps: Tensor, noise: Tensor) -> Tensor:
        assert self.ranges is not None  # set before the first batch
        observations, actions = (normalize(values, given) for values, given in zip(batch, self.ranges, strict=True))
        noisy = self.scheduler.add_noise(actions, noise, timesteps)
        return F.mse_loss(self(noisy, timesteps, observations).float(), noise)

    def _timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw timesteps (count,) spread evenly: one from each of `count` equal ranges, in random order."""
        share = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        last = self.scheduler.config.num_train_timesteps - 1
        return (share * (last + 1)).long().clamp(max=last).to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch, self._timesteps(len(batch[1])), torch.randn_like(batch[1]))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        """Loss at noise and timesteps that depend on the batch index only, so that epochs are comparable."""
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(batch[1].shape, generator=generator).to(batch[1])
        self.val_loss(self._loss(batch, self._timesteps(len(noise), generator), noise))
        self.log(f"{stage}/loss", self.val_loss, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def on_validation_epoch_start(self) -> None:
        # not at the end: Lightning's weight averaging has put the plain weights back by then
        if not self.trainer.sanity_checking:
            self._log_success("val")

    def on_test_epoch_start(self) -> None:
        self._log_success("test")

    def _log_success(self, stage: str) -> None:
        if self.eval_episodes == 0:
            return
        pipeline, training = self.pipeline(), self.model.training
        pipeline.set_progress_bar_config(disable=True)
        if self.eval_steps < self.scheduler.config.num_train_timesteps:
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        self.model.eval()
        try:
            found = evaluate_policy(
                pipeline, self._data().environment, self.eval_episodes, num_inference_steps=self.eval_steps
            )
        finally:
            self.model.train(training)
        self.log(f"{stage}/success", found.success_rate, prog_bar=True, rank_zero_only=True)
        self.log(f"{stage}/score", found.mean_score, rank_zero_only=True)

    def pipeline(self) -> DiffusionPolicyPipeline:
        """Return a pipeline around the model, with the noise schedule of the training.

        Raises:
            RuntimeError: The ranges of the data are unknown before the training.
        """
        if self.ranges is None:
            raise RuntimeError(
                "The ranges of observations and actions are unknown: fit the task, or load a checkpoint."
            )
        return DiffusionPolicyPipeline(self.model, self.scheduler, self.n_action_steps, *self.ranges)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the pipeline as a diffusers folder, for `DiffusionPipeline.from_pretrained`.

        After training with `EMAWeightAveraging`, or from a checkpoint of it, the averaged weights are written.

        Args:
            path: Folder; created if it is not there.
            dtype: Type of the saved weights; None keeps theirs. The model itself is left as it is.
        """
        pipeline = self.pipeline()
        if dtype is not None:
            pipeline.transformer = self.model.copy_as(dtype)
        pipeline.save_pretrained(str(path))
