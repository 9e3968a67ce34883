"""What `zoo bench ffn` measures smaller feed-forward layers on: a classifier, or a denoiser of classes of images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from zoo.bench.caching import PSNR, class_images, psnr_of_all
from zoo.bench.latency import Latency, processor_clock
from zoo.bench.report import Entry, Ratio
from zoo.bench.timing import Progress, Settings, compare
from zoo.data.images import ImageClassification, ImageDiffusion, draw, images_for
from zoo.data.readable import places_of
from zoo.engines import EngineCall, EngineError, EngineName
from zoo.evaluation.fid_c import FID_C, judge_of
from zoo.ffn.compressing import batch_macs, recover
from zoo.ffn.depth import Nothing
from zoo.ffn.technique import arguments_of, ffn_layers, model_output, replace_module
from zoo.moe.calibration import class_batches, sampled_images
from zoo.profiling import count_params
from zoo.record import RecordError, record_of

__all__ = [
    "DENSE",
    "LEFT",
    "PREPARED",
    "RECOVERED",
    "RECOVERY_BATCH",
    "RIGHT_AWAY",
    "TOP1",
    "TRAINED",
    "Candidate",
    "ClassifierSubject",
    "DenoiserSubject",
    "Subject",
    "Technique",
    "heading",
]

DENSE = "dense"
TRAINED = "trained so"
TOP1 = "top-1 (%)"
LEFT = "FFN MACs left (%)"
SINGLE = "one image (ms)"
SINGLE_SPEED = "one image, times as fast"
PREPARED = "preparing (s)"
RECOVERY_BATCH = 128
_VALIDATION = 2000  # images
_GENERATED = 100
_KEPT_VALUES = 2**28  # of validation images in memory, a gibibyte

Technique = Callable[[nn.Module, float, Sequence[Any]], object]
"""Makes a model's feed-forward layers smaller in place: the model, the share that stays, calibration batches."""


def heading(what: str, when: str) -> str:
    """Return what a value is called: "top-1 (%)", "recovered" is "top-1 recovered (%)"."""
    name, bracket, unit = what.partition(" (")
    return f"{name} {when}{bracket}{unit}"


RIGHT_AWAY, RECOVERED = "right away", "recovered"


@dataclass(kw_only=True)
class Candidate:
    """A model to measure.

    Args:
        name: Of its line.
        series: Technique, or `TRAINED`.
        budget: Share of the feed-forward work that was to stay; None: it was trained so.
        model: Itself.
        macs: For one image.
        values: What was measured, by heading.
    """

    name: str
    series: str
    budget: float | None
    model: nn.Module
    macs: int
    values: dict[str, float]


