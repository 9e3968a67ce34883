"""What the page does with what visitors give, without any Gradio: the functions behind the commands, kept loaded."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.app.offers import Offers
from zoo.cli.inputs import find_pictures, one_line
from zoo.cli.output import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answer", "Limits", "Restored", "Service", "upload_error"]

_PREVIEW = 1600  # longer side of what the slider shows, pixels
_LOADED = 6  # networks that stay in memory

Tell = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Args:
        pixels: Of a picture, all its frames counted.
        result_pixels: Of a result.
        pictures: To classify at a time.
        models: To compare.
        images: To generate.
        steps: Of a scheduler.
    """

    pixels: int = 24_000_000
    result_pixels: int = 100_000_000
    pictures: int = 12
    models: int = 4
    images: int = 8
    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model says of one picture.

    Args:
        model: Its name.
        top: Classes with label and probability, the most probable first.
        seconds: Reading the picture and running the network.
        likely: Whether the first class is as probable as the weights ask for.
    """

    model: str
    top: list[dict[str, Any]]
    seconds: float
    likely: bool = True


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A restored picture.

    Args:
        file: The result, in the format of the input.
        before: The input as large as the result, in 8 bits, for the slider.
        after: The result likewise.
        size: Height and width of the input, pixels.
        output_size: Of the result.
        model: Which weights did it.
        because: Why these.
        seconds: Reading, network and writing.
        method: Whole, in tiles, ...
        notes: What else there is to know.
    """

    file: Path
    before: Image
    after: Image
    size: tuple[int, int]
    output_size: tuple[int, int]
    model: str
    because: str
    seconds: float
    method: str
    notes: list[str] = field(default_factory=list)


