"""`zoo restore`: pictures in, the same kind of pictures out, with a report, metrics and a page to compare them."""

from __future__ import annotations

import argparse
import os
import re
import string
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.cluster import add_ray, check_ray, spread
from zoo.cli.inputs import add_device, add_engine, find_pictures, report_failures
from zoo.cli.output import FailureError, UsageError, at_least, check_target, hush, note, number, pick_device, progress
from zoo.cli.restoring import TASKS, Job, print_results
from zoo.cli.targets import FIELDS, USUAL_SUFFIXES, Plan, of_same_names, plan

if TYPE_CHECKING:
    from torch import nn

    from zoo.pictures.restore import Networks


def add_parser(subparsers: Any) -> None:
    """Add `restore`."""
    parser = subparsers.add_parser(
        "restore",
        help="upscale or clean pictures",
        description="Restore pictures. Folders keep their tree, frames their order and names. Pictures that fail are "
        "listed at the end, with exit code 1. A stopped run goes on with --skip-existing.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders; - is the input")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder; for one picture, also a file, or - for the output"
    )
    mends = ", ".join(f"{task} ({what})" for task, what in TASKS.items())
    parser.add_argument("--task", choices=tuple(TASKS), help=f"what to mend: {mends}; default: the model's, or sr")
    parser.add_argument(
        "--scale", type=_scale, help="output pixels per input pixel, also 2.5 or 8 (default: the model's, or 2 for sr)"
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of the results, in place of --scale")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of the results, in place of --scale")
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="longer side of the results")
    parser.add_argument("--crop", metavar="WxH+X+Y", help="only this part, as it looks in the whole; WxH: the middle")
    parser.add_argument("--sigma", type=float, help="strength of the noise, of 255: picks weights for it (denoise)")
    parser.add_argument("--model", metavar="NAME.TAG", help="published weights, file, folder or Hub id")
    parser.add_argument("--weights", help="weight file for --model, or one whose architecture is recognised")
    parser.add_argument(
        "--right",
        type=Path,
        metavar="VIEWS",
        help="right views of a dual-pixel sensor to the left ones in FILE (defocus)",
    )
    parser.add_argument("--budget", default="4GB", help="memory the process may hold: 800MB, 4GB, none (default: 4GB)")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="side of tiles, in place of a choice by --budget")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="of tiles (default: no seam can appear)")
    parser.add_argument("--exact", action="store_true", help="exact tiles, also where they more than double the work")
    parser.add_argument("--self-ensemble", action="store_true", help="average 8 flips and turns: slower, a bit better")
    parser.add_argument(
        "--quality",
        choices=("fast", "balanced", "best"),
        help="least work; highest PSNR; that averaged over flips and turns (default: fast on a CPU, else balanced)",
    )
    parser.add_argument(
        "--kind",
        choices=("auto", "clean", "real"),
        default="auto",
        help="shipped weights for clean pictures, or real photos with JPEG blocks and noise (default: looks)",
    )
    parser.add_argument("--format", metavar="SUFFIX", help="file format of the results: png, jpg, ... (default: same)")
    parser.add_argument(
        "--jpeg-quality", type=int, default=95, metavar="Q", help="of JPEG, WebP, AVIF, ..., 1 to 100 (default: 95)"
    )
    parser.add_argument("--strip", action="store_true", help="leave out EXIF, XMP, text, resolution and file date")
    parser.add_argument("--max-pixels", type=number, metavar="N", help="most pixels of an input (default: 179M)")
    parser.add_argument(
        "--template", help="names of the results, for example '{stem}_x{scale}{suffix}'; also {task} {model} {index}"
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="REFERENCES", help="PSNR and SSIM to pictures of the same names in a folder"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE.html", help="write a page with before/after sliders")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write settings and results of every picture")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="leave existing results as they are")
    existing.add_argument("--force", action="store_true", help="replace existing results")
    add_device(parser)
    add_engine(parser, "eager", ", where it takes two minutes or more")
    add_ray(parser)


def run(args: argparse.Namespace) -> int:
    """Restore pictures."""
    check(args)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        if "-" in args.files:
            most = None if args.max_pixels is None else int(args.max_pixels)
            args.input = str(_from_pipe(Path(folder), most))
            args.files = [args.input if file == "-" else file for file in args.files]
        args.piped = str(args.output) == "-"
        if not args.piped:
            return _run(args)
        args.output = Path(folder) / "out"
        code = _run(args)
        for path in sorted(args.output.rglob("*")):
            if path.is_file():
                sys.stdout.buffer.write(path.read_bytes())
        sys.stdout.flush()
        return code


def _from_pipe(folder: Path, max_pixels: int | None) -> Path:
    """Store what comes through the input as a file with the suffix of its format."""
    from zoo.pictures.picture import PictureError
    from zoo.pictures.read import peek

    path = folder / "stdin"
    length = path.write_bytes(sys.stdin.buffer.read())
    try:
        known = peek(path, max_pixels).format
    except PictureError as error:
        raise FailureError(str(error).replace(str(path), f"The input of {length} bytes")) from error
    return path.rename(path.with_suffix(USUAL_SUFFIXES.get(known, f".{known.lower()}")))


