"""`zoo tune-cache`: the cache setting for a pipeline that keeps a budget, saved for "auto"."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.errors import require_library
from zoo.cli.output import (
    UsageError,
    check_target,
    note,
    print_json,
    print_table,
    progress,
    replacing,
    table,
)
from zoo.cli.pipelines import add_request, check_request, load_pipeline, plan_calls

if TYPE_CHECKING:
    from zoo.bench.tuning import Tuning

_PICTURES = (".png", ".svg", ".pdf")
_COUNT = 10  # pictures, where neither prompts nor a count say how many


def add_parser(subparsers: Any) -> None:
    """Add `tune-cache`."""
    parser = subparsers.add_parser(
        "tune-cache",
        help="find the cache that keeps a quality, and save it",
        description="Try caches, ours and diffusers', and fewer steps on a pipeline: about 50 runs. Print speed and "
        "likeness to the pictures without a cache, recommend the fastest setting that keeps the budget, and save it, "
        'so that zoo.enable_cache(pipe, "auto") and `zoo generate --cache auto` find it. Exit code 1: no cache keeps '
        "the budget.",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="NAME.TAG, folder of diffusers, or Hub id")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--budget", metavar="B", help="what to keep: 'psnr>=30' (dB; the default) or 'ssim>=0.95'")
    aim.add_argument("--speedup", type=float, metavar="X", help="find the best quality at this many times the speed")
    parser.add_argument("--steps", type=int, default=50, help="steps of the scheduler (default: 50)")
    add_request(parser)
    parser.add_argument("--count", type=int, metavar="N", help=f"pictures (default: one a prompt, {_COUNT} of classes)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"at a time (default: {_COUNT} of classes, one of prompts)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds at the end (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw likeness against time: png, svg, pdf")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw what the recommended cache computes when")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where to save the setting (default: beside the model)"
    )
    parser.add_argument("--all", action="store_true", help="show every setting, not only the best at each speed")
    parser.add_argument("--force", action="store_true", help="replace existing pictures")


def run(args: argparse.Namespace) -> int:
    """Sweep, print, draw and save."""
    _check(args)
    if args.plot or args.timeline:
        require_library("matplotlib", "--plot" if args.plot else "--timeline")
    pipe, device = load_pipeline(args, args.pipeline)
    plan = plan_calls(args, pipe, name=args.pipeline, count=args.count, classes=_COUNT, batch=args.batch)

    import torch

    from zoo.bench import Settings
    from zoo.bench.tuning import tune_cache

    settings = Settings(
        rounds=args.rounds,
        threads=args.threads or torch.get_num_threads(),
        device=str(device),
        dtype=args.dtype,
    )
    with progress(args) as display:
        task = display.add_task("preparing", total=None)

        steps = display.add_task("steps", total=None)

        def tell(what: str, done: int, total: int) -> None:
            display.update(task, description=what, completed=done, total=total)

        def call(number: int) -> Any:
            display.reset(steps, total=number * -(-len(plan.items) // plan.batch))
            return torch.cat(plan.run(number, lambda: display.advance(steps)))

        tuning = tune_cache(
            pipe,
            call,
            budget=f"speedup>={args.speedup:g}" if args.speedup else args.budget or "psnr>=30",
            steps=args.steps,
            guidance=args.guidance,
            settings=settings,
            folder=args.output,
            progress=tell,
        )
    _draw(args, pipe, call, tuning)
    _report(args, tuning)
    return 0 if tuning.setting is not None or tuning.fewer_steps is not None else 1


def _check(args: argparse.Namespace) -> None:
    check_request(args, "steps", "count", "batch", "rounds", "threads")
    if args.speedup is not None and not args.speedup > 1:
        raise UsageError(f"--speedup must be above 1, got {args.speedup:g}.")
    for option in ("plot", "timeline"):
        path = getattr(args, option)
        if path is None:
            continue
        if path.suffix.lower() not in _PICTURES:
            raise UsageError(f"--{option} writes {', '.join(_PICTURES)}, not {path.name!r}.")
        check_target(path, force=args.force)


def _draw(args: argparse.Namespace, pipe: Any, call: Callable[[int], Any], tuning: Tuning) -> None:
    if args.plot is not None:
        from zoo.bench.report import plot

        with replacing(args.plot, force=args.force) as temporary:
            plot(tuning.benchmark, temporary)
    if args.timeline is None:
        return
    if tuning.setting is None:
        note(args, "There is no recommended cache to draw a timeline of.")
        return
    from zoo.caching import cached, timeline

    with cached(pipe, tuning.setting.config):
        call(args.steps)
        with replacing(args.timeline, force=args.force) as temporary:
            timeline(pipe, temporary)


def _report(args: argparse.Namespace, tuning: Tuning) -> None:
    from zoo.bench.report import columns, facts, to_json
    from zoo.bench.tuning import best_entries

    if args.json:
        setting = tuning.setting
        print_json(
            {
                "pipeline": args.pipeline,
                "budget": str(tuning.budget),
                "recommended": None if setting is None else setting.name,
                "measured": None if setting is None else setting.measured,
                "fewer_steps": tuning.fewer_steps,
                "verdict": str(tuning),
                "saved": tuning.path,
                **to_json([tuning.benchmark]),
            }
        )
        return
    if args.quiet:
        print("" if tuning.path is None else tuning.path)
        return
    benchmark = tuning.benchmark
    shown = columns(benchmark)
    headings = [column.heading for column in shown]
    rows = table(*headings, title=benchmark.title, right=headings[1:])
    entries = benchmark.entries if args.all else best_entries(benchmark.entries)
    for entry in entries:
        best = tuning.setting is not None and entry.name == tuning.setting.name
        rows.add_row(*(column.text(entry) for column in shown), style="bold" if best else None)
    print_table(rows, facts(benchmark.conditions), facts(benchmark.environment), *benchmark.notes, "", *tuning.verdict)
    if tuning.path is not None:
        print_table(f'Saved to {tuning.path}: zoo.enable_cache(pipe, "auto") finds it.')
