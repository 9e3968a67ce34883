"""`zoo classify`: name what is in pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo import catalog
from zoo.cli.inputs import add_device, find_pictures, one_line, report_failures
from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, hush, pick_device, print_json, print_table, progress, table

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn


def add_parser(subparsers: Any) -> None:
    """Add `classify`."""
    parser = subparsers.add_parser(
        "classify",
        help="name what is in pictures",
        description="Print the most probable classes of each picture. Unreadable ones are listed, with exit code 1.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders")
    parser.add_argument("--model", metavar="NAME.TAG", help="published weights, file, folder or Hub id")
    add_model_args(parser)
    parser.add_argument("--topk", type=int, default=3, metavar="K", help="classes for each picture (default: 3)")
    add_device(parser)


def default_model(task: str) -> str:
    """Return the shipped weights for a task.

    Raises:
        UsageError: None are shipped.
    """
    for name, facts in catalog.load().items():
        for tag, weight in facts["weights"].items():
            if facts["task"] == task and weight["source"] == "shipped":
                return f"{name}.{tag}"
    raise UsageError(f"No weights for {task} are shipped: say --model.")


def run(args: argparse.Namespace) -> int:
    """Classify pictures."""
    if args.topk < 1:
        raise UsageError(f"--topk must be at least 1, got {args.topk}.")
    name = args.model or default_model("classification")
    find_model(name, task="classification")
    arguments = model_args(args)
    pictures = find_pictures(args.files)
    missing = [{"file": str(each.path), "error": "no such file"} for each in pictures if not each.path.exists()]
    if len(missing) == len(pictures):
        if args.json:
            print_json({"model": name, "results": [], "failed": missing})
        return report_failures(args, missing, len(missing))
    import torch
    from timm.data import create_transform, resolve_model_data_config

    from zoo.factory import create_model
    from zoo.ffn.reparam import reparameterize

    hush(args)
    device = pick_device(args.device)
    model = create_model(name, pretrained=True, **arguments).eval()
    labels = _labels(model)
    reparameterize(model, measure=False)
    model.to(device, getattr(torch, args.dtype))
    data = resolve_model_data_config(model)
    transform = create_transform(**data)
    mode: Literal["RGB", "L"] = "L" if data["input_size"][0] == 1 else "RGB"
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with progress(args) as bar, torch.inference_mode():
        for picture in bar.track(pictures, description="classifying"):
            try:
                image = transform(_eight_bit(picture.path, mode))[None]
            except (OSError, ValueError) as error:
                failed.append({"file": str(picture.path), "error": one_line(error)})
                continue
            logits = model(image.to(device, getattr(torch, args.dtype))).float()
            top = logits.softmax(-1)[0].topk(min(args.topk, logits.shape[-1]))
            found = [
                {"label": labels[index], "index": index, "probability": round(value, 6)}
                for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            results.append({"file": str(picture.path), "top": found})
    if args.json:
        print_json({"model": name, "results": results, "failed": failed})
    elif args.quiet:
        for result in results:
            print(f"{result['file']}\t{result['top'][0]['label']}")
    elif results:
        rows = table("picture", "class", "probability", right=("probability",), title=name)
        for result in results:
            for rank, entry in enumerate(result["top"]):
                rows.add_row("" if rank else result["file"], entry["label"], f"{100 * entry['probability']:.1f} %")
        print_table(rows)
    return report_failures(args, failed, len(results) + len(failed))


def _eight_bit(path: Path, mode: Literal["RGB", "L"]) -> Image:
    """Read a picture as training does."""
    from zoo.pictures.eight_bit import read_eight_bit

    return read_eight_bit(path, mode)


def _labels(model: nn.Module) -> list[str]:
    """Return the names of a model's classes: its own, ImageNet's for 1000 classes, or numbers."""
    cfg: Any = model.pretrained_cfg
    count = int(getattr(model, "num_classes", 0))
    if not count:
        raise UsageError("This model has no classes.")
    names = cfg.get("label_names")
    if names and len(names) == count:
        return list(names)
    if count == 1000:
        from timm.data import ImageNetInfo

        return list(ImageNetInfo().label_descriptions())
    return [f"class {index}" for index in range(count)]
