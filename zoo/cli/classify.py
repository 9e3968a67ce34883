"""`zoo classify`: name what is in pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo import catalog
from zoo.cli.cluster import add_ray, check_ray, spread
from zoo.cli.inputs import add_device, add_engine, find_pictures, one_line, report_failures
from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, at_least, hush, note, pick_device, print_json, print_table, progress, table
from zoo.sources import beside

if TYPE_CHECKING:
    from torch import nn

    from zoo.engines import EngineName

_NARROWEST = 200  # most times that a side is as long as the other
_NAMED = 20  # classes that are listed
UNKNOWN = "none that it knows"


def add_parser(subparsers: Any) -> None:
    """Add `classify`."""
    parser = subparsers.add_parser(
        "classify",
        help="name what is in pictures",
        description="Print the most probable classes of each picture, or that none is likely, where the weights state "
        "from which probability on one is. Unreadable ones are listed, with exit code 1.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders")
    parser.add_argument("--model", metavar="NAME.TAG", help="published weights, file, folder or Hub id")
    add_model_args(parser)
    parser.add_argument("--topk", type=int, default=3, metavar="K", help="classes for each picture (default: 3)")
    add_device(parser)
    add_engine(parser)
    add_ray(parser)


def default_model() -> str:
    """Return the shipped weights to classify with: those that know photographs, the most accurate of them.

    Raises:
        UsageError: None are shipped.
    """
    found = {
        f"{name}.{tag}": next((each["value"] for each in weight["metrics"] if each["name"] == "Top-1 accuracy"), 0.0)
        for name, facts in catalog.load().items()
        for tag, weight in facts["weights"].items()
        if facts["task"] == "classification" and weight["source"] == "shipped"
    }
    if not found:
        raise UsageError("No weights for classification are shipped: say --model.")
    return max(found, key=lambda name: (name.endswith(".imagenette"), found[name]))


def run(args: argparse.Namespace) -> int:
    """Classify pictures."""
    at_least(args, topk=1)
    check_ray(args)
    name = args.model or default_model()
    find_model(name, task="classification")
    arguments = model_args(args)
    pictures = find_pictures(args.files)
    missing = [
        {"file": str(each.path), "error": f"no such file.{beside(each.path)}"}
        for each in pictures
        if not os.path.exists(each.path)
    ]
    if len(missing) == len(pictures):
        if args.json:
            print_json({"model": name, "results": [], "failed": missing})
        return report_failures(args, missing, len(missing))
    hush(args)
    options = {"device": args.device, "dtype": args.dtype, "engine": args.engine, **arguments}
    classifier = Classifier(name, told=partial(note, args), **options)
    paths = [picture.path for picture in pictures if os.path.exists(picture.path)]
    found: Iterable[tuple[int, dict[str, Any]]] = enumerate(map(_teller(classifier, args.topk), paths))
    if args.ray is not None:
        found = spread(args, paths, _worker, name, args.topk, options, lost=_lost)
    with progress(args) as bar:
        outcomes = dict(bar.track(found, total=len(paths), description="classifying"))
    told = [outcomes[number] for number in range(len(paths))]
    results: list[dict[str, Any]] = [each for each in told if "top" in each]
    failed = [*missing, *(each for each in told if "top" not in each)]
    if args.json:
        print_json({"model": name, "results": results, "failed": failed})
    elif args.quiet:
        for result in results:
            print(f"{result['file']}\t{result['top'][0]['label'] if result['likely'] else UNKNOWN}")
    elif results:
        rows = table("picture", "class", "probability", right=("probability",), title=name)
        for result in results:
            lines = [(entry["label"], f"{100 * entry['probability']:.1f} %") for entry in result["top"]]
            if not result["likely"]:
                lines = [(UNKNOWN, ""), *((f"perhaps {label}", share) for label, share in lines)]
            for rank, line in enumerate(lines):
                rows.add_row("" if rank else result["file"], *line)
        print_table(rows)
        note(args, classifier.knows())
    return report_failures(args, failed, len(results) + len(failed))


def _teller(classifier: Classifier, topk: int) -> Callable[[Path], dict[str, Any]]:
    """Return what tells of one picture: its classes, or what is wrong with it."""

    def tell(path: Path) -> dict[str, Any]:
        try:
            top = classifier.top(path, topk)
        except (OSError, ValueError) as error:
            return {"file": str(path), "error": one_line(error)}
        return {"file": str(path), "likely": classifier.is_likely(top), "top": top}

    return tell


def _worker(name: str, topk: int, options: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """Return what classifies in a process of a cluster."""
    return _teller(Classifier(name, **options), topk)


def _lost(path: Path, why: str) -> dict[str, Any]:
    return {"file": str(path), "error": f"{path}: {why}"}


class Classifier:
    """A classifier at work: loaded and merged once, then asked about one picture after the other.

    Args:
        name: As `--model` takes it.
        device: As `--device` takes it.
        dtype: Name of the precision.
        engine: As `--engine` takes it.
        told: Told in words what an engine does.
        **arguments: Of the model.

    Raises:
        UsageError: There is no such device, or the model has no classes.
        ValueError: There is no such model; the message names the nearest.
        CheckpointError: The weights are missing or damaged, or do not fit.
        ImportError: The engine is not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "float32",
        engine: EngineName = "eager",
        told: Callable[[str], object] | None = None,
        **arguments: Any,
    ) -> None:
        import torch
        from timm.data import create_transform, resolve_model_data_config

        from zoo.cfg import temperature_of
        from zoo.engines import attach, check_engine
        from zoo.factory import create_model
        from zoo.ffn.reparam import reparameterize
        from zoo.processor import tell_of_emulation

        self.name = name
        check_engine(engine)
        self._device, self._dtype = pick_device(device), getattr(torch, dtype)
        tell_of_emulation(self._dtype, self._device, "float32 for dtype")
        model = create_model(name, pretrained=True, **arguments).eval()
        self.labels = _labels(model)
        reparameterize(model, measure=False)
        self._model: nn.Module = model.to(self._device, self._dtype)
        if engine != "eager":
            attach(self._model, engine, told=told)
        cfg: Any = model.pretrained_cfg
        self.temperature, self.threshold = temperature_of(model), cfg.get("threshold") or 0.0
        data = resolve_model_data_config(model)
        if (channels := data["input_size"][0]) not in (1, 3):
            raise UsageError(f"{name} takes images of {channels} channels; pictures have 1 or 3.")
        if data["interpolation"] == "random":  # of training; measured as the data module measures
            data["interpolation"] = "bicubic"
        self._transform: Any = create_transform(**data)
        self._mode: Literal["RGB", "L"] = "L" if channels == 1 else "RGB"

    def top(self, path: Path, count: int) -> list[dict[str, Any]]:
        """Return the most probable classes of a picture, each with label, index and probability.

        Raises:
            PictureError: It is no readable picture, or so narrow that enlarging its short side would fill the memory.
        """
        import torch

        from zoo.pictures.eight_bit import read_eight_bit  # as training reads it
        from zoo.pictures.picture import PictureError

        picture = read_eight_bit(path, self._mode)
        if max(picture.size) > _NARROWEST * min(picture.size):
            size = "x".join(map(str, picture.size))
            raise PictureError(
                f"{path} has {size} pixels: at most {_NARROWEST} times as long as wide can be classified."
            )
        with torch.inference_mode():
            image = self._transform(picture)[None]
            logits = self._model(image.to(self._device, self._dtype)).float()
            best = (logits / self.temperature).softmax(-1)[0].topk(min(count, logits.shape[-1]))
        return [
            {"label": self.labels[index], "index": index, "probability": round(value, 6)}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def is_likely(self, top: Sequence[dict[str, Any]]) -> bool:
        """Return whether the first class is as probable as the weights ask for; True where they ask for nothing."""
        return bool(top[0]["probability"] >= self.threshold)

    def knows(self) -> str:
        """Return in words which classes there are, and from which probability on one is likely."""
        few = len(self.labels) <= _NAMED
        known = f"{self.name} knows {len(self.labels)} classes" + (f": {', '.join(self.labels)}." if few else ".")
        return known + (f" Below {100 * self.threshold:.3g} % none is likely." if self.threshold else "")


def _labels(model: nn.Module) -> list[str]:
    """Return the names of a model's classes: its own (n01440764 in words), ImageNet's for 1000 classes, or numbers."""
    cfg: Any = model.pretrained_cfg
    count = int(getattr(model, "num_classes", 0))
    if not count:
        raise UsageError("This model has no classes.")
    names = cfg.get("label_names")
    if names and len(names) == count:
        from zoo.data.readable import in_words

        return in_words(names)
    if count == 1000:
        from timm.data import ImageNetInfo

        return list(ImageNetInfo().label_descriptions())
    return [f"class {index}" for index in range(count)]
