"""Compare models by name: classifiers, restorers or denoisers, merged unless told otherwise."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from zoo import catalog, factory
from zoo.bench.memory import in_fresh_process, peak_memory, resident_peak
from zoo.bench.report import Benchmark, Check, Entry, Goal
from zoo.bench.timing import (
    BenchError,
    Progress,
    Settings,
    cast,
    compare,
    environment,
    now,
    require_close,
    torch_threads,
)
from zoo.engines import EngineError, attach, check_engine, detach
from zoo.ffn.reparam import reparameterize
from zoo.profiling import count_macs, count_params, denoiser_inputs
from zoo.record import record_of
from zoo.sources import find, metrics_of

__all__ = ["Subject", "compare_models"]

_RESTORER_SIZE = 256  # pixels a side, where a network takes any size


@dataclass(kw_only=True)
class Subject:
    """A model that is ready to be timed.

    Args:
        name: What it is called in the table.
        source: The name that it was built from.
        engine: What runs it.
        merged: It was re-parameterised.
        task: "classification", "sr", "generation", ...
        model: In evaluation mode.
        inputs: Arguments of `forward` by position.
        named: Arguments of `forward` by name.
        checks: What was compared when it was merged.
    """

    name: str
    source: str
    merged: bool
    task: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    named: dict[str, Any]
    checks: tuple[Check, ...] = ()
    engine: str = "eager"

    def __call__(self) -> Any:
        return self.model(*self.inputs, **self.named)

    @property
    def accuracy(self) -> dict[str, float]:
        """Top-1 accuracy in percent by data set: of these weights, or the authors'; empty where none is known."""
        source = find(self.source)
        facts = catalog.load().get(source.architecture or "", {})
        if source.kind == "model" and not source.tag:
            return {"top-1 on ImageNet-1k (%)": facts["top1"]} if facts.get("top1") else {}
        metrics = metrics_of(source)
        found = [metric for metric in metrics if metric["name"] == "Top-1 accuracy"]
        return {f"top-1 on {metric['dataset']} (%)": metric["value"] for metric in found[:1]}

    @property
    def family(self) -> str:
        """Family of the model, "timm" for those of others."""
        return catalog.load().get(find(self.source).architecture or "", {}).get("family", "timm")

    @torch.no_grad()
    def macs(self) -> int:
        """Count multiply-accumulates of one call on the meta device, where attention is counted; the weights go."""
        detach(self.model)
        named = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in self.named.items()}
        return count_macs(self.model.to("meta"), *(value.to("meta") for value in self.inputs), **named)


def subject(
    name: str,
    settings: Settings,
    *,
    size: int | None = None,
    merge: bool = True,
    check: bool = True,
    label: str | None = None,
    engine: str = "eager",
) -> Subject:
    """Build a model with random weights (a denoiser: with its own) and an input for it.

    Args:
        name: Registered name of ours or timm's, or a published denoiser.
        settings: Batch, type and device.
        size: Height and width of the input in pixels; None is the model's own.
        merge: Re-parameterise what can be.
        check: Check in float32 that merging leaves the output as it is.
        label: What it is called in the table; None is its name.
        engine: What runs it, as in `zoo.accelerate`.

    Raises:
        ValueError: There is no such model or engine; the message names the nearest.
        ImportError: The engine is not installed.
        BenchError: Merging changes the output.
    """
    check_engine(engine)
    torch.manual_seed(0)
    is_denoiser = find(name).kind == "pipeline"
    task, model, x, named = (_denoiser if is_denoiser else _network)(name, size)
    model = model.eval().requires_grad_(False)
    checks: tuple[Check, ...] = ()
    merged = False
    if merge:
        with torch.inference_mode():
            before = _first(model(x, **named)) if check else None
            merged = bool(reparameterize(model, measure=False).layers)
            if merged and before is not None:
                checks = (require_close(f"{name} merged and as it is trained", _first(model(x, **named)), before),)
    cast(model, settings)
    if engine != "eager":
        attach(model, check_engine(engine))
    batch = x.expand(settings.batch, *x.shape[1:]).contiguous().to(settings.device, settings.torch_dtype)
    named = {key: _batch_of(value, settings) if isinstance(value, Tensor) else value for key, value in named.items()}
    return Subject(
        name=label or (f"{name} (merged)" if merged else name),
        source=name,
        merged=merged,
        task=task,
        model=model,
        inputs=(batch,),
        named=named,
        checks=checks,
        engine=engine,
    )


def _batch_of(value: Tensor, settings: Settings) -> Tensor:
    """Repeat one sample; timesteps and labels (B,) keep their type."""
    value = value.expand(settings.batch, *value.shape[1:]).to(settings.device)
    return value.to(settings.torch_dtype) if value.ndim > 1 else value


Parts = tuple[str, nn.Module, Tensor, dict[str, Any]]
"""Task, model, one input, arguments by name."""


def _denoiser(name: str, size: int | None) -> Parts:
    model = factory.create_model(name, pretrained=True)
    sample, named = denoiser_inputs(model, size)
    config: Any = model.config
    return (
        "policy" if "observation_dim" in config else "generation",
        model,
        sample,
        {**named, "return_dict": False},
    )


