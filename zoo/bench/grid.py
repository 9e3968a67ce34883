"""Models by engine, precision, batch and threads: every combination in one process and in turns."""

from __future__ import annotations

import importlib.util
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import catalog
from zoo.acceleration import accelerate
from zoo.bench.integer import INTEGER_ENGINES, IntegerCall, write_integer
from zoo.bench.latency import processor_clock, summarize, time_in_turns
from zoo.bench.memory import in_fresh_process, peak_memory, resident_peak
from zoo.bench.report import SAME, Benchmark, Check, Entry, Ratio
from zoo.bench.subjects import Subject, first, subject
from zoo.bench.timing import BenchError, DTypeName, Progress, Settings, busy, environment, speedup, torch_threads
from zoo.cfg import temperature_of
from zoo.data.images import images_to_judge
from zoo.engines import EngineCall, EngineError, check_engine
from zoo.evaluation.calibration import expected_calibration_error
from zoo.profiling import count_params
from zoo.sources import find
from zoo.text import counted

__all__ = ["DIFFERENCE", "OFFERED", "PRECISIONS", "Grid", "compare_grid", "refusal"]

PRECISIONS: dict[str, DTypeName] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "float32"}
"""Precisions by name, each with the type of the inputs."""
OFFERED: dict[str, tuple[str, ...]] = {
    "eager": ("fp32", "bf16", "fp16", "int8"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "int8"),
    "inductor": ("fp32",),
    "auto": ("fp32",),
}
"""The precisions that each engine runs."""
DIFFERENCE = "difference from eager fp32"
LIKENESS = "PSNR to eager fp32 (dB)"
RATE = "images/s"
_EXACT = ("eager", "fp32")
_SETTLE = 0.005  # s: workers of an OpenMP team wait busily for some 3 ms after their last work
_JUDGED = 256  # images


def refusal(engine: str, precision: str) -> str:
    """Say in one line why an engine does not run a precision here; nothing where it does."""
    if precision not in OFFERED[engine]:
        return f"{engine} runs {', '.join(OFFERED[engine])}, not {precision}"
    if (engine, precision) == ("eager", "int8") and importlib.util.find_spec("torchao") is None:
        return f"{engine} runs int8 with torchao, which is missing: pip install 'ffn-zoo[quantize]'"
    return ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied.

    Args:
        engines: As in `zoo.accelerate`; with the first precision, the first is the reference.
        precisions: "fp32", "bf16", "fp16", "int8".
        batches: Inputs of one call.
        threads: CPU threads.

    Raises:
        ValueError: A list is empty or has a value twice, a number is below 1, there is no such engine or precision, or
            none of the engines runs any of the precisions.
        ImportError: An engine is not installed.
    """

    engines: tuple[str, ...] = ("eager",)
    precisions: tuple[str, ...] = ("fp32",)
    batches: tuple[int, ...] = (4,)
    threads: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        for name in ("engines", "precisions", "batches", "threads"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {list(values)}.")
        for name in ("batches", "threads"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(getattr(self, name))}.")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                hint = catalog.did_you_mean(precision, PRECISIONS)
                raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.{hint}")
        for engine in self.engines:
            check_engine(engine)
        if not self.pairs:
            raise ValueError(f"{'; '.join(self.refused)}.")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Engine and precision of all that can run, the reference first."""
        return [pair for pair in itertools.product(self.engines, self.precisions) if not refusal(*pair)]

    @property
    def refused(self) -> list[str]:
        """What cannot run, each in one line."""
        return list(filter(None, itertools.starmap(refusal, itertools.product(self.engines, self.precisions))))


@dataclass(kw_only=True, eq=False)
class _Run:
    """One combination.

    Args:
        subject: The model, in its type, with one input.
        engine: What runs it.
        precision: In which it is run.
        batch: Inputs of one call.
        threads: CPU threads.
        run: Takes arguments of `forward` and returns its output.
        call: The same with its arguments.
        taken: The engine that "auto" has taken.
        values: What was measured besides, by heading.
        times: Milliseconds of each round.
    """

    subject: Subject
    engine: str
    precision: str
    batch: int
    threads: int
    run: Callable[..., Any]
    call: Callable[[], Any]
    taken: str = ""
    values: dict[str, float] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    @property
    def pair(self) -> tuple[str, str]:
        """Engine and precision."""
        return self.engine, self.precision


