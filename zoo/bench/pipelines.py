"""Diffusion pipelines beside each other, and caches on one: time, and how good or how alike their images are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.bench.caching import PSNR, Make, psnr_of_all
from zoo.bench.latency import processor_clock
from zoo.bench.report import Benchmark, Entry
from zoo.bench.timing import Progress, Settings, compare, environment, torch_threads
from zoo.caching.core import denoisers
from zoo.evaluation.fid_c import SampleJudge, judge_of
from zoo.moe.dense2moe import activated_parameters, expert_layers
from zoo.profiling import count_params

__all__ = ["ACTIVATED", "Sampler", "compare_pipelines"]

ACTIVATED = "activated parameters (M)"
_TOP_K = (0, 1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A pipeline, and the images that it is to make.

    Args:
        name: Published name, folder or Hub id.
        pipe: The pipeline.
        make: Makes images with it.
        count: Images in all.
        batch: Of a call.
        labels: Class numbers, one an image; None where it makes images of something else.
        guidance: Scale that was asked for; None is the pipeline's own.
    """

    name: str
    pipe: Any
    make: Make
    count: int
    batch: int
    labels: Sequence[int] | None = None
    guidance: float | None = None

    def judge(self, device: str) -> SampleJudge | None:
        """Return what judges its images; None where they are no classes of CIFAR-10."""
        return judge_of(getattr(self.pipe, "id2label", None), self.labels, device)

    def conditions(self, steps: int) -> dict[str, Any]:
        """Return what to say of how the images were made."""
        said = {"images": self.count, "scheduler": type(getattr(self.pipe, "scheduler", None)).__name__, "steps": steps}
        return said if self.guidance is None else said | {"guidance scale": self.guidance}


def compare_pipelines(
    samplers: Sequence[Sampler], settings: Settings, *, steps: int = 25, progress: Progress | None = None
) -> Benchmark:
    """Make images with each pipeline, from the same noise.

    A pipeline with experts is measured at several numbers of activated experts, from none to all, unless it was
    saved with none.

    Args:
        samplers: The pipelines; the first is what the others are compared with, where their images are of one size.
        settings: Rounds, threads and device.
        steps: Of the scheduler.
        progress: Told after each run.

    Raises:
        ValueError: A name is repeated.
    """
    names = [sampler.name for sampler in samplers]
    if len(set(names)) != len(names):
        raise ValueError(f"Give different pipelines, got {', '.join(names)}.")
    labels = _labels(names)
    runs = {run.label: run for sampler in samplers for run in _runs(sampler, labels[sampler.name])}
    images: dict[str, list[Tensor]] = {}

    def sample(run: _Run, first: int) -> Tensor:
        run.switch()
        return run.sampler.make(steps, range(first, min(first + run.sampler.batch, run.sampler.count)))

    def timed_call(run: _Run) -> None:
        images[run.label] = [sample(run, 0)]

    first = next(iter(runs))
    with torch_threads(settings.threads):
        calls = {label: partial(timed_call, run) for label, run in runs.items()}
        timed = compare(calls, settings, reference=first, progress=progress, clock=processor_clock(settings.device))
        for done, (label, run) in enumerate(runs.items()):
            one = run.sampler
            images[label] += [sample(run, start) for start in range(one.batch, one.count, one.batch)]
            if progress is not None:
                progress("more images", done + 1, len(runs))
    original = torch.cat(images[first])
    judges = {sampler.name: sampler.judge(settings.device) for sampler in samplers}
    has_experts = any(_experts(network) for run in runs.values() for network in run.networks)
    entries = []
    for label, run in runs.items():
        made, judge = torch.cat(images[label]), judges[run.sampler.name]
        alike = label != first and made.shape == original.shape
        values = {} if judge is None else judge(made, original if alike else None)
        if alike:
            values[PSNR] = psnr_of_all(made, original)
        run.switch()
        if has_experts:
            values[ACTIVATED] = sum(map(activated_parameters, run.networks)) / 1e6
        params = sum(map(count_params, run.networks))
        entries.append(Entry.of(label, timed[label], params=params, values=values, series=run.series))
    notes = next((judge.notes for judge in judges.values() if judge is not None), ())
    return Benchmark(
        name="pipelines",
        title=" against ".join(labels.values()) if len(names) < 3 else f"{len(names)} pipelines",
        conditions=settings.conditions(**samplers[0].conditions(steps)) | {"batch": samplers[0].batch},
        environment=environment(settings.device),
        reference=first,
        entries=tuple(entries),
        notes=(
            *notes,
            *(
                (f"PSNR compares with the images of {first} from the same noise, all together.",)
                if len(runs) > 1
                else ()
            ),
        ),
    )


@dataclass(frozen=True)
class _Run:
    """A pipeline at one number of activated experts; None where it has no experts to choose."""

    label: str
    series: str
    sampler: Sampler
    top_k: int | None

    @property
    def networks(self) -> list[Any]:
        return list(denoisers(self.sampler.pipe)[1])

    def switch(self) -> None:
        """Activate as many experts."""
        for network in self.networks if self.top_k is not None else ():
            if _experts(network)["top_k"] != self.top_k:
                network.set_top_k(self.top_k)


def _runs(sampler: Sampler, series: str) -> Iterator[_Run]:
    """Yield what of a pipeline is measured."""
    network = denoisers(sampler.pipe)[1][0]
    moe = _experts(network)
    if not moe or moe["top_k"] == 0:
        yield _Run(series, series, sampler, None)
        return
    most = min(layer.experts for layer in expert_layers(network).values())
    for top_k in sorted({k for k in _TOP_K if k < most} | {moe["top_k"], most}):
        yield _Run(f"{series}, top {top_k}", series, sampler, top_k)


def _experts(network: Any) -> Any:
    """Return the configuration of a network's experts; None where it has none."""
    return getattr(network, "config", {}).get("moe")


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Return what each is called for people: the last part of its path, or all where two have the same."""
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))
