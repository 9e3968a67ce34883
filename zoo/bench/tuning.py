"""Find the cache setting for a pipeline that keeps a budget of quality, or of time, and save it for "auto"."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.bench.caching import NO_CACHE, PSNR, SSIM, likeness, size_of, stage_of, without_cache
from zoo.bench.latency import processor_clock
from zoo.bench.report import Benchmark, Entry
from zoo.bench.timing import Progress, Settings, compare, environment, now, torch_threads
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.core import active_cache, cache_summary, cached, denoisers
from zoo.caching.presets import CACHE_FAILURES, PRESETS, STEPS, Preset, Subject, notes_of, planned_bac, reason_of
from zoo.caching.saved import LEAST_STEPS, SavedSetting, default_guidance, fingerprint, folder_for
from zoo.caching.taylorseer import TaylorSeerConfig

__all__ = ["Budget", "Tuning", "as_images", "best_entries", "tune_cache"]

_REFINED = 4  # lines of settings that are refined, fewer steps among them
_HALVINGS = 3  # settings tried on each of them
_FINALISTS = 6  # settings that are timed in turns at the end, of one method at most two
_SLOWER = 0.95  # of the speed of a milder setting: the run was disturbed
_FACTORS = (1.0, 2.0, 4.0, 8.0)  # thresholds to try, times the median error of the gate from step to step
_RIVALS = ("diffusers-taylorseer", "first-block", "mag")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a setting has to keep.

    Args:
        measure: "psnr", dB, or "ssim", both to the images without a cache; or "speedup", times as fast.
        least: Smallest value.
    """

    measure: Literal["psnr", "ssim", "speedup"]
    least: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "psnr>=30", "ssim>=0.95" or "speedup>=2".

        Raises:
            ValueError: It is none of these.
        """
        found = re.fullmatch(r"\s*(psnr|ssim|speedup)\s*>=\s*(\d+(?:\.\d*)?)\s*", text)
        if not found or not float(found[2]) > 0:
            raise ValueError(f"A budget is like 'psnr>=30', 'ssim>=0.95' or 'speedup>=2', got {text!r}.")
        return cls(measure=found[1], least=float(found[2]))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.measure}>={self.least:g}"


def as_images(output: Any) -> Tensor:
    """Return what a pipeline made as (B, C, H, W) in [0, 1], on the CPU; frames of a video count as images.

    Args:
        output: The pipeline's output or its images: a tensor, an array or PIL images.

    Raises:
        TypeError: It is none of these.
    """
    for name in ("images", "frames"):
        output = getattr(output, name, output)
    if isinstance(output, list | tuple) and output and not isinstance(output[0], Tensor):
        from torchvision.transforms.functional import to_tensor

        flat = [image for one in output for image in (one if isinstance(one, list) else [one])]
        return torch.stack([to_tensor(image) for image in flat])
    if isinstance(output, list | tuple) and output:
        output = torch.stack(list(output))
    if not isinstance(output, Tensor):
        if not hasattr(output, "__array__"):
            raise TypeError(f"A run must return the pipeline's output or its images, got {type(output).__name__}.")
        output = torch.as_tensor(output).movedim(-1, -3)  # arrays of diffusers have the channels last
    if output.ndim < 4:
        raise TypeError(f"Images must be (B, C, H, W), got {tuple(output.shape)}: output_type='pt' gives them.")
    return output.detach().float().cpu().flatten(0, -4)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `tune_cache` found.

    Args:
        budget: What was asked for.
        setting: The best cache; None where none keeps the budget.
        path: Its file; None where nothing was saved, as where fewer steps serve better.
        fewer_steps: Steps without a cache that serve better than the best cache; None where it is the best.
        verdict: All this in sentences.
        benchmark: Every setting that was tried.
    """

    budget: Budget
    setting: SavedSetting | None
    path: Path | None = None
    fewer_steps: int | None
    verdict: tuple[str, ...]
    benchmark: Benchmark

    def __str__(self) -> str:
        return " ".join(self.verdict)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A value on a line of settings; without a configuration it is fewer steps."""

    line: Preset
    value: float
    steps: int
    config: Any

    @property
    def name(self) -> str:
        return f"{self.line.method}, {self.line.label.format(self.value)}"

    @property
    def series(self) -> str:
        return ", ".join([self.line.method, *self.line.label.split(", ")[1:2]])


@dataclass(kw_only=True)
class _Trial:
    """A candidate and what was measured of it; the speed-up is of one run, later of several."""

    candidate: _Candidate
    entry: Entry

    @property
    def speedup(self) -> float:
        return self.entry.speedup.median if self.entry.speedup is not None else 0.0

    def value(self, measure: str) -> float:
        """Return speed-up, PSNR or SSIM; the least possible where it is no number."""
        value = self.speedup if measure == "speedup" else self.entry.values.get({"psnr": PSNR, "ssim": SSIM}[measure])
        return -math.inf if value is None or math.isnan(value) else value


@dataclass(kw_only=True)
class _Sweep:
    """The runs made so far."""

    subject: Subject
    run: Callable[[int], Any]
    settings: Settings
    budget: Budget
    progress: Progress | None
    trials: dict[str, _Trial] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    reference: Tensor | None = None
    uncached: Entry | None = None

    def measure(self, candidates: Sequence[_Candidate], rounds: int, what: str) -> None:
        """Run settings in turns with the pipeline without a cache, and note what they give."""
        settings = replace(self.settings, rounds=rounds, warmup=0)
        plain = without_cache(self.subject.steps)
        images: dict[str, Tensor] = {}
        notes: dict[str, dict[str, float]] = {}

        def call(candidate: _Candidate) -> Callable[[], None]:
            def one() -> None:
                if candidate.name in self.refused:
                    return
                context = (
                    contextlib.nullcontext()
                    if candidate.config is None
                    else cached(self.subject.pipe, candidate.config)
                )
                try:
                    with context:
                        images[candidate.name] = as_images(self.run(candidate.steps))
                        fewer = candidate.config is None
                        notes[candidate.name] = (
                            {STEPS: float(candidate.steps)} if fewer else notes_of(self.subject.pipe)
                        )
                except CACHE_FAILURES as error:
                    self.refused[candidate.name] = reason_of(error)

            return one

        def uncached() -> None:
            self.reference = as_images(self.run(self.subject.steps))

        told = stage_of(self.progress, what)
        calls = {plain: uncached, **{candidate.name: call(candidate) for candidate in candidates}}
        timed = compare(calls, settings, reference=plain, progress=told, clock=processor_clock(settings.device))
        assert self.reference is not None
        self.uncached = Entry(
            name=plain, time=timed[plain][0], values={STEPS: float(self.subject.steps)}, series=NO_CACHE
        )
        for candidate in candidates:
            if candidate.name in self.refused:
                continue
            values = likeness(images[candidate.name], self.reference) | notes[candidate.name]
            entry = Entry.of(candidate.name, timed[candidate.name], values=values, series=candidate.series)
            trial, before = _Trial(candidate=candidate, entry=entry), self.trials.get(candidate.name)
            # of two runs in passing the one that was disturbed less; at the end all rounds together count
            if rounds > 1 or before is None or trial.speedup > before.speedup:
                self.trials[candidate.name] = trial

    def measure_line(self, candidates: Sequence[_Candidate], what: str) -> None:
        """Measure settings of a line, and once more those that are slower than milder ones: something disturbed them.

        Args:
            candidates: Of one line, from mild to strong.
            what: Is done, for people.
        """
        self.measure(candidates, 1, what)
        own = [trial for each in candidates if (trial := self.trials.get(each.name)) is not None]
        fastest, disturbed = 0.0, []
        for trial in own:
            if trial.speedup < _SLOWER * fastest:
                disturbed.append(trial.candidate)
            fastest = max(fastest, trial.speedup)
        if disturbed:
            self.measure(disturbed, 1, f"{what} again")

    def candidate(self, line: Preset, value: float) -> _Candidate | None:
        """Return a setting that was not tried yet; None where it was, or cannot be."""
        steps = self.subject.steps
        fewer = line.method == NO_CACHE
        try:
            config = line.config(self.subject, value)
        except CACHE_FAILURES as error:
            self.refused.setdefault(line.method, reason_of(error))
            return None
        found = _Candidate(line=line, value=value, steps=int(value) if fewer else steps, config=config)
        return None if found.name in self.trials or found.name in self.refused else found

    def keeps(self, trial: _Trial) -> bool:
        """Return whether a setting keeps the budget."""
        return trial.value(self.budget.measure) >= self.budget.least

    def score(self, trial: _Trial) -> tuple[bool, float]:
        """Return what settings are sorted by: the budget kept, then what it leaves open."""
        kept = self.keeps(trial)
        aim = "psnr" if self.budget.measure == "speedup" else "speedup"
        return kept, trial.value(aim if kept else self.budget.measure)

    def best(self, *, caches: bool) -> list[_Trial]:
        """Return the caches, or the runs with fewer steps, best first."""
        own = [trial for trial in self.trials.values() if (trial.candidate.config is not None) == caches]
        return sorted(own, key=self.score, reverse=True)

    def next_on(self, line: Preset) -> _Candidate | None:
        """Return the setting to try next on a line: between the last that keeps the budget and its neighbour."""
        own = {trial.candidate.value: trial for trial in self.trials.values() if trial.candidate.line is line}
        mild = sorted(own, reverse=line.knob in ("updates", "steps"))  # and then stronger
        if len(mild) < 2:
            return None
        kept = [self.keeps(own[value]) for value in mild]
        # with a quality to keep, the mild settings do; with a speed to keep, the strong ones
        if self.budget.measure == "speedup":
            mild, kept = mild[::-1], kept[::-1]
        first = kept.index(False) if False in kept else len(kept)
        if first == 0:
            value = _beyond(line, mild[1], mild[0], self.subject.steps)
        elif first == len(mild):
            value = _beyond(line, mild[-2], mild[-1], self.subject.steps)
        else:
            value = _between(line, mild[first - 1], mild[first])
        return None if value is None else self.candidate(line, value)


def _between(line: Preset, one: float, other: float) -> float | None:
    """Return a value between two; None where there is none."""
    value = float(f"{math.sqrt(one * other):.2g}") if line.knob == "threshold" else (int(one) + int(other)) // 2
    return None if value in (one, other) else value


def _beyond(line: Preset, one: float, other: float, steps: int) -> float | None:
    """Return a value beyond `other` as seen from `one`; None where there is none."""
    if line.knob == "threshold":
        return float(f"{other * other / one:.2g}")
    value = round(other * other / one)
    value += (value == other) * (1 if other > one else -1)
    least, most = {"interval": (2, steps)}.get(line.knob, (1, steps - 1))
    return float(value) if least <= value <= most else None


def _lines(subject: Subject, gate_error: float | None) -> Iterator[Preset]:
    """Yield the settings to try, as lines from mild to strong."""
    steps = subject.steps
    if gate_error:
        thresholds = tuple(float(f"{factor * gate_error:.2g}") for factor in _FACTORS)
        for first, last in ((1, 1), (1, 2), (2, 2)):
            yield _cg_line(thresholds, first_order=first, last_order=last)
    updates = PRESETS["bac"].values(steps)
    yield _numbered(PRESETS["step-forecast"])
    for words, chosen in (("union 0", {"union": 0}), ("union 3", {"union": 3}), ("shared steps", {"shared": True})):
        yield Preset(
            method="BAC",
            knob="updates",
            label=f"{{:g}} updates, {words}",
            values=lambda steps: updates,
            config=lambda subject, value, chosen=chosen: planned_bac(  # type: ignore[misc]
                subject, int(value), **chosen
            ),
        )
    for order in (1, 2):
        yield Preset(
            method="TaylorSeer",
            knob="interval",
            label=f"every {{:g}} steps, order {order}",
            values=lambda steps: (2, 3, 5),
            config=lambda subject, value, order=order: TaylorSeerConfig(  # type: ignore[misc]
                interval=int(value), max_order=order
            ),
        )
    for name in _RIVALS:
        yield _numbered(PRESETS[name])
    yield Preset(
        method=NO_CACHE,
        knob="steps",
        label="{:g} steps",
        values=lambda steps: sorted({max(1, round(share * steps)) for share in (0.75, 0.5, 0.35, 0.25)}, reverse=True),
        config=lambda subject, value: None,
    )


def _numbered(preset: Preset) -> Preset:
    """Return a preset whose values are shown as short numbers, and are whole where they are counts."""
    is_whole = preset.knob != "threshold"
    return replace(
        preset,
        label=preset.label.replace("{}", "{:g}"),
        config=lambda subject, value: preset.config(subject, int(value) if is_whole else value),
    )


def _cg_line(thresholds: Sequence[float], first_order: int, last_order: int, warmup_steps: int = 3) -> Preset:
    return Preset(
        method="CG-Taylor",
        knob="threshold",
        label=f"threshold {{:g}}, orders {first_order} and {last_order}, warm-up {warmup_steps}",
        values=lambda steps: thresholds,
        config=lambda subject, value: CGTaylorConfig(
            threshold=value, first_order=first_order, last_order=last_order, warmup_steps=warmup_steps
        ),
    )


def _gate_error(subject: Subject, refused: dict[str, str]) -> float | None:
    """Return the median error of CG-Taylor's gate where nothing is skipped; None where it does not fit."""
    try:
        with cached(subject.pipe, CGTaylorConfig(threshold=0.0)):
            subject.run()
            errors = cache_summary(subject.pipe).denoisers[0].errors
    except CACHE_FAILURES as error:
        refused["CG-Taylor"] = reason_of(error)
        return None
    found = [error.error for error in errors if error.error > 0]  # False for NaN
    return statistics.median(found) if found else None


