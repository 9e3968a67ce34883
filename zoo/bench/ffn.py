"""Smaller feed-forward layers of a trained classifier: techniques by budget, their cost and speed, and rivals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import zoo
from zoo.bench.latency import processor_clock
from zoo.bench.report import Benchmark, Entry, Goal, new_figure, plot, save_with_legend
from zoo.bench.timing import Progress, Settings, cast, compare, environment, now, torch_threads
from zoo.catalog import nearest
from zoo.data.images import draw, images_for
from zoo.ffn.compressing import compress, recover, resized
from zoo.ffn.depth import DepthConfig, Nothing
from zoo.ffn.eugens import EUGensConfig
from zoo.ffn.importance import default_loss
from zoo.ffn.low_rank import LowRankConfig
from zoo.ffn.prune import PruneConfig
from zoo.ffn.repa import RePaConfig
from zoo.ffn.reparam import reparameterize
from zoo.ffn.snnk import SNNKConfig
from zoo.ffn.technique import FFNReport, ffn_layers, replace_module
from zoo.profiling import count_macs, count_params
from zoo.sources import find

__all__ = ["TECHNIQUES", "TORCH_PRUNING", "ffn", "goals", "plot_accuracy"]

BUDGETS = (0.75, 0.5, 0.35)
DENSE = "dense"
TRAINED = "trained so"
TOP1 = "top-1 right away (%)"
RECOVERED = "top-1 recovered (%)"
LEFT = "FFN MACs left (%)"
SINGLE = "one image (ms)"
SINGLE_SPEED = "one image, times as fast"
PREPARED = "preparing (s)"
TORCH_PRUNING = "Torch-Pruning"
_RIVALS = (TORCH_PRUNING, "plain SVD")
_HALF = 0.5
_RECOVERED_KINDS = 3
_RECOVERY_BATCH = 128
_KEPT_VALUES = 2**28  # of validation images in memory, a gibibyte
_MOST_LOST = 1.5  # points, with recovery, at half of the work

Batches = Sequence[Any]
Technique = Callable[[nn.Module, float, Batches], object]
"""Makes a model's feed-forward layers smaller in place: the model, the share that stays, calibration batches."""


def _sized(config: Any, model: nn.Module, keep: float, data: Batches) -> FFNReport:
    return compress(model, resized(config, keep, model), data)


def _features(config: EUGensConfig | SNNKConfig, model: nn.Module, keep: float, data: Batches) -> FFNReport:
    """Take as many random features as cost the share of the first layer's work that stays."""
    layer = next(iter(ffn_layers(model).values()))
    if isinstance(config, EUGensConfig):
        products = config.order * (config.order + 1) // 2  # each of inputs and two constants, see EUGen
        cost = products * (layer.dim + 2) + config.order * layer.out_dim
    else:
        cost = layer.dim + layer.out_dim
    return compress(model, replace(config, features=max(1, int(keep * layer.macs() / cost))), data)


def _torch_pruning(method: str, everywhere: bool, model: nn.Module, keep: float, data: Batches) -> None:
    """Prune hidden channels of the feed-forward layers with Torch-Pruning, as its users do.

    Args:
        method: "magnitude" or "Taylor".
        everywhere: Compare channels of all layers; otherwise each layer loses the same share.
        model: Pruned in place.
        keep: Share of the hidden channels that stay.
        data: For gradients, and as an example.

    """
    import torch_pruning

    importance = torch_pruning.importance
    first = [layer.up for layer in ffn_layers(model).values()]
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # position embeddings are no part of what it prunes here
        if method == "Taylor":
            for batch in data:
                default_loss(model, batch).backward()
        pruner = torch_pruning.pruner.BasePruner(
            model,
            data[0][0][:1],
            importance=importance.GroupTaylorImportance()
            if method == "Taylor"
            else importance.GroupMagnitudeImportance(),
            pruning_ratio=1 - keep,
            global_pruning=everywhere,
            ignored_layers=[each for each in model.modules() if isinstance(each, kinds) and each not in first],
        )
        pruner.step()
    model.zero_grad(set_to_none=True)


