"""What caches of diffusion models save and what they cost: time and PSNR, beside fewer steps in the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.bench.report import Benchmark, Entry
from zoo.bench.timing import Progress, Settings, compare, environment, now, torch_threads
from zoo.caching.presets import CacheSetting, Subject, cache_settings

__all__ = ["PSNR", "RECOGNISED", "caching", "class_subject", "measure_caches"]

PSNR = "PSNR (dB)"
RECOGNISED = "recognised (%)"
SAME_TIME_STEPS = "steps in the same time"
SAME_TIME_PSNR = "their PSNR (dB)"
NO_CACHE = "no cache"

Classify = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> predicted class numbers (B,)."""


def class_subject(pipe: Any, labels: Sequence[int], *, steps: int, guidance_scale: float) -> Subject:
    """Return a class-conditional pipeline as caches are calibrated on it."""

    def run() -> None:
        pipe(list(labels), num_inference_steps=steps, guidance_scale=guidance_scale, seed=1, output_type="latent")

    return Subject(pipe=pipe, run=run, steps=steps, guidance=guidance_scale)


@dataclass(frozen=True, kw_only=True)
class CacheResults:
    """What `measure_caches` found.

    Args:
        entries: The uncached run, the caches, then fewer steps; compared with the uncached run.
        images: Images (B, C, H, W) in [0, 1] of each entry, by its name.
        refused: Why a setting cannot work on this pipeline, by its name.
    """

    entries: tuple[Entry, ...]
    images: dict[str, Tensor]
    refused: dict[str, str]

    @property
    def uncached(self) -> Entry:
        """The run without a cache."""
        return self.entries[0]


def measure_caches(
    pipe: Any,
    labels: Sequence[int],
    candidates: Sequence[CacheSetting],
    settings: Settings,
    *,
    steps: int = 50,
    guidance_scale: float = 3.0,
    classify: Classify | None = None,
    fewer_steps: bool = True,
    progress: Progress | None = None,
) -> CacheResults:
    """Run a pipeline without a cache, with each cache, and with as many steps as fit into each cache's time.

    All runs start from the same noise. PSNR compares with the images without a cache, over all images together.

    Args:
        pipe: A class-conditional pipeline without a cache.
        labels: Class numbers, one an image.
        candidates: Caches to measure.
        settings: Rounds, threads and device; the type is the pipeline's, the batch is the number of labels.
        steps: Of the scheduler, without and with caches.
        guidance_scale: Weight of classifier-free guidance.
        classify: A classifier, to count the images that it recognises as the class asked for.
        fewer_steps: Run fewer steps in each cache's time too.
        progress: Told after each run.
    """
    images: dict[str, Tensor] = {}
    uncached = f"{NO_CACHE}, {steps} steps"

    def generate(name: str, count: int, config: Any = None) -> Callable[[], None]:
        def call() -> None:
            context = contextlib.nullcontext() if config is None else zoo.cached(pipe, config)
            with context:
                images[name] = pipe(
                    list(labels),
                    num_inference_steps=count,
                    guidance_scale=guidance_scale,
                    seed=0,
                    output_type="pt",
                ).images

        return call

    refused: dict[str, str] = {}
    calls = {uncached: generate(uncached, steps)}
    for candidate in candidates:
        try:
            with zoo.cached(pipe, candidate.config):
                pass
        except (ValueError, TypeError) as error:
            refused[candidate.name] = str(error)
        else:
            calls[candidate.name] = generate(candidate.name, steps, candidate.config)
    methods = {candidate.name: candidate.method for candidate in candidates}
    timed = compare(calls, settings, reference=uncached, progress=_stage(progress, "with and without caches"))
    same_time = {
        name: max(1, min(steps, round(steps / speed.median)))
        for name, (_, speed) in timed.items()
        if fewer_steps and speed is not None
    }
    ladder = {f"{NO_CACHE}, {count} steps": count for count in sorted(set(same_time.values()) - {steps}, reverse=True)}
    if ladder:
        fewer = {name: generate(name, count) for name, count in ladder.items()}
        again = compare(
            {uncached: calls[uncached], **fewer},
            settings,
            reference=uncached,
            progress=_stage(progress, "fewer steps"),
        )
        timed |= {name: again[name] for name in fewer}
    reference = images[uncached]

    def entry(name: str) -> Entry:
        values = {} if name == uncached else {PSNR: psnr_of_all(images[name], reference)}
        if classify is not None:
            hits = classify(images[name]).cpu() == torch.tensor(list(labels))
            values[RECOGNISED] = 100 * float(hits.float().mean())
        if name in same_time:
            count = same_time[name]
            values[SAME_TIME_STEPS] = count
            if count != steps:
                values[SAME_TIME_PSNR] = psnr_of_all(images[f"{NO_CACHE}, {count} steps"], reference)
        series = methods.get(name, NO_CACHE)
        return Entry(name=name, time=timed[name][0], speedup=timed[name][1], values=values, series=series)

    return CacheResults(entries=tuple(entry(name) for name in timed), images=images, refused=refused)


