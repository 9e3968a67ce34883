"""`zoo tune-cache`: the cache setting for a pipeline that keeps a budget, saved for "auto"."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.generate import SCHEDULERS
from zoo.cli.inputs import add_device
from zoo.cli.output import (
    UsageError,
    check_target,
    hush,
    note,
    pick_device,
    print_json,
    print_table,
    progress,
    replacing,
    table,
)

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
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), help="default: the one that came with the pipeline")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--classes", metavar="A,B", help="classes by name or number, in turns (default: all)")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--count", type=int, metavar="N", help=f"pictures (default: one a prompt, or {_COUNT})")
    parser.add_argument("--batch", type=int, default=_COUNT, metavar="N", help=f"at a time (default: {_COUNT})")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds at the end (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own)")
    add_device(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw likeness against time: png, svg, pdf")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw what the recommended cache computes when")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where to save the setting (default: beside the model)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing pictures")


def run(args: argparse.Namespace) -> int:
    """Sweep, print, draw and save."""
    _check(args)
    if not Path(args.pipeline).is_dir() and "/" not in args.pipeline:
        catalog.entry(args.pipeline)  # a wrong name is said before diffusers is imported
    prompts = _prompts(args.prompts)
    pipe = _load(args)
    call = _run(args, pipe, _inputs(args, pipe, prompts))

    import torch

    from zoo.bench import Settings
    from zoo.bench.tuning import tune_cache

    settings = Settings(
        rounds=args.rounds,
        threads=args.threads or torch.get_num_threads(),
        device=str(pipe.device),
        dtype=args.dtype,
    )
    with progress(args) as display:
        task = display.add_task("preparing", total=None)

        def tell(what: str, done: int, total: int) -> None:
            display.update(task, description=what, completed=done, total=total)

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
    return 0 if tuning.setting is not None else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "count", "batch", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}.")
    if args.speedup is not None and not args.speedup > 1:
        raise UsageError(f"--speedup must be above 1, got {args.speedup:g}.")
    for option in ("plot", "timeline"):
        path = getattr(args, option)
        if path is None:
            continue
        if path.suffix.lower() not in _PICTURES:
            raise UsageError(f"--{option} writes {', '.join(_PICTURES)}, not {path.name!r}.")
        check_target(path, force=args.force)


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one a line.")
    return prompts


def _load(args: argparse.Namespace) -> Any:
    hush(args, diffusers=True)
    import diffusers
    import torch

    from zoo.factory import create_pipeline

    device = pick_device(args.device)
    pipe = create_pipeline(args.pipeline, dtype=getattr(torch, args.dtype))
    if args.scheduler:
        scheduler = getattr(diffusers, SCHEDULERS[args.scheduler])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)  # there is one for the whole sweep
    return pipe


def _inputs(args: argparse.Namespace, pipe: Any, prompts: list[str]) -> list[Any]:
    """Return one class or prompt for each picture."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    given: list[Any]
    if "class_labels" in parameters:
        if prompts:
            raise UsageError(f"{args.pipeline} makes pictures of classes: give --classes instead of --prompts.")
        given = _classes(args.classes, pipe)
    elif "prompt" in parameters:
        if args.classes:
            raise UsageError(f"{args.pipeline} makes pictures of prompts: give --prompts FILE instead of --classes.")
        if not prompts:
            raise UsageError(f"{args.pipeline} needs prompts like those that it is to serve: --prompts FILE.")
        given = prompts
    else:
        raise UsageError(
            f"{args.pipeline} is a {type(pipe).__name__}, which takes neither classes nor prompts: tune it in Python "
            f"with tune_cache(pipe, run)."
        )
    count = args.count or (len(prompts) or _COUNT)
    return [given[index % len(given)] for index in range(count)]


def _classes(text: str | None, pipe: Any) -> list[Any]:
    if text is None:
        config = pipe.transformer.config
        return list(range(getattr(config, "num_classes", None) or config.num_embeds_ada_norm))
    parts = [part for part in (part.strip() for part in text.split(",")) if part]
    given = [int(part) if part.isdigit() else part for part in parts]
    names = [part for part in given if isinstance(part, str)]
    if hasattr(pipe, "id2label"):  # ours takes names and numbers
        return list(pipe.get_label_ids(given))
    numbers = iter(pipe.get_label_ids(names) if names else [])  # diffusers' DiTPipeline takes names alone
    return [next(numbers) if isinstance(part, str) else part for part in given]


def _run(args: argparse.Namespace, pipe: Any, inputs: list[Any]) -> Callable[[int], Any]:
    """Return what makes all pictures with a number of steps, each from a noise of its own."""
    import torch

    from zoo.bench.tuning import as_images

    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}

    def call(steps: int) -> Any:
        pictures = []
        for first in range(0, len(inputs), args.batch):
            batch = inputs[first : first + args.batch]
            seeds = [torch.Generator("cpu").manual_seed(first + index) for index in range(len(batch))]
            made = pipe(batch, num_inference_steps=steps, generator=seeds, output_type="pt", **guidance)
            pictures.append(as_images(made))
        return torch.cat(pictures)

    return call


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
    for entry in benchmark.entries:
        best = tuning.setting is not None and entry.name == tuning.setting.name
        rows.add_row(*(column.text(entry) for column in shown), style="bold" if best else None)
    print_table(rows, facts(benchmark.conditions), facts(benchmark.environment), *benchmark.notes, "", *tuning.verdict)
    if tuning.path is not None:
        print_table(f'Saved to {tuning.path}: zoo.enable_cache(pipe, "auto") finds it.')
