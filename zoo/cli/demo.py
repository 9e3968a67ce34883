"""`zoo demo`: everything at once on the shipped weights, as one HTML report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo.cli.output import hush, print_json, progress, replacing


def add_parser(subparsers: Any) -> None:
    """Add `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="generate, enlarge, merge and classify, in one report",
        description="Run the shipped weights on real pictures and write one self-contained HTML report; an older one "
        "in the folder is replaced.",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder of the report (default: demo)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where the report is."""
    from zoo.demo import headline, load_models, render, run_demo

    hush(args, diffusers=True)
    report = args.output / "report.html"
    with replacing(report, force=True) as temporary, progress(args) as bar:
        task = bar.add_task("loading the weights", total=None)
        results = run_demo(
            load_models(),
            threads=args.threads,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
        temporary.write_text(render(results), encoding="utf-8")
    if args.json:
        print_json({"report": str(report.resolve()), "seconds": results.seconds, "headline": dict(headline(results))})
        return 0
    if not args.quiet:
        for value, what in headline(results):
            print(f"{value}: {what}")
    print(report.resolve())
    return 0
