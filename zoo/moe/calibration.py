"""Batches with the diffusion training loss's target, by which channels are ranked before they are dealt to experts.

The distillation loss would not do: it is zero at conversion, with its gradient (Dense2MoE).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["class_batches", "flow_batches", "flow_inputs", "sampled_images"]


def class_batches(pipe: Any, images: Iterable[tuple[Tensor, Tensor]], seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Add noise to images of classes, at timesteps spread evenly over the schedule.

    Args:
        pipe: Class-conditional pipeline; its scheduler says how noise is added and what the model predicts.
        images: Batches of images (B, C, H, W) in [-1, 1] and class numbers (B,).
        seed: Of noise and timesteps.

    Yields:
        Arguments of the transformer, and the target.

    Raises:
        ValueError: The scheduler's prediction is unknown.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    kind, steps = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, the scheduler has {kind!r}.")
    generator = torch.Generator().manual_seed(seed)
    kept = next(pipe.transformer.parameters())
    for clean, labels in images:
        count = len(clean)
        strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        timesteps = (strata / count * steps).long().clamp(0, steps - 1)
        noise = torch.randn(clean.shape, generator=generator)
        targets = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
        yield {
            "hidden_states": scheduler.add_noise(clean, noise, timesteps).to(kept),
            "timestep": timesteps.to(kept.device),
            "class_labels": labels.to(kept.device),
            "target": targets[kind].to(kept),
        }


def flow_batches(
    batches: Iterable[dict[str, Tensor]], *, guidance: float | None = 3.5, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Add noise to stored latents as flow matching does: x = (1 - t) latents + t noise, target noise - latents.

    Args:
        batches: What `zoo.data.latents.Latents` gives.
        guidance: Guidance that a guidance-distilled model is told; None for others.
        seed: Of noise and times, which are logit-normal.

    Yields:
        Arguments of the transformer, and the target.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        latents = batch["latents"]
        times = torch.sigmoid(torch.randn(len(latents), generator=generator)).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        yield {**flow_inputs(batch, times, noise, guidance), "target": noise - latents}


def flow_inputs(
    batch: Mapping[str, Tensor], times: Tensor, noise: Tensor, guidance: float | None = None
) -> dict[str, Tensor]:
    """Return a flow-matching transformer's arguments for stored latents at given times.

    Args:
        batch: What `zoo.data.latents.Latents` gives, latents (B, N, C).
        times: (B,) from 0, clean, to 1, noise.
        noise: Of the latents' shape.
        guidance: Guidance that a guidance-distilled model is told; None for others.
    """
    latents = batch["latents"]
    share, told = times.view(-1, 1, 1), times.to(latents)
    inputs = {key: value for key, value in batch.items() if key != "latents"}
    if guidance is not None:
        inputs["guidance"] = torch.full_like(told, guidance)
    return {**inputs, "hidden_states": ((1 - share) * latents + share * noise).to(latents), "timestep": told}


def sampled_images(
    pipe: Any, count: int, *, batch_size: int = 32, steps: int = 25, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw images of all classes in turn from a pipeline itself, where no data are at hand.

    Args:
        pipe: `PixelDiTPipeline` or one like it.
        count: Images in all.
        batch_size: Images at a time.
        steps: Of the scheduler.
        seed: Of the first image.

    Yields:
        Images (B, C, H, W) in [-1, 1] and class numbers (B,).
    """
    classes = pipe.transformer.config.num_classes
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        labels = [number % classes for number in numbers]
        seeds = [seed + number for number in numbers]
        images = pipe(labels, num_inference_steps=steps, seed=seeds, output_type="pt").images
        yield images.cpu() * 2 - 1, torch.tensor(labels)