def compare_grid(
    names: Sequence[str],
    grid: Grid,
    settings: Settings = Settings(),
    *,
    size: int | None = None,
    merge: bool = True,
    memory: bool = False,
    data: str | None = None,
    samples: int = _JUDGED,
    name: str = "models",
    title: str | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time models on every engine, in every precision, at every batch and number of threads, all in turns.

    Each model is compared with itself on the first engine in the first precision, at the same batch and threads. With
    one engine and precision, models are compared with the second one; a model alone with its first batch and number of
    threads, by the time of one image. A combination that cannot run is left out, and the notes say why.

    Args:
        names: Registered names, with or without tag, files, folders or Hub ids.
        grid: What is varied.
        settings: Rounds and device; batch, type and threads come from the grid.
        size: Height and width of all inputs in pixels; None is each model's own (restorers: 256).
        merge: Re-parameterise what can be.
        memory: Measure the peak memory of the first call too, on the CPU each in a process of its own.
        data: Folder of class folders: measure the accuracy of trained classifiers on it. Engines need one, of whatever
            pictures, for int8.
        samples: Images that accuracy is measured on at most.
        name: Short name of the benchmark.
        title: What is compared, in words; None names the models.
        progress: Told after each step.

    Raises:
        ValueError: A name is unknown or repeated, the models do different tasks, engines are asked for on a GPU, or
            accuracy of models none of which is a trained classifier.
        FileNotFoundError: There is no picture in `data`.
        BenchError: Merging changes an output, or nothing can run.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Give one or more different models, got {', '.join(names) or 'none'}.")
    if settings.device != "cpu" and set(grid.engines) - {"eager"}:
        foreign = next(engine for engine in grid.engines if engine != "eager")
        raise ValueError(f"The engine {foreign!r} runs on the CPU, not on {settings.device}.")
    if data is not None and size is not None:
        raise ValueError("Accuracy is measured at the size of the weights: leave out the size, or the data.")
    calibrated = "int8" in grid.precisions and not set(INTEGER_ENGINES).isdisjoint(grid.engines)
    if data is not None and not calibrated and not any(_is_judged(each) for each in names):
        raise ValueError(
            f"Accuracy is measured of classifiers with weights of their own (NAME.TAG, file or folder); "
            f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} none."
        )
    notes = [busy(max(grid.threads))] if settings.device == "cpu" else []
    notes += [f"{each}: left out." for each in grid.refused]
    if calibrated and data is None:
        notes.append("int8 on engines is left out: it is calibrated with pictures, give a folder of them (--data DIR).")
    forms = [pair for pair in grid.pairs if data is not None or not _is_file(*pair)]
    if not forms:
        raise BenchError(" ".join(filter(None, notes)))
    runs, checks = [], list[Check]()
    one = replace(settings, batch=1, dtype=PRECISIONS[forms[0][1]])
    load = {each: data is not None or _ships(each, size) for each in names}
    firsts = {each: subject(each, one, size=size, merge=merge, pretrained=load[each]) for each in names}
    if len({each.task for each in firsts.values()}) > 1:  # before anything is built
        listed = ", ".join(f"{source}: {each.task}" for source, each in firsts.items())
        raise ValueError(f"Models of different tasks cannot be compared: {listed}.")
    judged = data is not None
    if data is not None:
        try:
            for each in filter(_can_be_judged, firsts.values()):
                images_to_judge(each.model, data, 1, samples)
        except (FileNotFoundError, ValueError) as error:
            if not calibrated:  # which any pictures do for
                raise
            judged = False
            notes.append(f"Accuracy is left out: {error}")
    with tempfile.TemporaryDirectory(prefix="zoo-bench-", ignore_cleanup_errors=True) as folder:  # of eight-bit files
        for model in names:
            made, left_out = _runs(
                firsts[model], forms, grid, settings, Path(folder), progress, size=size, merge=merge, data=data
            )
            runs += made
            checks += firsts[model].checks if made else ()
            notes += left_out
            if progress is not None:
                progress(f"{model} is ready", len(checks), len(names))
        if not runs:
            raise BenchError(" ".join(filter(None, notes)))
        if data is not None and judged:
            _judge(runs, data, samples, progress)
        _time(runs, settings, progress)
        peaks = [_peak(each, settings, size, progress) if memory else None for each in runs]
    ratios, reference = _ratios(runs, grid, len(names))
    entries = _entries(runs, ratios, peaks, settings, size)
    shapes = {entry.settings["input"] for entry in entries}
    of_all = f"{_joined(sorted(map(str, shapes)))}{' for all' if size else ''}"
    if 1 in grid.threads and settings.device == "cpu":
        notes.append(
            "On 1 thread, times are processor time, which other programs on the same cores do not lengthen"
            f"{'; on more, wall clock' if len(grid.threads) > 1 else ''}."
        )
    if memory and set(grid.engines) - {"eager"}:
        notes.append("Peak memory of an engine includes its own copy of the weights.")
    return Benchmark(
        name=name,
        title=title or _title(entries),
        conditions={
            **{heading: _listed(entries, heading) for heading in ("engine", "precision", "batch", "threads")},
            "rounds": settings.rounds,
            "warm-up rounds": settings.warmup,
            "input": of_all if len(shapes) == 1 or size else f"each model's own: {of_all}",
        },
        environment=environment(settings.device),
        reference=reference,
        entries=entries,
        checks=tuple(checks),
        notes=tuple(dict.fromkeys(filter(None, notes))),
    )