def _stage(progress: Progress | None, what: str) -> Progress | None:
    """Name the stage that a progress report is about."""
    if progress is None:
        return None
    return lambda _, done, total: progress(what, done, total)


def psnr_of_all(images: Tensor, reference: Tensor) -> float:
    """Return the PSNR of all images together, after rounding to 8 bits, dB; infinite if they are equal."""
    difference = (_to_bytes(images) - _to_bytes(reference)).double()
    return float(10 * torch.log10(255.0**2 / difference.square().mean()))


def _to_bytes(images: Tensor) -> Tensor:
    return (images.float().clamp(0, 1) * 255).round()


def classify_with(model: nn.Module, device: str = "cpu") -> Classify:
    """Return a function that classifies images with a classifier of timm's registry, in evaluation mode."""
    from timm.data import resolve_model_data_config

    model = model.to(device)
    data = resolve_model_data_config(model)
    size = tuple(data["input_size"][-2:])
    mean, std = (torch.tensor(data[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        images = images.float()
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return model((images.to(device) - mean) / std).argmax(1)

    return classify


def caching(
    settings: Settings,
    progress: Progress | None = None,
    *,
    name: str = "pixeldit.cifar10",
    classifier_name: str = "repavit_tiny.cifar10",
    steps: int = 50,
    guidance_scale: float = 3.0,
) -> list[Benchmark]:
    """Every cache on the shipped denoiser, beside fewer steps in the same time."""
    pipe = zoo.create_pipeline(name, dtype=settings.torch_dtype).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    classes = pipe.transformer.config.num_classes
    labels = [index % classes for index in range(settings.batch)]
    judge = zoo.create_model(classifier_name, pretrained=True)
    zoo.reparameterize(judge, measure=False)
    with torch_threads(settings.threads):
        candidates = cache_settings(class_subject(pipe, labels, steps=steps, guidance_scale=guidance_scale))
        results = measure_caches(
            pipe,
            labels,
            candidates,
            settings,
            steps=steps,
            guidance_scale=guidance_scale,
            classify=classify_with(judge, settings.device),
            progress=progress,
        )
    return [
        Benchmark(
            name="caching",
            title=f"Caches of diffusion steps on {name}",
            conditions=settings.conditions(
                scheduler=type(pipe.scheduler).__name__, steps=steps, **{"guidance scale": guidance_scale}
            ),
            environment=environment(settings.device),
            date=now(),
            reference=results.uncached.name,
            entries=results.entries,
            notes=(
                f"PSNR compares with the images of {results.uncached.name}, from the same noise, all images together.",
                f"Recognised: share of images that {classifier_name} takes for the class that was asked for.",
                *(f"Not measured: {setting}. {reason}" for setting, reason in results.refused.items()),
            ),
        )
    ]
