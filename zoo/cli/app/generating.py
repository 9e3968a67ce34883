"""The work of the page's third tab: pictures with and without a cache, from one seed."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.app.service import Service, Tell
from zoo.cli.output import UsageError
from zoo.sources import PIPELINE_INDEX, cards_dir, find

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CACHES", "Generated", "choices_of", "generate"]

CACHES = ("none", "cg-taylor", "bac", "taylorseer", "first-block", "auto")
"""What the page offers, as `zoo generate --cache` takes it."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Pictures of one request.

    Args:
        names: What each shows.
        plain: Without a cache.
        plain_seconds: Their time.
        cached: With the cache, in the same order; empty without one.
        seconds: Their time.
        psnr: Mean over the pictures that differ, dB; None where none does.
        timeline: Picture of the steps that were computed and skipped.
    """

    names: list[str]
    plain: list[Image]
    plain_seconds: float
    cached: list[Image]
    seconds: float | None = None
    psnr: float | None = None
    timeline: Path | None = None


def choices_of(service: Service, model: str) -> list[str]:
    """Return the names of a pipeline's classes, without loading it; empty where it has none."""
    service.require([model], service.offers.pipelines)
    index = (find(model).path or cards_dir() / model) / PIPELINE_INDEX
    if not index.is_file():  # on the Hub
        return []
    labels = json.loads(index.read_text(encoding="utf-8")).get("id2label")
    return [str(name).partition(",")[0].strip() for name in labels.values()] if isinstance(labels, dict) else []


def generate(
    service: Service,
    model: str,
    subject: str,
    *,
    count: int = 4,
    seed: int = 0,
    steps: int = 20,
    cache: str = "none",
    tell: Tell | None = None,
) -> Generated:
    """Make pictures as `zoo generate` does, twice where there is a cache.

    Args:
        service: With the pipelines on offer.
        model: One of them.
        subject: Class or prompt.
        count: Pictures.
        seed: Of the first; the next have the next numbers.
        steps: Of the scheduler.
        cache: One of `CACHES`.
        tell: Called with (steps done, steps in all).

    Raises:
        UsageError: A number is out of bounds, or the model is not on offer.
        ValueError: There is no such class, or the cache does not fit.
    """
    limits = service.limits
    service.require([model], service.offers.pipelines)
    for name, value, most in (("count", count, limits.images), ("steps", steps, limits.steps)):
        if not (isinstance(value, int | float) and value == int(value) and 1 <= value <= most):
            raise UsageError(f"{name} is a whole number from 1 to {most} here, got {value}.")
    if not (isinstance(seed, int | float) and seed == int(seed) and 0 <= seed < 2**32):
        raise UsageError(f"seed is a whole number from 0, got {seed}.")
    if cache not in CACHES:
        raise UsageError(f"No cache is called {cache!r}; there are {', '.join(CACHES)}.")
    if not (subject or "").strip():
        raise UsageError("Say what to show: a class or a prompt.")
    with service.lock:
        return _generate(service, model, subject.strip(), int(count), int(seed), int(steps), cache, tell)


def _generate(
    service: Service, model: str, subject: str, count: int, seed: int, steps: int, cache: str, tell: Tell | None
) -> Generated:
    from zoo.caching import cached, timeline
    from zoo.cli import generate as command
    from zoo.evaluation.metrics import psnr

    pipe = _pipeline(service, model)
    words = ["generate", "--model", model, "--classes", subject, "--count", str(count), "--seed", str(seed)]
    args = _options(service, [*words, "--steps", str(steps), "--cache", cache, "--batch-size", str(count)])
    labels = pipe.get_label_ids(command._classes(args.classes, pipe))
    chosen = [labels[index % len(labels)] for index in range(count)]
    names = [pipe.id2label.get(label, f"class {label}") for label in chosen]
    config = None if cache == "none" else command._cache_config(args, pipe, chosen)
    if config is not None:
        with cached(pipe, config):
            pass  # a cache that does not fit is refused before anything is computed
    if tell is not None:
        tell(0, 1 if config is None else 2)
    start = time.perf_counter()
    plain, seconds = command._generate(args, pipe, chosen)
    if config is None:
        return Generated(names=names, plain=command._to_pil(plain), plain_seconds=seconds, cached=[])
    if tell is not None:
        tell(1, 2)
    drawing = Path(tempfile.mkdtemp(dir=service.folder)) / "timeline.png"
    with cached(pipe, config):
        images, start = None, time.perf_counter()
        images, _ = command._generate(args, pipe, chosen)
        cached_seconds = time.perf_counter() - start
        timeline(pipe, drawing)
    ratios = psnr(images, plain, space="rgb")
    finite = ratios[ratios.isfinite()]
    return Generated(
        names=names,
        plain=command._to_pil(plain),
        plain_seconds=seconds,
        cached=command._to_pil(images),
        seconds=cached_seconds,
        psnr=float(finite.mean()) if len(finite) else None,
        timeline=drawing,
    )


def _options(service: Service, words: list[str]) -> argparse.Namespace:
    from zoo.cli import parse

    return parse([*words, "-o", str(service.folder / "grid.png"), "-q", "--device", service.device])


def _pipeline(service: Service, model: str) -> Any:
    """Load a pipeline once, and run it for two steps: the first are slower."""
    from zoo.cli import generate as command

    def load() -> Any:
        pipe = command._pipeline(_options(service, ["generate", "--model", model]))
        pipe([0], num_inference_steps=2, output_type="latent")
        return pipe

    return service.kept(("pipeline", model), load)
