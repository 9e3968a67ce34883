"""Restorers against the plain formulation of their authors: time, peak memory, and streaming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.bench.memory import in_fresh_process, resident_peak
from zoo.bench.plain_restorers import PLAIN
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.timing import Progress, Settings, compare, environment, require_close, torch_threads
from zoo.ffn.reparam import reparameterize
from zoo.profiling import count_params

__all__ = ["restorers"]

_PLAIN = "plain formulation"
_SUBJECTS: dict[str, tuple[tuple[int, int], dict[str, float]]] = {  # (height, width), numbers to reach
    "dat_light_x2": ((360, 640), {"time": 2.5, "memory": 0.5}),
    "dat_s_x4": ((64, 64), {"time": 1.15}),
    "restormer_denoise_color": ((512, 512), {"time": 1.1, "memory": 0.5, "stream": 0.25, "slower": 1.3}),
    "ffnetsr_light_x2": ((128, 128), {"time": 1.0}),
}


def restorers(
    settings: Settings,
    progress: Progress | None = None,
    *,
    models: Sequence[str] = tuple(_SUBJECTS),
    size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
) -> list[Benchmark]:
    """Time each family merged, and streamed where it can be, against the plain formulation, and measure peak memory.

    Args:
        settings: How to measure.
        progress: Told after each step.
        models: Registered names.
        size: Height and width of the input, pixels; None is each model's own.
        arguments: More arguments of the models.
    """
    return [_restorer(name, settings, progress, size or _SUBJECTS[name][0], arguments or {}) for name in models]


def _subject(name: str, settings: Settings, size: tuple[int, int], arguments: dict[str, Any]) -> tuple[Any, Tensor]:
    """Build a merged network with random weights, and its input."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **arguments).eval().requires_grad_(False)
    reparameterize(model, measure=False)
    x = torch.rand(settings.batch, model.in_chans, *size)
    return model.to(settings.device, settings.torch_dtype), x.to(settings.device, settings.torch_dtype)


def _calls(name: str, model: Any, x: Tensor) -> dict[str, Any]:
    """Return what is compared: the network, its stream, the plain formulation."""
    plain = PLAIN[type(model)]
    calls = {f"{name} (merged)": lambda: model(x), _PLAIN: lambda: plain(model, x)}
    if name.startswith("restormer"):
        calls[f"{name} (streamed)"] = lambda: model.stream(x)
    return calls


def _restorer(
    name: str, settings: Settings, progress: Progress | None, size: tuple[int, int], arguments: dict[str, Any]
) -> Benchmark:
    wanted = _SUBJECTS[name][1]
    with torch_threads(settings.threads), torch.inference_mode():
        model, x = _subject(name, settings, size, arguments)
        calls = _calls(name, model, x)
        expected = calls[_PLAIN]()
        checks = tuple(
            require_close(f"{label} and {_PLAIN}", call(), expected, 1e-3)
            for label, call in calls.items()
            if label != _PLAIN
        )
        timed = compare(calls, settings, reference=_PLAIN, progress=progress)
    on_cpu = torch.device(settings.device).type == "cpu"
    peaks = {label: in_fresh_process(_peak, name, label, settings, size, arguments) for label in calls if on_cpu}
    params = count_params(model)
    entries = tuple(Entry.of(label, timed[label], params=params, peak_bytes=peaks.get(label)) for label in calls)
    merged, streamed = f"{name} (merged)", f"{name} (streamed)"
    ratio = timed[merged][1]
    assert ratio is not None
    goals = [Goal(what=f"{merged}, times as fast as the {_PLAIN}", value=ratio.median, wanted=wanted["time"])]
    for label, key in ((merged, "memory"), (streamed, "stream")):
        if key in wanted and on_cpu:
            share = peaks[label] / max(1, peaks[_PLAIN])
            what = f"{label}, peak memory over that of the {_PLAIN}"
            goals.append(Goal(what=what, value=share, wanted=wanted[key], at_most=True))
    if "slower" in wanted:
        slower = timed[streamed][0].median / timed[_PLAIN][0].median
        what = f"{streamed}, time over that of the {_PLAIN}"
        goals.append(Goal(what=what, value=slower, wanted=wanted["slower"], at_most=True))
    return Benchmark(
        name=f"restorers_{name}",
        title=f"Merged {name} against the plain formulation of its authors, inference",
        conditions=settings.conditions(input="x".join(map(str, x.shape[1:]))),
        environment=environment(settings.device),
        reference=_PLAIN,
        entries=entries,
        checks=checks,
        goals=tuple(goals),
        notes=("Random weights: they do not change the time.", "The plain formulation has the same merged weights."),
    )


def _peak(name: str, label: str, settings: Settings, size: tuple[int, int], arguments: dict[str, Any]) -> int:
    """Return the bytes by which memory grows in one call, in this process."""
    with torch_threads(settings.threads), torch.inference_mode():
        model, x = _subject(name, settings, size, arguments)
        _warm(model, x)
        before, peak = resident_peak(_calls(name, model, x)[label])
    return peak - before


def _warm(model: nn.Module, x: Tensor) -> None:
    """Make a small call: what libraries keep for ever after their first use is not the model's."""
    model(x[..., :16, :16])
