"""Train class-conditional diffusion models: Gaussian noise of a diffusers scheduler, sample grids, class accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.utils import make_grid, save_image

import zoo
from zoo.data.readable import placed, places_of
from zoo.diffusion.pipelines import PixelDiTPipeline
from zoo.diffusion.pixel_dit import PixelDiT
from zoo.notices import notice
from zoo.record import KEY, ModelRecord
from zoo.tasks.labels import check_classes, check_labels, label_by
from zoo.tasks.optim import OptimConfig, TimmOptimModule
from zoo.tasks.plain import arguments_of, as_config

__all__ = ["Diffusion", "names_of"]


class Diffusion(TimmOptimModule):
    """Train a `PixelDiT` to undo noise, and look at what it generates.

    Args:
        model: The denoiser, or the shipped name, folder or Hub id of a pipeline whose denoiser is trained on.
        class_names: Name of each class, stored with the pipeline; None takes those of the pipeline trained on, or of
            the data. Of a pipeline trained on they may be others, also more or fewer: those it knows by name stay, the
            rest begin as its "no class".
        optim: Optimizer and schedule.
        beta_schedule: Noise schedule, a name of diffusers' `DDPMScheduler`.
        prediction_type: What the network predicts.
        timestep_sampling: "uniform", or "logit-normal" (https://arxiv.org/abs/2403.03206), which trains middle noise
            levels more. Both spread the timesteps of a batch evenly, as in https://arxiv.org/abs/2107.00630.
        logit_mean: Mean of the logit-normal; above 0 means more noise.
        logit_std: Standard deviation of the logit-normal.
        snr_gamma: Min-SNR weight (https://arxiv.org/abs/2303.09556), paper: 5; None weights all timesteps alike.
        sample_steps: DDIM steps of samples in validation and test.
        guidance_scale: Classifier-free guidance of these samples.
        grid_rows: Images a class in the grid drawn at each validation; 0 draws none.
        test_classifier: timm name with weight tag of a classifier of the same classes ("repavit_tiny.cifar10");
            `train.py test` then reports the share of samples that it recognises as the class asked for.
        test_samples: Number of those samples, over all processes.

    Raises:
        ValueError: There are not as many names as classes, or the pipeline to train on has another kind of denoiser, or
            was trained with another noise schedule or prediction than the settings say.
    """

    model: PixelDiT

    def __init__(
        self,
        model: PixelDiT | str,
        class_names: list[str] | None = None,
        optim: OptimConfig = OptimConfig(),
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2",
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction",
        timestep_sampling: Literal["uniform", "logit-normal"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        *,
        snr_gamma: float | None = None,
        sample_steps: int = 25,
        guidance_scale: float = 3.0,
        grid_rows: int = 4,
        test_classifier: str | None = None,
        test_samples: int = 1000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if isinstance(model, str):
            denoiser, names = _to_train_on(model, beta_schedule=beta_schedule, prediction_type=prediction_type)
            if class_names is not None and class_names != names:
                denoiser = _with_classes(denoiser, names or [], class_names, model)
            class_names = class_names or names
        else:  # a mapping as a checkpoint keeps it
            described = model.get("init_args", dict(model)) if isinstance(model, Mapping) else None
            denoiser = model if described is None else PixelDiT.from_config(described)
        if class_names is not None and len(class_names) != denoiser.config.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names, the denoiser {denoiser.config.num_classes} classes: set "
                "its num_classes to as many, or class_names to null."
            )
        if isinstance(self.hparams.get("model"), str | nn.Module):
            # a checkpoint needs no other weights than its own: a description, as the command line's is
            class_path = f"{PixelDiT.__module__}.{PixelDiT.__qualname__}"
            self.hparams["model"] = {"class_path": class_path, "init_args": arguments_of(denoiser)}
        self.keep_plain()
        self.model, self.optim = denoiser.train(), as_config(OptimConfig, optim)
        self.scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type=prediction_type)
        self.timestep_sampling, self.logit_mean, self.logit_std = timestep_sampling, logit_mean, logit_std
        self.snr_gamma = snr_gamma
        self.class_names = class_names
        self.sample_steps, self.guidance_scale, self.grid_rows = sample_steps, guidance_scale, grid_rows
        self.test_classifier, self.test_samples = test_classifier, test_samples
        self.val_loss = MeanMetric()
        self.class_accuracy = MulticlassAccuracy(denoiser.config.num_classes, average="micro")

    def model_record(self) -> ModelRecord:
        return ModelRecord(architecture=type(self.model).__name__, task="generation").updated(
            model_args=arguments_of(self.model),
            num_classes=self.model.config.num_classes,
            label_names=self.class_names,
        )

    def setup(self, stage: str) -> None:
        """Compare size and classes of the data with the model's; where only one of them has names, both get those."""
        data = getattr(self.trainer, "datamodule", None)
        drawn, size = self.model.config.sample_size, getattr(data, "image_size", None)
        if size not in (None, drawn):
            raise ValueError(
                f"The data gives images of {size} pixels, the denoiser draws {drawn}: set image_size to {drawn}, or "
                f"train a denoiser of sample_size {size}."
            )
        names = getattr(data, "class_names", None)
        if names is not None and self.class_names is not None and self.trainer.ckpt_path is None:
            try:
                places_of(placed(names, self.class_names, "the data"), self.class_names, "The data")
            except ValueError as error:
                raise ValueError(f"{error} To train on other classes, set class_names to those of the data.") from error
        label_by(data, self.class_names)
        check_classes(data, self.model.config.num_classes)
        names = getattr(data, "class_names", None) or []
        if self.class_names is None and len(names) == self.model.config.num_classes:
            self.class_names = None if all(name.isdecimal() for name in names) else list(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        names = checkpoint.get(KEY, {}).get("label_names")
        label_by(getattr(self._trainer, "datamodule", None), names)
        self.class_names = names or self.class_names

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        check_labels(batch[1], 0, self.model.config.num_classes - 1, wait=batch_idx == 0)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        check_labels(batch[1], 0, self.model.config.num_classes - 1, wait=batch_idx == 0)

    def forward(self, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Predict from noisy images (B, C, H, W), timesteps (B,) and labels (B,)."""
        return self.model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]

    def _timesteps(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw timesteps (count,), one from each of `count` equally probable strata, in random order."""
        strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        uniform = (strata / count).clamp(1e-6, 1 - 1e-6)
        if self.timestep_sampling == "logit-normal":
            uniform = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform))
        last = self.scheduler.config.num_train_timesteps - 1
        return (uniform * (last + 1)).long().clamp(0, last).to(self.device)

    def _loss(self, images: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample (B,)."""
        prediction_type = self.scheduler.config.prediction_type
        output = self(self.scheduler.add_noise(images, noise, timesteps), timesteps, labels).float()
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "sample":
            target = images
        else:
            target = self.scheduler.get_velocity(images, noise, timesteps)
        loss = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        if self.snr_gamma is None:
            return loss
        alpha = self.scheduler.alphas_cumprod.to(images.device)[timesteps]
        snr = alpha / (1 - alpha)
        unweighted = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
        return loss * snr.clamp(max=self.snr_gamma) / unweighted

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self._loss(images, labels, self._timesteps(len(images)), torch.randn_like(images)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, stage: str) -> None:
        """Loss at noise and timesteps that depend on the batch index only, so that epochs are comparable."""
        images, labels = batch
        generator = torch.Generator().manual_seed(batch_idx)
        timesteps = self._timesteps(len(images), generator)
        noise = torch.randn(images.shape, generator=generator).to(images)
        self.val_loss(self._loss(images, labels, timesteps, noise))
        self.log(f"{stage}/loss", self.val_loss, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def on_validation_epoch_start(self) -> None:
        # not at the end: Lightning's weight averaging has put the plain weights back by then
        if self.grid_rows and not self.trainer.sanity_checking:
            self._log_grid()

    @rank_zero_only
    def _log_grid(self) -> None:
        classes = self.model.config.num_classes
        images = self.sample(list(range(classes)) * self.grid_rows)
        grid = make_grid(images.cpu(), nrow=classes, padding=1)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/samples", grid, self.global_step)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, folder / f"step_{self.global_step:06d}.png")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        if self.test_classifier is None:
            return
        accuracy = self._measure_class_accuracy(self.test_classifier)
        self.log("test/class_accuracy", accuracy, prog_bar=True)

    def _measure_class_accuracy(self, classifier_name: str, batch_size: int = 100) -> MulticlassAccuracy:
        """Generate classes in turn, seeded by their number, and count those that the classifier recognises."""
        classifier = timm.create_model(classifier_name, pretrained=True).eval().to(self.device)
        classes = self.model.config.num_classes
        if (known := getattr(classifier, "num_classes", None)) != classes:
            raise ValueError(f"{classifier_name} knows {known} classes, the denoiser {classes}.")
        names = (getattr(classifier, "pretrained_cfg", None) or {}).get("label_names")
        places = list(range(classes))
        if names and self.class_names:
            places = places_of(self.class_names, names, "The denoiser")
        data = resolve_model_data_config(classifier)
        mean, std = (torch.tensor(data[key], device=self.device).view(1, -1, 1, 1) for key in ("mean", "std"))
        own = list(range(self.global_rank, self.test_samples, self.trainer.world_size))
        for start in range(0, len(own), batch_size):
            numbers = own[start : start + batch_size]
            labels = [number % classes for number in numbers]
            images = self.sample(labels, seeds=numbers)
            if images.shape[-2:] != data["input_size"][-2:]:
                images = F.interpolate(images, data["input_size"][-2:], mode="bicubic", antialias=True).clamp(0, 1)
            with torch.no_grad():
                predicted = classifier((images - mean) / std)[:, places].float().argmax(1)
            self.class_accuracy.update(predicted, torch.tensor(labels, device=self.device))
        return self.class_accuracy

    def sample(self, labels: list[int], seeds: list[int] | None = None) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] of the given classes, drawn with the task's DDIM settings.

        Args:
            labels: Class numbers.
            seeds: Seed of each image; None takes 0, 1, 2, ...
        """
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        training = self.model.training
        self.model.eval()
        try:
            generated: Any = pipeline(
                labels,
                num_inference_steps=self.sample_steps,
                guidance_scale=self.guidance_scale,
                seed=seeds if seeds is not None else 0,
                output_type="pt",
            )
        finally:
            self.model.train(training)
        return generated.images

    def pipeline(self) -> PixelDiTPipeline:
        """Return a pipeline around the model, with a DDIM scheduler of the same noise schedule."""
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        names = None if self.class_names is None else dict(enumerate(self.class_names))
        return PixelDiTPipeline(self.model, scheduler, id2label=names)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the pipeline as a diffusers folder, for `DiffusionPipeline.from_pretrained`.

        After training with `EMAWeightAveraging`, or from a checkpoint of it, the averaged weights are written:
        `Diffusion.load_from_checkpoint("last.ckpt").save_pretrained("folder", torch.float16)`.

        Args:
            path: Folder; created if it is not there.
            dtype: Type of the saved weights; None keeps theirs. The model itself is left as it is.
        """
        pipeline = self.pipeline()
        if dtype is not None:
            pipeline.transformer = self.model.copy_as(dtype)
        pipeline.save_pretrained(str(path))


def _to_train_on(name: str, **expected: str) -> tuple[PixelDiT, list[str] | None]:
    """Return a pipeline's denoiser in float32 and its classes' names; refuse what it was not trained with."""
    pipeline = zoo.create_pipeline(name, requires="transformer")
    if not isinstance(pipeline.transformer, PixelDiT):
        raise ValueError(
            f"The denoiser to train on must be a PixelDiT, {name} holds a {type(pipeline.transformer).__name__}."
        )
    for key, value in expected.items():
        if (known := pipeline.scheduler.config.get(key)) != value:
            raise ValueError(
                f"{name} was trained with {key} {known}, not {value}: set model.init_args.{key} to {known}."
            )
    return pipeline.transformer.float(), names_of(pipeline)


def _with_classes(denoiser: PixelDiT, names: list[str], wanted: list[str], source: str) -> PixelDiT:
    """Return the denoiser for other classes: those of the same name keep their embedding."""
    if not names and len(wanted) == denoiser.config.num_classes:
        return denoiser  # the names of its numbers
    known = [name for name in wanted if name in names]
    notice(
        f"{source} knows {len(names) or denoiser.config.num_classes} classes, class_names has {len(wanted)}: "
        f"{len(known)} of them keep what it knows, the others begin as its images of no class."
    )
    state = denoiser.state_dict()
    key = "conditioning.class_embedder.embedding_table.weight"
    table = state[key]
    none = table[denoiser.null_label] if denoiser.config.class_dropout_prob else table.mean(0)
    rows = [table[names.index(name)] if name in names else none for name in wanted]
    state[key] = torch.stack([*rows, *([none] if denoiser.config.class_dropout_prob else [])])
    changed: PixelDiT = PixelDiT.from_config({**denoiser.config, "num_classes": len(wanted)})
    changed.load_state_dict(state)
    return changed


def names_of(pipeline: Any) -> list[str] | None:
    """Return the names of a pipeline's classes in the order of their numbers; None where they have none."""
    names = getattr(pipeline, "id2label", None) or {}
    return [names[number] for number in sorted(names)] or None