class Subject:
    """The dense model, and what its smaller forms are made with and measured on.

    Args:
        dense: In evaluation mode, where and of the type that it is measured.
        settings: How to measure.
        calibration: Batches, as techniques take them.
        progress: Told after each step.
    """

    quality = TOP1
    """Heading of what tells how good a model is."""
    falls = False
    """Whether lower is better."""

    def __init__(
        self, dense: nn.Module, settings: Settings, calibration: Sequence[Any], progress: Progress | None
    ) -> None:
        self.dense, self.settings, self.calibration, self.progress = dense, settings, calibration, progress
        self.notes: list[str] = []
        self.one = _resized(calibration[0], 1)
        self.macs = batch_macs(dense, self.one)
        bare = copy.deepcopy(dense)
        for name in ffn_layers(dense):
            replace_module(bare, name, Nothing())
        self.ffn_macs = self.macs - batch_macs(bare, self.one)

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Return what tells how good a model is, by heading; empty where that cannot be told."""
        raise NotImplementedError

    def training(self) -> Any:
        """Return batches to recover on, drawn anew in every pass."""
        raise NotImplementedError

    def conditions(self) -> dict[str, Any]:
        """Return what its numbers depend on, for people."""
        raise NotImplementedError

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, total)

    def candidate(self, name: str, series: str, budget: float | None, model: nn.Module, seconds: float) -> Candidate:
        """Return a candidate with what needs no clock."""
        macs = batch_macs(model, self.one)
        values = {heading(key, RIGHT_AWAY): value for key, value in self.judged(model).items()}
        # models that were trained smaller may differ in more than their feed-forward layers
        values |= {} if series == TRAINED else {LEFT: 100 * (1 - (self.macs - macs) / self.ffn_macs)}
        values |= {PREPARED: seconds} if budget is not None else {}
        return Candidate(name=name, series=series, budget=budget, model=model, macs=macs, values=values)

    def make(self, techniques: dict[str, Technique], budgets: Sequence[float]) -> list[Candidate]:
        """Apply every technique at every budget; what cannot be is noted."""
        found = []
        clock = processor_clock(self.settings.device)
        for place, (series, technique) in enumerate(techniques.items()):
            for budget in budgets:
                self.tell(f"{series}, {budget:g}", place, len(techniques))
                model = copy.deepcopy(self.dense)
                start = clock()
                try:
                    technique(model, budget, self.calibration)
                except ValueError as error:
                    self.notes.append(f"Not measured: {series} at {budget:g}. {error}")
                    continue
                found.append(self.candidate(f"{series}, {budget:g}", series, budget, model.eval(), clock() - start))
        return found

    def recover(self, candidates: Sequence[Candidate], steps: int) -> None:
        """Let candidates learn from the dense model, in place, and measure them again."""
        for candidate in candidates:

            def tell(done: int, total: int, loss: float, name: str = candidate.name) -> None:
                self.tell(f"recovering {name}, loss {loss:.3f}", done, total)

            recover(candidate.model, self.dense, self.training(), steps=steps, progress=tell)
            judged = self.judged(candidate.model)
            candidate.values |= {heading(key, RECOVERED): value for key, value in judged.items()}

    def _timed(self, calls: dict[str, Callable[[], object]]) -> dict[str, tuple[Latency, Ratio | None]]:
        clock = processor_clock(self.settings.device)
        return compare(calls, self.settings, reference=DENSE, progress=self.progress, clock=clock)

    @torch.inference_mode()
    def entries(self, candidates: Sequence[Candidate], engine: EngineName | None = None) -> tuple[Entry, ...]:
        """Time the dense model and all candidates in turns, one call of the batch and one of one image.

        Args:
            candidates: Of `make`, and others.
            engine: One that they are timed on too; what it cannot run is noted.
        """
        dense = self.candidate(DENSE, DENSE, None, self.dense, 0)
        everyone = [dense, *candidates]
        batches = (_resized(self.one, self.settings.batch), self.one)
        timed = [
            self._timed({each.name: partial(model_output, each.model, batch) for each in everyone}) for batch in batches
        ]
        if engine is not None:
            for what, batch in zip((f"on {engine} (ms)", f"one image on {engine} (ms)"), batches, strict=True):
                self._time_on(engine, everyone, batch, what)
        entries = []
        for each in everyone:
            single, speedup = timed[1][each.name]
            values = {**each.values, SINGLE: single.median}
            if speedup is not None:
                values[SINGLE_SPEED] = speedup.median
            entries.append(
                Entry.of(
                    each.name,
                    timed[0][each.name],
                    params=count_params(each.model),
                    macs=each.macs,
                    values=values,
                    series=each.series,
                )
            )
        return tuple(entries)

    def _time_on(self, engine: EngineName, everyone: Sequence[Candidate], batch: Any, what: str) -> None:
        """Time all in turns on an engine, into their values."""
        calls: dict[str, Callable[[], object]] = {}
        for place, each in enumerate(everyone):
            self.tell(f"{each.name} on {engine}", place, len(everyone))
            run = EngineCall(each.model, engine, threads=self.settings.threads)
            call = partial(run, **arguments_of(batch)) if isinstance(batch, dict) else partial(run, batch[0])
            try:
                call()  # builds the graph and checks it
            except EngineError as error:
                self.notes.append(f"Left out: {each.name} on {engine}: {error}")
                continue
            calls[each.name] = call
        if DENSE not in calls:
            return
        times = self._timed(calls)
        for each in everyone:
            if each.name in times:
                time, speed = times[each.name]
                each.values[what] = time.median
                if speed is not None:
                    each.values[f"{what.removesuffix(' (ms)')}, times as fast"] = speed.median


class ClassifierSubject(Subject):
    """A classifier, judged by the share of validation images whose class is right.

    Args:
        dense: In evaluation mode, where and of the type that it is measured.
        settings: How to measure; `count` validation images, None is 2000.
        data: Labelled images; None: noise, and no accuracy.
        samples: Images for calibration.
        progress: Told after each step.
    """

    def __init__(
        self, dense: nn.Module, settings: Settings, data: str | None, samples: int, progress: Progress | None
    ) -> None:
        self.images = None if data is None else images_for(dense, data, min(samples, 64))
        self.samples, self.seen, self.validation = samples, 0, ()  # type: tuple[int, int, Any]
        if self.images is None:
            noise = torch.randn(settings.batch, *resolve_model_data_config(dense)["input_size"])
            calibration: Any = [(noise, torch.zeros(len(noise), dtype=torch.long))]
        else:
            calibration = draw(self.images, "train", samples)
            validation = draw(self.images, "validation", settings.count or _VALIDATION)
            self.seen = len(validation.dataset)  # type: ignore[arg-type]
            self.validation = _OnDevice(validation, settings)
        super().__init__(dense, settings, list(_OnDevice(calibration, settings)), progress)
        if self.one[0].numel() * self.seen < _KEPT_VALUES:
            self.validation = list(self.validation)

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Return the share of validation images whose class is right, in percent."""
        if not self.seen:
            return {}
        right = count = 0
        names, own = self.images.class_names if self.images else None, _names_of(model)
        places: Any = slice(None)
        if names is not None and own is not None and list(own) != names:  # a rival's
            places = places_of(names, own, "The first model")
        with torch.inference_mode():
            for images, labels in self.validation:
                right += int((model(images)[:, places].argmax(1) == labels).sum())
                count += len(labels)
        return {TOP1: 100 * right / count}

    def training(self) -> Any:
        """Return augmented training images."""
        return _OnDevice(_recovery_batches(self.images), self.settings)

    def conditions(self) -> dict[str, Any]:
        """Return how many images there were."""
        size = {"input": "x".join(map(str, self.one[0].shape[1:]))}
        return size | ({"calibration images": self.samples, "validation images": self.seen} if self.seen else {})


