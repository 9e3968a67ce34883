"""diffusers' pipeline of class-conditional transformers, for any number of classes and their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import nn

from zoo.catalog import did_you_mean

__all__ = ["DiTPipeline"]

_IMAGENET = 1000  # the null class that diffusers' pipeline asks for, whatever the model


class DiTPipeline(diffusers.DiTPipeline):
    """`diffusers.DiTPipeline`, whose null class is that of its model, and whose class names are saved with it.

    A saved folder names the class `DiTPipeline`, so that diffusers loads it as its own.

    Args:
        transformer: The denoiser.
        vae: Decoder of its latents.
        scheduler: Any scheduler.
        id2label: Names of each class, separated by commas. Keys may be text, as JSON has them.
    """

    def __init__(
        self,
        transformer: diffusers.DiTTransformer2DModel,
        vae: diffusers.AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        names: dict[Any, str] = {int(key): name for key, name in (id2label or {}).items()}
        super().__init__(transformer, vae, scheduler, names or None)
        self.register_to_config(id2label={str(key): name for key, name in names.items()} or None)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class, the first of several; empty where the pipeline has none."""
        return {int(key): name.partition(",")[0].strip() for key, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """Return the class numbers of names and numbers.

        Args:
            label: One class or several.

        Raises:
            ValueError: There is no such class; the message names the nearest.
        """
        return [self._label_id(each) for each in ([label] if isinstance(label, int | str) else label)]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            if label in self.labels:
                return int(self.labels[label])
            if not self.labels:
                raise ValueError(f"This pipeline has no class names: give a number instead of {label!r}.")
            raise ValueError(f"No class is called {label!r}.{did_you_mean(label, self.labels, quoted=True)}")
        classes = self.transformer.config.num_embeds_ada_norm
        if not 0 <= label < classes:
            raise ValueError(f"Class numbers go from 0 to {classes - 1}, got {label}.")
        return int(label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate one image for each class.

        Args:
            class_labels: Classes by name or number, one an image.
            guidance_scale: Weight of classifier-free guidance; up to 1 is off.
            generator: Random generator, or one an image.
            num_inference_steps: Steps of the scheduler.
            output_type: "pil", "np" or "pt".
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: There is no such class.
        """
        labels = self.get_label_ids(class_labels)
        null = self.transformer.config.num_embeds_ada_norm

        def set_null(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            asked = kwargs["class_labels"].clone()
            asked[len(labels) :] = null  # the second half, where there is guidance
            return args, {**kwargs, "class_labels": asked}

        handle = None
        if null != _IMAGENET:
            handle = self.transformer.register_forward_pre_hook(set_null, prepend=True, with_kwargs=True)
        try:
            return super().__call__(labels, guidance_scale, generator, num_inference_steps, output_type, return_dict)
        finally:
            if handle is not None:
                handle.remove()
