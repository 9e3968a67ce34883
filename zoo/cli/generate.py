"""`zoo generate`: pictures and videos from any diffusion pipeline, with and without a cache."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog import did_you_mean
from zoo.cli.errors import require_library
from zoo.cli.inputs import add_engine
from zoo.cli.output import UsageError, at_least, check_target, note, print_json, print_table, progress, replacing, table
from zoo.cli.pipelines import Plan, add_request, check_name, check_request, load_pipeline, plan_calls
from zoo.cli.showing import Panel, has_encoder, plan_target, write

if TYPE_CHECKING:
    from torch import Tensor

# what each cache lets one set; the table is zoo.caching.presets, which is not imported to parse a command
CACHES = {
    "step-forecast": "updates",
    "cg-taylor": "threshold",
    "bac": "updates",
    "taylorseer": "interval",
    "first-block": "threshold",
}
_WARM_UP = 2  # steps


def add_parser(subparsers: Any) -> None:
    """Add `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="make pictures and videos of prompts or classes",
        description="Make pictures or videos with any pipeline of diffusers. With a cache they are made twice, to say "
        "what it saves.",
    )
    parser.add_argument(
        "pipeline", nargs="?", metavar="PIPELINE", help="NAME.TAG, folder of diffusers, or Hub id (as --model)"
    )
    parser.add_argument("--model", metavar="NAME.TAG", help="the same (default: pixeldit.cifar10)")
    add_request(parser)
    parser.add_argument(
        "--count", type=int, help="pictures in all, classes or prompts in turn (default: one a prompt, 16 of classes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture, the next have the next numbers")
    parser.add_argument("--steps", type=int, default=50, help="steps of the scheduler (default: 50)")
    parser.add_argument(
        "--cache",
        metavar="METHOD",
        default="none",
        help=f"leave out what an earlier step computed: {', '.join(CACHES)}, also with a number: cg-taylor=0.05; auto: "
        "as `zoo tune-cache` has found; or the file that it has saved",
    )
    parser.add_argument(
        "--threshold", type=float, help="cg-taylor, first-block: error or change up to which a step is skipped"
    )
    parser.add_argument("--updates", type=int, help="bac: steps at which each part is computed (default: a third)")
    parser.add_argument("--interval", type=int, help="taylorseer: compute every so many steps in full (default: 3)")
    parser.add_argument("--no-compare", action="store_true", help="with a cache: do not make them without it, too")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw what the cache computed: png, svg, pdf")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures at a time (default: 32 of classes, one of prompts)"
    )
    add_engine(parser)
    parser.add_argument("--fps", type=float, default=16, help="frames a second of a video (default: 16)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="picture file, a labelled grid where there are several; video file; or a folder for single ones",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> int:
    """Generate, and compare with the uncached result where a cache is asked for."""
    if args.pipeline and args.model and args.pipeline != args.model:
        raise UsageError(f"Give one pipeline, got {args.pipeline} and --model {args.model}.")
    name = args.pipeline or args.model or "pixeldit.cifar10"
    check_request(args, "count", "steps", "batch_size")
    if not args.fps > 0:
        raise UsageError(f"--fps must be above 0, got {args.fps:g}.")
    _check_cache(args)
    if args.timeline is not None:
        if args.cache == "none":
            raise UsageError("--timeline draws what a cache computed: choose one with --cache.")
        require_library("matplotlib", "--timeline")
        check_target(args.timeline, force=args.force)
    check_name(name)
    pipe, device = load_pipeline(args, name)
    _use_engine(args, pipe)
    plan = plan_calls(args, pipe, name=name, count=args.count, classes=16, batch=args.batch_size, seed=args.seed)
    of_classes = "class_labels" in plan.items[0]
    target = plan_target(args.output, plan.names, video=plan.is_video, grid=of_classes, force=args.force)
    if target.kind == "frames" and not has_encoder():
        note(args, "There is no encoder of videos here (pip install 'ffn-zoo[video]'): frames are written as PNG.")
    result: dict[str, Any] = {
        "model": name,
        "classes" if of_classes else "prompts": sorted(set(plan.names), key=list(plan.names).index),
        "count": len(plan.items),
        "seed": args.seed,
        "steps": args.steps,
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "device": str(device),
        "dtype": args.dtype,
        "cache": args.cache,
        "engine": args.engine,
    }
    panels: list[Panel] = []
    with progress(args) as bar:
        if args.cache == "none":
            made, seconds = _timed(plan, args.steps, _telling(bar, "generating", plan, args.steps))
            panels.append((f"{name}, {args.steps} steps: {seconds:.1f} s", made))
        else:
            made, seconds = _cached(args, plan, result, panels, bar)
    frames, _, height, width = made[0].shape
    result |= {"size": [width, height], "seconds": round(seconds, 3)} | ({"frames": frames} if plan.is_video else {})
    write(target, panels, plan.names, fps=args.fps, force=args.force)
    result["output"] = str(target.path)
    _report(args, result, plan.batch)
    return 0


def _use_engine(args: argparse.Namespace, pipe: Any) -> None:
    """Let an engine run the denoisers of a pipeline."""
    from zoo.caching.core import denoisers
    from zoo.engines import attach, check_engine

    engine = check_engine(args.engine)
    for network in denoisers(pipe)[1] if engine != "eager" else ():
        attach(network.eval(), engine, told=lambda words: note(args, f"{words}."))


def _split_cache(args: argparse.Namespace) -> None:
    """Take cg-taylor=0.05, as `zoo bench` does, for --cache cg-taylor --threshold 0.05."""
    name, equals, value = args.cache.partition("=")
    if not equals or name not in CACHES:
        return
    option = CACHES[name]
    try:
        number: float = float(value) if option == "threshold" else int(value)
    except ValueError as error:
        raise UsageError(f"--cache {name}=NUMBER sets --{option}, got {value!r}.") from error
    if getattr(args, option) is not None:
        raise UsageError(f"--cache {args.cache} sets --{option}: leave one of them out.")
    args.cache = name
    setattr(args, option, number)


def _check_cache(args: argparse.Namespace) -> None:
    _split_cache(args)
    if args.cache != "none" and args.engine != "eager":
        raise UsageError(
            f"--cache {args.cache} skips blocks of the denoiser, and --engine {args.engine} runs it whole: choose one."
        )
    known = ["none", *CACHES, "auto"]
    if args.cache not in known and not Path(args.cache).is_file():
        hint = did_you_mean(args.cache, known)
        raise UsageError(
            f"{args.cache!r} is neither a cache nor the file of one.{hint} Choices: {', '.join(known)}, or a file."
        )
    for option in dict.fromkeys(CACHES.values()):
        if getattr(args, option) is not None and CACHES.get(args.cache) != option:
            fitting = " or ".join(name for name, own in CACHES.items() if own == option)
            raise UsageError(f"--{option} belongs to --cache {fitting}.")
    if args.threshold is not None and not 0 <= args.threshold < math.inf:
        raise UsageError(f"--threshold must be a number from 0, got {args.threshold:g}.")
    at_least(args, updates=1, interval=1)
    if args.no_compare and args.cache == "none":
        raise UsageError("--no-compare is for --cache: without one there is nothing to compare.")


def _telling(bar: Any, what: str, plan: Plan, steps: int) -> Callable[[], None]:
    """Return what moves a progress bar on by a step."""
    calls = -(-len(plan.items) // plan.batch)
    task = bar.add_task(what, total=calls * steps)
    return lambda: bar.advance(task)


def _timed(plan: Plan, steps: int, tell: Callable[[], None]) -> tuple[list[Tensor], float]:
    start = time.perf_counter()
    made = plan.run(steps, tell)
    return made, time.perf_counter() - start


def _cached(
    args: argparse.Namespace, plan: Plan, result: dict[str, Any], panels: list[Panel], bar: Any
) -> tuple[list[Tensor], float]:
    """Generate with the cache, and without it to compare; add speed-up and PSNR to `result`."""
    from zoo.caching import cache_summary, cached, timeline

    config, name = _cache_config(args, plan), Path(args.cache).stem
    with cached(plan.pipe, config):
        pass  # a cache that does not fit is refused before anything is computed
    plain: list[Tensor] = []
    plain_seconds = 0.0
    if not args.no_compare:
        plan.run(min(_WARM_UP, args.steps), which=plan.first)  # the first is slower
        plain, plain_seconds = _timed(plan, args.steps, _telling(bar, "without cache", plan, args.steps))
        panels.append((f"without cache: {plain_seconds:.1f} s", plain))
    with cached(plan.pipe, config):
        made, seconds = _timed(plan, args.steps, _telling(bar, f"with {name}", plan, args.steps))
        result["summary"] = str(cache_summary(plan.pipe))
        if args.timeline is not None:
            with replacing(args.timeline, force=args.force) as temporary:
                timeline(plan.pipe, temporary)
    result["cache_config"] = {key: value for key, value in vars(config).items() if isinstance(value, int | float | str)}
    title = f"{name}: {seconds:.1f} s"
    if plain:
        result |= _compared(made, plain) | {
            "uncached_seconds": round(plain_seconds, 3),
            "speedup": round(plain_seconds / seconds, 3),
        }
        said = "same pictures" if result["psnr"] is None else f"PSNR {result['psnr']:.1f} dB"
        title += f", {plain_seconds / seconds:.2f}x, {said}"
    panels.append((title, made))
    return made, seconds


def _compared(made: list[Tensor], plain: list[Tensor]) -> dict[str, Any]:
    from zoo.bench.caching import psnr_of_all

    ratios = [psnr_of_all(ours, theirs) for ours, theirs in zip(made, plain, strict=True)]
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    quality = round(sum(finite) / len(finite), 2) if finite else None
    return {"psnr": quality, "identical": len(ratios) - len(finite)}


def _cache_config(args: argparse.Namespace, plan: Plan) -> Any:
    from zoo.caching.core import denoisers
    from zoo.caching.presets import Subject, cache_setting
    from zoo.caching.saved import SavedSetting, default_guidance, find_setting

    guidance = default_guidance(plan.pipe) if args.guidance is None else args.guidance
    model = denoisers(plan.pipe)[1][0]
    if args.cache == "auto":
        return find_setting(plan.pipe, model, steps=args.steps, guidance=guidance).config
    if args.cache not in CACHES:
        saved = SavedSetting.load(args.cache)
        if (saved.model, saved.num_steps) != (type(model).__name__, args.steps):
            raise UsageError(
                f"{args.cache} was found for {saved.model} with {saved.num_steps} steps, not for "
                f"{type(model).__name__} with {args.steps}."
            )
        return saved.config
    subject = Subject(
        pipe=plan.pipe, run=lambda: plan.run(args.steps, which=plan.first), steps=args.steps, guidance=args.guidance
    )
    return cache_setting(args.cache, subject, getattr(args, CACHES[args.cache])).config


def _report(args: argparse.Namespace, result: dict[str, Any], batch: int) -> None:
    if args.json:
        print_json(result)
        return
    if args.quiet:
        print(result["output"])
        return
    of = "videos" if "frames" in result else "pictures"
    size = "x".join(map(str, result["size"])) + (f", {result['frames']} frames" if "frames" in result else "")
    conditions = f"{result['count']} {of if result['count'] > 1 else of[:-1]} of {size}, {result['steps']} steps, "
    conditions += f"{result['scheduler']}, batch up to {batch}, {result['dtype']}, {result['device']}"
    rows = table("", "seconds", "speed-up", "PSNR to uncached", right=("seconds", "speed-up", "PSNR to uncached"))
    compared = "uncached_seconds" in result
    if compared:
        rows.add_row("no cache", f"{result['uncached_seconds']:.2f}", "1.00x", "")
    quality = "" if not compared else "same" if result["psnr"] is None else f"{result['psnr']:.1f} dB"
    speed = f"{result['speedup']:.2f}x" if compared else ""
    rows.add_row("no cache" if args.cache == "none" else args.cache, f"{result['seconds']:.2f}", speed, quality)
    more = [result["summary"]] if "summary" in result and not compared else []
    print_table(f"{result['model']}: {conditions}", rows, *more, f"Written to {result['output']}")
