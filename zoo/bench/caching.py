"""What caches of diffusion steps save and what they cost: time and likeness, beside fewer steps in the same time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.bench.cache_dit import cache_dit_settings
from zoo.bench.latency import processor_clock
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.timing import Progress, Settings, compare, environment, torch_threads
from zoo.caching.presets import CACHE_FAILURES, STEPS, CacheSetting, Subject, cache_settings, reason_of
from zoo.evaluation.fid_c import FEWEST, FID_C, RECOGNISED, SampleJudge
from zoo.evaluation.metrics import ssim

__all__ = [
    "FID_C",
    "NO_CACHE",
    "PSNR",
    "RECOGNISED",
    "SAME_TIME_STEPS",
    "SSIM",
    "caching",
    "class_images",
    "class_subject",
    "compare_caches",
    "likeness",
    "measure_caches",
    "psnr_of_all",
    "recogniser",
    "size_of",
    "ssim_of_all",
    "stage_of",
    "without_cache",
]

PSNR = "PSNR (dB)"
SSIM = "SSIM"
SAME_TIME_STEPS = "steps in the same time"
NO_CACHE = "no cache"
_WANTED = {3.0: 36.0, 4.0: 32.0}  # PSNR (dB) at so many times the speed
_SPEEDS = (1.3, 4.0)  # where ours are to be ahead of everything else
_OURS = ("Step forecast", "CG-Taylor", "BAC", "BAC, shared steps", "TaylorSeer")

Classify = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> predicted class numbers (B,)."""
Make = Callable[[int, range], Tensor]
"""Steps, and which images by their numbers -> the images (B, C, H, W) in [0, 1] on the CPU."""
Judge = Callable[[Tensor, Tensor | None], Mapping[str, float]]
"""Images (B, C, H, W) in [0, 1] of an entry, and those without a cache or None for these -> values by heading."""


def class_images(pipe: Any, labels: Sequence[int], *, guidance_scale: float) -> Make:
    """Return what makes images of classes, each of them a noise of its own.

    Args:
        pipe: A class-conditional pipeline of ours.
        labels: Class numbers, one an image.
        guidance_scale: Weight of classifier-free guidance.
    """

    def make(steps: int, which: range) -> Tensor:
        made: Tensor = pipe(
            [labels[index] for index in which],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=which.start,
            output_type="pt",
        ).images
        return made.cpu()

    return make


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
    make: Make,
    count: int,
    candidates: Sequence[CacheSetting],
    settings: Settings,
    *,
    steps: int = 50,
    timed: int | None = None,
    judge: Judge | None = None,
    fewer_steps: bool = True,
    progress: Progress | None = None,
) -> CacheResults:
    """Run a pipeline without a cache, with each cache, and with as many steps as fit into each cache's time.

    All runs start from the same noise. PSNR and SSIM compare with the images without a cache, PSNR over all images
    together.

    Args:
        pipe: A pipeline without a cache.
        make: Makes images with it.
        count: Images in all.
        candidates: Caches to measure.
        settings: Rounds, threads and device; the type is the pipeline's.
        steps: Of the scheduler, without and with caches.
        timed: Images of a timed call, the first ones; the others are made in calls of as many. None is all.
        judge: Says more of an entry's images, which are in the order of their numbers.
        fewer_steps: Run fewer steps in each cache's time too.
        progress: Told after each run.
    """
    batch = count if timed is None else min(timed, count)
    images: dict[str, Tensor] = {}
    notes: dict[str, Mapping[str, float]] = {}
    uncached = without_cache(steps)

    def generate(name: str, number: int, cache: CacheSetting | None = None, first: int = 0) -> Callable[[], None]:
        def call() -> None:
            if name in refused:
                return
            try:
                with contextlib.nullcontext() if cache is None else cache.on(pipe):
                    made = make(number, range(first, min(first + batch, count)))
                    if not first:
                        notes[name] = {STEPS: float(number)} if cache is None else cache.notes(pipe)
            except CACHE_FAILURES as error:
                if cache is None:
                    raise
                refused[name] = reason_of(error)
                return
            images[name] = torch.cat([images[name], made]) if first else made

        return call

    refused: dict[str, str] = {}
    runs: dict[str, tuple[int, CacheSetting | None]] = {uncached: (steps, None)}
    for candidate in candidates:
        try:
            with candidate.on(pipe):
                pass
        except CACHE_FAILURES as error:
            refused[candidate.name] = reason_of(error)
        else:
            runs[candidate.name] = (steps, candidate)
    methods = {candidate.name: candidate.method for candidate in candidates}
    calls = {name: generate(name, *run) for name, run in runs.items()}
    clock = processor_clock(settings.device)
    found = compare(
        calls, settings, reference=uncached, progress=stage_of(progress, "with and without caches"), clock=clock
    )
    runs = {name: run for name, run in runs.items() if name not in refused}
    found = {name: found[name] for name in runs}
    same_time = {
        name: max(1, min(steps, round(steps / speed.median)))
        for name, (_, speed) in found.items()
        if fewer_steps and speed is not None
    }
    ladder = {without_cache(number): number for number in sorted(set(same_time.values()) - {steps}, reverse=True)}
    if ladder:
        runs |= {name: (number, None) for name, number in ladder.items()}
        again = compare(
            {name: generate(name, *runs[name]) for name in (uncached, *ladder)},
            settings,
            reference=uncached,
            progress=stage_of(progress, "fewer steps"),
            clock=clock,
        )
        found |= {name: again[name] for name in ladder}
    for done, (name, run) in enumerate(runs.items()):
        for first in range(batch, count, batch):
            generate(name, *run, first)()
        if progress is not None and count > batch:
            progress("more images", done + 1, len(runs))
    values: dict[str, dict[str, float]] = {}
    for name in runs:
        original = None if name == uncached else images[uncached]
        judged = {} if judge is None else judge(images[name], original)
        values[name] = {**likeness(images[name], original), **judged, **notes[name]}
    for name, number in same_time.items():
        fewer = values.get(without_cache(number), {}) if number != steps else {}
        values[name] |= {
            SAME_TIME_STEPS: number,
            **{f"their {key}": fewer[key] for key in (PSNR, FID_C) if key in fewer},
        }
    entries = tuple(
        Entry.of(name, times, values=values[name], series=methods.get(name, NO_CACHE)) for name, times in found.items()
    )
    return CacheResults(entries=entries, images=images, refused=refused)