def _is_judged(name: str) -> bool:
    source = find(name)
    return source.task in ("classification", None) and (source.kind != "model" or bool(source.tag))


# Preparation


def _runs(
    ready: Subject,
    pairs: Sequence[tuple[str, str]],
    grid: Grid,
    settings: Settings,
    folder: Path,
    progress: Progress | None,
    *,
    size: int | None,
    merge: bool,
    data: str | None,
) -> tuple[list[_Run], list[str]]:
    """Build and check all combinations of a model before anything is timed; return what cannot run as notes.

    `ready` is the model in the first precision.
    """
    found: list[_Run] = []
    notes: list[str] = []
    made: dict[str, Subject] = {}  # by what is done to the weights: engines share their eight-bit file
    refused: set[str] = set()
    name, expected = ready.source, ready.expected
    written = Path(tempfile.mkdtemp(dir=folder))
    load = data is not None or _ships(name, size)
    for engine, precision in pairs:
        on_file = _is_file(engine, precision)
        form = "file" if on_file else precision
        if form in refused:
            continue
        if form not in made:
            one = replace(settings, batch=1, dtype=PRECISIONS[precision])
            each = subject(name, one, size=size, merge=merge, check=False, pretrained=load) if made else ready
            try:
                if on_file:
                    said = write_integer(each, str(data), written, _teller(name, progress))
                    notes.append(f"{each.name} in int8 on engines: {said}.")
                else:
                    _quantise(each, precision)
            except EngineError as error:
                refused.add(form)
                notes.append(f"Left out: {name} {'on engines' if on_file else 'in eager int8'}: {error}")
                continue
            made[form] = each
        for batch, threads in itertools.product(grid.batches, grid.threads):
            one_run = _run(made[form], engine, precision, batch, threads, written if on_file else None)
            try:
                with torch_threads(threads), torch.inference_mode():
                    output = first(one_run.call())
            except EngineError as error:
                notes.append(f"Left out: {name} on {engine}: {error}")
                break
            if one_run.pair != _EXACT and expected is not None:
                one_run.values |= _loss(output, expected, made[form].task)
            if engine == "auto" and isinstance(one_run.run, EngineCall):
                said = next(words for words in one_run.run.said if words.startswith("auto takes"))
                one_run.taken = said.split()[2]
                notes.append(f"{name}: {said}.")
            found.append(one_run)
    return found, notes


def _is_file(engine: str, precision: str) -> bool:
    """Tell whether an engine runs the eight-bit file of `zoo export`."""
    return precision == "int8" and engine in INTEGER_ENGINES


def _can_be_judged(each: Subject) -> bool:
    return each.task == "classification" and each.trained


def _teller(name: str, progress: Progress | None) -> Callable[[str], object]:
    def told(words: str) -> None:
        if progress is not None:
            progress(f"{name} in int8: {words}", 0, 1)

    return told


def _ships(name: str, size: int | None) -> bool:
    """Tell whether a name is that of weights which are here and fit: what an engine loses is measured on them."""
    source = find(name)
    facts = catalog.load().get(source.architecture or "", {}).get("weights", {}).get(source.tag, {})
    return facts.get("source") == "shipped" and (size is None or source.task != "classification")


def _quantise(each: Subject, precision: str) -> None:
    """Give a model integer weights, where it is to have them.

    Raises:
        EngineError: It has no layer for them.
    """
    if precision != "int8":
        return
    report: Any = accelerate(each.model, quantize="int8-dynamic").zoo_report
    step = next(step for step in report.steps if step.name == "integer weights")
    if not step.done:
        raise EngineError(f"{step.said}.")


