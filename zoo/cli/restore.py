"""`zoo restore`: pictures in, the same kind of pictures out, with a report, metrics and a page to compare them."""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.inputs import SUFFIXES, Picture, add_device, find_pictures, one_line, report_failures
from zoo.cli.output import UsageError, check_target, hush, pick_device, progress
from zoo.cli.restoring import TASKS, Job, print_results

if TYPE_CHECKING:
    from torch import nn


_FIELDS = ("stem", "suffix", "scale", "task", "model", "index")  # of --template


def add_parser(subparsers: Any) -> None:
    """Add `restore`."""
    parser = subparsers.add_parser(
        "restore",
        help="upscale or clean pictures",
        description="Restore pictures. Folders keep their tree, frames their order and names. Pictures that fail are "
        "listed at the end, with exit code 1. A stopped run goes on with --skip-existing.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures, patterns or folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder; for one picture, also a file")
    mends = ", ".join(f"{task} ({what})" for task, what in TASKS.items())
    parser.add_argument("--task", choices=tuple(TASKS), help=f"what to mend: {mends}; default: the model's, or sr")
    parser.add_argument("--scale", type=int, help="output pixels per input pixel (default: the model's, or 2 for sr)")
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
    parser.add_argument("--self-ensemble", action="store_true", help="average 8 flips and turns: slower, a bit better")
    parser.add_argument("--format", metavar="SUFFIX", help="file format of the results: png, jpg, ... (default: same)")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG, WebP and AVIF, 1 to 100 (default: 95)")
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


def run(args: argparse.Namespace) -> int:
    """Restore pictures."""
    _check(args)
    pictures = find_pictures(args.files)
    references = _of_same_names("--metrics", pictures, args.metrics)
    rights = _of_same_names("--right", pictures, args.right)
    model = load_model(args, task=args.task, sigma=args.sigma)
    name, takes_two = args.model or args.weights or type(model).__name__, getattr(model, "in_chans", 3) == 6
    if takes_two and args.right is None:
        raise UsageError(f"{name} restores two views of a dual-pixel sensor: give the right ones by --right.")
    if args.right is not None and not takes_two:
        raise UsageError(f"{name} restores one picture, not two views: leave out --right.")
    job = Job(args, model, references, rights)
    targets = _targets(pictures, args, job)
    existing = {target for target in targets if target.exists()}
    if existing and not (args.force or args.skip_existing):
        raise UsageError(
            f"{len(existing)} of the results exist, {min(existing)} for one: --skip-existing leaves them, --force "
            "replaces them."
        )
    for file in (args.compare, args.report):
        if file is not None:
            check_target(file, force=args.force or args.skip_existing)
    with progress(args) as bar:
        tiles = bar.add_task("parts", visible=len(pictures) == 1)
        job.tell = lambda done, total: bar.update(tiles, completed=done, total=total)
        for picture, target in bar.track(list(zip(pictures, targets, strict=True)), description="restoring"):
            job.do(picture, target, skip=args.skip_existing and target in existing)
    print_results(args, job)
    return report_failures(args, job.failed, len(pictures))


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
    if args.model is None and args.weights is None and not _ships(task):
        raise UsageError(
            f"No weights for {task} are shipped yet: give a weight file with --weights (the authors' files are "
            "recognised), or published weights with --model."
        )
    from zoo.factory import create_model
    from zoo.ffn.reparam import reparameterize
    from zoo.pictures.restore import load_restorer

    hush(args)
    model: Any = args.model
    if model is not None and args.weights is None and ("/" in model or Path(model).exists()):
        model = create_model(model, pretrained=True)
        if not hasattr(model, "scale"):
            raise UsageError(f"{args.model} holds a {type(model).__name__}, which does not restore images.")
        reparameterize(model, measure=False)
    device = pick_device(args.device)
    return load_restorer(task, args.scale, model, args.weights, sigma=sigma, device=device, dtype=args.dtype)