TECHNIQUES: dict[str, Technique] = {
    "prune, activation": partial(_sized, PruneConfig()),
    "prune, CFSP": partial(_sized, PruneConfig(scores="cfsp")),
    "prune, OBS": partial(_sized, PruneConfig(scores="obs")),
    "prune, Taylor": partial(_sized, PruneConfig(scores="taylor")),
    "prune, no compensation": partial(_sized, PruneConfig(compensation="none")),
    "prune, random": partial(_sized, PruneConfig(scores="random", compensation="none")),
    "low rank, whitened": partial(_sized, LowRankConfig()),
    "RePa": partial(_sized, RePaConfig()),
    "depth": partial(_sized, DepthConfig()),
    "EUGens": partial(_features, EUGensConfig()),
    "SNNK": partial(_features, SNNKConfig()),
    "plain SVD": partial(_sized, LowRankConfig(whiten=False)),
    f"{TORCH_PRUNING}, magnitude": partial(_torch_pruning, "magnitude", False),
    f"{TORCH_PRUNING}, Taylor": partial(_torch_pruning, "Taylor", False),
    f"{TORCH_PRUNING}, Taylor, global": partial(_torch_pruning, "Taylor", True),
}
"""What is compared; rivals come last."""


@dataclass(kw_only=True)
class _Candidate:
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


class _OnDevice:
    """Batches of images and labels, moved to where the model is."""

    def __init__(self, batches: Any, settings: Settings) -> None:
        self.batches, self.settings = batches, settings

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield images.to(self.settings.device, self.settings.torch_dtype), labels.to(self.settings.device)


