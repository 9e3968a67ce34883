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
    from zoo.export.artefact import Artefact
    from zoo.sources import Source

_STEPS = 2  # recorded: what changes from step to step is seen
_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "aoti": ".aoti.pt2", "executorch": ".pte"}
_ONE = ("aoti", "executorch")  # formats of one image of one size
_PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def add_parser(subparsers: Any) -> None:
    """Add `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a merged model for another runtime, and a README beside it; the file is kept where its "
        "outputs are the model's. Of a diffusion pipeline it is the denoiser, with the shapes and settings of the call "
        "that --prompt and the like describe.",
        epilog="fp16 and bf16: weights and arithmetic, inputs and outputs stay float32 (openvino: weights). int8: "
        "convolutions and products with weights, calibrated by pictures; first, last and costliest layers stay in "
        "float, and the loss is measured on pictures held out of --data.",
    )
    parser.add_argument(
        "name", metavar="MODEL", help="NAME (random weights), NAME.TAG, file, checkpoint, folder or Hub id"
    )
    parser.add_argument("--format", choices=tuple(_SUFFIXES), required=True)
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="number type (default: fp32)")
    parser.add_argument(
        "--with-preprocess",
        action="store_true",
        help="take 8-bit pictures (N x H x W x 3) and return probabilities, of restorers 8-bit pictures; a classifier "
        "takes any size (bilinear and bicubic scaling, as Pillow's, and crop inside), with --fixed-size its own",
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="pictures that int8 is calibrated and measured with")
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: NAME with the format's suffix)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images of a classifier, with --fixed-size of a restorer",
    )
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
    if args.image_size is not None and args.image_size < 1:
        raise UsageError(f"--image-size must be at least 1 pixel, got {args.image_size}.")
    _check_size(args, source.task)
    asked = [option for option in REQUEST if getattr(args, option) not in (None, [])]
    if asked and source.kind not in ("pipeline", "hub"):
        raise UsageError(f"--{asked[0].replace('_', '-')} is for pipelines; {args.name} is a model.")
    check_request(args)
    if args.device != "cpu":
        raise UsageError(f"Files are written on the CPU; leave out --device {args.device}.")
    output = args.output or Path(_plain_name(source) + _SUFFIXES[args.format])
    _check_options(args, denoiser)
    for path in (output, _readme_of(output), *([output.with_suffix(".bin")] if args.format == "openvino" else [])):
        check_target(path, force=args.force, make=False)
    arguments = model_args(args)
    from zoo.export.artefact import check_output, check_runtime, write_artefact
    from zoo.factory import create_model, image_size_args
    from zoo.record import record_of

    check_runtime(args.format, args.precision, run=not args.no_check)
    check_output(args.format, output)
    hush(args, diffusers=denoiser)
    if args.image_size is not None and source.task in (None, "classification"):
        arguments |= image_size_args(args.name, args.image_size, **arguments)
    if asked or (denoiser and not source.tag):
        pipe, _ = load_pipeline(args, args.name)
        if asked or not hasattr(pipe, "transformer") or "num_classes" not in pipe.transformer.config:
            return _export_steps(args, pipe, output)
    model = create_model(args.name, pretrained=not random, **arguments).eval()
    if source.task is None:
        _check_size(args, record_of(model).task)
    with progress(args) as bar:
        task = bar.add_task("exporting", total=None)
        artefact = write_artefact(
            model,
            output,
            format=args.format,
            precision=args.precision,
            with_preprocess=args.with_preprocess,
            data=args.data,
            name=None if random else args.name,
            image_size=args.image_size,
            dynamic_size=not args.fixed_size,
            check=not args.no_check,
            told=lambda text: bar.update(task, description=text),
        )
    _report(args, [_result(args, artefact) | {"random_weights": random}])
    if random:
        note(args, f"{args.name} was exported with random weights; NAME.TAG takes published ones.")
    return 0


def _export_steps(args: argparse.Namespace, pipe: Any, output: Path) -> int:
    """Export the denoisers of a pipeline as one run calls them."""
    if args.model_args or args.fixed_size:
        option = "--model-args" if args.model_args else "--fixed-size"
        raise UsageError(f"{option} is for models; {args.name} is a pipeline, whose shapes are those of the run.")
    _check_options(args, True)
    from torch import nn

    from zoo.caching.core import denoisers
    from zoo.export.artefact import write_step
    from zoo.export.step import record_steps

    found = []
    networks = denoisers(pipe)[1]
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and part in networks}
    targets = {
        name: output if not index else output.with_stem(f"{output.stem}_{name}") for index, name in enumerate(parts)
    }
    for path in targets.values():
        check_target(path, force=args.force, make=False)
        check_target(_readme_of(path), force=args.force, make=False)
    plan = plan_calls(args, pipe, name=args.name, count=1)
    with progress(args) as bar:
        task = bar.add_task("running two steps", total=None)
        for step in record_steps(pipe, parts, lambda: plan.run(_STEPS)):
            artefact = write_step(
                step,
                targets[step.component],
                format=args.format,
                precision=args.precision,
                check=not args.no_check,
                told=lambda text, name=step.component: bar.update(task, description=f"{text} {name}"),
            )
            found.append(
                _result(args, artefact) | {"inputs": {k: list(v.shape) for k, v in step.network.inputs.items()}}
            )
    _report(args, found)
    return 0


def _check_size(args: argparse.Namespace, task: str | None) -> None:
    """Refuse a side where none is of use, and a restorer of one size without it."""
    if task in (None, "classification"):
        return
    one = f"--format {args.format}" if args.format in _ONE else "--fixed-size" if args.fixed_size else ""
    if task in ("generation", "policy"):
        if args.image_size is not None:
            raise UsageError(f"--image-size is for classifiers and restorers: {args.name} is for {task}.")
    elif one and args.image_size is None:
        raise UsageError(f"{one} writes a restorer for one size: add --image-size PIXELS, the side of the pictures.")
    elif not one and args.image_size is not None:
        raise UsageError(f"{args.name} takes any size; --image-size fixes it together with --fixed-size.")


def _check_options(args: argparse.Namespace, denoiser: bool) -> None:
    """Refuse options that do not go together, and a folder without pictures."""
    given = (
        ("--with-preprocess", args.with_preprocess),
        ("--precision int8", args.precision == "int8"),
        ("--image-size", args.image_size is not None),
    )
    for option, wrong in given if denoiser else ():
        if wrong:
            raise UsageError(f"{option} is for classifiers and restorers; {args.name} is a pipeline.")
    if args.precision != "int8":
        if args.data is not None:
            raise UsageError(f"--data belongs to --precision int8; this is {args.precision}.")
    elif args.data is None:
        raise UsageError("--precision int8 needs --data DIR, a folder of pictures that tell ranges and loss.")
    if args.data is not None and not args.data.is_dir():
        raise UsageError(f"--data takes a folder of pictures; there is no folder {args.data}.")
    if args.data is not None:
        from zoo.data.labelled_images import has_parquet
        from zoo.data.photos import find_images

        if not has_parquet(args.data):
            find_images(args.data)


def _readme_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.md")


def _result(args: argparse.Namespace, artefact: Artefact) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": args.name,
        "format": args.format,
        "precision": args.precision,
        "file": str(artefact.path),
        "readme": str(artefact.readme),
        "bytes": artefact.bytes,
        "max_error": artefact.max_error,
    }
    if artefact.note:
        found["note"] = artefact.note
    return found | ({"loss": artefact.loss} if artefact.loss else {})


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if args.json:
        print_json(results[0] if len(results) == 1 else results)
        return
    if args.quiet:
        print("\n".join(result["file"] for result in results))
        return
    rows = table("file", "format", "precision", "MB", "largest difference from the model", right=("MB",))
    for result in results:
        compared = "not compared" if result["max_error"] is None else f"{result['max_error']:.1e}"
        rows.add_row(result["file"], args.format, args.precision, f"{result['bytes'] / 1e6:.1f}", compared)
    inputs = [f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in results[0].get("inputs", {}).items()]
    lines = [f"Inputs: {', '.join(inputs)}."] if inputs else []
    lines += [result["note"] for result in results if "note" in result]
    lines += results[0].get("loss", {}).get("lines", [])
    print_table(rows, *lines, f"How to run it: {', '.join(result['readme'] for result in results)}.")