def tune_cache(
    pipe: Any,
    run: Callable[[int], Any],
    *,
    budget: str = "psnr>=30",
    steps: int = 50,
    guidance: float | None = None,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    save: bool = True,
    progress: Progress | None = None,
) -> Tuning:
    """Find the fastest cache that keeps a quality, or the best one that reaches a speed-up, and save it for "auto".

    Step forecasts, CG-Taylor, BAC, TaylorSeer, diffusers' First Block Cache, TaylorSeer and MagCache, and fewer steps
    without a cache are each tried at a few settings, about 44 runs; those that are slower than a milder setting once
    more; the four most promising are refined around the budget, about 14 runs more; at the end the best six take turns
    with the uncached pipeline. All runs have to start from the same noise. Nothing stays on the pipeline, also after a
    failure.

    Args:
        pipe: A diffusers pipeline without a cache.
        run: Makes images with a number of steps, always from the same noise, and returns them or the pipeline's output,
            as does `lambda steps: pipe(prompts, num_inference_steps=steps, generator=torch.manual_seed(0))`.
        budget: "psnr>=30" (dB, all images together) or "ssim>=0.95", to the images without a cache; or "speedup>=2".
        steps: Of the scheduler.
        guidance: Guidance scale in `run`; None is the pipeline's own. The setting is saved under it.
        settings: Rounds at the end, CPU threads and device; None is 3 rounds, torch's threads and the pipeline's
            device.
        folder: Where to save the setting; None is beside the model, or the user's folder (`ZOO_CACHE`, or zoo in the
            platform's cache folder) where that cannot be or the model is not the user's own.
        save: Save the recommendation.
        progress: Told after each run.

    Raises:
        ValueError: The budget cannot be read, a cache is on already, there are too few steps, or no cache fits at all.

    Example:
        >>> print(zoo.tune_cache(pipe, lambda n: pipe(["cat"] * 8, num_inference_steps=n, seed=0), budget="psnr>=32"))
        >>> zoo.enable_cache(pipe, "auto")
    """
    wanted = Budget.parse(budget)
    if steps < LEAST_STEPS:
        raise ValueError(f"With {steps} steps there is next to nothing to skip: a cache needs {LEAST_STEPS} or more.")
    if active_cache(pipe) is not None:
        raise ValueError("The pipeline has a cache already: call zoo.disable_cache first.")
    device = str(pipe.device)
    settings = settings or Settings(rounds=3, threads=torch.get_num_threads(), device=device)
    guidance = default_guidance(pipe) if guidance is None else guidance
    subject = Subject(pipe=pipe, run=lambda: run(steps), steps=steps, guidance=guidance)
    sweep = _Sweep(subject=subject, run=run, settings=settings, budget=wanted, progress=progress)
    with torch_threads(settings.threads), warnings.catch_warnings():
        run(min(2, steps))  # the first call of all is slower
        warnings.simplefilter("ignore", UserWarning)  # of settings that are tried, not of the user's doing
        _try_all(sweep)
        finalists = _finalists(sweep)
        sweep.measure([trial.candidate for trial in finalists], settings.rounds, "the best in turns")
    names = [trial.candidate.name for trial in finalists]
    found = _conclude(sweep, [sweep.trials[name] for name in names])
    if found.setting is None or found.fewer_steps is not None or not save:
        return found
    return replace(found, path=found.setting.save(folder or folder_for(pipe)))


