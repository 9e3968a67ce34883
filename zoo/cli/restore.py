"""`zoo restore`: pictures in, the same kind of pictures out, with a report, metrics and a page to compare them."""

from __future__ import annotations

import argparse
import json
import logging
import string
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.inputs import SUFFIXES, Picture, add_device, find_pictures, one_line, report_failures
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
from zoo.evaluation.protocols import Protocol, protocol_of_task

if TYPE_CHECKING:
    from torch import nn

    from zoo.cli.compare import Comparison
    from zoo.pictures.image_io import Picture as Planes

TASKS = {
    "sr": "too small",
    "denoise": "noise",
    "deblur": "motion blur",
    "derain": "rain",
    "defocus": "a lens out of focus",
}
"""What `--task` takes, and what each task mends."""

_FIELDS = ("stem", "suffix", "scale", "task", "model", "index")  # of --template
_HARDLY = 0.5  # mean change below which a picture counts as unchanged, of 255


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
    job = _Job(args, model, references, rights)
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
    _print(args, job)
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


class _Job:
    """One model at work on many pictures, and what came of it."""

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, references: dict[Path, Path], rights: dict[Path, Path]
    ) -> None:
        self.args, self.model, self.references, self.rights = args, model, references, rights
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        self.scale = int(getattr(model, "scale", 1))
        self.task = args.task or str(cfg.get("task") or "sr")
        published = args.model or ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
        self.name = published if args.weights is None else args.model or str(cfg.get("architecture"))
        self.title = self.name if args.weights is None else f"{self.name} with {Path(args.weights).name}"
        self.protocol: Protocol = protocol_of_task(self.task)
        self.restored: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.tell: Any = None
        self.comparison: Comparison | None = None
        if args.compare is not None:
            from zoo.cli.compare import Comparison

            self.comparison = Comparison()

    def do(self, picture: Picture, target: Path, skip: bool) -> None:
        """Restore one picture, or only look at its result; what is wrong with it is noted and the next one follows."""
        from zoo.pictures.restore import open_picture

        entry: dict[str, Any] = {"file": str(picture.path), "output": str(target)}
        try:
            with _warnings() as said:
                if not skip:
                    check_target(target, force=True)
                if not skip or self.comparison is not None:
                    source = open_picture(picture.path)
                if skip:
                    result = open_picture(target) if self.args.metrics or self.comparison is not None else None
                else:
                    result = self._restore(self._with_right_view(picture.path, source, entry), target, entry)
                if result is not None and self.args.metrics:
                    self._measure(picture.path, result, entry)
                if result is not None and self.comparison is not None:
                    self.comparison.add(picture.relative.as_posix(), source, result, _facts(entry))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            self.failed.append({"file": str(picture.path), "error": one_line(error)})
            return
        entry["warnings"] = [*entry.get("warnings", []), *said]
        (self.skipped if skip else self.restored).append(entry)

    def _with_right_view(self, path: Path, source: Planes, entry: dict[str, Any]) -> Planes:
        from zoo.pictures.restore import open_picture, pair_views

        if self.args.right is None:
            return source
        if path not in self.rights:
            raise ValueError(f"There is no right view of this name in {self.args.right}.")
        entry["right"] = str(self.rights[path])
        return pair_views(source, open_picture(self.rights[path]))

    def _restore(self, source: Planes, target: Path, entry: dict[str, Any]) -> Planes:
        from zoo.pictures.restore import restore_picture

        how: list[str] = []  # more than one where a first try ran out of memory
        start = time.perf_counter()
        result = restore_picture(
            source,
            self.model,
            budget=None if self.args.budget.lower() == "none" else self.args.budget,
            tile=self.args.tile,
            overlap=self.args.overlap,
            self_ensemble=self.args.self_ensemble,
            progress=self.tell,
            inform=how.append,
        )
        result.save(target, quality=self.args.quality)
        entry["size"], entry["output_size"] = list(source.size), list(result.size)
        entry["seconds"] = round(time.perf_counter() - start, 3)
        entry["method"] = how[-1]
        if self.scale == 1:
            entry["mean_change"] = round(_mean_change(source, result), 3)
        return result

    def _measure(self, path: Path, result: Planes, entry: dict[str, Any]) -> None:
        """Compare a result with its reference, cut from the top left where that is a little larger."""
        import torch

        from zoo.evaluation.metrics import measure
        from zoo.pictures.restore import open_picture

        if path not in self.references:
            entry.setdefault("warnings", []).append(f"no reference of this name in {self.args.metrics}")
            return
        reference = open_picture(self.references[path])
        height, width = result.size
        extra = [own - size for own, size in zip(reference.size, result.size, strict=True)]
        if not all(0 <= more < self.scale for more in extra):
            sizes = ["x".join(map(str, size)) for size in (reference.size, result.size)]
            entry.setdefault("warnings", []).append(f"the reference has {sizes[0]} pixels, the result {sizes[1]}")
            return
        planes = []
        channels = max(result.color.shape[2], reference.color.shape[2])
        for picture in (result, reference):
            color = torch.from_numpy(picture.color[:height, :width].astype("float32")) / picture.peak
            planes.append(color.permute(2, 0, 1)[None].expand(-1, channels, -1, -1))
        values = measure(self.protocol, planes[0], planes[1], self.scale)
        entry["metrics"] = {name: float(value) for name, value in values.items()}

    @property
    def means(self) -> dict[str, float]:
        """Means of the metrics over all pictures that have a reference."""
        measured = [entry["metrics"] for entry in (*self.restored, *self.skipped) if "metrics" in entry]
        return {name: sum(values[name] for values in measured) / len(measured) for name in (measured or [{}])[0]}

    def report(self) -> dict[str, Any]:
        """Return everything for programs."""
        args, parameter = self.args, next(self.model.parameters())
        options = ("weights", "sigma", "budget", "tile", "overlap", "self_ensemble", "format", "quality", "template")
        report: dict[str, Any] = {"model": self.name, "task": self.task, "scale": self.scale}
        report |= {"device": str(parameter.device), "dtype": str(parameter.dtype).removeprefix("torch.")}
        report["settings"] = {name: getattr(args, name) for name in options}
        if args.metrics is not None:
            report["metrics"] = {"protocol": self.protocol.name, "summary": self.protocol.summary, "means": self.means}
        return report | {"restored": self.restored, "skipped": self.skipped, "failed": self.failed}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what is warned about and logged while one picture is at work."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("zoo"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield said
        said += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _mean_change(before: Planes, after: Planes) -> float:
    """Mean absolute difference of two pictures of one size, of 255."""
    import numpy as np

    first = before.color[..., : after.color.shape[2]]  # of two views the left one
    difference = after.color.astype(np.float32) / after.peak - first.astype(np.float32) / before.peak
    return float(np.abs(difference).mean()) * 255