def _run(args: argparse.Namespace) -> int:
    pictures = find_pictures(args.files, leave_out=args.output)
    if args.piped and len(pictures) != 1:
        raise UsageError(f"-o - takes one picture, got {len(pictures)}.")
    references = of_same_names("--metrics", pictures, args.metrics)
    rights = of_same_names("--right", pictures, args.right)
    check_budget(args.budget)
    networks = load_networks(args)
    model = networks.first
    name, takes_two = args.model or args.weights or type(model).__name__, getattr(model, "in_chans", 3) == 6
    if takes_two and args.right is None:
        raise UsageError(f"{name} restores two views of a dual-pixel sensor: give the right ones by --right.")
    if args.right is not None and not takes_two:
        raise UsageError(f"{name} restores one picture, not two views: leave out --right.")
    job = Job(args, networks, references, rights)
    plans = plan(pictures, args, job)
    existing = {each.target for each in plans if os.path.exists(each.target)}
    if existing and not (args.force or args.skip_existing):
        raise UsageError(
            f"{len(existing)} of the results exist, {min(existing)} for one: --skip-existing leaves them, --force "
            "replaces them."
        )
    for file in (args.compare, args.report):
        if file is not None:
            check_target(file, force=args.force or args.skip_existing)
    for each in plans:
        if each.error is not None:
            job.failed.append({"file": str(each.picture.path), "error": each.error})
        for text in each.notes:
            note(args, f"{each.picture.path}: {text}")
    todo = [each for each in plans if each.error is None]
    if job.failed and todo:
        note(args, f"{len(job.failed)} of {len(plans)} cannot be done, see the end; restoring the others.")
    if args.ray is not None:
        _spread(args, job, [(each, args.skip_existing and each.target in existing) for each in todo])
        print_results(args, job)
        return _report(args, job, len(pictures))
    with progress(args) as bar:
        tiles = bar.add_task("parts of the picture")
        job.tell = lambda done, total: bar.update(tiles, completed=done, total=total)
        job.alone = len(todo) == 1
        for each in bar.track(todo, description="restoring"):
            job.do(each, skip=args.skip_existing and each.target in existing)
    print_results(args, job)
    return _report(args, job, len(pictures))


def _report(args: argparse.Namespace, job: Job, total: int) -> int:
    """List what failed, and return the exit code; what came through the input is not called by where it lies."""
    if piped := getattr(args, "input", None):
        for entry in job.failed:
            entry["file"] = "-" if entry["file"] == piped else entry["file"]
            entry["error"] = entry["error"].replace(piped, "the input")
    return report_failures(args, job.failed, total)


def _spread(args: argparse.Namespace, job: Job, todo: list[tuple[Plan, bool]]) -> None:
    """Restore pictures on a cluster, and note what came of them as if it had been here."""
    if not todo:
        return
    with progress(args) as bar:
        workers = spread(args, todo, _worker, args, job.references, job.rights, lost=_lost)
        found = dict(bar.track(workers, total=len(todo), description="restoring"))
    for place in range(len(todo)):
        restored, skipped, failed = found[place]
        job.restored += restored
        job.skipped += skipped
        job.failed += failed


def _lost(item: tuple[Plan, bool], why: str) -> tuple[list[Any], list[Any], list[dict[str, str]]]:
    path = item[0].picture.path
    return [], [], [{"file": str(path), "error": f"{path}: {why}"}]


def _worker(args: argparse.Namespace, references: dict[Path, Path], rights: dict[Path, Path]) -> Any:
    """Return what restores one picture in a process of a cluster: a plan and whether it is done already."""
    args.quiet = True
    job = Job(args, load_networks(args), references, rights)

    def work(item: tuple[Plan, bool]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, str]]]:
        job.restored, job.skipped, job.failed = [], [], []
        job.do(item[0], skip=item[1])
        return job.restored, job.skipped, job.failed

    return work


def load_model(args: argparse.Namespace, *, task: str | None, sigma: float | None) -> nn.Module:
    """Load what --model, --weights and --scale ask for, on the device of --device.

    Args:
        args: Options of the command.
        task: For which weights are chosen where neither a model nor weights are named; None is "sr".
        sigma: Noise for which weights are chosen, of 255.

    Raises:
        UsageError: It is no restorer, or no weights for the task are shipped.
    """
    task = task or "sr"
    _require_weights(args, task)
    from zoo.pictures.restore import load_restorer

    hush(args)
    device = pick_device(args.device)
    return load_restorer(task, args.scale, args.model, args.weights, sigma=sigma, device=device, dtype=args.dtype)


def load_networks(args: argparse.Namespace) -> Networks:
    """Load what a run needs first; further networks are loaded when a size asks for them."""
    from zoo.pictures.restore import Networks, Size

    task = args.task or "sr"
    _require_weights(args, task)
    try:
        size = Size(scale=args.scale, width=args.width, height=args.height, max_side=args.max_side)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options: dict[str, Any] = {"sigma": args.sigma, "device": pick_device(args.device), "dtype": args.dtype}
    if args.engine not in ("auto", "eager"):
        options["engine"] = args.engine
    hush(args)
    networks = Networks(size, task, args.model, args.weights, kind=args.kind, quality=args.quality, **options)
    if args.model is None and args.weights is None:
        _say_cost(args, task, networks)
    return networks


