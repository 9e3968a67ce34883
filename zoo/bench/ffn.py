"""Smaller feed-forward layers of a trained model: techniques by budget, their cost and speed, and rivals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from zoo.bench.caching import PSNR
from zoo.bench.ffn_subjects import (
    DENSE,
    LEFT,
    PREPARED,
    RECOVERED,
    RECOVERY_BATCH,
    RIGHT_AWAY,
    TOP1,
    TRAINED,
    Candidate,
    ClassifierSubject,
    DenoiserSubject,
    Subject,
    Technique,
    heading,
)
from zoo.bench.report import Benchmark, Entry, Goal, plot, save_with_legend
from zoo.bench.timing import Progress, Settings, cast, environment, torch_threads
from zoo.catalog import did_you_mean
from zoo.diffusion.pipelines import PixelDiTPipeline
from zoo.engines import check_engine
from zoo.evaluation.fid_c import FID_C
from zoo.ffn.compressing import compress, resized
from zoo.ffn.depth import DepthConfig
from zoo.ffn.eugens import EUGensConfig
from zoo.ffn.importance import default_loss
from zoo.ffn.low_rank import LowRankConfig
from zoo.ffn.prune import PruneConfig
from zoo.ffn.repa import RePaConfig
from zoo.ffn.reparam import reparameterize
from zoo.ffn.snnk import SNNKConfig
from zoo.ffn.technique import FFNReport, arguments_of, ffn_layers
from zoo.figures import new_figure
from zoo.sources import find

__all__ = ["TECHNIQUES", "TORCH_PRUNING", "ffn", "goals", "plot_quality"]

BUDGETS = (0.75, 0.5, 0.35)
TORCH_PRUNING = "Torch-Pruning"
_RIVALS = (TORCH_PRUNING, "plain SVD")
_HALF = 0.5
_RECOVERED_KINDS = 3
_MOST_LOST = 1.5  # points, with recovery, at half of the work


def _sized(config: Any, model: nn.Module, keep: float, data: Sequence[Any]) -> FFNReport:
    return compress(model, resized(config, keep, model), data)


def _features(config: EUGensConfig | SNNKConfig, model: nn.Module, keep: float, data: Sequence[Any]) -> FFNReport:
    """Take as many random features as cost the share of the first layer's work that stays."""
    layer = next(iter(ffn_layers(model).values()))
    if isinstance(config, EUGensConfig):
        products = config.order * (config.order + 1) // 2  # each of inputs and two constants, see EUGen
        cost = products * (layer.dim + 2) + config.order * layer.out_dim
    else:
        cost = layer.dim + layer.out_dim
    return compress(model, replace(config, features=max(1, int(keep * layer.macs() / cost))), data)