def _facts(entry: dict[str, Any]) -> str:
    """What the page says below a picture."""
    parts = []
    if "size" in entry:
        sizes = [f"{width}x{height}" for height, width in (entry["size"], entry["output_size"])]
        parts += [" -> ".join(dict.fromkeys(sizes)) + " pixels", f"{entry['seconds']:.2f} s"]
    if "metrics" in entry:
        parts += [_number(name, value) for name, value in entry["metrics"].items()]
    return ", ".join(parts)


def _number(name: str, value: float) -> str:
    return f"PSNR {value:.2f} dB" if name == "psnr" else f"{name.upper()} {value:.4f}"


def _targets(pictures: list[Picture], args: argparse.Namespace, job: _Job) -> list[Path]:
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


def _print(args: argparse.Namespace, job: _Job) -> None:
    """Write the page and the report, and print what was done."""
    if job.comparison is not None and job.comparison.count:
        means = ", ".join(_number(name, value) for name, value in job.means.items())
        with replacing(args.compare, force=True) as temporary:
            temporary.write_text(job.comparison.page(job.title, job.task, job.scale, means), encoding="utf-8")
    if args.report is not None:
        with replacing(args.report, force=True) as temporary:
            temporary.write_text(json.dumps(job.report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.json:
        print_json(job.report())
        return
    if args.quiet:
        for entry in job.restored:
            print(entry["output"])
        return
    names = list(job.means)
    headings = ["PSNR, dB" if name == "psnr" else name.upper() for name in names]
    methods = {entry["method"] for entry in job.restored} - {"whole"}
    columns = ["picture", "size", "result", "size", "seconds", *(["method"] if methods else []), *headings]
    rows = table(*columns, right=("seconds", *headings), title=job.title)
    for entry in job.restored:
        sizes = ["x".join(map(str, entry[key])) for key in ("size", "output_size")]
        values = [entry["method"]] if methods else []
        values += [f"{entry['metrics'][name]:.4f}" if "metrics" in entry else "-" for name in names]
        rows.add_row(entry["file"], sizes[0], entry["output"], sizes[1], f"{entry['seconds']:.2f}", *values)
    if job.restored:
        print_table(rows)
    if job.means:
        count = sum("metrics" in entry for entry in (*job.restored, *job.skipped))
        means = ", ".join(_number(name, value) for name, value in job.means.items())
        print_table(f"Mean of {count}: {means}. Protocol {job.protocol.name}: {job.protocol.summary}.")
    if job.skipped:
        note(args, f"{len(job.skipped)} skipped: their results exist.")
    for entry in (*job.restored, *job.skipped):
        for text in entry["warnings"]:
            note(args, f"{entry['file']}: {text}")
    _hint(args, job)
    if job.comparison is not None and job.comparison.left_out:
        note(args, f"{args.compare} shows the first {job.comparison.count}; {job.comparison.left_out} are left out.")


def _hint(args: argparse.Namespace, job: _Job) -> None:
    """Say which tasks there are where pictures came out as they went in."""
    same = [entry for entry in job.restored if entry.get("mean_change", _HARDLY) < _HARDLY]
    if not same:
        return
    others = ", ".join(f"{task} ({what})" for task, what in TASKS.items() if task != job.task)
    note(
        args,
        f"{len(same)} of {len(job.restored)} hardly changed, {same[0]['file']} by {same[0]['mean_change']:.2f} of 255: "
        f"there may be none of what {job.task} mends ({TASKS.get(job.task, job.task)}). Other tasks: {others}.",
    )