class _Subject:
    """The dense model, and what its smaller forms are made with and measured on.

    Args:
        dense: In evaluation mode.
        settings: How to measure.
        data: Labelled images; None: noise, and no accuracy.
        samples: Images for calibration.
        progress: Told after each step.
    """

    def __init__(
        self, dense: nn.Module, settings: Settings, data: str | None, samples: int, progress: Progress | None
    ) -> None:
        self.dense, self.settings, self.progress = dense, settings, progress
        self.notes: list[str] = []
        self.images = None if data is None else images_for(dense, data, min(samples, 64))
        self.validation: Any = ()
        self.seen = 0
        if self.images is None:
            noise = torch.randn(settings.batch, *resolve_model_data_config(dense)["input_size"])
            calibration: Any = [(noise, torch.zeros(len(noise), dtype=torch.long))]
        else:
            calibration = draw(self.images, "train", samples)
            validation = draw(self.images, "validation", settings.count or 10**9)
            self.seen = len(validation.dataset)  # type: ignore[arg-type]
            self.validation = _OnDevice(validation, settings)
        self.calibration = list(_OnDevice(calibration, settings))
        self.one = self.calibration[0][0][:1]
        if self.one.numel() * self.seen < _KEPT_VALUES:
            self.validation = list(self.validation)
        self.macs = _macs(dense, self.one)
        bare = copy.deepcopy(dense)
        for name in ffn_layers(dense):
            replace_module(bare, name, Nothing())
        self.ffn_macs = self.macs - _macs(bare, self.one)

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, total)

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of validation images whose class is right, in percent."""
        right = count = 0
        with torch.inference_mode():
            for images, labels in self.validation:
                right += int((model(images).argmax(1) == labels).sum())
                count += len(labels)
        return 100 * right / count

    def measured(self, name: str, series: str, budget: float | None, model: nn.Module, seconds: float) -> _Candidate:
        """Return a candidate with what needs no clock."""
        macs = _macs(model, self.one)
        left = 100 * (1 - (self.macs - macs) / self.ffn_macs)
        values = {TOP1: self.accuracy(model)} if self.images is not None else {}
        # models that were trained smaller may differ in more than their feed-forward layers
        values |= {} if series == TRAINED else {LEFT: left}
        values |= {PREPARED: seconds} if budget is not None else {}
        return _Candidate(name=name, series=series, budget=budget, model=model, macs=macs, values=values)

    def make(self, techniques: Mapping[str, Technique], budgets: Sequence[float]) -> list[_Candidate]:
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
                found.append(self.measured(f"{series}, {budget:g}", series, budget, model.eval(), clock() - start))
        return found

    def recover(self, candidates: Sequence[_Candidate], steps: int) -> None:
        """Let candidates learn from the dense model, in place, and measure them again."""
        assert self.images is not None
        for candidate in candidates:
            self.images.batch_size = min(_RECOVERY_BATCH, len(self.images._open("train", training=True)))
            loader: Any = _OnDevice(self.images.train_dataloader(), self.settings)

            def tell(done: int, total: int, loss: float, name: str = candidate.name) -> None:
                self.tell(f"recovering {name}, loss {loss:.3f}", done, total)

            recover(candidate.model, self.dense, loader, steps=steps, progress=tell)
            candidate.values[RECOVERED] = self.accuracy(candidate.model)

    @torch.inference_mode()
    def entries(self, candidates: Sequence[_Candidate]) -> tuple[Entry, ...]:
        """Time the dense model and all candidates in turns, one call of the batch and one of one image."""
        clock = processor_clock(self.settings.device)
        many = self.one.expand(self.settings.batch, *self.one.shape[1:]).contiguous()
        dense = self.measured(DENSE, DENSE, None, self.dense, 0)
        everyone = [dense, *candidates]
        timed = [
            compare(
                {each.name: partial(each.model, x) for each in everyone},
                self.settings,
                reference=DENSE,
                progress=self.progress,
                clock=clock,
            )
            for x in (many, self.one)
        ]
        entries = []
        for each in everyone:
            single, speedup = timed[1][each.name]
            values = {**each.values, SINGLE: single.median}
            if speedup is not None:
                values[SINGLE_SPEED] = speedup.median
            entries.append(
                Entry(
                    name=each.name,
                    time=timed[0][each.name][0],
                    speedup=timed[0][each.name][1],
                    params=count_params(each.model),
                    macs=each.macs,
                    values=values,
                    series=each.series,
                )
            )
        return tuple(entries)


def _macs(model: nn.Module, one: Tensor) -> int:
    """Count on the meta device, where attention is counted."""
    return count_macs(copy.deepcopy(model).to("meta"), one.to("meta"))


def ffn(
    settings: Settings,
    progress: Progress | None = None,
    *,
    model: str | None = None,
    data: str | Path | None = None,
    samples: int = 256,
    budgets: Sequence[float] = BUDGETS,
    recovery: int = 0,
    techniques: Sequence[str] | None = None,
    rivals: Sequence[str] = (),
    model_args: Mapping[str, Any] | None = None,
) -> list[Benchmark]:
    """Compare techniques at budgets of feed-forward work: accuracy at once and recovered, time, size.

    Args:
        settings: `batch` images are one call, and one image is another; `count` validation images tell the accuracy.
        progress: Told after each step.
        model: Name, file or folder of a classifier; without weights only times are measured, on noise.
        data: Labelled images, as `zoo compress` takes them.
        samples: Training images for calibration.
        budgets: Shares of the feed-forward multiply-accumulates that stay.
        recovery: Steps of learning from the dense model, of 128 images each; at the smallest budget, where most is
            lost, and for the best of each kind of technique and the best of Torch-Pruning's only. 0: none.
        techniques: Keys of `TECHNIQUES`; None is all.
        rivals: Models that were trained to be smaller, by name, file or folder: measured beside.
        model_args: Arguments of the model.

    Raises:
        ValueError: There is no model, a technique is unknown, a budget is no share, or trained weights come without
            data.
        ImportError: Torch-Pruning is not installed.
    """
    if wrong := [name for name in techniques or () if name not in TECHNIQUES]:
        near = nearest(wrong[0], list(TECHNIQUES), 1)
        raise ValueError(
            f"No technique is called {wrong[0]!r}.{f' Did you mean {near[0]!r}?' if near else ''} "
            f"Techniques: {'; '.join(TECHNIQUES)}."
        )
    if outside := [budget for budget in budgets if not 0 < budget < 1]:
        raise ValueError(f"A budget is a share of the feed-forward work, above 0 and below 1, got {outside[0]:g}.")
    if model is None:
        raise ValueError(
            "zoo bench ffn needs a classifier and labelled images: --model NAME.TAG, file or folder, and --data DIR "
            "(class folders or Parquet); or one without weights, such as vit_small_patch16_224, for times only."
        )
    source = find(model)
    trained = source.kind != "model" or bool(source.tag)
    if trained and data is None:
        raise ValueError(f"Accuracy of {model} is measured on labelled images: --data DIR (class folders or Parquet).")
    names = list(techniques or TECHNIQUES)
    if any(name.startswith(TORCH_PRUNING) for name in names) and find_spec("torch_pruning") is None:
        raise ImportError("Torch-Pruning needs the 'benchmark' extra: pip install 'ffn-zoo[benchmark]'")
    torch.manual_seed(0)
    dense = cast(zoo.create_model(model, pretrained=trained, **(model_args or {})).eval(), settings)
    with torch_threads(settings.threads):
        subject = _Subject(dense, settings, str(data) if trained else None, samples, progress)
        candidates = subject.make({name: TECHNIQUES[name] for name in names}, budgets)
        if subject.images is not None and recovery:
            subject.recover(_to_recover(candidates), recovery)
        for rival in rivals:
            trained_so = cast(zoo.create_model(rival, pretrained=True).eval(), settings)
            reparameterize(trained_so, measure=False)
            candidates.append(subject.measured(rival, TRAINED, None, trained_so, 0))
        entries = subject.entries(candidates)
    conditions = settings.conditions(model=model, input="x".join(map(str, subject.one.shape[1:])))
    if subject.images is not None:
        conditions |= {"calibration images": samples, "validation images": subject.seen}
    notes = [
        f"{LEFT}: of the dense model's feed-forward layers. Times, {PREPARED} too, are of the process where one thread "
        "runs on a CPU; those of calls are taken in turns.",
        *subject.notes,
    ]
    if subject.images is None:
        notes.append("The weights are random: times only.")
    elif recovery:
        notes.append(
            f"Recovered: {recovery} steps of {_RECOVERY_BATCH} images on outputs and features of the dense model; only "
            "the best technique of each kind, at the smallest budget."
        )
    return [
        Benchmark(
            name="ffn",
            title="Smaller feed-forward layers of a trained classifier: techniques by share of the work that stays",
            conditions=conditions,
            environment=environment(settings.device),
            date=now(),
            reference=DENSE,
            entries=entries,
            goals=goals(entries),
            notes=tuple(notes),
        )
    ]


def _to_recover(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return the best of the best three kinds of technique, and Torch-Pruning's best, at the smallest budget."""
    smallest = min((each.budget for each in candidates if each.budget is not None), default=None)
    best: dict[str, _Candidate] = {}
    for each in candidates:
        kind = each.series.partition(",")[0]
        if each.budget == smallest and (kind not in best or each.values[TOP1] > best[kind].values[TOP1]):
            best[kind] = each
    ours = sorted((kind for kind in best if kind not in _RIVALS), key=lambda kind: -best[kind].values[TOP1])
    return [best[kind] for kind in (*ours[:_RECOVERED_KINDS], TORCH_PRUNING) if kind in best]


