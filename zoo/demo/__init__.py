"""The demo: generate, enlarge, merge and classify with the shipped weights, and write one HTML page about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.bench.timing import Progress, Settings, environment, now, torch_threads
from zoo.demo.parts import Photo, classify_photos, generate, merge, photos, shown, upscale
from zoo.demo.report import Results, headline, render
from zoo.evaluation.fid_c import Judge
from zoo.factory import create_model, create_pipeline
from zoo.ffn.reparam import reparameterize
from zoo.pictures.restore import load_restorer
from zoo.sources import no_shipped_file
from zoo.weights import CheckpointError, cards_dir

__all__ = ["Models", "Results", "headline", "load_models", "render", "run_demo"]

DENOISER = "pixeldit.cifar10"
CLASSIFIER = "repavit_tiny.cifar10"
UPSCALERS = ("cfsr_x2.bsds", "cfsr_x4.bsds")
REAL = ("restormer_tiny_restore_color.real", "cfsr_x2.real", "cfsr_x4.real")  # for photos as phones write them
JPEG_QUALITY = 40


@dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of the demo.

    Args:
        pipe: Makes pictures of the classifier's classes.
        classifier: In evaluation mode.
        upscalers: By name.
        real: Restorers of compressed photos, by name.
    """

    pipe: Any
    classifier: nn.Module
    upscalers: dict[str, nn.Module]
    real: dict[str, nn.Module]


def load_models() -> Models:
    """Load the shipped weights.

    Raises:
        CheckpointError: Some are not there, or damaged; the message names them.
    """
    missing = [name for name in (DENOISER, CLASSIFIER, *UPSCALERS, *REAL) if not (cards_dir() / name).is_dir()]
    if missing:
        absent = f"The demo needs the weights {', '.join(missing)}, which are not in {cards_dir()}."
        raise CheckpointError(no_shipped_file(cards_dir() / missing[0]) or absent)
    pipe = create_pipeline(DENOISER)
    pipe.set_progress_bar_config(disable=True)
    classifier = create_model(CLASSIFIER, pretrained=True).eval()
    reparameterize(classifier, measure=False)
    upscalers, real = ({name: load_restorer(model=name, device="cpu") for name in names} for names in (UPSCALERS, REAL))
    return Models(pipe=pipe, classifier=classifier, upscalers=upscalers, real=real)


def run_demo(
    models: Models,
    *,
    threads: int = 2,
    per_class: int = 3,
    steps: int = 20,
    vit: str = "repavit_base",
    rival: str = "vit_base_patch16_224",
    progress: Progress | None = None,
) -> Results:
    """Compute and measure everything that the report shows, on the CPU.

    Args:
        models: From `load_models`, or others of the same kinds.
        threads: CPU threads of torch.
        per_class: Generated pictures of each class.
        steps: Of the scheduler.
        vit: RePaViT to merge.
        rival: timm's ViT of the same size.
        progress: Told after each step.

    Raises:
        ImportError: scikit-image is not installed.
    """
    album = photos()
    start = time.perf_counter()
    with torch_threads(1):  # whose processor time no other program lengthens: caches are chosen by it
        models.pipe([0], num_inference_steps=2, output_type="latent")  # the first call is slower
        generation = generate(
            models.pipe,
            Judge(models.classifier).classes,
            Settings(threads=1, rounds=3, warmup=0),
            per_class=per_class,
            steps=steps,
            progress=progress,
        )
    with torch_threads(threads):
        upscalings = []
        tasks: list[tuple[Photo, str, int | None]]
        tasks = [(album[key], name, None) for key in ("cat", "astronaut", "coffee") for name in models.upscalers]
        tasks += [(shown(album["coffee"]), name, JPEG_QUALITY) for name in models.real]
        for done, (photo, name, jpeg) in enumerate(tasks, 1):
            upscalings.append(upscale(photo, {**models.upscalers, **models.real}[name], name, jpeg))
            if progress is not None:
                progress("restoring photos", done, len(tasks))
        names = list(generation.names)
        chosen = [(album["cat"], True), (album["coffee"], False), (album["rocket"], False)]
        classified = classify_photos(models.classifier, names, chosen)
        merged = merge(Settings(batch=2, threads=threads, rounds=6, warmup=1), name=vit, rival=rival, progress=progress)
    return Results(
        generation=generation,
        upscalings=upscalings,
        merge=merged,
        classified=classified,
        denoiser=DENOISER,
        classifier=CLASSIFIER,
        environment=environment(),
        threads=threads,
        date=now(),
        seconds=time.perf_counter() - start,
    )
