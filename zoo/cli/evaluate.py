"""`zoo evaluate`: PSNR and SSIM of restorers on benchmark sets, as the papers measure them."""

from __future__ import annotations

import argparse
import itertools
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.inputs import add_device
from zoo.cli.models import find_model
from zoo.cli.output import UsageError, at_least, print_json, print_table, progress, table
from zoo.cli.restore import check_budget
from zoo.evaluation.protocols import PROTOCOLS, Protocol, protocol_of_task
from zoo.sources import WEIGHT_SUFFIXES, Source, beside, find

if TYPE_CHECKING:
    from zoo.data.photos import Pair
    from zoo.evaluation.restorers import Restorer, Score

_BASELINES = ("bicubic", "input")
_SIGMAS = (15.0, 25.0, 50.0)  # of the published tables, where a model is not for one of its own
_HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", "mae": "MAE"}
_DIGITS = {"psnr": 3, "ssim": 4, "mae": 4}


def add_parser(subparsers: Any) -> None:
    """Add `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a restorer on benchmark sets",
        description="Print the mean PSNR and SSIM of a restorer on benchmark sets, measured as the papers do. A set is "
        "a folder of clean images (their degraded versions are made), a folder that holds HR, GT or target and LR*, "
        "input*, blur* or noisy* (scales in folders X2, X3, X4 or names like babyx2.png; two views in inputL and "
        "inputR), or a text file that names clean images of the set in its folder.",
        epilog="protocols: " + "; ".join(f"{name}: {protocol.summary}" for name, protocol in PROTOCOLS.items()),
    )
    parser.add_argument("model", metavar="MODEL", help="name, NAME.TAG, file or folder; baselines: bicubic, input")
    parser.add_argument("--weights", metavar="FILE", help="weight file for MODEL, or a tag of it")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER", help="benchmark sets")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="default: the customary one of the model's task")
    parser.add_argument("--scale", type=int, help="of bicubic; of a model, checked")
    parser.add_argument("--sigma", metavar="15,25,50", help="noise to add, of 255 (default: the model's own, or these)")
    parser.add_argument(
        "--jpeg-quality", metavar="75,50", help="of the protocol jpeg (default: 75 and 50, at scale 1 40)"
    )
    parser.add_argument("--self-ensemble", action="store_true", help="average 8 flips and turns (papers' '+')")
    parser.add_argument("--budget", default="4GB", help="memory the process may hold: 800MB, 4GB, none (default: 4GB)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of each set")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    sets = _sets(args.data)
    wanted = _sigmas(args.sigma)
    at_least(args, limit=1)
    if args.model not in _BASELINES:
        source = find_model(args.model, weights=args.weights is None)
        if source.task == "classification":
            raise UsageError(
                f"{args.model} is a classifier, and this command measures restorers. Accuracy on DIR/val/CLASS/*.jpg:"
                f" {_validation(source)}"
            )
        if source.kind == "pipeline":
            raise UsageError(f"{args.model} is a model for {source.task or 'generation'}: it restores no images.")
    if args.weights is not None and Path(args.weights).suffix in WEIGHT_SUFFIXES:
        find(args.weights)  # says that there is no such file
    check_budget(args.budget)
    subjects = _Subjects(args, wanted)
    protocol, scale, channels = subjects.protocol, subjects.scale, subjects.channels
    if protocol.degradation == "bicubic" and scale < 2:
        raise UsageError(f"The protocol {protocol.name!r} is for super-resolution; {args.model} does not enlarge.")
    sigmas: list[float | None] = list(subjects.sigmas) if protocol.degradation == "noise" else [None]
    if wanted and sigmas == [None]:
        raise UsageError(f"--sigma is for a protocol that adds noise; {protocol.name!r} does not.")
    qualities = _qualities(args.jpeg_quality, protocol, scale)

    from zoo.data.photos import find_pairs
    from zoo.evaluation.restorers import evaluate

    found = {name: find_pairs(folder, scale, subjects.views) for name, folder in sets.items()}
    chosen = {name: pairs[: args.limit] for name, pairs in found.items()}
    on_file = {name for name, pairs in chosen.items() if any(pair.degraded for pair in pairs)}
    for name in on_file:
        if args.jpeg_quality or len(wanted) > 1:
            option = "--jpeg-quality" if args.jpeg_quality else "--sigma with several values"
            raise UsageError(
                f"{option} makes degraded images, and {name} holds its own, {chosen[name][0].degraded[0].parent}: give "
                f"the clean ones alone, {name}={chosen[name][0].clean.parent}."
            )
    results: list[dict[str, Any]] = []
    with progress(args) as bar:
        task = bar.add_task("evaluating", total=len(sigmas) * len(qualities) * sum(map(len, chosen.values())))
        for turn, (sigma, quality) in enumerate(itertools.product(sigmas, qualities)):
            restorer = subjects.restorer(sigma)
            for name, pairs in chosen.items():
                if name in on_file and turn:
                    bar.advance(task, len(pairs))  # the files are what they are
                    continue
                scores = evaluate(
                    restorer,
                    pairs,
                    protocol,
                    scale=scale,
                    sigma=sigma,
                    quality=quality,
                    channels=channels,
                    progress=lambda done, total: bar.advance(task),
                )
                made = (sigma, quality) if name not in on_file else (wanted[0] if wanted else None, None)
                results.append(_summary(name, pairs, len(found[name]), made, protocol, scores))
    if args.json:
        report = {"model": args.model, "weights": args.weights, "scale": scale, "protocol": protocol.name}
        report |= {"protocol_summary": protocol.summary, "self_ensemble": args.self_ensemble}
        report |= {"device": subjects.device, "dtype": args.dtype, "sets": results}
        print_json(report)
    elif args.quiet:
        for result in results:
            made = (result["sigma"], result["jpeg_quality"])
            words = [result["set"], *(f"{value:g}" for value in made if value is not None)]
            print("\t".join(words + [f"{result[key]:.{_DIGITS[key]}f}" for key in protocol.metrics]))
    else:
        _print(args, protocol, scale, subjects.device, results)
    return 0


def _validation(source: Source) -> str:
    """Return the command that measures a classifier: with the config that it was trained by, where that is known."""
    from zoo.cli.train import find_config

    config = "CONFIG"
    beside = source.path / "training.yaml" if source.path is not None else None
    if beside is not None and beside.is_file():
        config = str(beside)
    elif source.tag:
        with suppress(ValueError):
            find_config(f"classification/{source.architecture}_{source.tag}")
            config = f"classification/{source.architecture}_{source.tag}"
    words = ["zoo", "train", "validate", "--config", config, "--model.init_args.model", source.name]
    return shlex.join([*words, "--model.init_args.pretrained", "true", "--data.init_args.data_dir", "DIR"])


class _Subjects:
    """What is measured: a baseline, or a model that may be another one for each noise level."""

    def __init__(self, args: argparse.Namespace, wanted: list[float]) -> None:
        self.args, self.channels, self.views, self.device = args, 3, 1, "cpu"
        self.sigmas = wanted or list(_SIGMAS)
        self._models: dict[float | None, Any] = {}
        if args.model in _BASELINES:
            self.scale = args.scale or 1
            if (self.scale > 1) != (args.model == "bicubic"):
                raise UsageError("bicubic needs a --scale of at least 2, and input has none.")
            default = "y-crop" if args.model == "bicubic" else "rgb"
            self.protocol = PROTOCOLS[args.protocol or default]
            return
        # published models for one noise level each are found by it; what is named exactly serves for all
        exact = args.weights is not None or "." in args.model or "/" in args.model or Path(args.model).exists()
        self._by_sigma = bool(wanted) and not exact
        model = self._model(self.sigmas[0] if self._by_sigma else None)
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        self.scale, self.channels = (
            int(getattr(model, "scale", 1)),
            int(getattr(model, "out_chans", getattr(model, "in_chans", 3))),
        )
        self.views = 2 if getattr(model, "in_chans", 3) == 6 else 1
        self.device = str(next(model.parameters()).device)
        self.protocol = PROTOCOLS[args.protocol] if args.protocol else protocol_of_task(str(cfg.get("task", "sr")))
        if not wanted and args.weights is None and isinstance(cfg.get("sigma"), (int, float)):
            self.sigmas = [float(cfg["sigma"])]

    def _model(self, sigma: float | None) -> Any:
        from zoo.cli.restore import load_model

        key = sigma if self._by_sigma else None
        if key not in self._models:
            self._models.clear()  # one at a time in memory
            self._models[key] = load_model(self.args, task=None, sigma=key)
        return self._models[key]

    def restorer(self, sigma: float | None) -> Restorer:
        """Return what restores images with this noise."""
        from zoo.evaluation.restorers import bicubic, network, unchanged

        if self.args.model == "bicubic":
            return bicubic(self.scale)
        if self.args.model == "input":
            return unchanged
        budget = None if self.args.budget.lower() == "none" else self.args.budget
        return network(self._model(sigma), budget=budget, self_ensemble=self.args.self_ensemble)


def _sets(given: list[str]) -> dict[str, Path]:
    """Read NAME=FOLDER; a folder alone is called by its own name."""
    sets: dict[str, Path] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        path = Path(folder if separator else text)
        name = name if separator else path.name or str(path.resolve().name)
        if not name or name in sets:
            raise UsageError(f"--data takes NAME=FOLDER with different names, got {text!r}.")
        if not path.exists():
            raise UsageError(f"--data {name}: there is no folder or list {path}.{beside(path)}")
        sets[name] = path
    return sets


def _sigmas(text: str | None) -> list[float]:
    try:
        sigmas = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        sigmas = [-1.0]
    if not all(0 <= sigma <= 255 for sigma in sigmas):
        raise UsageError(f"--sigma takes numbers from 0 to 255 separated by commas, got {text!r}.")
    return sigmas


def _qualities(text: str | None, protocol: Protocol, scale: int) -> list[int | None]:
    """Read the qualities of a protocol that compresses; [None] of any other."""
    if protocol.degradation != "jpeg":
        if text:
            raise UsageError(f"--jpeg-quality is for the protocol jpeg; {protocol.name!r} does not compress.")
        return [None]
    try:
        found = [int(part) for part in text.split(",")] if text else [75, 50] if scale > 1 else [40]
    except ValueError:
        found = [0]
    if not all(1 <= quality <= 100 for quality in found):
        raise UsageError(f"--jpeg-quality takes whole numbers from 1 to 100 separated by commas, got {text!r}.")
    return list(found)


def _summary(
    name: str,
    pairs: list[Pair],
    available: int,
    made: tuple[float | None, int | None],
    protocol: Protocol,
    scores: list[Score],
) -> dict[str, Any]:
    """Return the means of a set and the values of its images."""
    count = len(scores)
    means = {key: sum(score.values[key] for score in scores) / count for key in protocol.metrics}
    return {
        "set": name,
        "images": count,
        "available": available,
        "made": sum(not pair.degraded for pair in pairs),
        "sigma": made[0],
        "jpeg_quality": made[1],
        **means,
        "seconds_per_image": sum(score.seconds for score in scores) / count,
        "per_image": [{"file": score.file.name, **score.values, "seconds": score.seconds} for score in scores],
    }


def _print(
    args: argparse.Namespace, protocol: Protocol, scale: int, device: str, results: list[dict[str, Any]]
) -> None:
    made_by = [key for key in ("sigma", "jpeg_quality") if any(result[key] is not None for result in results)]
    columns = [
        "set",
        "images",
        *(key.replace("_", " ") for key in made_by),
        *(_HEADINGS[key] for key in protocol.metrics),
        "s/image",
    ]
    name = args.model + (f" with {args.weights}" if args.weights else "") + (f", x{scale}" if scale > 1 else "")
    rows = table(*columns, title=name + (", self-ensemble" if args.self_ensemble else ""), right=columns[1:])
    for result in results:
        whole = result["images"] == result["available"]
        cells = [result["set"], str(result["images"]) + ("" if whole else f" of {result['available']}")]
        cells += ["-" if result[key] is None else f"{result[key]:g}" for key in made_by]
        cells += [f"{result[key]:.{_DIGITS[key]}f}" for key in protocol.metrics]
        rows.add_row(*cells, f"{result['seconds_per_image']:.2f}")
    made = sorted({result["set"] for result in results if result["made"]})
    what = "degraded images made here: " + ", ".join(made) if made else "degraded images read from files"
    print_table(rows, f"Protocol {protocol.name}: {protocol.summary}.", f"{device}, {args.dtype}; {what}.")