class Service:
    """The models of the page, loaded when first used, and the folder in which results lie for a while.

    Requests may come from several threads: networks work on one at a time.

    Args:
        offers: Which models there are.
        limits: What a request may ask for.
        device: As `--device` takes it.
    """

    def __init__(self, offers: Offers | None = None, limits: Limits | None = None, *, device: str = "auto") -> None:
        self.offers, self.limits, self.device = offers or Offers.of(), limits or Limits(), device
        self.lock = threading.RLock()
        self._loaded: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory(prefix="zoo-app-", ignore_cleanup_errors=True)

    @property
    def folder(self) -> Path:
        """Where everything of visitors lies; it is gone when the service is closed."""
        return Path(self._folder.name)

    def close(self) -> None:
        """Delete everything of visitors."""
        self._folder.cleanup()

    def sweep(self, age: float) -> None:
        """Delete what is older than so many seconds, uploads and results."""
        oldest = time.time() - age
        paths = sorted(self.folder.rglob("*"), reverse=True)  # what is in a folder before the folder
        changed = {path: path.stat().st_mtime for path in paths if path.exists()}
        for path, when in changed.items():
            if when < oldest:
                with contextlib.suppress(OSError):  # another request was faster, or there is something newer in it
                    path.rmdir() if path.is_dir() else path.unlink()

    def warm(self) -> None:
        """Load what a first visitor most likely asks for, so that the first result comes as fast as the next."""
        from PIL import Image

        with tempfile.TemporaryDirectory(dir=self.folder) as folder, contextlib.suppress(Exception):
            file = Path(folder) / "gray.png"
            Image.new("RGB", (16, 16), "gray").save(file)
            self.classify([file], self.offers.classifiers[:2])
            shutil.rmtree(self.restore(file).file.parent)

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what `make` made for this key, of the last few keys."""
        if key not in self._loaded:
            self._loaded[key] = make()
            while len(self._loaded) > _LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def classify(
        self, files: Sequence[str | Path] | None, models: Sequence[str] | None, tell: Tell | None = None
    ) -> tuple[list[tuple[str, list[Answer]]], list[str]]:
        """Name what is in pictures, by several models.

        Args:
            files: Uploads.
            models: Of those on offer.
            tell: Called with (done, in all).

        Returns:
            Each picture's name with the answers of all models, and a line for each that failed.

        Raises:
            UsageError: There is nothing to do, or too much.
        """
        from zoo.cli.classify import Classifier

        files, models = list(files or ()), list(models or ())
        if not files:
            raise UsageError("Choose a picture first.")
        if not models:
            raise UsageError("Choose a model first.")
        if len(files) > self.limits.pictures:
            raise UsageError(f"{len(files)} pictures are too many at a time; at most {self.limits.pictures} are taken.")
        if len(models) > self.limits.models:
            raise UsageError(f"{len(models)} models are too many at a time; at most {self.limits.models} are taken.")
        self.require(models, self.offers.classifiers)
        found, failed, done = [], [], 0
        with self.lock:
            loaded = []
            for name in models:
                load: Any = lambda name=name: Classifier(name, device=self.device)  # noqa: E731
                loaded.append(self.kept(("classifier", name), load))
            for file in files:
                answers = []
                try:
                    self._look(Path(file))
                    for name, classifier in zip(models, loaded, strict=True):
                        start = time.perf_counter()
                        top = classifier.top(Path(file), 5)
                        seconds, likely = time.perf_counter() - start, classifier.is_likely(top)
                        answers.append(Answer(model=name, top=top, seconds=seconds, likely=likely))
                except Exception as error:  # whatever it is, the other pictures are done
                    failed.append(upload_error(error, file))
                else:
                    found.append((Path(file).name, answers))
                done += 1
                if tell is not None:
                    tell(done, len(files))
        return found, failed

    def restore(
        self,
        file: str | Path | None,
        *,
        task: str = "sr",
        quality: str = "fast",
        scale: str | float | None = None,
        budget: str = "4GB",
        model: str | None = None,
        tell: Tell | None = None,
    ) -> Restored:
        """Restore a picture as `zoo restore` does.

        Args:
            file: Upload.
            task: As `--task` takes it.
            quality: As `--quality` takes it.
            scale: As `--scale` takes it; None or empty is the usual one.
            budget: As `--budget` takes it.
            model: One of those on offer; None or "auto" chooses by task and quality.
            tell: Called with (parts done, parts in all).

        Raises:
            UsageError: There is no picture, it is too large, or the options do not fit each other.
            ValueError: The picture is unreadable, or the options do not fit the model.
        """
        if file is None:
            raise UsageError("Choose a picture first.")
        file = Path(file)
        chosen = None if model in (None, "", "auto") else model
        if chosen is not None:
            self.require([chosen], self.offers.restorers)
        words = ["restore", str(file), "-o", tempfile.mkdtemp(dir=self.folder), "--force", "-q"]
        words += ["--budget", budget, "--device", self.device, "--max-pixels", str(self.limits.pixels)]
        words += ["--quality", quality] if chosen is None else ["--model", chosen]
        words += ["--task", task] if chosen is None else []
        if scale not in (None, ""):
            words += ["--scale", str(scale)]
        return self._restore(file, words, tell)

    def _restore(self, file: Path, words: list[str], tell: Tell | None) -> Restored:
        from zoo.cli import parse, restore, targets
        from zoo.cli.restoring import Job

        args = parse(words)
        args.piped = False
        try:
            restore.check(args)
            self._look(file)
            with self.lock:
                key = ("restorer", args.task, args.model, args.scale, args.quality)
                networks = self.kept(key, lambda: restore.load_networks(args))
                job = Job(args, networks, {}, {})
                job.tell, job.alone = tell or (lambda done, total: None), True
                (plan,) = targets.plan(find_pictures([str(file)]), args, job)
                if plan.error is not None:
                    raise UsageError(plan.error)
                self._check_result(file, job)
                job.do(plan, skip=False)
            if job.failed:
                raise UsageError(job.failed[0]["error"])
            return self._restored(file, job.restored[0], args)
        except Exception as error:
            shutil.rmtree(args.output, ignore_errors=True)
            raise UsageError(upload_error(error, file).replace(f"{args.output}{os.sep}", "")) from error

    def _restored(self, file: Path, entry: dict[str, Any], args: argparse.Namespace) -> Restored:
        from PIL import Image

        from zoo.pictures.eight_bit import read_eight_bit

        result = Path(entry["output"])
        height, width = entry["output_size"]
        shrink = min(1.0, _PREVIEW / max(height, width))
        shown = max(1, round(width * shrink)), max(1, round(height * shrink))
        before = read_eight_bit(file).resize(shown, Image.Resampling.BICUBIC)
        after = read_eight_bit(result)
        notes = [text.replace(str(file), file.name) for text in entry.get("warnings", ())]
        return Restored(
            file=result,
            before=before,
            after=after if after.size == shown else after.resize(shown, Image.Resampling.LANCZOS),
            size=tuple(entry["size"]),
            output_size=(height, width),
            model=entry.get("model") or args.model or "",
            because=entry.get("because", ""),
            seconds=entry["seconds"],
            method=entry["method"],
            notes=notes,
        )

    def _look(self, file: Path) -> None:
        """Refuse what is no picture or too large, from its head."""
        from zoo.pictures.read import peek

        kind = peek(file, self.limits.pixels)
        if kind.pixels > self.limits.pixels:
            frames = f" in {kind.frames} frames" if kind.frames > 1 else ""
            raise UsageError(
                f"{file.name} has {kind.pixels / 1e6:.1f} million pixels{frames}; this page takes at most "
                f"{self.limits.pixels / 1e6:g} million."
            )

    def _check_result(self, file: Path, job: Any) -> None:
        from zoo.pictures.read import peek

        kind = peek(file, self.limits.pixels)
        height, width = job.size.of(kind.size, job.scale)
        if height * width * kind.pixels > self.limits.result_pixels * kind.size[0] * kind.size[1]:
            raise UsageError(
                f"The result would have {width}x{height} pixels; this page makes at most "
                f"{self.limits.result_pixels / 1e6:g} million: a smaller scale does, or `zoo restore`."
            )

    def require(self, names: Sequence[str], offered: Sequence[str]) -> None:
        """Refuse names that the page does not offer: a request can be sent by hand."""
        wrong = next((name for name in names if name not in offered), None)
        if wrong is not None:
            raise UsageError(f"The page does not offer {wrong!r}; it has {', '.join(offered)}.")


def upload_error(error: BaseException, file: str | Path) -> str:
    """Return what is wrong in one line that calls an upload by its name, not by where it lies."""
    name = Path(file).name
    said = one_line(error).replace(str(file), name)
    return said if name in said else f"{name}: {said}"
