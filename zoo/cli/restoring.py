"""The work of `zoo restore`: one model on many pictures, what came of each, and the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.inputs import one_line
from zoo.cli.output import check_target, note, print_json, print_table, replacing, table
from zoo.evaluation.protocols import Protocol, protocol_of_task

if TYPE_CHECKING:
    from zoo.cli.compare import Comparison
    from zoo.cli.targets import Plan
    from zoo.pictures.picture import Picture as Planes
    from zoo.pictures.restore import Networks

__all__ = ["TASKS", "Job", "print_results"]

TASKS = {
    "sr": "too small",
    "denoise": "noise",
    "deblur": "motion blur",
    "derain": "rain",
    "defocus": "a lens out of focus",
    "restore": "JPEG blocks and noise",
}
"""What `--task` takes, and what each task mends."""

_HARDLY = 0.5  # mean change below which a picture counts as unchanged, of 255


class Job:
    """One model at work on many pictures, and what came of it."""

    def __init__(
        self, args: argparse.Namespace, networks: Networks, references: dict[Path, Path], rights: dict[Path, Path]
    ) -> None:
        self.args, self.networks, self.references, self.rights = args, networks, references, rights
        self.model, self.size = networks.first, networks.size
        cfg: Any = getattr(self.model, "pretrained_cfg", None) or {}
        self.scale = int(getattr(self.model, "scale", 1))
        self.task = args.task or str(cfg.get("task") or "sr")
        published = args.model or ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
        self.name = published if args.weights is None else args.model or str(cfg.get("architecture"))
        self.title = self.name if args.weights is None else f"{self.name} with {Path(args.weights).name}"
        self.protocol: Protocol = protocol_of_task(self.task)
        self.restored: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.tell: Any = None
        self.alone = False
        self.comparison: Comparison | None = None
        if args.compare is not None:
            from zoo.cli.compare import Comparison

            self.comparison = Comparison()

    def do(self, plan: Plan, skip: bool) -> None:
        """Restore one picture, or only look at its result; what is wrong with it is noted and the next one follows."""
        picture, target = plan.picture, plan.target
        entry: dict[str, Any] = {"file": str(picture.path), "output": str(target)}
        try:
            with _warnings() as said:
                if not skip:
                    check_target(target, force=True)
                if not skip or self.comparison is not None:
                    source = self._open(picture.path)
                if skip:
                    result = self._open(target) if self.args.metrics or self.comparison is not None else None
                else:
                    result = self._restore(self._with_right_view(picture.path, source, entry), target, entry)
                if result is not None and self.args.metrics:
                    self._measure(picture.path, result, entry)
                if result is not None and self.comparison is not None:
                    name = picture.relative.as_posix()
                    self.comparison.add(name, _cropped(source, self.args.crop), result, _facts(entry))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it is, the other pictures are done
            self.failed.append({"file": str(picture.path), "error": one_line(error)})
            return
        told = [text for text in (_untold(text, plan.notes) for text in said) if text]
        entry["warnings"] = [*plan.notes, *entry.get("warnings", []), *told]
        entry["told"] = len(plan.notes)  # before anything was computed
        (self.skipped if skip else self.restored).append(entry)

    def _open(self, path: Path, every_frame: bool = True) -> Planes:
        from zoo.pictures.restore import open_picture

        most = None if self.args.max_pixels is None else int(self.args.max_pixels)
        return open_picture(path, every_frame=every_frame and self.args.right is None, max_pixels=most)

    def _with_right_view(self, path: Path, source: Planes, entry: dict[str, Any]) -> Planes:
        from zoo.pictures.restore import pair_views

        if self.args.right is None:
            return source
        if path not in self.rights:
            raise ValueError(f"There is no right view of this name in {self.args.right}.")
        entry["right"] = str(self.rights[path])
        return pair_views(source, self._open(self.rights[path]))

    def _restore(self, source: Planes, target: Path, entry: dict[str, Any]) -> Planes:
        from zoo.pictures.formats import format_of
        from zoo.pictures.metadata import stripped
        from zoo.pictures.restore import restore_picture
        from zoo.pictures.write import kept_frames, write_picture

        how: list[str] = []  # more than one where a first try ran out of memory
        start = time.perf_counter()
        if self.args.strip:
            source = dataclasses.replace(source, metadata=stripped(source.metadata))
        # frames that would not be written are not restored
        source = dataclasses.replace(source, frames=kept_frames(source, format_of(target) or ""))
        networks = self.networks.reaching(source.size, source)
        if self.args.engine == "auto":
            from zoo.pictures.engine import engine_if_worthwhile

            for network in networks:
                if said := engine_if_worthwhile(network, source.size):
                    note(self.args, f"{said}.")
        chosen = self.args.model is None and self.args.weights is None and bool(networks)
        if chosen:
            entry["model"], entry["because"] = self.networks.name, self.networks.reason
        if chosen and self.alone:
            note(self.args, f"{self.networks.name}: {self.networks.reason}.")

        def hear(words: str) -> None:
            how.append(words)
            if "times the work" in words or "blended over" in words:
                note(self.args, f"{words}{'' if self.args.exact else ' (--exact insists on exact ones)'}.")

        result = restore_picture(
            source,
            networks,
            budget=None if self.args.budget.lower() == "none" else self.args.budget,
            tile=self.args.tile,
            overlap=self.args.overlap,
            exact=self.args.exact,
            self_ensemble=self.args.self_ensemble or self.args.quality == "best",
            progress=self.tell,
            inform=hear,
            size=self.size,
            crop=self.args.crop,
        )
        write_picture(result, target, self.args.jpeg_quality)
        entry["size"], entry["output_size"] = list(source.size), list(result.size)
        if result.frames:
            entry["frames"] = 1 + len(result.frames)
        entry["seconds"] = round(time.perf_counter() - start, 3)
        entry["method"] = how[-1] if how else "whole"
        if source.size == result.size:
            entry["mean_change"] = round(_mean_change(source, result), 3)
        return result

    def _measure(self, path: Path, result: Planes, entry: dict[str, Any]) -> None:
        """Compare a result with its reference, cut from the top left where that is a little larger."""
        import torch

        from zoo.evaluation.metrics import measure

        if path not in self.references:
            entry.setdefault("warnings", []).append(f"no reference of this name in {self.args.metrics}")
            return
        reference = self._open(self.references[path], every_frame=False)
        height, width = result.size
        extra = [own - size for own, size in zip(reference.size, result.size, strict=True)]
        if not all(0 <= more < self.scale for more in extra):
            sizes = [f"{across}x{down}" for down, across in (reference.size, result.size)]
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
        options = [
            "weights",
            "sigma",
            "budget",
            "tile",
            "overlap",
            "exact",
            "self_ensemble",
            "quality",
            "kind",
        ]
        options += ["engine", "format", "template", "jpeg_quality", "strip", "width", "height", "max_side", "crop"]
        report: dict[str, Any] = {"model": self.name, "task": self.task, "scale": self.size.scale or self.scale}
        report |= {"device": str(parameter.device), "dtype": str(parameter.dtype).removeprefix("torch.")}
        report["settings"] = {name: getattr(args, name) for name in options}
        if args.metrics is not None:
            report["metrics"] = {"protocol": self.protocol.name, "summary": self.protocol.summary, "means": self.means}
        return report | {"restored": self.restored, "skipped": self.skipped, "failed": self.failed}


def _cropped(picture: Planes, crop: str | None) -> Planes:
    """Return the part of a picture that was restored."""
    from zoo.pictures.sizes import crop_box

    if crop is None:
        return picture
    left, top, right, bottom = crop_box(crop, picture.size)
    planes = {name: getattr(picture, name) for name in ("color", "black", "alpha")}
    parts: dict[str, Any] = {
        name: None if plane is None else plane[top:bottom, left:right] for name, plane in planes.items()
    }
    return dataclasses.replace(picture, frames=(), **parts)


def _untold(text: str, notes: Sequence[str]) -> str:
    """Return what of a remark was not said before; empty where all was."""
    for known in notes:
        if text.startswith(known):  # "PNG: a" is known of "PNG: a, b."
            rest = text[len(known) :].strip(" ,.")
            return f"{known.partition(': ')[0]}: {rest}." if rest else ""
    return "" if text.partition(": ")[2].rstrip(".") in " ".join(notes) else text


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


def print_results(args: argparse.Namespace, job: Job) -> None:
    """Write the page and the report, and print what was done."""
    if job.comparison is not None and job.comparison.count:
        means = ", ".join(_number(name, value) for name, value in job.means.items())
        with replacing(args.compare, force=True) as temporary:
            page = job.comparison.page(job.title, job.task, job.size.scale or job.scale, means)
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    if args.report is not None:
        with replacing(args.report, force=True) as temporary:
            text = json.dumps(job.report(), indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.json:
        print_json(job.report())
        return
    if args.quiet and not args.piped:
        for entry in job.restored:
            print(entry["output"])
        return
    names = list(job.means)
    headings = ["PSNR, dB" if name == "psnr" else name.upper() for name in names]
    methods = {entry["method"] for entry in job.restored} - {"whole"}
    columns = ["picture", "size", "result", "size", "seconds", *(["method"] if methods else []), *headings]
    chosen = ", ".join(sorted({entry["model"] for entry in job.restored if entry.get("model")}))
    rows = table(*columns, right=("seconds", *headings), title=chosen or job.title)
    for entry in job.restored:
        sizes = [f"{width}x{height}" for height, width in (entry["size"], entry["output_size"])]
        values = [re.split(r" over |; |, \d", entry["method"])[0]] if methods else []  # what that costs was said before
        values += [f"{entry['metrics'][name]:.4f}" if "metrics" in entry else "-" for name in names]
        rows.add_row(entry["file"], sizes[0], entry["output"], sizes[1], f"{entry['seconds']:.2f}", *values)
    if job.restored and not args.piped:
        print_table(rows)
    if not job.alone:
        for model in sorted({entry["model"] for entry in job.restored if "model" in entry}):
            used = [entry for entry in job.restored if entry.get("model") == model]
            reason = f"{used[0]['file']}: {used[0]['because']}"
            note(args, f"{model} restored {len(used)} of {len(job.restored)}, for one {reason}.")
    if job.means and not args.piped:
        count = sum("metrics" in entry for entry in (*job.restored, *job.skipped))
        means = ", ".join(_number(name, value) for name, value in job.means.items())
        print_table(f"Mean of {count}: {means}. Protocol {job.protocol.name}: {job.protocol.summary}.")
    if job.skipped:
        note(args, f"{len(job.skipped)} skipped: their results exist.")
    for entry in (*job.restored, *job.skipped):
        for text in entry["warnings"][entry["told"] :]:
            note(args, f"{entry['file']}: {text}")
    _hint(args, job)
    if job.comparison is not None and job.comparison.left_out:
        note(args, f"{args.compare} shows the first {job.comparison.count}; {job.comparison.left_out} are left out.")


def _hint(args: argparse.Namespace, job: Job) -> None:
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