def _try_all(sweep: _Sweep) -> None:
    """Try the grid, then refine the best lines."""
    lines = list(_lines(sweep.subject, _gate_error(sweep.subject, sweep.refused)))
    for line in lines:
        found = [sweep.candidate(line, value) for value in line.values(sweep.subject.steps)]
        if candidates := [candidate for candidate in found if candidate is not None]:
            sweep.measure_line(candidates, f"trying {line.method}")
    if not sweep.best(caches=True):
        raise ValueError("No cache works on this pipeline: " + "; ".join(sweep.refused.values()))
    ranked = list({id(trial.candidate.line): trial.candidate.line for trial in sweep.best(caches=True)}.values())
    chosen = [*ranked[: _REFINED - 1], lines[-1]]
    for _ in range(_HALVINGS):
        found = [sweep.next_on(line) for line in chosen]
        if candidates := [candidate for candidate in found if candidate is not None]:
            sweep.measure(candidates, 1, "refining")
    best = next((trial for trial in sweep.best(caches=True) if trial.candidate.line.method == "CG-Taylor"), None)
    if best is not None:
        config, value = best.candidate.config, best.candidate.value
        variants = [
            _cg_line((value,), first_order=config.first_order, last_order=config.last_order, warmup_steps=steps)
            for steps in (2, 5)
        ]
        found = [sweep.candidate(line, value) for line in variants]
        sweep.measure([candidate for candidate in found if candidate is not None], 1, "refining CG-Taylor")


