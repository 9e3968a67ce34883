"""`zoo finetune`: teach a model the classes of your own pictures."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, at_least, hush, print_json, print_table, silent, table
from zoo.sources import beside

if TYPE_CHECKING:
    from rich.table import Table

    from zoo.tasks.finetuning import Finetuned

_LAYOUT = "expected DIR/CLASS/*.jpg or DIR/{train,val}/CLASS/*.jpg, or Parquet files or shards"


def add_parser(subparsers: Any) -> None:
    """Add `finetune`."""
    parser = subparsers.add_parser(
        "finetune",
        help="teach a model the classes of your own pictures",
        description="Train a classifier on DIR/CLASS/*.jpg, of which a part of every class is held out, or"
        " on DIR/{train,val}/CLASS/*.jpg, or on Parquet files or WebDataset shards with these splits. The folder it"
        " writes is a model for every other command.",
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of class folders, Parquet or shards")
    parser.add_argument("--model", required=True, metavar="NAME.TAG", help="what to start from; also a file or folder")
    add_model_args(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the model's folder")
    parser.add_argument("--epochs", type=int, default=20, help="at most (default: 20)")
    parser.add_argument("--patience", type=int, default=5, help="epochs without progress before the end (default: 5)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="input side (default: that of the weights)")
    parser.add_argument("--batch-size", type=int, help="pictures of a step (default: by the number of pictures)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the classifier (default: 5e-4)")
    parser.add_argument("--freeze", nargs="+", default=[], metavar="PART", help="parts that stay: stem stages.0")
    parser.add_argument("--lora", type=int, nargs="?", const=8, metavar="RANK", help="train low-rank adapters only")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share that is held out (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--force", action="store_true", help="replace a folder that this command has written")


def run(args: argparse.Namespace) -> int:
    """Fine-tune a model."""
    _check_options(args)
    _check_output(args.output, force=args.force)
    _check_pictures(args.data, args.output)
    find_model(args.model, task="classification")
    arguments = model_args(args)
    hush(args)
    try:
        from zoo.tasks.finetuning import finetune
    except ImportError as error:
        raise ImportError(f"Training needs {error.name}, which is missing: pip install 'ffn-zoo[train]'.") from error
    with _live(args) as tell:
        result = finetune(
            args.data, args.model, args.output, image_size=args.image_size, epochs=args.epochs, patience=args.patience,
            batch_size=args.batch_size, lr=args.lr, freeze=args.freeze, lora=args.lora, val_fraction=args.val_fraction,
            seed=args.seed, num_workers=args.num_workers, skip_damaged=args.skip_damaged, overwrite=args.force,
            model_args=arguments, tell=tell,
        )  # fmt: skip
    _report(args, result)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    at_least(args, epochs=1, patience=1, image_size=1, batch_size=2, lora=1, num_workers=0)
    if not args.lr > 0:
        raise UsageError(f"--lr must be above 0, got {args.lr:g}.")
    if not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction is a share and lies between 0 and 1, got {args.val_fraction:g}.")
    if args.lora and args.freeze:
        raise UsageError("--lora fixes all weights but the classifier's: leave --freeze out.")


def _check_output(output: Path, *, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; -o takes the name of a folder.")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise UsageError(f"{output} exists; --force replaces it.")
        if not (output / "config.json").is_file() or not (output / "README.md").is_file():
            raise UsageError(f"{output} holds something else than a model of your own: it is not replaced.")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(f"The folder {above} is not writable.")


def _check_pictures(folder: Path, output: Path) -> None:
    """Refuse a folder that cannot be learnt from, before torch is imported."""
    from zoo.pictures.folders import class_folders, is_picture, misnamed_parts, pictures_below, split_folder

    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}: {_LAYOUT}.{beside(folder)}")
    if _is_packed(folder):
        return
    train = split_folder(folder, ("train",)) or folder
    held_out = split_folder(folder, ("validation", "val", "valid")) is None
    if train == folder and (parts := misnamed_parts(folder)):
        raise UsageError(
            f"{folder} holds {', '.join(parts)}: call the folder of the training pictures train, the other val."
        )
    if train.resolve() in output.resolve().parents:
        raise UsageError(f"{output} lies in {train}, whose folders are classes: choose a folder outside of it.")
    counts = {path.name: sum(1 for _ in pictures_below(path)) for path in class_folders(train)}
    if not any(counts.values()):
        loose = sum(is_picture(entry.name) for entry in os.scandir(train))
        found = f"{loose} pictures outside of class folders" if loose else "no pictures in class folders"
        raise UsageError(f"{train} holds {found}: {_LAYOUT}.")
    for name, count in counts.items():
        if not count:
            raise UsageError(f"The class folder {train / name} holds no pictures: fill it, or take it away.")
        if held_out and count == 1:
            raise UsageError(
                f"The class {name!r} has one picture: it takes two, one to learn from and one to measure on, or some in"
                f" {folder / 'val' / name}."
            )
    if len(counts) == 1:
        raise UsageError(f"{train} has one class, {next(iter(counts))!r}: a classifier takes two or more.")


def _is_packed(folder: Path) -> bool:
    """Tell whether pictures are in shards or Parquet files: labels are known when these are opened."""
    from zoo.data.shards import find_shards
    from zoo.pictures.folders import class_folders, pictures_below

    pictures = (name for path in class_folders(folder) for name in pictures_below(path))
    return bool(find_shards(folder, ("train",))) or (not any(pictures) and any(folder.rglob("*.parquet")))


@contextmanager
def _live(args: argparse.Namespace) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield a function that adds an epoch to a table, which grows where somebody watches."""
    rows: list[dict[str, float]] = []
    if silent(args):
        yield rows.append
        return
    from rich.console import Console
    from rich.live import Live

    with Live(_epochs(rows, args.epochs), console=Console(stderr=True), refresh_per_second=4) as live:

        def tell(numbers: dict[str, float]) -> None:
            rows.append(numbers)
            live.update(_epochs(rows, args.epochs))

        yield tell


