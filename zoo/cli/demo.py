"""`zoo demo`: generate, enlarge, merge and classify with the shipped weights, and write one HTML report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.cli.errors import require_library
from zoo.cli.output import at_least, check_target, hush, print_json, print_table, progress, replacing

_OWN = b'<meta name="generator" content="zoo demo">'


def add_parser(subparsers: Any) -> None:
    """Add `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="generate, enlarge, merge and classify, in one report",
        description="Run the shipped weights on real pictures, on the CPU and without network, and write one "
        "self-contained HTML report; an older report in the folder is replaced.",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="gets report.html (default: demo)"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of torch (default: 2)")
    parser.add_argument("--force", action="store_true", help="replace a report.html that is not from this command")


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where its report is."""
    at_least(args, threads=1)
    report = args.output / "report.html"
    force = args.force or _is_report(report)
    check_target(report, force=force, make=False)
    for name in ("diffusers", "skimage", "matplotlib"):
        require_library(name, "zoo demo", extra="demo")
    hush(argparse.Namespace(quiet=True, json=False), diffusers=True)  # the progress below says what happens
    with progress(args) as display:
        loading = display.add_task("loading the networks", total=1)
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done)

        from zoo.demo import headline, load_models, render, run_demo

        models = load_models()
        check_target(report, force=force)  # makes the folder
        display.update(loading, completed=1)
        results = run_demo(models, threads=args.threads, progress=tell)
        with replacing(report, force=force) as temporary:
            temporary.write_text(render(results), encoding="utf-8")
    numbers = headline(results)
    if args.json:
        listed = [{"value": value, "what": what} for value, what in numbers]
        print_json({"report": str(report.resolve()), "seconds": round(results.seconds, 1), "numbers": listed})
    elif args.quiet:
        print(report.resolve())
    else:
        lines = [f"{value}  {what}" for value, what in numbers]
        print_table(*lines, f"The report is {report.resolve()} ({results.seconds:.0f} s). Open it in a browser.")
    return 0


def _is_report(path: Path) -> bool:
    """Tell whether a file was written by this command, which may then replace it."""
    return path.is_file() and _OWN in path.read_bytes()[:2000]
