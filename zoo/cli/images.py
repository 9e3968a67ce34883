"""`zoo classify` and `zoo restore`: models at work on the user's pictures."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.inputs import SUFFIXES, Picture, find_pictures
from zoo.cli.output import UsageError, check_target, hush, note, pick_device, print_json, print_table, progress, table

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn


def add_parser(subparsers: Any) -> None:
    """Add `classify` and `restore`."""
    parser = subparsers.add_parser(
        "classify",
        help="name what is in pictures",
        description="Print the most probable classes of each picture. Unreadable ones are listed, with exit code 1.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders")
    parser.add_argument("--model", metavar="NAME.TAG", help="published weights, file, folder or Hub id")
    parser.add_argument("--topk", type=int, default=3, metavar="K", help="classes for each picture (default: 3)")
    _add_device(parser)
    parser.set_defaults(run=run_classify)

    parser = subparsers.add_parser(
        "restore",
        help="upscale or clean pictures",
        description="Restore pictures. Folders keep their tree. Unreadable pictures are listed, with exit code 1.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder; for one picture, also a file")
    parser.add_argument("--task", default="sr", help="what to do where no model is named (default: sr)")
    parser.add_argument("--scale", type=int, help="output pixels per input pixel (default: the model's, or 2)")
    parser.add_argument("--model", metavar="NAME.TAG", help="published weights, file, folder or Hub id")
    parser.add_argument("--weights", help="weight file for --model, or one whose architecture is recognised")
    parser.add_argument("--budget", default="4GB", help="memory the process may hold: 800MB, 4GB, none (default: 4GB)")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="side of tiles, in place of a choice by --budget")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles (default: no seam can appear)")
    parser.add_argument("--self-ensemble", action="store_true", help="average 8 flips and turns: slower, a bit better")
    parser.add_argument("--format", metavar="SUFFIX", help="file format of the results: png, jpg, ... (default: same)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="leave existing results as they are")
    existing.add_argument("--force", action="store_true", help="replace existing results")
    _add_device(parser)
    parser.set_defaults(run=run_restore)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


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


def run_classify(args: argparse.Namespace) -> int:
    """Classify pictures."""
    if args.topk < 1:
        raise UsageError(f"--topk must be at least 1, got {args.topk}.")
    name = args.model or default_model("classification")
    _check_task(name)
    import torch
    from timm.data import create_transform, resolve_model_data_config

    from zoo.factory import create_model
    from zoo.ffn.reparam import reparameterize

    hush(args)
    device = pick_device(args.device)
    model = create_model(name, pretrained=True).eval()
    labels = _labels(model)
    reparameterize(model, measure=False)
    model.to(device, getattr(torch, args.dtype))
    data = resolve_model_data_config(model)
    transform = create_transform(**data)
    mode = "L" if data["input_size"][0] == 1 else "RGB"
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with progress(args) as bar, torch.inference_mode():
        for picture in bar.track(find_pictures(args.files), description="classifying"):
            try:
                image = transform(_eight_bit(picture.path, mode))[None]
            except (OSError, ValueError) as error:
                failed.append({"file": str(picture.path), "error": _one_line(error)})
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


def _check_task(name: str) -> None:
    """Refuse a name of ours that does not classify; unknown names are left to the factory."""
    facts = catalog.load().get(name.partition(".")[0])
    if facts is None:
        return
    if facts["task"] != "classification":
        raise UsageError(f"{name} is a model for {facts['task']}: it cannot classify.")
    if "." not in name and not facts["weights"]:
        raise UsageError(f"No weights are published for {name}.")


def _eight_bit(path: Path, mode: str) -> Image:
    """Read a picture of any kind, upright, as 8-bit "L" or "RGB"."""
    import numpy as np
    from PIL import Image as Pillow
    from PIL import ImageOps

    from zoo.restoration.image_io import open_picture

    picture = open_picture(path)
    image = picture.to_image()
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip these instead of scaling them
        levels = picture.color[..., 0] * (255.0 / picture.peak)
        image = Pillow.fromarray(levels.round().astype(np.uint8))
    return ImageOps.exif_transpose(image).convert(mode)


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


def run_restore(args: argparse.Namespace) -> int:
    """Restore pictures."""
    pictures = find_pictures(args.files)
    targets = _targets(pictures, args)
    existing = {target for target in targets if target.exists()}
    if existing and not (args.force or args.skip_existing):
        raise UsageError(
            f"{len(existing)} of the results exist, {min(existing)} for one: --skip-existing leaves them, --force "
            "replaces them."
        )
    todo = [
        (picture, target)
        for picture, target in zip(pictures, targets, strict=True)
        if not (args.skip_existing and target in existing)
    ]
    from zoo.restoration.inference import open_picture, restore_picture

    model = _restorer(args)
    cfg: Any = getattr(model, "pretrained_cfg", {})
    name = args.model or ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    budget = None if args.budget.lower() == "none" else args.budget
    restored: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with progress(args) as bar:
        tiles = bar.add_task("tiles", visible=len(todo) == 1)
        for picture, target in bar.track(todo, description="restoring"):
            start = time.perf_counter()
            try:
                check_target(target, force=True)
                source = open_picture(picture.path)
                result = restore_picture(
                    source,
                    model,
                    budget=budget,
                    tile=args.tile,
                    overlap=args.overlap,
                    self_ensemble=args.self_ensemble,
                    progress=lambda done, total: bar.update(tiles, completed=done, total=total),
                )
                result.save(target)
            except (OSError, ValueError, RuntimeError) as error:
                failed.append({"file": str(picture.path), "error": _one_line(error)})
                continue
            restored.append(
                {
                    "file": str(picture.path),
                    "output": str(target),
                    "size": list(source.size),
                    "output_size": list(result.size),
                    "seconds": round(time.perf_counter() - start, 3),
                }
            )
    skipped = [str(target) for target in targets if args.skip_existing and target in existing]
    if args.json:
        device = str(next(model.parameters()).device)
        print_json({"model": name, "device": device, "restored": restored, "skipped": skipped, "failed": failed})
    elif args.quiet:
        for entry in restored:
            print(entry["output"])
    else:
        rows = table("picture", "size", "result", "size", "seconds", right=("seconds",), title=name)
        for entry in restored:
            sizes = ["x".join(map(str, entry[key])) for key in ("size", "output_size")]
            rows.add_row(entry["file"], sizes[0], entry["output"], sizes[1], f"{entry['seconds']:.2f}")
        if restored:
            print_table(rows)
        if skipped:
            note(args, f"{len(skipped)} skipped: their results exist.")
    return report_failures(args, failed, len(pictures))


def _targets(pictures: list[Picture], args: argparse.Namespace) -> list[Path]:
    """Return where each result goes: the named file, or the place in the output folder."""
    suffix = f".{args.format.lstrip('.').lower()}" if args.format else None
    output: Path = args.output
    as_file = output.suffix.lower() in SUFFIXES and not output.is_dir()
    if as_file and (len(pictures) != 1 or Path(args.files[0]).is_dir()):
        raise UsageError(f"{output} names one file for {len(pictures)} pictures: give a folder.")
    targets: dict[Path, Path] = {}
    for picture in pictures:
        target = output if as_file else output / picture.relative
        target = target.with_suffix(suffix) if suffix and not as_file else target
        if target in targets:
            raise UsageError(f"{targets[target]} and {picture.path} would both become {target}.")
        if target.exists() and picture.path.exists() and target.samefile(picture.path):
            raise UsageError(f"{target} would replace its own input: choose another folder.")
        targets[target] = picture.path
    return list(targets)


def _restorer(args: argparse.Namespace) -> nn.Module:
    """Load what --model, --weights, --task and --scale ask for, on the device."""
    from zoo.factory import create_model
    from zoo.ffn.reparam import reparameterize
    from zoo.restoration.inference import load_restorer

    hush(args)
    model: Any = args.model
    if model is not None and args.weights is None and ("/" in model or Path(model).exists()):
        model = create_model(model, pretrained=True)
        if not hasattr(model, "scale"):
            raise UsageError(f"{args.model} holds a {type(model).__name__}, which does not restore images.")
        reparameterize(model, measure=False)
    device = pick_device(args.device)
    return load_restorer(args.task, args.scale, model, args.weights, device=device, dtype=args.dtype)


def report_failures(args: argparse.Namespace, failed: list[dict[str, str]], total: int) -> int:
    """List inputs that failed on the standard error, and return the exit code."""
    if failed and not args.json:
        for entry in failed:
            print(f"zoo: {entry['file']}: {entry['error']}", file=sys.stderr)
        note(args, f"{len(failed)} of {total} failed.")
    return 1 if failed else 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
