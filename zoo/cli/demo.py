"""`zoo demo`: everything at once on the shipped weights, as one HTML report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from zoo.cli.output import note, print_json, progress


def add_parser(subparsers: Any) -> None:
    """Add `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="generate, classify, restore and time, in one report",
        description="Run the shipped weights on real pictures and write one self-contained HTML report.",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder of the report (default: demo)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where the report is."""
    from zoo import demo

    start = time.perf_counter()
    with progress(args) as bar:
        task = bar.add_task("starting", total=5)

        def tell(what: str) -> None:
            bar.update(task, description=what, advance=1)
            if bar.disable:
                note(args, f"{what} ...")

        report = demo.run(args.output, tell, args.threads)
    seconds = time.perf_counter() - start
    if args.json:
        print_json({"report": str(report.resolve()), "seconds": seconds})
    else:
        print(report.resolve() if args.quiet else f"{report.resolve()} ({seconds:.0f} s)")
    return 0
