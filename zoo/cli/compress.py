"""`zoo compress` and `zoo inspect`: the feed-forward layers of a trained classifier, made smaller or looked at."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.models import add_model_args, find_model, model_args
from zoo.cli.output import UsageError, check_target, hush, millions, note, print_json, print_table, progress, table
from zoo.files import whole
from zoo.sources import beside

if TYPE_CHECKING:
    from torch import nn

_METHODS = ("prune", "low-rank", "repa", "depth")  # keys of zoo.ffn.compressing.METHODS, which imports torch
_RATE = 2e-4  # of recovery
_SCORES = ("activation", "cfsp", "obs", "taylor", "magnitude", "random")


def add_parser(subparsers: Any) -> None:
    """Add `compress` and `inspect`."""
    parser = subparsers.add_parser(
        "compress",
        help="make the feed-forward layers of a trained classifier smaller",
        description="Prune, thin, merge or remove feed-forward layers, measure what that costs, and write a folder "
        "that every other command takes.",
    )
    _add_model_and_data(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--method", choices=_METHODS, default="prune", help="technique (default: %(default)s)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--keep", type=float, metavar="SHARE", help="share of the feed-forward work that stays")
    size.add_argument("--budget", metavar="TEXT", help='for the whole model: "macs<=0.6" or "latency<=0.7"')
    parser.add_argument("--scores", choices=_SCORES, help="how --method prune ranks channels")
    parser.add_argument("--recover", type=int, default=0, metavar="EPOCHS", help="learn from the dense model after it")
    parser.add_argument("--lr", type=float, help=f"peak learning rate of --recover (default: {_RATE})")
    parser.add_argument("--force", action="store_true", help="replace a folder that zoo wrote")
    parser.set_defaults(run=run_compress)
    parser = subparsers.add_parser(
        "inspect",
        help="show which feed-forward layer costs most and can lose most",
        description="Measure work, effect, sparsity and spectra of every feed-forward layer of a classifier.",
    )
    _add_model_and_data(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture to draw")
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    parser.set_defaults(run=run_inspect)


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME_OR_PATH", help="model with weights: NAME.TAG, folder, file or Hub id")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="class folders, in train/ and val/ or not, or Parquet"
    )
    add_model_args(parser)
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="images measured on (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")


def _check_compress(args: argparse.Namespace) -> None:
    """Refuse calls that make no sense, before torch is imported."""
    if args.keep is not None and not 0 < args.keep < 1:
        raise UsageError(f"--keep is a share above 0 and below 1, got {args.keep:g}.")
    if args.scores and args.method != "prune":
        raise UsageError(f"--scores ranks channels for --method prune, not for {args.method}.")
    if args.recover < 0:
        raise UsageError(f"--recover takes a number of epochs, got {args.recover}.")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UsageError(f"--lr is a learning rate above 0, got {args.lr:g}.")
    if args.lr is not None and not args.recover:
        raise UsageError(f"--lr {args.lr:g} is the rate of --recover EPOCHS, which is not given.")
    _check(args)
    from zoo.cards.own import is_own_folder

    if args.output.exists() and not (args.force and is_own_folder(args.output)):
        cure = "--force replaces a folder that zoo wrote" if not args.force else "it was not written by zoo"
        raise UsageError(f"{args.output} exists; {cure}.")


def run_compress(args: argparse.Namespace) -> int:
    """Compress one model."""
    _check_compress(args)
    hush(args)
    import copy

    from zoo.data.images import draw, require_readable
    from zoo.ffn.compressing import compress, read_budget, recover, stand_in

    if args.budget is not None:
        read_budget(args.budget)
    model, data = _model_and_data(args)
    calibration = list(draw(data, "train", args.samples))
    config = _configured(args, model, calibration[0])
    stand_in(model, config, calibration[0])  # says what cannot be done, before all images are run
    if args.recover:
        require_readable(data)
    dense = copy.deepcopy(model) if args.recover else model
    with progress(args) as bar:
        task = bar.add_task("accuracy before", total=None)
        before = _accuracy(model, data, bar, task)
        bar.update(task, description="compressing", total=None)
        report = compress(model, config, calibration)
        bar.update(task, description="accuracy after")
        after = right_away = _accuracy(model, data, bar, task)
        if args.recover:
            loader = data.train_dataloader()
            bar.update(task, description="recovering", total=args.recover * len(loader), completed=0)

            def tell(done: int, total: int, loss: float) -> None:
                bar.update(task, completed=done, description=f"recovering, loss {loss:.3f}")

            recover(model, dense, loader, epochs=args.recover, lr=args.lr or _RATE, progress=tell)
            after = _accuracy(model, data, bar, task)
    result = {
        "name": args.name,
        "folder": str(args.output),
        "method": args.method,
        "config": dataclasses.asdict(config),
        "report": report.to_dict(),
        "accuracy_before": before,
        "accuracy_right_away": right_away,
        "accuracy_after": after,
    }
    _write(args, model, config, result)
    if args.json:
        print_json(result)
    elif args.quiet:
        print(args.output)
    else:
        print_table(str(report))
        rows = table("top-1 accuracy", "before", "right away", *(["recovered"] if args.recover else []))
        shown = [before, right_away, after] if args.recover else [before, after]
        rows.add_row("", *(f"{100 * accuracy:.2f} %" for accuracy in shown))
        print_table(rows)
        note(args, f"{args.output} is written. Next: zoo classify PICTURE --model {args.output}")
    return 0


def _configured(args: argparse.Namespace, model: nn.Module, batch: Any) -> Any:
    """Return the technique's configuration, of the size that is asked for."""
    from zoo.ffn.compressing import config_for_budget, config_of, resized

    config = config_of(args.method)
    if args.scores:
        config = dataclasses.replace(config, scores=args.scores)
    if args.budget is not None:
        return config_for_budget(model, config, args.budget, batch)[0]
    return config if args.keep is None else resized(config, args.keep, model)