def without_cache(steps: float) -> str:
    """Return what a run of so many steps without a cache is called."""
    return f"{NO_CACHE}, {steps:g} steps"


def likeness(images: Tensor, reference: Tensor | None) -> dict[str, float]:
    """Return PSNR and, where they are large enough, SSIM of images to those without a cache; nothing of these."""
    if reference is None:
        return {}
    similar = ssim_of_all(images, reference)
    return {PSNR: psnr_of_all(images, reference), **({} if similar is None else {SSIM: similar})}


def stage_of(progress: Progress | None, what: str) -> Progress | None:
    """Name the stage that a progress report is about."""
    if progress is None:
        return None
    return lambda _, done, total: progress(what, done, total)


def psnr_of_all(images: Tensor, reference: Tensor) -> float:
    """Return the PSNR of all images together, after rounding to 8 bits, dB; infinite if they are equal."""
    difference = (_to_bytes(images) - _to_bytes(reference)).double()
    return float(10 * torch.log10(255.0**2 / difference.square().mean()))


def ssim_of_all(images: Tensor, reference: Tensor) -> float | None:
    """Return the mean SSIM of all images; None where they are too small for it, below 11 pixels a side."""
    return None if min(images.shape[-2:]) < 11 else float(ssim(images, reference, space="rgb").mean())


def size_of(images: Tensor) -> str:
    """Return width and height of images, pixels: "512x512"."""
    return f"{images.shape[-1]}x{images.shape[-2]}"


def _to_bytes(images: Tensor) -> Tensor:
    return (images.float().clamp(0, 1) * 255).round()


def recogniser(classify: Classify, labels: Sequence[int]) -> Judge:
    """Return a judge that counts the images which a classifier takes for the class that was asked for."""

    def judge(images: Tensor, uncached: Tensor | None = None) -> dict[str, float]:
        hits = classify(images).cpu() == torch.tensor(list(labels))
        return {RECOGNISED: 100 * float(hits.float().mean())}

    return judge


def caching(
    settings: Settings,
    progress: Progress | None = None,
    *,
    name: str = "pixeldit.cifar10",
    steps: int = 50,
    guidance_scale: float = 3.0,
) -> list[Benchmark]:
    """Every cache on the shipped denoiser, beside fewer steps in the same time."""
    pipe = zoo.create_pipeline(name, dtype=settings.torch_dtype).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    classes = pipe.transformer.config.num_classes
    count = settings.count or settings.batch
    labels = [index % classes for index in range(count)]
    with torch_threads(settings.threads):
        subject = class_subject(pipe, labels[: settings.batch], steps=steps, guidance_scale=guidance_scale)
        return [
            compare_caches(
                name,
                class_images(pipe, labels, guidance_scale=guidance_scale),
                count,
                [*cache_settings(subject), *cache_dit_settings(steps)],
                subject,
                settings,
                judge=SampleJudge(labels, settings.device),
                has_goals=True,
                progress=progress,
            )
        ]