def goals(entries: Sequence[Entry]) -> tuple[Goal, ...]:
    """Compare pruning at half of the work with Torch-Pruning's best, and recovered with the dense model.

    Without recovery it is what pruning loses right away that has to be as small.

    Args:
        entries: Of `ffn`; a line's name ends with its budget.
    """
    by_name = {entry.name: entry.values for entry in entries if TOP1 in entry.values}
    end = f", {_HALF:g}"

    def best(kind: str, key: str) -> tuple[float, str] | None:
        found = [
            (values[key], name)
            for name, values in by_name.items()
            if name.startswith(kind) and name.endswith(end) and key in values
        ]
        return max(found, default=None)

    told = []
    ours, theirs, recovered = best("prune", TOP1), best(TORCH_PRUNING, TOP1), best("prune", RECOVERED)
    last, when = (recovered, "recovered") if recovered else (ours, "right away")
    if ours and theirs:
        what = f"{ours[1]}: points of top-1 above {theirs[1]}, right away"
        told.append(Goal(what=what, value=ours[0] - theirs[0], wanted=0))
    if last and DENSE in by_name:
        what = f"{last[1]}: points of top-1 below {DENSE}, {when}"
        told.append(Goal(what=what, value=by_name[DENSE][TOP1] - last[0], wanted=_MOST_LOST, at_most=True))
    return tuple(told)