def _ships(task: str) -> bool:
    """Tell whether weights for a task come with the package."""
    return any(
        facts["task"] == task and weight["source"] == "shipped"
        for facts in catalog.load().values()
        for weight in facts["weights"].values()
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse calls that make no sense, before torch is imported."""
    if not 1 <= args.quality <= 100:
        raise UsageError(f"--quality must be from 1 to 100, got {args.quality}.")
    if args.sigma is not None and (args.sigma < 0 or args.task not in (None, "denoise")):
        raise UsageError(f"--sigma is the noise of --task denoise, at least 0; got {args.sigma:g} for {args.task}.")
    if args.sigma is not None and args.task is None and args.model is None and args.weights is None:
        args.task = "denoise"
    if args.right is not None and args.task is None and args.model is None and args.weights is None:
        args.task = "defocus"
    if args.compare is not None and args.compare.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--compare writes a .html file, not {args.compare.name!r}.")
    facts = catalog.load().get((args.model or "").partition(".")[0])
    if facts and args.task and args.weights is None and facts["task"] not in (args.task, "classification"):
        raise UsageError(f"{args.model} is for {facts['task']}, not {args.task}.")
    if args.template is not None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(args.template) if field is not None}
        except ValueError as error:
            raise UsageError(f"--template {args.template!r}: {error}.") from error
        wrong = fields - set(_FIELDS)
        if wrong or not fields or "/" in args.template or "\\" in args.template:
            raise UsageError(
                f"--template names a file with {', '.join(f'{{{field}}}' for field in _FIELDS)}; got {args.template!r}."
            )
    if args.format:
        from PIL import Image

        Image.init()
        suffix = f".{args.format.lstrip('.').lower()}"
        if Image.EXTENSION.get(suffix) not in Image.SAVE:
            raise UsageError(f"--format {args.format!r} is no format that can be written: png, jpg, webp, tif, ...")


def _targets(pictures: list[Picture], args: argparse.Namespace, job: Job) -> list[Path]:
    """Return where each result goes: the named file, or the place in the output folder."""
    suffix = f".{args.format.lstrip('.').lower()}" if args.format else None
    output: Path = args.output
    as_file = output.suffix.lower() in SUFFIXES and not output.is_dir()
    if as_file and (len(pictures) != 1 or Path(args.files[0]).is_dir()):
        raise UsageError(f"{output} names one file for {len(pictures)} pictures: give a folder.")
    targets: dict[Path, Path] = {}
    for index, picture in enumerate(pictures):
        target = output if as_file else output / picture.relative
        target = target.with_suffix(suffix) if suffix and not as_file else target
        if args.template and not as_file:
            fields = {"stem": target.stem, "suffix": target.suffix, "scale": job.scale, "task": job.task}
            try:
                name = args.template.format(**fields, model=Path(job.name).name, index=index)
            except (ValueError, TypeError, IndexError, KeyError) as error:
                raise UsageError(f"--template {args.template!r}: {one_line(error)}.") from error
            target = target.with_name(name)
        if target in targets:
            raise UsageError(f"{targets[target]} and {picture.path} would both become {target}.")
        if target.exists() and picture.path.exists() and target.samefile(picture.path):
            raise UsageError(f"{target} would replace its own input: choose another folder.")
        targets[target] = picture.path
    return list(targets)


def _of_same_names(option: str, pictures: list[Picture], given: Path | None) -> dict[Path, Path]:
    """Return the file that an option gives for each picture: of the same name below a folder, in any format."""
    if given is None:
        return {}
    if given.is_file():
        if len(pictures) != 1:
            raise UsageError(f"{option} {given} is one file for {len(pictures)} pictures: give a folder.")
        return {pictures[0].path: given}
    if not given.is_dir():
        raise UsageError(f"{option}: there is no folder {given}.")
    known = {picture.relative.with_suffix("").as_posix(): picture.path for picture in find_pictures([str(given)])}
    found = {}
    for picture in pictures:
        name = picture.relative.with_suffix("").as_posix()
        customary = name.rpartition("x")[0] if name.rpartition("x")[2].isdigit() else name  # babyx2 belongs to baby
        match = known.get(name) or known.get(customary)
        if match is not None:
            found[picture.path] = match
    if not found:
        raise UsageError(f"{option}: {given} has no picture that is called like one of the {len(pictures)} inputs.")
    return found
