"""`zoo export`: write a model for another runtime and compare the file with the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.cli.output import UsageError, check_target, hush, note, print_json, print_table, progress, table

_FORMATS = ("onnx", "torch-export")


def add_parser(subparsers: Any) -> None:
    """Add `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a merged model for another runtime, then compare the file's outputs with the model's.",
    )
    parser.add_argument("name", metavar="NAME[.TAG]", help="model; with a tag, or from a file or folder, with weights")
    parser.add_argument("--format", choices=_FORMATS, required=True)
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: NAME with the format's suffix)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images of a classifier")
    parser.add_argument("--fixed-size", action="store_true", help="one height and width only")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with the model")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> int:
    """Export one model."""
    from zoo.export import target
    from zoo.factory import create_model

    writer = target(args.format)
    output = args.output or Path(Path(args.name).name + writer.SUFFIX)
    check_target(output, force=args.force)
    architecture, _, tag = args.name.partition(".")
    registered = catalog.load().get(architecture)
    random, denoiser = False, (Path(args.name) / "model_index.json").is_file()
    if registered is not None:
        random, denoiser = not tag, registered["task"] in catalog.PIPELINE_TASKS
        if random and denoiser:
            names = " or ".join(f"{architecture}.{tag}" for tag in registered["weights"])
            raise UsageError(f"Say which weights: {names}.")
    hush(args, diffusers=denoiser)
    size = {} if args.image_size is None else {"img_size": args.image_size}
    model = create_model(args.name, pretrained=not random, **size).eval()
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