def _write(args: argparse.Namespace, model: nn.Module, config: Any, result: dict[str, Any]) -> None:
    """Write the folder of the compressed model."""
    from zoo.cards import Metric, write_own_model
    from zoo.record import record_of

    how = f"zoo compress {args.name} --method {args.method}, {config}"
    metric = Metric(
        name="Top-1 accuracy",
        value=round(100 * result["accuracy_after"], 2),
        unit="%",
        dataset=Path(args.data).name,
        protocol=f"validation images; {100 * result['accuracy_before']:.2f} % before",
    )
    write_own_model(
        args.output,
        model,
        record_of(model).of_own_weights(),
        metrics=[metric],
        training=f"Compressed from {args.name}: {how}; {args.recover} epochs of recovery from the dense model.",
        config={"command": how, "report": result["report"]},
        datasets=[Path(args.data).name],
        overwrite=args.force,
    )


def run_inspect(args: argparse.Namespace) -> int:
    """Inspect one model."""
    _check(args)
    if args.plot is not None:
        check_target(args.plot, force=args.force)
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot draws with matplotlib, which is missing: pip install 'ffn-zoo[demo]'.")
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = sorted(FigureCanvasBase.get_supported_filetypes())
        if args.plot.suffix.lower().removeprefix(".") not in kinds:
            raise UsageError(f"--plot takes a picture whose name ends in {', '.join(kinds)}, got {args.plot.name}.")
    hush(args)
    from zoo.data.images import draw
    from zoo.ffn.inspection import inspect_ffns, plot_inspection

    model, data = _model_and_data(args, judged=False)
    with progress(args) as bar:
        bar.add_task("inspecting", total=None)
        report = inspect_ffns(model, list(draw(data, "train", args.samples)))
    if args.plot is not None:
        with whole(args.plot) as temporary:
            drawn = temporary.with_name(f"{temporary.stem}{args.plot.suffix}")
            plot_inspection(report, drawn, args.name)
            drawn.rename(temporary)
    if args.json:
        print_json({"name": args.name, **report.to_dict(), "advice": report.advice()})
        return 0
    rows = table(
        "layer", "channels", "MACs a token", "share", "error without", "channels for 90 %", "near zero", "dimensions",
        right=("channels", "MACs a token", "share", "error without", "channels for 90 %", "near zero"),
    )  # fmt: skip
    for layer in report.layers:
        spectra = layer.spectra
        rows.add_row(
            layer.name,
            str(layer.hidden_dim),
            millions(layer.macs),
            f"{100 * layer.share:.1f} %",
            f"{100 * layer.error:.1f} %",
            f"{100 * layer.channels_90:.0f} %",
            f"{100 * layer.sparsity:.0f} %",
            "" if spectra is None else f"{spectra.before.participation:.0f} -> {spectra.after.participation:.0f}",
        )
    print_table(rows, report.advice())
    return 0


def _check(args: argparse.Namespace) -> None:
    """Say what is wrong with the model's name, the data and numbers before torch is imported."""
    if args.samples < 1 or args.batch < 1:
        raise UsageError(f"--samples and --batch must be at least 1, got {args.samples} and {args.batch}.")
    if not Path(args.data).is_dir():
        raise UsageError(f"--data names no folder: {args.data}.{beside(Path(args.data))}")
    find_model(args.name, task="classification")
    model_args(args)  # refuses what is not KEY=VALUE


def _model_and_data(args: argparse.Namespace, *, judged: bool = True) -> tuple[nn.Module, Any]:
    """Return the model and its data module, whose preprocessing is the model's own."""
    from zoo.data.images import images_for
    from zoo.factory import create_model

    model = create_model(args.name, pretrained=True, **model_args(args)).eval()
    return model, images_for(model, args.data, args.batch, judged=judged)


def _accuracy(model: nn.Module, data: Any, bar: Any, task: Any) -> float:
    """Return the share of validation images whose class is right."""
    import torch

    loader = data.val_dataloader()
    right = seen = 0
    bar.update(task, total=len(loader), completed=0)
    with torch.inference_mode():
        for images, labels in loader:
            right += int((model(images).argmax(1) == labels).sum())
            seen += len(labels)
            bar.advance(task)
    return right / max(seen, 1)