def _torch_pruning(method: str, everywhere: bool, model: nn.Module, keep: float, data: Sequence[Any]) -> None:
    """Prune hidden channels of the feed-forward layers with Torch-Pruning, as its users do.

    Args:
        method: "magnitude" or "Taylor".
        everywhere: Compare channels of all layers; otherwise each layer loses the same share.
        model: Pruned in place.
        keep: Share of the hidden channels that stay.
        data: For gradients, and as an example.

    """
    import torch_pruning

    importance, denoiser = torch_pruning.importance, isinstance(data[0], dict)
    first = [layer.up for layer in ffn_layers(model).values()]
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # position embeddings are no part of what it prunes here
        if method == "Taylor":
            for batch in data:
                default_loss(model, batch).backward()
        example = arguments_of(data[0]) if denoiser else data[0][0][:1]
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=importance.GroupTaylorImportance()
            if method == "Taylor"
            else importance.GroupMagnitudeImportance(),
            pruning_ratio=1 - keep,
            global_pruning=everywhere,
            output_transform=(lambda output: output.sample) if denoiser else None,
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
    engine: str | None = None,
) -> list[Benchmark]:
    """Compare techniques at budgets of feed-forward work: quality at once and recovered, time, size.

    A classifier is judged by its accuracy, the denoiser of a pipeline by the images that it makes.

    Args:
        settings: `batch` images are one call, and one image is another; `count` validation images tell the accuracy,
            or so many images are made.
        progress: Told after each step.
        model: Name, file or folder of a classifier, or a `PixelDiTPipeline`; without weights only times are measured,
            on noise.
        data: Labelled images, as `zoo compress` takes them; a pipeline is calibrated on images of its own without.
        samples: Training images for calibration.
        budgets: Shares of the feed-forward multiply-accumulates that stay.
        recovery: Steps of learning from the dense model, of 128 images each; at the smallest budget, where most is
            lost, and for the best of each kind of technique and the best of Torch-Pruning's only. 0: none.
        techniques: Keys of `TECHNIQUES`; None is all.
        rivals: Models that were trained to be smaller, by name, file or folder: measured beside.
        model_args: Arguments of the model.
        engine: As in `zoo.accelerate`: what all are timed on too, beside eager PyTorch.

    Raises:
        ValueError: There is no model, a technique or engine is unknown, a budget is no share, trained weights come
            without data, or an engine is asked for on a GPU or in another type than float32.
        ImportError: Torch-Pruning or the engine is not installed.
    """
    if wrong := [name for name in techniques or () if name not in TECHNIQUES]:
        raise ValueError(
            f"No technique is called {wrong[0]!r}.{did_you_mean(wrong[0], TECHNIQUES, quoted=True)} "
            f"Techniques: {'; '.join(TECHNIQUES)}."
        )
    if outside := [budget for budget in budgets if not 0 < budget < 1]:
        raise ValueError(f"A budget is a share of the feed-forward work, above 0 and below 1, got {outside[0]:g}.")
    if model is None:
        raise ValueError(
            "zoo bench ffn needs a classifier and labelled images: --model NAME.TAG, file or folder, and --data DIR "
            "(class folders or Parquet); or one without weights, such as vit_small_patch16_224, for times only; or a "
            "pipeline such as pixeldit.cifar10."
        )
    source = find(model)
    generates, trained = source.kind == "pipeline", source.kind != "model" or bool(source.tag)
    if generates and recovery and data is None:
        raise ValueError(f"Recovery of {model} learns from images: --data DIR (class folders or Parquet).")
    if generates and rivals:
        raise ValueError("--rival takes classifiers; a pipeline stands alone.")
    if trained and not generates and data is None:
        raise ValueError(f"Accuracy of {model} is measured on labelled images: --data DIR (class folders or Parquet).")
    runner = None if engine is None else check_engine(engine)
    if runner is not None and (settings.device != "cpu" or settings.dtype != "float32"):
        raise ValueError(f"The engine {runner!r} runs float32 on the CPU, not {settings.dtype} on {settings.device}.")
    names = list(techniques or TECHNIQUES)
    if any(name.startswith(TORCH_PRUNING) for name in names) and find_spec("torch_pruning") is None:
        raise ImportError("Torch-Pruning needs the 'benchmark' extra: pip install 'ffn-zoo[benchmark]'")
    torch.manual_seed(0)
    with torch_threads(settings.threads):
        words = None if data is None else str(data)
        subject: Subject
        if generates:
            subject = DenoiserSubject(_pipeline(model, settings), settings, words, samples, progress)
        else:
            dense = cast(zoo.create_model(model, pretrained=trained, **(model_args or {})).eval(), settings)
            subject = ClassifierSubject(dense, settings, words if trained else None, samples, progress)
        candidates = subject.make({name: TECHNIQUES[name] for name in names}, budgets)
        if trained and recovery:
            subject.recover(_to_recover(candidates, subject), recovery)
        for rival in rivals:
            trained_so = cast(zoo.create_model(rival, pretrained=True).eval(), settings)
            reparameterize(trained_so, measure=False)
            candidates.append(subject.candidate(rival, TRAINED, None, trained_so, 0))
        entries = subject.entries(candidates, runner)
    notes = [
        f"{LEFT}: of the dense model's feed-forward layers. Times, {PREPARED} too, are of the process where one thread "
        "runs on a CPU; those of calls are taken in turns.",
        *subject.notes,
    ]
    if not trained:
        notes.append("The weights are random: times only.")
    elif recovery:
        notes.append(
            f"Recovered: {recovery} steps of {RECOVERY_BATCH} images on outputs and features of the dense model; only "
            "the best technique of each kind, at the smallest budget."
        )
    return [
        Benchmark(
            name="ffn",
            title=f"Smaller feed-forward layers of a trained {'denoiser' if generates else 'classifier'}: techniques "
            "by share of the work that stays",
            conditions=settings.conditions(model=model, **subject.conditions()),
            environment=environment(settings.device),
            reference=DENSE,
            entries=entries,
            goals=goals(entries),
            notes=tuple(notes),
        )
    ]


