"""What the demo computes: samples and caches, upscaled photos, a merged ViT, classified photos."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import zoo
from zoo.bench.caching import PSNR, CacheResults, Classify, class_images, class_subject, measure_caches, recogniser
from zoo.bench.report import Check, Entry
from zoo.bench.timing import Progress, Settings, compare, require_close
from zoo.caching.presets import CacheSetting, cache_settings
from zoo.data.degradations import JpegCompression
from zoo.data.resize import imresize
from zoo.evaluation.metrics import psnr, ssim
from zoo.ffn.reparam import ReparamReport
from zoo.pictures.restore import restore
from zoo.profiling import count_params

__all__ = [
    "ClassifiedPhoto",
    "Generation",
    "Merge",
    "Photo",
    "Upscaling",
    "classify_photos",
    "generate",
    "merge",
    "photos",
    "upscale",
]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Samples without and with a cache, and the study that the cache was chosen from.

    Args:
        names: Name of each class.
        labels: Class number of each sample.
        images: Samples without and with the cache: (B, H, W, 3), 8 bits.
        predicted: Class numbers that the classifier gives them.
        cache: The entry with the cache, of all samples: time, speed-up, PSNR, share recognised.
        uncached: The entry without.
        steps: Of the scheduler.
        guidance_scale: Weight of classifier-free guidance.
        scheduler: Name of its class.
        params: Parameters of the denoiser.
        study: Entries of the study: without a cache, caches, fewer steps.
        study_images: Samples of the study.
        rule: How the cache was chosen from the study.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    images: tuple[Pixels, Pixels]
    predicted: tuple[tuple[int, ...], tuple[int, ...]]
    cache: Entry
    uncached: Entry
    steps: int
    guidance_scale: float
    scheduler: str
    params: int
    study: tuple[Entry, ...]
    study_images: int
    rule: str


_TRIED = ("step-forecast", "cg-taylor", "bac", "first-block")


def generate(
    pipe: Any,
    classify: Classify,
    settings: Settings,
    *,
    per_class: int = 4,
    study_per_class: int = 1,
    steps: int = 25,
    guidance_scale: float = 3.0,
    wanted_psnr: float = 35.0,
    candidates: Sequence[CacheSetting] | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Study caches on a few samples, then make all samples without and with the one chosen.

    Args:
        pipe: A class-conditional pipeline whose classes have names.
        classify: Classifier of the same classes.
        settings: Rounds and threads.
        per_class: Samples of each class.
        study_per_class: Samples of each class in the study.
        steps: Of the scheduler.
        guidance_scale: Weight of classifier-free guidance.
        wanted_psnr: The fastest cache that keeps this PSNR in the study is chosen, dB.
        candidates: Caches to try; None takes ours and First Block Cache, mild to strong.
        progress: Told after each run.

    Raises:
        ValueError: No cache works on this pipeline.
    """
    classes = pipe.transformer.config.num_classes
    if candidates is None:
        subject = class_subject(pipe, list(range(classes)), steps=steps, guidance_scale=guidance_scale)
        candidates = cache_settings(subject, _TRIED)
    study = measure_caches(
        pipe,
        class_images(pipe, list(range(classes)) * study_per_class, guidance_scale=guidance_scale),
        classes * study_per_class,
        candidates,
        settings,
        steps=steps,
        progress=_named(progress, "trying caches"),
    )
    chosen, rule = _choose(study, candidates, wanted_psnr)
    labels = [label for label in range(classes) for _ in range(per_class)]
    results = measure_caches(
        pipe,
        class_images(pipe, labels, guidance_scale=guidance_scale),
        len(labels),
        [chosen],
        settings,
        steps=steps,
        judge=recogniser(classify, labels),
        fewer_steps=False,
        progress=_named(progress, "generating"),
    )
    uncached, cached = results.entries[:2]
    pictures = [_to_pixels(results.images[entry.name]) for entry in (uncached, cached)]
    predicted = [tuple(classify(results.images[entry.name]).tolist()) for entry in (uncached, cached)]
    return Generation(
        names=tuple(pipe.id2label[label] for label in range(classes)),
        labels=tuple(labels),
        images=(pictures[0], pictures[1]),
        predicted=(predicted[0], predicted[1]),
        cache=cached,
        uncached=uncached,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=type(pipe.scheduler).__name__,
        params=count_params(pipe.transformer),
        study=study.entries,
        study_images=classes * study_per_class,
        rule=rule,
    )


