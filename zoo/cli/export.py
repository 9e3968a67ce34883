"""`zoo export`: write a model for another runtime and compare the file with the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalog
from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, check_target, hush, note, print_json, print_table, progress, table
from zoo.cli.pipelines import REQUEST, add_request, check_request, load_pipeline, plan_calls

if TYPE_CHECKING:
    from zoo.sources import Source

_STEPS = 2  # recorded: what changes from step to step is seen
_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def add_parser(subparsers: Any) -> None:
    """Add `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a merged model for another runtime, then compare the file's outputs with the model's. Of a "
        "diffusion pipeline it is the denoiser, with the shapes and settings of the call that --prompt and the like "
        "describe.",
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
    add_request(parser)
    parser.set_defaults(device="cpu")
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
    asked = [option for option in REQUEST if getattr(args, option) not in (None, [])]
    if asked and source.kind not in ("pipeline", "hub"):
        raise UsageError(f"--{asked[0].replace('_', '-')} is for pipelines; {args.name} is a model.")
    check_request(args)
    if args.device != "cpu":
        raise UsageError(f"Files are written on the CPU; leave out --device {args.device}.")
    output = args.output or Path(_plain_name(source) + _SUFFIXES[args.format])
    check_target(output, force=args.force)
    arguments = model_args(args)
    from zoo.export import target
    from zoo.factory import create_model, image_size_args

    writer = target(args.format)
    hush(args, diffusers=denoiser)
    if args.image_size is not None:
        arguments |= image_size_args(args.name, args.image_size, **arguments)
    if asked or (denoiser and not source.tag):
        pipe, _ = load_pipeline(args, args.name)
        if asked or not hasattr(pipe, "transformer") or "num_classes" not in pipe.transformer.config:
            return _export_steps(args, pipe, output)
    model = create_model(args.name, pretrained=not random, **arguments).eval()
    options = {"image_size": args.image_size, "dynamic_size": not args.fixed_size}
    with progress(args) as bar:
        task = bar.add_task("exporting", total=None)
        writer.export(model, output, name=None if random else args.name, **options)
        bar.update(task, description="comparing")
        error = None if args.no_check else writer.check(output, model, **options)
    _report(args, [_result(args, output, error) | {"random_weights": random}])
    if random:
        note(args, f"{args.name} was exported with random weights; NAME.TAG takes published ones.")
    return 0


def _export_steps(args: argparse.Namespace, pipe: Any, output: Path) -> int:
    """Export the denoisers of a pipeline as one run calls them."""
    if args.model_args or args.fixed_size:
        option = "--model-args" if args.model_args else "--fixed-size"
        raise UsageError(f"{option} is for models; {args.name} is a pipeline, whose shapes are those of the run.")
    from torch import nn

    from zoo.caching.core import denoisers
    from zoo.export import target
    from zoo.export.network import whole
    from zoo.export.step import compare_step, record_steps

    writer, found = target(args.format), []
    networks = denoisers(pipe)[1]
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and part in networks}
    targets = {
        name: output if not index else output.with_stem(f"{output.stem}_{name}") for index, name in enumerate(parts)
    }
    for path in targets.values():
        check_target(path, force=args.force)
    plan = plan_calls(args, pipe, name=args.name, count=1)
    with progress(args) as bar:
        task = bar.add_task("running two steps", total=None)
        for step in record_steps(pipe, parts, lambda: plan.run(_STEPS)):
            path = targets[step.component]
            bar.update(task, description=f"exporting {step.component}")
            with whole(path) as temporary:
                writer.write(step.network, temporary)
            bar.update(task, description=f"comparing {step.component}")
            error = None if args.no_check else compare_step(writer.runner(path), step)
            found.append(
                _result(args, path, error) | {"inputs": {k: list(v.shape) for k, v in step.network.inputs.items()}}
            )
    _report(args, found)
    return 0


def _result(args: argparse.Namespace, path: Path, error: float | None) -> dict[str, Any]:
    size = path.stat().st_size
    return {"name": args.name, "format": args.format, "file": str(path), "bytes": size, "max_error": error}


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if args.json:
        print_json(results[0] if len(results) == 1 else results)
        return
    if args.quiet:
        print("\n".join(result["file"] for result in results))
        return
    rows = table("file", "format", "MB", "largest difference from the model", right=("MB",))
    for result in results:
        compared = "not compared" if result["max_error"] is None else f"{result['max_error']:.1e}"
        rows.add_row(result["file"], args.format, f"{result['bytes'] / 1e6:.1f}", compared)
    inputs = [f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in results[0].get("inputs", {}).items()]
    print_table(rows, *([f"Inputs: {', '.join(inputs)}."] if inputs else []))