def plot_accuracy(benchmark: Benchmark, path: str | Path) -> Path:
    """Draw top-1 against the share of work that stays, and against speed, and write a PNG or SVG by the suffix.

    Without accuracies it is the plot of other benchmarks, work against time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    entries = [entry for entry in benchmark.entries if TOP1 in entry.values]
    if not entries:
        return plot(benchmark, path)
    figure = new_figure(11.4, 5.2)
    work, speed = figure.subplots(1, 2, sharey=True)
    batch = benchmark.conditions["batch"]
    for index, series in enumerate(dict.fromkeys(entry.series for entry in entries)):
        own = [entry for entry in entries if entry.series == series]
        color, marker = ("k", "D") if series in (DENSE, TRAINED) else (f"C{index % 10}", "os^v"[index // 10 % 4])
        rival = series.partition(",")[0] in _RIVALS
        line = "" if series in (DENSE, TRAINED) else ":" if rival else "-"
        for axes, place in ((work, _work), (speed, _speed)):
            shown = [(place(entry), entry) for entry in own if place(entry) is not None]
            style: dict[str, Any] = dict(color=color, marker=marker, markersize=5, linewidth=1.2)
            label = series if axes is work or series == TRAINED else None
            axes.plot([x for x, _ in shown], [e.values[TOP1] for _, e in shown], linestyle=line, label=label, **style)
            for x, entry in shown:
                if RECOVERED in entry.values:
                    axes.plot(
                        [x, x],
                        [entry.values[TOP1], entry.values[RECOVERED]],
                        color=color,
                        linewidth=0.8,
                        linestyle="--",
                    )
                    axes.plot(x, entry.values[RECOVERED], color=color, marker="*", markersize=13, markeredgecolor="k")
                if series == TRAINED:
                    axes.annotate(Path(entry.name).name, (x, entry.values[TOP1]), xytext=(5, -9),
                                  textcoords="offset points", fontsize=7)  # fmt: skip
    work.set_xlabel("feed-forward MACs that stay (%)")
    work.invert_xaxis()
    work.set_ylabel(f"top-1 on {benchmark.conditions.get('validation images', '?')} validation images (%)")
    speed.set_xlabel(f"times as fast as dense, batch {batch} — {benchmark.environment['device']}", fontsize=9)
    for axes in (work, speed):
        axes.grid(alpha=0.3)
    stars = "; stars: recovered" if any(RECOVERED in entry.values for entry in entries) else ""
    figure.suptitle(f"{benchmark.title}\nright away{stars}", fontsize=10)
    return save_with_legend(figure, path, loc="outside right upper", fontsize=7)


def _work(entry: Entry) -> float | None:
    return entry.values.get(LEFT)


def _speed(entry: Entry) -> float | None:
    return 1.0 if entry.name == DENSE else entry.speedup.median if entry.speedup else None