def _say_cost(args: argparse.Namespace, task: str, networks: Networks) -> None:
    """Say which quality is taken on a CPU where none was asked for, and what the others would cost."""
    from zoo.pictures.restorers import offers, usual_quality

    device = next(networks.first.parameters()).device
    if args.quality is not None or usual_quality(device) != "fast":
        return
    scale = int(getattr(networks.first, "scale", 1))
    found = offers(task, scale, args.sigma, "real" if args.kind == "real" else "clean")
    others = [f"{name} {found[name].work:.0f}" for name in ("balanced", "best")]  # weights follow the picture
    if found["balanced"].name == found["fast"].name:
        others = others[1:]
    note(args, f"--quality fast, the default on a CPU; {' and '.join(others)} times its work.")


def _require_weights(args: argparse.Namespace, task: str) -> None:
    if args.model is None and args.weights is None and not _ships(task):
        raise UsageError(
            f"No weights for {task} are shipped yet: give a weight file with --weights (the authors' files are "
            "recognised), or published weights with --model."
        )


def _ships(task: str) -> bool:
    """Tell whether weights for a task come with the package."""
    return any(
        facts["task"] == task and weight["source"] == "shipped"
        for facts in catalog.load().values()
        for weight in facts["weights"].values()
    )


def check_budget(budget: str) -> None:
    """Refuse what is no size of memory, before anything is loaded."""
    from zoo.pictures.plans import parse_bytes

    try:
        if budget.lower() != "none":
            parse_bytes(budget)
    except ValueError as error:
        raise UsageError(f"--budget takes 800MB, 4GB, ... or none, got {budget!r}.") from error


def check(args: argparse.Namespace) -> None:
    """Refuse calls that make no sense, before torch is imported."""
    if not 1 <= args.jpeg_quality <= 100:
        raise UsageError(f"--jpeg-quality must be from 1 to 100, got {args.jpeg_quality}.")
    at_least(args, tile=1, overlap=0)
    if str(args.output) == "-" and args.json:
        raise UsageError("-o - writes the picture to the output; --json would go there too: --report writes a file.")
    if args.ray is not None and (args.compare is not None or "-" in args.files or str(args.output) == "-"):
        raise UsageError("--ray takes files, and neither - nor --compare.")
    check_ray(args)
    if args.files.count("-") > 1:
        raise UsageError("The input, -, is one picture.")
    if args.crop is not None and re.fullmatch(r"0*[1-9]\d*x0*[1-9]\d*(\+\d+\+\d+)?", args.crop) is None:
        raise UsageError(
            f'--crop takes "640x480+100+50" (size, left, top), or "640x480" for the middle; got {args.crop!r}.'
        )
    if args.sigma is not None and (args.sigma < 0 or args.task not in (None, "denoise")):
        raise UsageError(f"--sigma is the noise of --task denoise, at least 0; got {args.sigma:g} for {args.task}.")
    if args.sigma is not None and args.task is None and args.model is None and args.weights is None:
        args.task = "denoise"
    if args.right is not None and args.task is None and args.model is None and args.weights is None:
        args.task = "defocus"
    if args.compare is not None and args.compare.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--compare writes a .html file, not {args.compare.name!r}.")
    if args.compare is not None and args.report is not None and args.compare.absolute() == args.report.absolute():
        raise UsageError(f"--compare and --report would both write {args.report}: give them different names.")
    facts = catalog.load().get((args.model or "").partition(".")[0])
    if facts and args.task and args.weights is None and facts["task"] not in (args.task, "classification"):
        raise UsageError(f"{args.model} is for {facts['task']}, not {args.task}.")
    if args.template is not None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(args.template) if field is not None}
        except ValueError as error:
            raise UsageError(f"--template {args.template!r}: {error}.") from error
        wrong = fields - set(FIELDS)
        if wrong or not fields or "/" in args.template or "\\" in args.template:
            raise UsageError(
                f"--template names a file with {', '.join(f'{{{field}}}' for field in FIELDS)}; got {args.template!r}."
            )
    from zoo.pictures.formats import writable_suffixes

    if args.report is not None and args.report.suffix.lower() in writable_suffixes():
        raise UsageError(f"--report writes a .json file, not {args.report.name!r}.")
    if args.format and f".{args.format.lstrip('.').lower()}" not in writable_suffixes():
        raise UsageError(f"--format {args.format!r} is no format that can be written: png, jpg, webp, tif, ...")


def _scale(text: str) -> float:
    """Read 2, 2.5, x3 or 3x."""
    try:
        value = float(text.strip("xX"))
    except ValueError:
        value = -1.0
    if not 0 < value <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no scale; write 2, 2.5 or x8, at most 64")
    return int(value) if value == int(value) else value
