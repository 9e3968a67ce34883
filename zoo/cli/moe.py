"""`zoo convert-moe`: from a dense diffusion pipeline to one whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.cli.output import UsageError, at_least, hush, note, print_json, print_table
from zoo.files import whole

_SCORES = ("taylor", "taylor_sum", "activation", "random")
_DEALS = ("snake", "contiguous", "random")
_GATES = ("softmax_n", "softmax", "softmax_renorm", "sigmoid", "unit")


def add_parser(subparsers: Any) -> None:
    """Add `convert-moe`."""
    parser = subparsers.add_parser(
        "convert-moe",
        help="turn a diffusion transformer into a mixture of experts",
        description="Divide every feed-forward layer into a shared expert and normal experts (Dense2MoE). With all "
        "experts on the result computes what the model does; with a few it is distilled afterwards: "
        "configs/diffusion/pixeldit_moe_cifar10.yaml. Known are DiT, PixArt, SD3 and Flux transformers and PixelDiT.",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="NAME.TAG, folder of diffusers, or Hub id")
    parser.add_argument(
        "--layout", default="1S12E2A", help="shared widths, experts, activated experts (default: 1S12E2A, the paper's)"
    )
    parser.add_argument("--gate", choices=_GATES, default="softmax_n", help="weight of a chosen expert")
    parser.add_argument(
        "--scores",
        choices=_SCORES,
        default="taylor",
        help="how channels are ranked (default: taylor); random needs no data",
    )
    parser.add_argument("--deal", choices=_DEALS, default="snake", help="how they are dealt to experts")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="images by class, or stored latents (zoo.data.latents); without it the pipeline's own samples",
    )
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="samples at a time (default: 32)")
    parser.add_argument("--share-modulation", action="store_true", help="one adaLN modulation for all blocks")
    parser.add_argument("--seed", type=int, default=0, help="of noise, times and random deals")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the pipeline with experts")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> int:
    """Convert, print what that brings, and write the pipeline."""
    if args.output.exists() and not args.force:
        raise UsageError(f"{args.output} exists; --force replaces it.")
    if args.output.exists() and not (args.output / "model_index.json").is_file():
        raise UsageError(f"{args.output} is no pipeline: it is not replaced.")
    at_least(args, samples=1, batch_size=1)
    if not Path(args.pipeline).is_dir() and "/" not in args.pipeline:
        catalog.entry(args.pipeline)
    hush(args, diffusers=True)
    from zoo.factory import create_pipeline
    from zoo.moe import MoEConfig, convert

    config = MoEConfig.from_layout(args.layout, gate=args.gate, scores=args.scores, deal=args.deal, seed=args.seed)
    pipe: Any = create_pipeline(args.pipeline, requires="transformer")
    pipe.set_progress_bar_config(disable=True)
    batches = None if args.scores == "random" else _calibration(args, pipe)
    moe, report = convert(pipe.transformer, config, calibration=batches)
    if args.share_modulation:
        note(args, f"{moe.share_modulation() / 1e6:.2f} M parameters of modulations saved: distil the model now.")
    pipe.register_modules(transformer=moe)
    with whole(args.output) as folder:
        pipe.save_pretrained(folder)
    if args.json:
        print_json({**asdict(report), "output": str(args.output)})
    else:
        print_table(str(report))
        note(args, f"Written to {args.output}.")
    return 0


def _calibration(args: argparse.Namespace, pipe: Any) -> Iterable[dict[str, Any]]:
    """Return batches with the training target: of images by class, of stored latents, or of the pipeline's samples."""
    from zoo.moe.calibration import class_batches, flow_batches, sampled_images

    by_class = "num_classes" in pipe.transformer.config
    if args.calibration is None:
        if not by_class:
            raise UsageError(
                f"{type(pipe).__name__} cannot be sampled without prompts: give --calibration DIR with stored latents "
                "(zoo.data.latents), or --scores random."
            )
        note(args, f"No --calibration: {args.samples} samples of the pipeline itself are taken.")
        return class_batches(pipe, sampled_images(pipe, args.samples, batch_size=args.batch_size, seed=args.seed))
    if not by_class:
        from zoo.data.latents import Latents

        loader = Latents(str(args.calibration), batch_size=args.batch_size, seed=args.seed).train_dataloader()
        return flow_batches(_first(loader, args), seed=args.seed)
    from zoo.data.images import ImageDiffusion

    size = pipe.transformer.config.sample_size
    data = ImageDiffusion(str(args.calibration), size, args.batch_size, hflip=0.0, seed=args.seed)
    if names := getattr(pipe, "id2label", None):
        data.take_classes([names[number] for number in sorted(names)])
    data.setup("fit")
    return class_batches(pipe, _first(data.train_dataloader(), args))


def _first(loader: Iterable[Any], args: argparse.Namespace) -> Iterable[Any]:
    """Yield batches until there are enough samples."""
    wanted = -(-args.samples // args.batch_size)
    for number, batch in enumerate(loader, start=1):
        yield batch
        if number == wanted:
            return