def _run(each: Subject, engine: str, precision: str, batch: int, threads: int, folder: Path | None) -> _Run:
    # one for each combination: a graph has fixed shapes, and its pool of threads a fixed size
    run: Callable[..., Any] = each.model
    if folder is not None:
        run = IntegerCall(engine, folder, threads)
    elif engine != "eager":
        run = EngineCall(each.model, check_engine(engine), threads=threads)
    inputs = tuple(value.expand(batch, *value.shape[1:]).contiguous() for value in each.inputs)
    named = {
        key: value.expand(batch, *value.shape[1:]).contiguous() if isinstance(value, Tensor) else value
        for key, value in each.named.items()
    }
    call = partial(run, *inputs, **named)
    return _Run(subject=each, engine=engine, precision=precision, batch=batch, threads=threads, run=run, call=call)


def _loss(output: Tensor, expected: Tensor, task: str) -> dict[str, float]:
    """Compare the first output of a batch with that of the model in eager float32."""
    found, wanted = output[:1].float().cpu(), expected.float()
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    values = {DIFFERENCE: float(f"{float((found - wanted).abs().max() / scale):.1e}")}
    if task not in ("classification", "generation", "policy"):
        error = float((found.clamp(0, 1) - wanted.clamp(0, 1)).square().mean())
        values[LIKENESS] = -10 * math.log10(error) if error > 0 else math.inf
    return values


# Measurement


def _time(runs: list[_Run], settings: Settings, progress: Progress | None) -> None:
    """Time all runs in turns; those of one number of threads stand together, since changing it costs time."""
    turns = sorted(runs, key=lambda each: each.threads)
    done, total = itertools.count(1), (settings.warmup + settings.rounds) * len(runs)
    several = max(each.threads for each in runs) > 1
    with torch.inference_mode():
        for turn in range(settings.warmup + settings.rounds):
            for threads, group in itertools.groupby(turns, key=lambda each: each.threads):
                with torch_threads(threads):
                    clock = processor_clock(settings.device)
                    for each in group:
                        if several:
                            time.sleep(_SETTLE)
                        taken = time_in_turns({"": each.call}, warmup=0, runs=1, device=settings.device, clock=clock)
                        if turn >= settings.warmup:
                            each.times += taken[""]
                        if progress is not None:
                            progress("timing in turns", next(done), total)


def _judge(runs: list[_Run], data: str, samples: int, progress: Progress | None) -> None:
    """Measure accuracy and calibration of trained classifiers, once for each engine and precision."""
    judged = [each for each in runs if _can_be_judged(each.subject)]
    largest = {(each.subject.source, each.pair): each for each in sorted(judged, key=lambda each: each.batch)}
    for done, (key, each) in enumerate(largest.items()):
        if progress is not None:
            progress(f"accuracy of {each.subject.source} on {each.engine}", done, len(largest))
        values = _accuracy(each, data, samples)
        for other in judged:
            if (other.subject.source, other.pair) == key:
                other.values.update(values)


def _accuracy(each: _Run, data: str, samples: int) -> dict[str, float]:
    """Return in percent: the images whose class is right, and how far probabilities are from that share."""
    logits, labels = [], []
    example = each.subject.inputs[0]
    with torch_threads(each.threads), torch.inference_mode():
        for images, found in images_to_judge(each.subject.model, data, each.batch, samples):
            full = images[torch.arange(each.batch) % len(images)]  # a graph has one batch size
            output = each.run(full.to(example.device, example.dtype))
            logits.append(output[: len(found)].float().cpu())
            labels.append(found)
    told, right = torch.cat(logits) / temperature_of(each.subject.model), torch.cat(labels)
    best = told.topk(min(5, told.shape[1])).indices == right[:, None]
    return {
        f"top-1 of {len(right)} images (%)": 100 * float(best[:, 0].double().mean()),
        **({"top-5 (%)": 100 * float(best.any(1).double().mean())} if told.shape[1] > 5 else {}),
        "calibration error (%)": 100 * expected_calibration_error(told.softmax(-1), right),
    }


def _peak(each: _Run, settings: Settings, size: int | None, progress: Progress | None) -> int:
    """Return the bytes by which memory grows in the first call."""
    if progress is not None:
        progress(f"memory of {each.subject.source} on {each.engine}", 0, 1)
    if torch.device(settings.device).type == "cuda":
        return peak_memory(each.call, settings.device)
    one = replace(settings, batch=1, dtype=PRECISIONS[each.precision])
    folder = each.run.folder if isinstance(each.run, IntegerCall) else None
    return in_fresh_process(
        _peak_here, each.subject.source, one, size, each.subject.merged, each.pair, each.batch, each.threads, folder
    )