def _choose(study: CacheResults, candidates: Sequence[CacheSetting], wanted: float) -> tuple[CacheSetting, str]:
    """Return the fastest cache that is good enough, or the best that saves time at all."""
    by_name = {candidate.name: candidate for candidate in candidates}
    found = [entry for entry in study.entries if entry.name in by_name and entry.speedup is not None]
    if not found:
        raise ValueError("No cache works on this pipeline: " + "; ".join(study.refused.values()))

    def gain(entry: Entry) -> float:
        return entry.speedup.median if entry.speedup is not None else 0.0

    good = [entry for entry in found if entry.values[PSNR] >= wanted]
    if good:
        return by_name[max(good, key=gain).name], f"the fastest that kept {wanted:g} dB"
    return by_name[max(found, key=lambda entry: entry.values[PSNR]).name], f"the best, since none kept {wanted:g} dB"


def _named(progress: Progress | None, what: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{what}: {stage}", done, total)


def _to_pixels(images: Tensor) -> Pixels:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3), 8 bits."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A freely licensed photo.

    Args:
        name: What it shows.
        credit: Who took it, and its licence.
        pixels: (H, W, 3), 8 bits.
        window: Top, left, height, width of what the report shows.
        detail: Top, left and side of a square to enlarge.
    """

    name: str
    credit: str
    pixels: Pixels
    window: tuple[int, int, int, int]
    detail: tuple[int, int, int]


def photos() -> dict[str, Photo]:
    """Return the photos that scikit-image brings along.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "The demo's photos come with scikit-image, of the 'demo' extra: pip install 'ffn-zoo[demo]'"
        ) from error
    return {
        "cat": Photo(
            name="Chelsea the cat",
            credit="Stéfan van der Walt, CC0",
            pixels=data.chelsea(),
            window=(0, 76, 300, 300),
            detail=(84, 132, 72),
        ),
        "astronaut": Photo(
            name="Eileen Collins",
            credit="NASA, public domain",
            pixels=data.astronaut(),
            window=(0, 60, 300, 300),
            detail=(64, 184, 72),
        ),
        "coffee": Photo(
            name="A cup of coffee",
            credit="Rachel Michetti, CC0",
            pixels=data.coffee(),
            window=(60, 130, 300, 300),
            detail=(206, 330, 72),
        ),
        "rocket": Photo(
            name="A rocket",
            credit="SpaceX, public domain",
            pixels=data.rocket(),
            window=(0, 170, 300, 300),
            detail=(100, 280, 72),
        ),
    }


