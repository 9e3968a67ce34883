"""`zoo export`: write a model for another runtime and compare the file with the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, check_target, hush, note, print_json, print_table, progress, table

if TYPE_CHECKING:
    from zoo.sources import Source

_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def add_parser(subparsers: Any) -> None:
    """Add `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a merged model for another runtime, then compare the file's outputs with the model's.",
    )
    parser.add_argument(
        "name", metavar="MODEL", help="NAME (random weights), NAME.TAG, file, checkpoint, folder or Hub id"
    )
    parser.add_argument("--format", choices=tuple(_SUFFIXES), required=True)
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: NAME with the format's suffix)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images of a classifier")
    parser.add_argument("--fixed-size", action="store_true", help="one height and width only")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with the model")
    add_model_args(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _plain_name(source: Source) -> str:
    """Return what a file is called after its model: mine/ gives mine, last.ckpt gives last, org/name gives name."""
    if source.path is None:
        return (source.repo_id or source.name).rpartition("/")[2].partition("@")[0]
    return source.path.stem if source.kind == "file" else source.path.resolve().name


def run(args: argparse.Namespace) -> int:
    """Export one model."""
    source = find_model(args.name, weights="." in args.name)
    denoiser = source.kind == "pipeline"
    random = source.kind == "model" and not source.tag
    if denoiser and source.path is None and not source.tag:
        facts = catalog.load()[str(source.architecture)]
        raise UsageError(
            f"Say which weights: {' or '.join(f'{source.architecture}.{tag}' for tag in facts['weights'])}."
        )
    if args.image_size is not None and (source.task not in (None, "classification") or args.image_size < 1):
        what = f"{args.name} is for {source.task}" if args.image_size > 0 else f"got {args.image_size}"
        raise UsageError(f"--image-size is the side of a classifier's images, 1 pixel or more: {what}.")
    output = args.output or Path(_plain_name(source) + _SUFFIXES[args.format])
    check_target(output, force=args.force)
    arguments = model_args(args)
    from zoo.export import target
    from zoo.factory import create_model, image_size_args

    writer = target(args.format)
    hush(args, diffusers=denoiser)
    if args.image_size is not None:
        arguments |= image_size_args(args.name, args.image_size, **arguments)
    model = create_model(args.name, pretrained=not random, **arguments).eval()
    options = {"image_size": args.image_size, "dynamic_size": not args.fixed_size}
    with progress(args) as bar:
        task = bar.add_task("exporting", total=None)
        writer.export(model, output, name=None if random else args.name, **options)
        bar.update(task, description="comparing")
        error = None if args.no_check else writer.check(output, model, **options)
    result = {
        "name": args.name,
        "format": args.format,
        "file": str(output),
        "bytes": output.stat().st_size,
        "max_error": error,
        "random_weights": random,
    }
    if args.json:
        print_json(result)
    elif args.quiet:
        print(output)
    else:
        rows = table("file", "format", "MB", "largest difference from the model", right=("MB",))
        compared = "not compared" if error is None else f"{error:.1e}"
        rows.add_row(str(output), args.format, f"{result['bytes'] / 1e6:.1f}", compared)
        print_table(rows)
        if random:
            note(args, f"{args.name} was exported with random weights; NAME.TAG takes published ones.")
    return 0
