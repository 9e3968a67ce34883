"""Diffusion pipelines beside each other: time, and how good their images are; mixtures of experts at every top-k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.bench.caching import PSNR, psnr_of_all
from zoo.bench.report import Benchmark, Entry
from zoo.bench.timing import Progress, Settings, compare, environment, now, torch_threads
from zoo.evaluation.fid_c import SampleJudge
from zoo.moe.dense2moe import activated_parameters, expert_layers
from zoo.profiling import count_params

__all__ = ["ACTIVATED", "compare_pipelines"]

ACTIVATED = "activated parameters (M)"
_TOP_K = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def compare_pipelines(
    names: Sequence[str],
    settings: Settings,
    *,
    steps: int = 25,
    guidance_scale: float = 3.0,
    progress: Progress | None = None,
) -> Benchmark:
    """Sample CIFAR-10 classes with each pipeline, from the same noise.

    A pipeline with experts is measured at several numbers of activated experts, from none to all, unless it was
    saved with none.

    Args:
        names: Published names or folders of class-conditional pipelines; the first is what the others are compared
            with.
        settings: Batch of the timed call, rounds, threads, device and type; `count` images measure quality.
        steps: Of the scheduler.
        guidance_scale: Weight of classifier-free guidance.
        progress: Told after each run.

    Raises:
        ValueError: A name is unknown or repeated, or a pipeline does not know the ten classes of CIFAR-10.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"Give different pipelines, got {', '.join(names)}.")
    labels = [index % 10 for index in range(settings.count or settings.batch)]
    judge = SampleJudge(labels, settings.device)
    runs = {run.label: run for name in names for run in _runs(name, settings)}
    images: dict[str, list[Tensor]] = {}

    def sample(run: _Run, first: int) -> Tensor:
        run.switch()
        chunk = labels[first : first + settings.batch]
        arguments: dict[str, Any] = dict(num_inference_steps=steps, guidance_scale=guidance_scale, output_type="pt")
        made: Tensor = run.pipe(chunk, seed=first, **arguments).images
        return made.cpu()

    def timed_call(run: _Run) -> None:
        images[run.label] = [sample(run, 0)]

    dense = next(iter(runs))
    with torch_threads(settings.threads):
        calls = {label: partial(timed_call, run) for label, run in runs.items()}
        timed = compare(calls, settings, reference=dense, progress=progress)
        for done, run in enumerate(runs.values()):
            images[run.label] += [sample(run, first) for first in range(settings.batch, len(labels), settings.batch)]
            if progress is not None:
                progress("more images", done + 1, len(runs))
    original = torch.cat(images[dense])
    entries = []
    for label, run in runs.items():
        made = torch.cat(images[label])
        values = judge(made, None if label == dense else original)
        if label != dense:
            values[PSNR] = psnr_of_all(made, original)
        run.switch()
        values[ACTIVATED] = activated_parameters(run.pipe.transformer) / 1e6
        time, speed = timed[label]
        params = count_params(run.pipe.transformer)
        entries.append(Entry(name=label, time=time, speedup=speed, params=params, values=values, series=run.series))
    return Benchmark(
        name="pipelines",
        title=" against ".join(_short(name) for name in names) if len(names) < 3 else f"{len(names)} pipelines",
        conditions=settings.conditions(images=len(labels), steps=steps, **{"guidance scale": guidance_scale}),
        environment=environment(settings.device),
        date=now(),
        reference=dense,
        entries=tuple(entries),
        notes=(
            *judge.notes,
            f"PSNR compares with the images of {dense} from the same noise, all together.",
        ),
    )


@dataclass(frozen=True)
class _Run:
    """A pipeline at one number of activated experts; None where it has no experts to choose."""

    label: str
    series: str
    pipe: Any
    top_k: int | None

    def switch(self) -> None:
        """Activate as many experts."""
        if self.top_k is not None and self.pipe.transformer.config.moe["top_k"] != self.top_k:
            self.pipe.transformer.set_top_k(self.top_k)


def _runs(name: str, settings: Settings) -> Iterator[_Run]:
    """Load a pipeline and yield what of it is measured."""
    pipe = zoo.create_pipeline(name, dtype=settings.torch_dtype).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    if config.get("num_classes") != 10:
        raise ValueError(f"{name} must know the 10 classes of CIFAR-10, as the classifier does that judges its images.")
    series, moe = _short(name), config.get("moe")
    if not moe or moe["top_k"] == 0:
        yield _Run(series, series, pipe, None)
        return
    most = min(layer.experts for layer in expert_layers(pipe.transformer).values())
    for top_k in sorted({k for k in _TOP_K if k < most} | {moe["top_k"], most}):
        yield _Run(f"{series}, top {top_k}", series, pipe, top_k)


def _short(name: str) -> str:
    """Return a published name, or the last part of a folder."""
    return name.rstrip("/").rsplit("/", 1)[-1]