def _network(name: str, size: int | None) -> Parts:
    source = find(name)
    ours = source.kind == "model" and source.architecture in catalog.load()
    # timm's classifiers get no size: not all take one; a user's model keeps the one that it was trained for
    arguments: dict[str, Any] = {"img_size": size} if ours and size and source.task == "classification" else {}
    model: Any = factory.create_model(name, **arguments)
    task = source.task or record_of(model).task
    if task != "classification":
        side = size or _RESTORER_SIZE
        return task, model, torch.rand(1, model.in_chans, side, side), {}
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return task, model, torch.randn(1, channels, size or height, size or width), {}


def _title(names: Sequence[str], entries: Sequence[Entry]) -> str:
    if len(names) > 3:
        return (
            f"{len(names)} models{', merged where they can be' if any('(merged)' in e.name for e in entries) else ''}"
        )
    return " against ".join(entry.name for entry in entries[:2]) + (" and others" if entries[2:] else "")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def _ready(subjects: list[Subject]) -> tuple[str, ...]:
    """Build and check engines before anything is timed; take out those that cannot run, and return what to note.

    Raises:
        BenchError: None can.
    """
    notes = []
    for each in list(subjects):
        each.name = f"{each.name}, {each.engine}"
        try:
            each()
        except EngineError as error:
            subjects.remove(each)
            notes.append(str(error))
    if not subjects:
        raise BenchError(" ".join(notes))
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > cores:
        notes.append(f"The machine was busy: a load of {load:.1f} on {cores} cores, so that times are too long.")
    return tuple(notes)


def _peak(each: Subject, settings: Settings, size: int | None) -> int:
    """Return the bytes by which memory grows in one call."""
    if torch.device(settings.device).type == "cuda":
        return peak_memory(each, settings.device)
    return in_fresh_process(_peak_here, each.source, settings, size, each.merged, each.engine)


def _peak_here(name: str, settings: Settings, size: int | None, merge: bool, engine: str) -> int:
    with torch_threads(settings.threads):
        before, peak = resident_peak(subject(name, settings, size=size, merge=merge, check=False, engine=engine))
    return peak - before


def compare_models(
    names: Sequence[str],
    settings: Settings = Settings(),
    *,
    size: int | None = None,
    merge: bool = True,
    memory: bool = False,
    goal: float | None = None,
    name: str = "models",
    title: str | None = None,
    progress: Progress | None = None,
    engines: Sequence[str] = (),
) -> Benchmark:
    """Time models in turns.

    With one name that can be merged, its merged form runs against its training form. Otherwise the first is compared
    with the second, the reference; further ones are compared with the reference too.

    Args:
        names: Registered names.
        settings: How to measure.
        size: Height and width of the inputs in pixels; None is each model's own (restorers: 256).
        merge: Re-parameterise what can be.
        memory: Measure the peak memory of one call too, on the CPU each in a process of its own.
        goal: How many times as fast as the second the first should be.
        name: Short name of the benchmark.
        title: What is compared, in words; None names the models.
        progress: Told after each step.
        engines: Run each model on each of these; the first model on the first is the reference. An engine that cannot
            run a model is left out, and the notes say why.

    Raises:
        ValueError: A name is unknown or repeated, or the models do different tasks.
        BenchError: Merging changes an output.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Give one or more different models, got {', '.join(names) or 'none'}.")
    with torch_threads(settings.threads):
        subjects = [
            subject(model, settings, size=size, merge=merge, engine=engine, check=engine == (*engines, "eager")[0])
            for model in names
            for engine in engines or ("eager",)
        ]
        notes = _ready(subjects) if engines else ()
        if len({each.task for each in subjects}) > 1:
            tasks = ", ".join(f"{each.source}: {each.task}" for each in subjects)
            raise ValueError(f"Models of different tasks cannot be compared: {tasks}.")
        if len(subjects) == 1 and subjects[0].checks and not engines:
            subjects.append(subject(names[0], settings, size=size, merge=False, label=f"{names[0]} (training form)"))
        reference = subjects[1].name if len(subjects) > 1 and not engines else subjects[0].name
        with torch.inference_mode():
            timed = compare({each.name: each for each in subjects}, settings, reference=reference, progress=progress)
        peaks = [_peak(each, settings, size) if memory else None for each in subjects]
        by_family = 1 < len({each.family for each in subjects}) < len(subjects)
        entries = tuple(
            Entry(
                name=each.name,
                time=timed[each.name][0],
                speedup=timed[each.name][1],
                params=count_params(each.model),
                macs=each.macs(),
                peak_bytes=peak,
                values=each.accuracy,
                series=each.family if by_family else "",
            )
            for each, peak in zip(subjects, peaks, strict=True)
        )
    first = entries[0].speedup
    goals: tuple[Goal, ...] = ()
    if goal is not None and first is not None:
        goals = (Goal(what=f"{entries[0].name} against {reference}, times as fast", value=first.median, wanted=goal),)
    shapes = {"x".join(map(str, each.inputs[0].shape[1:])) for each in subjects}
    plain = subjects[0].task not in catalog.PIPELINE_TASKS
    return Benchmark(
        name=name,
        title=title or _title(names, entries),
        conditions=settings.conditions(input=" and ".join(sorted(shapes))),
        environment=environment(settings.device),
        date=now(),
        reference=reference if len(subjects) > 1 else None,
        entries=entries,
        checks=tuple(itertools.chain.from_iterable(each.checks for each in subjects)),
        goals=goals,
        notes=(("Weights, random or trained, do not change the time.",) if plain else ()) + notes,
    )