def _epochs(rows: list[dict[str, float]], most: int) -> Table:
    out = table("epoch", "training loss", "validation loss", "accuracy", "s left at most")
    for column in out.columns:
        column.justify = "right"
    least = min((row["val_loss"] for row in rows), default=0.0)
    for row in rows:
        left = row["seconds"] / row["epoch"] * (most - row["epoch"])
        out.add_row(
            f"{row['epoch']:.0f} of {most}",
            f"{row['train_loss']:.3f}",
            f"{row['val_loss']:.3f}",
            f"{100 * row['val_acc1']:.1f} %",
            f"{left:.0f}",
            style="bold" if row["val_loss"] == least else None,
        )
    if not rows:
        out.caption = "reading pictures, loading the model, first epoch ..."
    return out


def _report(args: argparse.Namespace, result: Finetuned) -> None:
    folder, name = str(result.folder), result.folder.resolve().name
    repository = re.sub(r"[^a-zA-Z0-9_]+", "-", name).strip("-") or "model"  # what the Hub takes as a name
    commands = [
        shlex.join(["zoo", "classify", "PICTURE" if _is_packed(args.data) else str(args.data), "--model", folder]),
        shlex.join(["zoo", "export", folder, "--format", "onnx", "-o", f"{name}.onnx"]),
        shlex.join(["zoo", "publish", folder, "--repo-id", f"YOU/{repository}", "--dry-run"]),
    ]
    if args.json:
        print_json(
            {
                "folder": folder,
                "accuracy": result.accuracy,
                "right": result.right,
                "measured": len(result.files),
                "trained_on": result.trained_on,
                "classes": result.classes,
                "confusion": result.confusion,
                "files": result.files,
                "epochs": result.epochs,
                "best_epoch": result.best_epoch,
                "seconds": round(result.seconds, 2),
                "next": commands,
            }
        )
        return
    if args.quiet:
        print(folder)
        return
    rows = table("class", "pictures", "right", "most often taken for", right=("pictures", "right"))
    from zoo.data.readable import in_words

    words = in_words(result.classes)
    for place, (name, row) in enumerate(zip(words, result.confusion, strict=False)):
        wrong = max((count, other) for other, count in enumerate(row) if other != place)
        taken = f"{words[wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
        rows.add_row(name, str(sum(row)), str(row[place]), taken)
    print_table(
        rows,
        f"Accuracy {100 * result.accuracy:.1f} %: {result.right} of {len(result.files)} pictures that were not learnt"
        f" from, listed in {result.folder / 'validation.txt'}. Weights of epoch {result.best_epoch} of {result.epochs};"
        f" {result.seconds:.0f} s.",
        f"Confusion matrix: {result.folder / 'confusion.png'}. Next:",
        *(f"  {command}" for command in commands),
    )
    sys.stdout.flush()
