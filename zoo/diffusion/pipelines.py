"""Pipelines: from class labels to pictures, with any scheduler of diffusers that adds Gaussian noise."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from zoo.catalog import did_you_mean
from zoo.diffusion.pixel_dit import PixelDiT

__all__ = ["PixelDiTPipeline"]

Images = list[Image.Image] | np.ndarray | Tensor
StepCallback = Callable[["PixelDiTPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class PixelDiTPipeline(DiffusionPipeline):
    """Generate images of chosen classes with a `PixelDiT`.

    Args:
        transformer: The denoiser.
        scheduler: Any scheduler with a `prediction_type`. To change it later, build the new one from the old one's
            configuration: `pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)`.
        id2label: Name of each class; classes can then be asked for by name. Keys may be text, as JSON has them.
        prediction_type: What the denoiser was trained to predict; None takes it from `scheduler`.

    Raises:
        ValueError: `id2label` does not name the classes 0 to `num_classes - 1`, each by another name.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: PixelDiT,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[int, str] | dict[str, str] | None = None,
        prediction_type: str | None = None,
    ) -> None:
        super().__init__()
        names = {int(key): name for key, name in (id2label or {}).items()}
        classes = transformer.config.num_classes
        if names and (sorted(names) != list(range(classes)) or len(set(names.values())) != classes):
            raise ValueError(f"id2label must give each of the {classes} classes its own name, got {names}.")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            id2label={str(key): names[key] for key in sorted(names)} or None,
            prediction_type=prediction_type or scheduler.config.get("prediction_type"),
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class; empty where the pipeline has none."""
        return {int(key): name for key, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Return the class numbers of names and numbers.

        Args:
            class_labels: One class or several; names as in `id2label`, numbers from 0.

        Raises:
            ValueError: There is no such class, or none was given.
        """
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.flatten().tolist()
        given = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        if not given:
            raise ValueError("class_labels is empty: name at least one class.")
        return [self._label_id(label) for label in given]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            ids = {name: key for key, name in self.id2label.items()}
            if label in ids:
                return ids[label]
            if not ids:
                raise ValueError(f"This pipeline has no class names: give a number instead of {label!r}.")
            hint = did_you_mean(label, ids, quoted=True)
            raise ValueError(f"No class is called {label!r}.{hint} The classes are {', '.join(ids)}.")
        classes = self.transformer.config.num_classes
        if not 0 <= label < classes:
            raise ValueError(f"Class numbers go from 0 to {classes - 1}, got {label}.")
        return int(label)

    def _generators(
        self,
        seed: int | Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int,
    ) -> torch.Generator | list[torch.Generator] | None:
        """Return the generators of a call; seeds give every image its own, so that it does not depend on the others."""
        if seed is not None:
            if generator is not None:
                raise ValueError("Give either seed or generator, not both.")
            seeds = range(seed, seed + batch_size) if isinstance(seed, int) else list(seed)
            generator = [torch.Generator("cpu").manual_seed(value) for value in seeds]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"There are {batch_size} images, but {len(generator)} seeds or generators.")
        return generator

    def _step_arguments(self, eta: float, generator: Any) -> dict[str, Any]:
        """Return what this scheduler's `step` takes besides the prediction."""
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"{type(self.scheduler).__name__} has no eta; DDIMScheduler has.")
        return {key: value for key, value in (("eta", eta), ("generator", generator)) if key in accepted}

    def _check_scheduler(self) -> None:
        found = self.scheduler.config.get("prediction_type")
        if found != self.config.prediction_type:
            name = type(self.scheduler).__name__
            raise ValueError(
                f"The denoiser predicts {self.config.prediction_type!r}, but the {name} is set up for {found!r}. Use "
                f"{name}.from_config(pipe.scheduler.config) with the scheduler that came with the pipeline."
            )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        *,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generate one image for each class label.

        Args:
            class_labels: Classes by name or number, one an image.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Weight of classifier-free guidance. Up to 1 it is off; above, each step runs the network
                once on a doubled batch.
            eta: Share of fresh noise in each DDIM step, 0 to 1.
            seed: Seed of the first image, the next images have the next numbers; or one seed an image. An image then
                does not depend on the others in its batch.
            generator: Random generator, or one an image, in place of `seed`.
            latents: Initial standard normal noise (B, C, H, W), in place of random noise.
            output_type: PIL images; NumPy (B, H, W, C) or tensor (B, C, H, W) in [0, 1]; or "latent", the tensor as
                the scheduler left it, in [-1, 1] and not clamped.
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and the
                tensors named in the next argument; a returned dict replaces them.
            callback_on_step_end_tensor_inputs: Only "latents" exists.

        Raises:
            ValueError: A class, number or combination of arguments that cannot be; the message says which fit.
        """
        labels = self.get_label_ids(class_labels)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs may hold 'latents' only, got {sorted(unknown)}.")
        self._check_scheduler()
        generator = self._generators(seed, generator, len(labels))
        step_arguments = self._step_arguments(eta, generator)
        device, config = self._execution_device, self.transformer.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}.")
        guided = guidance_scale > 1
        if guided:
            labels = [self.transformer.null_label] * len(labels) + labels  # unconditional first, as FasterCache expects
        label_ids = torch.tensor(labels, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        try:
            for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
                model_input = torch.cat([latents, latents]) if guided else latents
                model_input = self.scheduler.scale_model_input(model_input, timestep)
                with self.transformer.cache_context("cond_uncond" if guided else "cond"):
                    prediction = self.transformer(
                        model_input.to(self.transformer.dtype),
                        timestep=timestep.to(device).expand(len(labels)),
                        class_labels=label_ids,
                        return_dict=False,
                    )[0].float()
                if guided:
                    unconditional, conditional = prediction.chunk(2)
                    prediction = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample
                if callback_on_step_end is not None:
                    replaced = callback_on_step_end(self, index, timestep, {"latents": latents})
                    latents = (replaced or {}).get("latents", latents)
        finally:
            self.maybe_free_model_hooks()  # also resets the caches, so an aborted call leaves nothing behind
        images: Images = self.image_processor.postprocess(latents, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# where DiffusionPipeline.from_pretrained looks for the class named in model_index.json
diffusers.PixelDiTPipeline = PixelDiTPipeline
# and, for Hub ids, where it looks for the module of a component that is not diffusers' own
setattr(diffusers.pipelines, PixelDiT.__module__, sys.modules[PixelDiT.__module__])