def shown(photo: Photo) -> Photo:
    """Return what the report shows of a photo, cut out, its sides multiples of 8."""
    top, left, height, width = photo.window
    pixels = photo.pixels[top : top + height // 8 * 8, left : left + width // 8 * 8]
    inner = photo.detail[0] - top, photo.detail[1] - left, photo.detail[2]
    return dataclasses.replace(photo, pixels=pixels, window=(0, 0, *pixels.shape[:2]), detail=inner)


@dataclass(frozen=True, kw_only=True)
class Upscaling:
    """A photo that was shrunk, perhaps compressed, and restored.

    Args:
        photo: The photo.
        scale: Factor.
        original: The photo, cut to a multiple of the factor.
        small: The shrunk photo, which both methods get.
        bicubic: Enlarged by bicubic interpolation; at scale 1 the shrunk photo itself.
        restored: Restored by the network.
        psnr: Of bicubic and network, dB, luma.
        ssim: Of bicubic and network, luma.
        seconds: Time of the network.
        model: Name of the network.
        jpeg: Quality at which the shrunk photo was compressed; None is not at all.
    """

    photo: Photo
    scale: int
    original: Pixels
    small: Pixels
    bicubic: Pixels
    restored: Pixels
    psnr: tuple[float, float]
    ssim: tuple[float, float]
    seconds: float
    model: str
    jpeg: int | None = None


def upscale(photo: Photo, restorer: nn.Module, name: str, jpeg: int | None = None) -> Upscaling:
    """Shrink a photo as MATLAB does, compress it or not, and restore it by bicubic interpolation and by a network.

    Args:
        photo: What to take.
        restorer: From `load_restorer`; its `scale` is the factor.
        name: Of the network, for people.
        jpeg: Quality of the compression, 1 to 100.
    """
    scale = int(restorer.scale)  # type: ignore[arg-type]
    height, width = (side // scale * scale for side in photo.pixels.shape[:2])
    original = photo.pixels[:height, :width]
    small = original if scale == 1 else imresize(original, 1 / scale)
    if jpeg is not None:
        small = JpegCompression.compress(small, jpeg)
    start = time.perf_counter()
    restored = restore(small, model=restorer)
    seconds = time.perf_counter() - start
    bicubic = small if scale == 1 else imresize(small, float(scale))
    target = _to_tensor(original)
    found = [_to_tensor(result) for result in (bicubic, restored)]
    ratios = [float(psnr(result, target, space="y", crop=scale)) for result in found]
    likeness = [float(ssim(result, target, space="y", crop=scale)) for result in found]
    return Upscaling(
        photo=photo,
        scale=scale,
        original=original,
        small=small,
        bicubic=bicubic,
        restored=restored,
        psnr=(ratios[0], ratios[1]),
        ssim=(likeness[0], likeness[1]),
        seconds=seconds,
        model=name,
        jpeg=jpeg,
    )


def _to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3), 8 bits -> (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A RePaViT before and after merging, beside timm's ViT of the same size.

    Args:
        entries: Merged, training form, timm's ViT; compared with the last.
        report: Of `zoo.reparameterize`.
        check: Outputs of the merged model and the training form.
        batch: Images of one call.
        rounds: Timed rounds.
        image_size: Pixels a side.
    """

    entries: tuple[Entry, ...]
    report: ReparamReport
    check: Check
    batch: int
    rounds: int
    image_size: int


def merge(
    settings: Settings,
    *,
    name: str = "repavit_base",
    rival: str = "vit_base_patch16_224",
    progress: Progress | None = None,
) -> Merge:
    """Merge a RePaViT with random weights and time it in turns with its training form and with timm's ViT."""
    torch.manual_seed(0)
    merged = zoo.create_model(name).eval().requires_grad_(False)
    training = copy.deepcopy(merged)
    other = zoo.create_model(rival).eval().requires_grad_(False)
    report = zoo.reparameterize(merged)
    embed: Any = merged.patch_embed
    size = embed.img_size[0]
    x = torch.randn(settings.batch, 3, size, size)
    models = {f"{name}, merged": merged, f"{name}, training form": training, f"timm {rival}": other}
    with torch.inference_mode():
        check = require_close("merged and training form", merged(x[:1]), training(x[:1]))
        timed = compare(
            {label: lambda model=model: model(x) for label, model in models.items()},  # type: ignore[misc]
            settings,
            reference=f"timm {rival}",
            progress=_named(progress, "merging"),
        )
    entries = tuple(Entry.of(label, timed[label], params=count_params(model)) for label, model in models.items())
    return Merge(
        entries=entries, report=report, check=check, batch=settings.batch, rounds=settings.rounds, image_size=size
    )


@dataclass(frozen=True, kw_only=True)
class ClassifiedPhoto:
    """A photo and what a small classifier takes it for.

    Args:
        photo: The photo.
        shown: What was shrunk: its square.
        seen: What the network saw.
        top: Best classes with their probabilities.
        belongs: It shows one of the classes.
    """

    photo: Photo
    shown: Pixels
    seen: Pixels
    top: tuple[tuple[str, float], ...]
    belongs: bool


def classify_photos(
    model: nn.Module, names: Sequence[str], chosen: Sequence[tuple[Photo, bool]], *, most: int = 3
) -> list[ClassifiedPhoto]:
    """Shrink squares of photos to the size that a classifier knows, and classify them.

    Args:
        model: Classifier in evaluation mode, from timm's registry.
        names: Of its classes.
        chosen: Photos, and whether they show one of the classes.
        most: Classes to return for each.
    """
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    side = config["input_size"][-1]
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    found = []
    for photo, belongs in chosen:
        top, left, height, width = photo.window
        shown = photo.pixels[top : top + height, left : left + width]
        seen = imresize(shown, size=(side, side))
        with torch.inference_mode():
            probabilities = model((_to_tensor(seen) - mean) / std)[0].softmax(0)
        best = probabilities.topk(min(most, len(names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append(
            ClassifiedPhoto(
                photo=photo,
                shown=shown,
                seen=seen,
                top=tuple((names[index], value) for index, value in pairs),
                belongs=belongs,
            )
        )
    return found
