"""The work of the page's third tab: pictures with and without a cache, from one seed."""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import generate as command
from zoo.cli.app.service import Service, Tell
from zoo.cli.output import UsageError
from zoo.cli.pipelines import classes_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["CACHES", "Generated", "choices_of", "generate"]

CACHES = ("none", *command.CACHES, "auto")
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
    return [str(name).partition(",")[0].strip() for name in classes_of(model).values()]


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


class _Bar:
    """Stands in for the progress bar of the command, and tells the page."""

    def __init__(self, runs: int, tell: Tell | None) -> None:
        self._runs, self._tell, self._done = runs, tell, 0
        self._totals: list[int] = []

    def add_task(self, what: str, total: int) -> int:
        self._totals.append(total)
        return len(self._totals) - 1

    def advance(self, task: int) -> None:
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, max(self._totals) * self._runs)


def _generate(
    service: Service, model: str, subject: str, count: int, seed: int, steps: int, cache: str, tell: Tell | None
) -> Generated:
    from zoo.cli.pipelines import check_request, plan_calls

    drawing = Path(tempfile.mkdtemp(dir=service.folder)) / "timeline.png"
    words = [model, "--count", str(count), "--seed", str(seed), "--steps", str(steps), "--cache", cache]
    args = _options(service, words if cache == "none" else [*words, "--timeline", str(drawing)])
    pipe = _pipeline(service, model)
    takes = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in takes:
        args.prompt = [subject]
    elif "class_labels" in takes:
        args.classes = subject
    check_request(args, "count", "steps")
    plan = plan_calls(args, pipe, name=model, count=count, classes=count, batch=None, seed=seed)
    bar: Any = _Bar(1 if cache == "none" else 2, tell)
    if cache == "none":
        made, seconds = command._timed(plan, steps, command._telling(bar, "", plan, steps))
        return Generated(names=list(plan.names), plain=_shown(made), plain_seconds=seconds, cached=[])
    result: dict[str, Any] = {}
    panels: list[Any] = []
    made, seconds = command._cached(args, plan, result, panels, bar)
    return Generated(
        names=list(plan.names),
        plain=_shown(panels[0][1]),
        plain_seconds=result["uncached_seconds"],
        cached=_shown(made),
        seconds=seconds,
        psnr=result["psnr"],
        timeline=drawing if drawing.is_file() else None,
    )


def _shown(made: Sequence[Tensor]) -> list[Image]:
    """Return each as a picture; of a video the frame in the middle."""
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image((frames[len(frames) // 2].float().clamp(0, 1) * 255).round().byte()) for frames in made]


def _options(service: Service, words: Sequence[str]) -> argparse.Namespace:
    from zoo.cli import parse

    return parse(["generate", *words, "-o", str(service.folder / "grid.png"), "--device", service.device, "-q"])


def _pipeline(service: Service, model: str) -> Any:
    """Load a pipeline once."""
    from zoo.cli.pipelines import load_pipeline

    return service.kept(("pipeline", model), lambda: load_pipeline(_options(service, [model]), model)[0])