def _pipeline(name: str, settings: Settings) -> PixelDiTPipeline:
    pipe = zoo.create_pipeline(name, dtype=settings.torch_dtype)
    if not isinstance(pipe, PixelDiTPipeline):
        raise ValueError(
            f"zoo bench ffn takes classifiers and pipelines such as pixeldit.cifar10, not a {type(pipe).__name__}."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(settings.device)


def _to_recover(candidates: Sequence[Candidate], subject: Subject) -> list[Candidate]:
    """Return the best of the best three kinds of technique, and Torch-Pruning's best, at the smallest budget."""
    smallest = min((each.budget for each in candidates if each.budget is not None), default=None)

    def worth(each: Candidate) -> float:
        value = each.values[heading(subject.quality, RIGHT_AWAY)]
        return -value if subject.falls else value

    best: dict[str, Candidate] = {}
    for each in candidates:
        kind = each.series.partition(",")[0]
        if each.budget == smallest and (kind not in best or worth(each) > worth(best[kind])):
            best[kind] = each
    ours = sorted((kind for kind in best if kind not in _RIVALS), key=lambda kind: -worth(best[kind]))
    return [best[kind] for kind in (*ours[:_RECOVERED_KINDS], TORCH_PRUNING) if kind in best]


def goals(entries: Sequence[Entry]) -> tuple[Goal, ...]:
    """Compare pruning at half of the work with Torch-Pruning's best, and recovered with the dense model.

    Without recovery it is what pruning loses right away that has to be as small.

    Args:
        entries: Of `ffn`; a line's name ends with its budget.
    """
    right_away, later = heading(TOP1, RIGHT_AWAY), heading(TOP1, RECOVERED)
    by_name = {entry.name: entry.values for entry in entries if right_away in entry.values}
    end = f", {_HALF:g}"

    def best(kind: str, key: str) -> tuple[float, str] | None:
        found = [
            (values[key], name)
            for name, values in by_name.items()
            if name.startswith(kind) and name.endswith(end) and key in values
        ]
        return max(found, default=None)

    told = []
    ours, theirs, recovered = best("prune", right_away), best(TORCH_PRUNING, right_away), best("prune", later)
    last, when = (recovered, RECOVERED) if recovered else (ours, RIGHT_AWAY)
    if ours and theirs:
        what = f"{ours[1]}: points of top-1 above {theirs[1]}, right away"
        told.append(Goal(what=what, value=ours[0] - theirs[0], wanted=0))
    if last and DENSE in by_name:
        what = f"{last[1]}: points of top-1 below {DENSE}, {when}"
        told.append(Goal(what=what, value=by_name[DENSE][right_away] - last[0], wanted=_MOST_LOST, at_most=True))
    return tuple(told)


def plot_quality(benchmark: Benchmark, path: str | Path) -> Path:
    """Draw quality against the share of work that stays, and against speed, and write a PNG or SVG by the suffix.

    Quality is top-1 accuracy, of images that were made FID-C or PSNR; without any it is the plot of other benchmarks,
    work against time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    measured = {key for entry in benchmark.entries for key in entry.values}
    quality = next((key for key in (TOP1, FID_C, PSNR) if heading(key, RIGHT_AWAY) in measured), None)
    if quality is None:
        return plot(benchmark, path)
    right_away, later = heading(quality, RIGHT_AWAY), heading(quality, RECOVERED)
    entries = [entry for entry in benchmark.entries if right_away in entry.values]
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
            axes.plot(
                [x for x, _ in shown], [e.values[right_away] for _, e in shown], linestyle=line, label=label, **style
            )
            for x, entry in shown:
                if later in entry.values:
                    axes.plot(
                        [x, x],
                        [entry.values[right_away], entry.values[later]],
                        color=color,
                        linewidth=0.8,
                        linestyle="--",
                    )
                    axes.plot(x, entry.values[later], color=color, marker="*", markersize=13, markeredgecolor="k")
                if series == TRAINED:
                    axes.annotate(_told_apart(entry.name, own), (x, entry.values[right_away]), xytext=(5, -9),
                                  textcoords="offset points", fontsize=7)  # fmt: skip
    work.set_xlabel("feed-forward MACs that stay (%)")
    work.invert_xaxis()
    told = benchmark.conditions
    count = f"{told['validation images']} validation images" if quality == TOP1 else f"{told['images made']} images"
    work.set_ylabel(f"{quality} of {count}")
    if quality == FID_C:
        work.invert_yaxis()  # up is better
    speed.set_xlabel(f"times as fast as dense, batch {batch} — {benchmark.environment['device']}", fontsize=9)
    for axes in (work, speed):
        axes.grid(alpha=0.3)
    stars = "; stars: recovered" if any(later in entry.values for entry in entries) else ""
    figure.suptitle(f"{benchmark.title}\nright away{stars}", fontsize=10)
    return save_with_legend(figure, path, loc="outside right upper", fontsize=7)


def _told_apart(name: str, entries: Sequence[Entry]) -> str:
    """Return the parts of a path that not all have: every training calls its checkpoint last.ckpt."""
    every = set.intersection(*(set(Path(entry.name).parts) for entry in entries))
    return "/".join(part for part in Path(name).parts if part not in every) or Path(name).name


def _work(entry: Entry) -> float | None:
    return entry.values.get(LEFT)


def _speed(entry: Entry) -> float | None:
    return 1.0 if entry.name == DENSE else entry.speedup.median if entry.speedup else None