def _peak_here(
    name: str,
    settings: Settings,
    size: int | None,
    merge: bool,
    pair: tuple[str, str],
    batch: int,
    threads: int,
    folder: Path | None,
) -> int:
    with torch_threads(threads):
        each = subject(name, settings, size=size, merge=merge, check=False, pretrained=_ships(name, size))
        if folder is None:
            _quantise(each, pair[1])
        before, peak = resident_peak(_run(each, *pair, batch, threads, folder).call)
    return peak - before


# Result


def _ratios(runs: list[_Run], grid: Grid, models: int) -> tuple[list[Ratio | None], str]:
    """Return how many times as fast each run is as its reference, by the time of one image, and what that one is."""
    pairs = grid.pairs
    sources = list(dict.fromkeys(each.subject.source for each in runs))

    def group(each: _Run) -> Any:
        own = (each.subject.source,) if len(pairs) > 1 else ()
        return (*own, each.batch, each.threads) if len(pairs) > 1 or models > 1 else ()

    def is_reference(each: _Run) -> bool:
        if len(pairs) > 1:
            return each.pair == pairs[0]
        if models > 1:
            return each.subject.source == sources[min(1, len(sources) - 1)]
        return each is runs[0]

    references = {group(each): each for each in runs if is_reference(each)}
    found: list[Ratio | None] = []
    for each in runs:
        other = references.get(group(each))
        if other is None or other is each:
            found.append(None if other is None else SAME)
            continue
        found.append(speedup([ms / other.batch for ms in other.times], [ms / each.batch for ms in each.times]))
    if len(references) == 1:
        return found, _name(next(iter(references.values())), runs)
    if len(pairs) > 1:
        own = [pairs[0][0] if len(grid.engines) > 1 else "", pairs[0][1] if len(grid.precisions) > 1 else ""]
        return found, ", ".join(filter(None, own))
    return found, next(iter(references.values())).subject.name


def _name(each: _Run, runs: Iterable[_Run]) -> str:
    """Return what tells a run from the others."""
    words = {
        "engine": each.engine,
        "precision": each.precision,
        "batch": f"batch {each.batch}",
        "threads": counted(each.threads, "thread"),
    }
    varied = [word for key, word in words.items() if len({getattr(other, key) for other in runs}) > 1]
    return ", ".join([each.subject.name, *varied])


def _entries(
    runs: list[_Run],
    ratios: Sequence[Ratio | None],
    peaks: Sequence[int | None],
    settings: Settings,
    size: int | None,
) -> tuple[Entry, ...]:
    """Return the lines of the table, by batch and threads, then models and engines in the order in which they came."""
    macs: dict[str, int] = {}
    params: dict[str, int] = {}
    floats = [each for each in runs if each.precision != "int8"]
    counted = {each.subject.source: each.subject for each in reversed(floats)}
    for source, own in counted.items():
        params[source] = count_params(own.model)
        macs[source] = own.macs()  # takes the weights
    found = []
    for each, ratio, peak in zip(runs, ratios, peaks, strict=True):
        source = each.subject.source
        with torch_threads(each.threads):
            latency = summarize(each.times, settings.device)
        rate = {RATE: 1e3 * each.batch / latency.median}
        found.append(
            Entry(
                name=_name(each, runs),
                time=latency,
                speedup=ratio,
                params=params.get(source),
                macs=macs[source] * each.batch if source in macs else None,
                peak_bytes=peak,
                values={**rate, **each.values, **({} if size else each.subject.accuracy)},
                settings={
                    "model": each.subject.name,
                    "engine": each.engine,
                    **({"taken": each.taken} if each.taken else {}),
                    "precision": each.precision,
                    "batch": each.batch,
                    "threads": each.threads,
                    "input": "x".join(map(str, each.subject.inputs[0].shape[1:])),
                },
            )
        )
    return tuple(sorted(found, key=lambda entry: (entry.settings["batch"], entry.settings["threads"])))


def _title(entries: Sequence[Entry]) -> str:
    models = list(dict.fromkeys(str(entry.settings["model"]) for entry in entries))
    varied = [
        heading
        for heading in ("engine", "precision", "batch", "threads")
        if len({entry.settings[heading] for entry in entries}) > 1
    ]
    what = ", ".join(models) if len(models) < 4 else f"{len(models)} models"
    return f"{what} by {_joined(varied)}" if varied else what


def _joined(words: Sequence[Any]) -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def _listed(entries: Sequence[Entry], heading: str) -> str:
    return _joined(list(dict.fromkeys(entry.settings[heading] for entry in entries)))
