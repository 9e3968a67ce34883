"""`zoo generate`: pictures of chosen classes, with and without a cache."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.output import (
    UsageError,
    check_target,
    hush,
    pick_device,
    print_json,
    print_table,
    replacing,
    silent,
    table,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# what each cache lets one set; the table is zoo.caching.presets, which is not imported to parse a command
_CACHES = {"cg-taylor": "threshold", "bac": "updates", "taylorseer": "interval", "first-block": "threshold"}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_COLUMNS = 10  # pictures beside each other in a grid
_TILE = 96  # smaller pictures are enlarged to at least this many pixels in a grid


def add_parser(subparsers: Any) -> None:
    """Add `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="make pictures of classes",
        description="Make pictures with a diffusion model. With a cache they are made twice, to say what it saves.",
    )
    parser.add_argument("--model", default="pixeldit.cifar10", metavar="NAME.TAG", help="model, folder or Hub id")
    parser.add_argument("--classes", metavar="A,B", help="classes by name or number (default: all)")
    parser.add_argument("--count", type=int, default=16, help="pictures in all, classes in turn (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture, the next have the next numbers")
    parser.add_argument("--steps", type=int, default=50, help="steps of the scheduler (default: 50)")
    parser.add_argument("--guidance", type=float, help="weight of classifier-free guidance; up to 1 is off")
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), help="default: the one that came with the model")
    parser.add_argument(
        "--cache",
        choices=("none", *_CACHES, "auto"),
        default="none",
        help="leave out what an earlier step computed; auto: as `zoo tune-cache` has found",
    )
    parser.add_argument(
        "--threshold", type=float, help="cg-taylor, first-block: error or change up to which a step is skipped"
    )
    parser.add_argument("--updates", type=int, help="bac: steps at which each part is computed (default: a third)")
    parser.add_argument("--interval", type=int, help="taylorseer: compute every so many steps in full (default: 3)")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw what the cache computed: png, svg, pdf")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="picture file for a labelled grid, or a folder for single ones"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> int:
    """Generate, and compare with the uncached result where a cache is asked for."""
    for name in ("count", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    single = args.output.suffix.lower() not in _IMAGE_SUFFIXES
    if not single:
        check_target(args.output, force=args.force)
    _check_cache(args)
    if args.timeline is not None:
        if args.cache == "none":
            raise UsageError("--timeline draws what a cache computed: choose one with --cache.")
        check_target(args.timeline, force=args.force)
    pipeline = _pipeline(args)
    labels = pipeline.get_label_ids(_classes(args.classes, pipeline))
    chosen = [labels[index % len(labels)] for index in range(args.count)]
    names = [pipeline.id2label.get(label, f"class {label}") for label in chosen]
    files = [args.output / f"{index:04d}_{name.replace(' ', '_')}.png" for index, name in enumerate(names)]
    if single:
        for file in files:
            check_target(file, force=args.force)
    result: dict[str, Any] = {
        "model": args.model,
        "classes": sorted(set(names), key=names.index),
        "count": args.count,
        "seed": args.seed,
        "steps": args.steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "device": str(pipeline.device),
        "dtype": args.dtype,
        "cache": args.cache,
    }
    panels: list[tuple[str, list[Image]]] = []
    if args.cache == "none":
        pictures, seconds = _generate(args, pipeline, chosen)
        panels.append((f"{args.model}, {args.steps} steps: {seconds:.1f} s", _to_pil(pictures)))
    else:
        pictures, seconds = _compare(args, pipeline, chosen, result, panels)
    result["seconds"] = round(seconds, 3)
    if single:
        for file, picture in zip(files, _to_pil(pictures), strict=True):
            with replacing(file, force=args.force) as temporary:
                picture.save(temporary)
    else:
        with replacing(args.output, force=args.force) as temporary:
            _grid(panels, names).save(temporary)
    result["output"] = str(args.output)
    _report(args, result)
    return 0


def _check_cache(args: argparse.Namespace) -> None:
    for option in dict.fromkeys(_CACHES.values()):
        if getattr(args, option) is not None and _CACHES.get(args.cache) != option:
            fitting = " or ".join(name for name, own in _CACHES.items() if own == option)
            raise UsageError(f"--{option} belongs to --cache {fitting}.")


def _classes(text: str | None, pipeline: Any) -> list[int | str]:
    if text is None:
        return list(range(pipeline.transformer.config.num_classes))
    return [int(part) if part.isdigit() else part for part in (part.strip() for part in text.split(",")) if part]


def _pipeline(args: argparse.Namespace) -> Any:
    """Load the pipeline as asked for, and silence it where nobody watches."""
    if not Path(args.model).is_dir() and "/" not in args.model:
        catalog.entry(args.model)  # a wrong name is said before diffusers is imported
    hush(args, diffusers=True)
    import diffusers
    import torch

    from zoo.diffusion import PixelDiTPipeline
    from zoo.factory import create_pipeline

    device = pick_device(args.device)
    pipeline = create_pipeline(args.model, dtype=getattr(torch, args.dtype))
    if not isinstance(pipeline, PixelDiTPipeline):
        raise UsageError(f"{args.model} is a {type(pipeline).__name__}, which does not generate from classes.")
    if args.scheduler:
        scheduler = getattr(diffusers, SCHEDULERS[args.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=silent(args), leave=False)
    return pipeline


def _generate(args: argparse.Namespace, pipeline: Any, labels: list[int]) -> tuple[Any, float]:
    """Return images (B, C, H, W) in [0, 1] and the seconds they took."""
    import torch

    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    images, start = [], time.perf_counter()
    for first in range(0, len(labels), args.batch_size):
        batch = labels[first : first + args.batch_size]
        images.append(
            pipeline(
                batch, num_inference_steps=args.steps, seed=args.seed + first, output_type="pt", **guidance
            ).images.cpu()
        )
    return torch.cat(images), time.perf_counter() - start


def _compare(
    args: argparse.Namespace, pipeline: Any, labels: list[int], result: dict[str, Any], panels: list[Any]
) -> tuple[Any, float]:
    """Generate without and with the cache, add speed-up and PSNR to `result`, and return the cached images."""
    from zoo.caching import cached, timeline
    from zoo.evaluation.metrics import psnr

    config = _cache_config(args, pipeline, labels)
    with cached(pipeline, config):
        pass  # a cache that does not fit is refused before anything is computed
    pipeline(labels[: args.batch_size], num_inference_steps=2, seed=args.seed, output_type="pt")  # the first is slower
    plain, plain_seconds = _generate(args, pipeline, labels)
    with cached(pipeline, config):
        pictures, seconds = _generate(args, pipeline, labels)
        if args.timeline is not None:
            with replacing(args.timeline, force=args.force) as temporary:
                timeline(pipeline, temporary)
    ratios = psnr(pictures, plain, space="rgb")
    finite = ratios[ratios.isfinite()]
    quality = round(float(finite.mean()), 2) if len(finite) else None
    result |= {
        "cache_config": {key: value for key, value in vars(config).items() if isinstance(value, int | float | str)},
        "uncached_seconds": round(plain_seconds, 3),
        "speedup": round(plain_seconds / seconds, 3),
        "psnr": quality,
        "identical": len(ratios) - len(finite),
    }
    said = "same pictures" if quality is None else f"PSNR {quality:.1f} dB"
    panels.append((f"without cache: {plain_seconds:.1f} s", _to_pil(plain)))
    panels.append((f"{args.cache}: {seconds:.1f} s, {plain_seconds / seconds:.2f}x, {said}", _to_pil(pictures)))
    return pictures, seconds


def _cache_config(args: argparse.Namespace, pipeline: Any, labels: list[int]) -> Any:
    from zoo.caching.presets import Subject, cache_setting
    from zoo.caching.saved import default_guidance, find_setting

    if args.cache == "auto":
        guidance = default_guidance(pipeline) if args.guidance is None else args.guidance
        return find_setting(pipeline, pipeline.transformer, steps=args.steps, guidance=guidance).config

    def run() -> None:
        _generate(args, pipeline, labels[: args.batch_size])

    subject = Subject(pipe=pipeline, run=run, steps=args.steps, guidance=args.guidance)
    return cache_setting(args.cache, subject, getattr(args, _CACHES[args.cache])).config


def _to_pil(images: Any) -> list[Image]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image((image.float() * 255).round().byte()) for image in images]


def _grid(panels: list[tuple[str, list[Image]]], names: list[str]) -> Image:
    """Draw titled panels below each other, in each one row or more a class with its name."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    side = panels[0][1][0].width
    zoom = max(1, math.ceil(_TILE / side))
    step, gap, head = side * zoom, 4, 28
    rows: list[tuple[str, list[int]]] = []  # a class with many pictures has several, the first with its name
    for name in sorted(set(names), key=names.index):
        indices = [index for index, other in enumerate(names) if other == name]
        rows += [
            ("" if start else name, indices[start : start + _COLUMNS]) for start in range(0, len(indices), _COLUMNS)
        ]
    widest = max(len(indices) for _, indices in rows)
    margin = 16 + max(int(font.getlength(name)) for name, _ in rows)
    title = max(int(font.getlength(text)) for text, _ in panels)
    width = max(margin + widest * (step + gap), title + 16)
    sheet = Image.new("RGB", (width, len(panels) * (head + len(rows) * (step + gap)) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for text, pictures in panels:
        draw.text((8, y + 6), text, "black", font)
        y += head
        for name, indices in rows:
            draw.text((8, y + step // 2 - 8), name, "black", font)
            for column, index in enumerate(indices):
                tile = pictures[index].convert("RGB").resize((step, step), Image.Resampling.BICUBIC)
                sheet.paste(tile, (margin + column * (step + gap), y))
            y += step + gap
    return sheet


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        print_json(result)
    elif args.quiet:
        print(result["output"])
    else:
        conditions = f"{result['count']} pictures, {result['steps']} steps, {result['scheduler']}, batch up to "
        conditions += f"{args.batch_size}, {result['dtype']}, {result['device']}"
        rows = table("", "seconds", "speed-up", "PSNR to uncached", right=("seconds", "speed-up", "PSNR to uncached"))
        if args.cache != "none":
            rows.add_row("no cache", f"{result['uncached_seconds']:.2f}", "1.00x", "")
        quality = "" if args.cache == "none" else "same" if result["psnr"] is None else f"{result['psnr']:.1f} dB"
        speed = "" if args.cache == "none" else f"{result['speedup']:.2f}x"
        rows.add_row("no cache" if args.cache == "none" else args.cache, f"{result['seconds']:.2f}", speed, quality)
        print_table(f"{args.model}: {conditions}", rows, f"Written to {result['output']}")