def compare_caches(
    name: str,
    make: Make,
    count: int,
    candidates: Sequence[CacheSetting],
    subject: Subject,
    settings: Settings,
    *,
    judge: SampleJudge | None = None,
    has_goals: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure caches on a pipeline, beside fewer steps in the same time.

    Args:
        name: Of the pipeline, for people.
        make: Makes images with it.
        count: Images in all.
        candidates: Caches to measure.
        subject: The pipeline, its steps and guidance.
        settings: `batch` images are timed; rounds, threads and device.
        judge: Of its images.
        has_goals: Say whether ours reach what they have to on the shipped denoiser.
        progress: Told after each run.
    """
    results = measure_caches(
        subject.pipe,
        make,
        count,
        candidates,
        settings,
        steps=subject.steps,
        timed=settings.batch,
        judge=judge,
        progress=progress,
    )

    def error(name: str, other: str) -> float:
        assert judge is not None
        return judge.difference_error(results.images[name], results.images[other])

    conditions: dict[str, Any] = {
        "images": count,
        "size": size_of(results.images[results.uncached.name]),
        "scheduler": type(getattr(subject.pipe, "scheduler", None)).__name__,
        "steps": subject.steps,
    }
    if subject.guidance is not None:
        conditions["guidance scale"] = subject.guidance
    told = error if judge is not None and count >= FEWEST else None
    return Benchmark(
        name="caching",
        title=f"Caches of diffusion steps on {name}",
        conditions=settings.conditions(**conditions),
        environment=environment(settings.device),
        reference=results.uncached.name,
        entries=results.entries,
        goals=_goals(results.entries, told) if has_goals else (),
        notes=(
            f"PSNR and SSIM compare with the images of {results.uncached.name}, from the same noise; PSNR of all "
            f"{count} images together.",
            *(() if judge is None else judge.notes),
            "Held: memory of stored features at most; without a number the cache does not tell.",
            *(f"Not measured: {setting}. {reason}" for setting, reason in results.refused.items()),
        ),
    )


def _goals(entries: Sequence[Entry], error: Callable[[str, str], float] | None = None) -> tuple[Goal, ...]:
    """Compare our caches with what else is as fast, from 1.3 to 4 times: fewer steps, and caches of others.

    Args:
        entries: Of `measure_caches`.
        error: Standard error of the difference in FID-C between two entries, by their names.
    """

    def speed(entry: Entry) -> float:
        return entry.speedup.median if entry.speedup is not None else 0.0

    def best(of: Sequence[Entry], least: float) -> Entry | None:
        return max((entry for entry in of if speed(entry) >= least), key=lambda entry: entry.values[PSNR], default=None)

    ours = [entry for entry in entries if entry.series in _OURS]
    if not ours:
        return ()
    goals = [
        Goal(
            what=f"{PSNR} at {least:g} times the speed", value=-math.inf if one is None else one.values[PSNR], wanted=to
        )
        for least, to in _WANTED.items()
        for one in [best(ours, least)]
    ]
    others = {
        "fewer steps": [entry for entry in entries if entry.series == NO_CACHE and PSNR in entry.values],
        "other caches": [entry for entry in entries if entry.series not in (*_OURS, NO_CACHE)],
    }
    for what, rivals in others.items():
        leads = []
        for rival in rivals:
            one = best(ours, speed(rival))
            if _SPEEDS[0] <= speed(rival) <= _SPEEDS[1]:
                leads.append(-math.inf if one is None else one.values[PSNR] - rival.values[PSNR])
        if leads:
            between = f"least lead over {what} from {_SPEEDS[0]:g} to {_SPEEDS[1]:g} times the speed ({PSNR})"
            goals.append(Goal(what=between, value=min(leads), wanted=0))
    for least in _WANTED:
        one = best(ours, least)
        fewer = None if one is None else best(others["fewer steps"], speed(one))
        if one is None or fewer is None or FID_C not in one.values or FID_C not in fewer.values:
            continue
        what = f"{one.name}: {FID_C} minus that of fewer steps in the same time or less"
        if error is not None:
            what += f" (standard error {error(one.name, fewer.name):.2f})"
        goals.append(Goal(what=what, value=one.values[FID_C] - fewer.values[FID_C], wanted=0, at_most=True))
    return tuple(goals)