class DenoiserSubject(Subject):
    """The denoiser of a pipeline that makes images of classes, judged by images that it makes.

    Args:
        pipe: `PixelDiTPipeline`, its denoiser in evaluation mode, where and of the type that it is measured.
        settings: How to measure; `count` images are made, None is 100.
        data: Images of the pipeline's classes, for calibration and recovery; None: it is calibrated on images of its
            own.
        samples: Images for calibration.
        steps: Of the scheduler.
        guidance: Weight of classifier-free guidance.
        progress: Told after each step.

    Raises:
        ValueError: The data's classes are not the pipeline's.
    """

    quality = FID_C
    falls = True

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        data: str | None,
        samples: int,
        progress: Progress | None,
        *,
        steps: int = 12,
        guidance: float = 3.0,
    ) -> None:
        self.pipe, self.samples, self.steps, self.guidance = pipe, samples, steps, guidance
        config = pipe.transformer.config
        self.images = None if data is None else ImageDiffusion(data, config.sample_size, min(samples, 64))
        if self.images is not None and pipe.id2label:
            self.images.take_classes([pipe.id2label[number] for number in sorted(pipe.id2label)])
        self.count = settings.count or _GENERATED
        labels = [index % config.num_classes for index in range(self.count)]
        self.judge = judge_of(pipe.id2label, labels, settings.device)
        if self.judge is None:
            self.quality, self.falls = PSNR, False
        self._make = class_images(pipe, labels, guidance_scale=guidance)
        drawn: Any = sampled_images(pipe, samples) if self.images is None else draw(self.images, "train", samples)  # type: ignore[arg-type]
        super().__init__(pipe.transformer, settings, list(class_batches(pipe, drawn)), progress)
        self.original = self._generated(self.dense)
        self.notes += [] if self.judge is None else list(self.judge.notes)

    def _generated(self, model: nn.Module) -> Tensor:
        self.pipe.transformer = model
        try:
            batches = range(0, self.count, self.settings.batch)
            made = [self._make(self.steps, range(at, min(at + self.settings.batch, self.count))) for at in batches]
        finally:
            self.pipe.transformer = self.dense
        return torch.cat(made)

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Return how far its images are from the dense model's of the same noise, and from real ones."""
        if model is self.dense:
            return {} if self.judge is None else self.judge(self.original)
        made = self._generated(model)
        judged = {} if self.judge is None else self.judge(made, self.original)
        return judged | {PSNR: psnr_of_all(made, self.original)}

    def training(self) -> Any:
        """Return training images with noise."""
        return _Noisy(self.pipe, _recovery_batches(self.images))

    def conditions(self) -> dict[str, Any]:
        """Return how images were made."""
        return {
            "input": "x".join(map(str, self.one["hidden_states"].shape[1:])),
            "calibration images": f"{self.samples}{'' if self.images else ' of its own'}",
            "images made": self.count,
            "scheduler": type(self.pipe.scheduler).__name__,
            "steps": self.steps,
            "guidance scale": self.guidance,
        }


class _OnDevice:
    """Batches of images and labels, moved to where the model is."""

    def __init__(self, batches: Any, settings: Settings) -> None:
        self.batches, self.settings = batches, settings

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield images.to(self.settings.device, self.settings.torch_dtype), labels.to(self.settings.device)


class _Noisy:
    """Batches of images and labels as a denoiser's arguments, with other noise in every pass."""

    def __init__(self, pipe: Any, batches: Any) -> None:
        self.pipe, self.batches, self.passes = pipe, batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        return class_batches(self.pipe, self.batches, seed=self.passes)


def _recovery_batches(images: ImageClassification | ImageDiffusion | None) -> Any:
    """Return training images in batches of `RECOVERY_BATCH`, or of all where there are fewer."""
    assert images is not None
    images.batch_size = min(RECOVERY_BATCH, len(images._open("train", training=True)))
    return images.train_dataloader()


def _resized(batch: Any, count: int) -> Any:
    """Return a batch of so many of the first sample."""
    if isinstance(batch, Tensor):
        return batch[:1].expand(count, *batch.shape[1:]).contiguous()
    if isinstance(batch, dict):
        return {key: _resized(value, count) for key, value in batch.items()}
    return tuple(_resized(part, count) for part in batch)


def _names_of(model: nn.Module) -> Sequence[str] | None:
    """Return the names of a classifier's classes; None where nothing is recorded."""
    try:
        return record_of(model).label_names
    except RecordError:
        return None