def _finalists(sweep: _Sweep) -> list[_Trial]:
    """Return the best caches, at most two of a method, and the best run with fewer steps."""
    chosen: list[_Trial] = []
    for trial in sweep.best(caches=True):
        own = sum(other.candidate.line.method == trial.candidate.line.method for other in chosen)
        if own < 2 and len(chosen) < _FINALISTS:
            chosen.append(trial)
    return [*chosen, *sweep.best(caches=False)[:1]]


def _conclude(sweep: _Sweep, finalists: Sequence[_Trial]) -> Tuning:
    """Say what is best."""
    assert sweep.uncached is not None
    assert sweep.reference is not None
    kept = sorted(filter(sweep.keeps, finalists), key=sweep.score, reverse=True)
    cache = next((trial for trial in kept if trial.candidate.config is not None), None)
    fewer = next((trial for trial in kept if trial.candidate.config is None), None)
    better = fewer if fewer and (cache is None or sweep.score(fewer) > sweep.score(cache)) else None
    conditions = sweep.settings.conditions(
        scheduler=type(sweep.subject.pipe.scheduler).__name__,
        steps=sweep.subject.steps,
        **({} if sweep.subject.guidance is None else {"guidance scale": sweep.subject.guidance}),
        budget=str(sweep.budget),
    )
    conditions.pop("warm-up rounds")
    conditions["batch"] = len(sweep.reference)
    conditions["size"] = size_of(sweep.reference)
    conditions["dtype"] = str(sweep.subject.pipe.dtype).removeprefix("torch.")
    setting, verdict = None, []
    if cache is None:
        near = sweep.best(caches=True)[0]
        verdict.append(f"No cache keeps {sweep.budget}; the nearest is {near.candidate.name}: {_facts(near)}.")
    else:
        pipe = sweep.subject.pipe
        model = denoisers(pipe)[1][0]
        setting = SavedSetting(
            model=type(model).__name__,
            fingerprint=fingerprint(model),
            scheduler=type(pipe.scheduler).__name__,
            num_steps=sweep.subject.steps,
            guidance=sweep.subject.guidance,
            name=cache.candidate.name,
            config=cache.candidate.config,
            measured={
                "times as fast": round(cache.speedup, 3),
                **{key: round(value, 4) for key, value in cache.entry.values.items() if math.isfinite(value)},
                **conditions,
                "device": environment(sweep.settings.device)["device"],
                "date": now(),
            },
        )
        what = "Best cache" if better is not None else "Recommended"
        verdict.append(f"{what} for {sweep.budget}: {cache.candidate.name}: {_facts(cache)}.")
    if better is not None:
        verdict.append(
            f"Fewer steps serve better: take {better.candidate.steps} steps without a cache: {_facts(better)}. Nothing "
            f"is saved."
        )
    elif fewer is not None:
        verdict.append(f"Fewer steps at this budget: {fewer.candidate.name}: {_facts(fewer)}.")
    else:
        verdict.append(f"No smaller number of steps that was tried keeps {sweep.budget}.")
    lines = sorted(sweep.trials.values(), key=lambda trial: trial.speedup)
    benchmark = Benchmark(
        name="tuning",
        title=f"Cache settings of {type(sweep.subject.pipe).__name__} for {sweep.budget}",
        conditions=conditions,
        environment=environment(sweep.settings.device),
        reference=sweep.uncached.name,
        entries=(sweep.uncached, *(trial.entry for trial in lines)),
        notes=(
            f"PSNR and SSIM compare with the images of {sweep.uncached.name}, from the same noise; "
            f"{len(sweep.reference)} images, PSNR of all together.",
            f"Timed in {sweep.settings.rounds} rounds: {', '.join(trial.candidate.name for trial in finalists)}; "
            "the others once.",
            *(f"Not measured: {name}. {reason}" for name, reason in sweep.refused.items()),
        ),
    )
    return Tuning(
        budget=sweep.budget,
        setting=setting,
        fewer_steps=None if better is None else better.candidate.steps,
        verdict=tuple(verdict),
        benchmark=benchmark,
    )


def best_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries than which no other is both as fast and as like the images without a cache (Pareto front).

    Args:
        entries: Of a `Tuning`'s benchmark; the first one is the run without a cache and always among those returned.
    """
    front: list[Entry] = []
    for entry in sorted(entries[1:], key=_place, reverse=True):  # fastest first
        if not front or _place(entry)[1] > _place(front[-1])[1]:
            front.append(entry)
    return [*entries[:1], *reversed(front)]


def _place(entry: Entry) -> tuple[float, float]:
    """Return speed and likeness of an entry."""
    return entry.speedup.median if entry.speedup else 0.0, entry.values.get(PSNR, math.nan)


def _facts(trial: _Trial) -> str:
    quality = trial.entry.values[PSNR]
    said = [f"{trial.speedup:.2f} times as fast", "equal images" if math.isinf(quality) else f"PSNR {quality:.1f} dB"]
    if SSIM in trial.entry.values:
        said.append(f"SSIM {trial.entry.values[SSIM]:.3f}")
    return ", ".join(said)
