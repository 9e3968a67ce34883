"""Restore pictures: a picture in, the same kind of picture out, with any restorer of the zoo."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag
from torch import nn

from zoo import catalog
from zoo.cfg import RestorationCfg
from zoo.ffn.reparam import reparameterize
from zoo.pictures.image_io import Picture, PictureError, open_picture, pair_views
from zoo.pictures.tiling import Progress, restore_tensor
from zoo.restoration import FAMILIES
from zoo.weights import CheckpointError, load_strict, read_checkpoint

__all__ = [
    "Picture",
    "PictureError",
    "load_restorer",
    "open_picture",
    "pair_views",
    "restore",
    "restore_picture",
    "restore_tensor",
]

Source = str | os.PathLike[str] | Image.Image | NDArray[Any]


def restore(
    image: Source | tuple[Source, Source],
    task: str = "sr",
    scale: int | None = None,
    model: str | nn.Module | None = None,
    weights: str | os.PathLike[str] | None = None,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    sigma: float | None = None,
) -> Any:
    """Restore a picture of any kind and size.

    The result has the mode of the input (gray, colour, alpha, palette, CMYK, 16-bit gray), its colour profile and its
    EXIF block; pixels are never turned, so the orientation in the EXIF block stays true. Opacity is scaled apart, and
    colour under full transparency is filled from its surroundings before.

    Args:
        image: Path, Pillow image, or array (H, W) or (H, W, 1 to 4) of uint8, uint16, bool, or floats in [0, 1]; or a
            tuple of two, the left and the right view of a dual-pixel sensor.
        task: "sr", "denoise", ...: chooses shipped weights where neither `model` nor `weights` is given.
        scale: Output pixels per input pixel; None takes the model's, or 2 for "sr" where there is no model.
        model: Name of a restorer ("cfsr_x2", "cfsr_x2.authors"), or a restorer. None recognises it from `weights`.
        weights: Weight file, ours or the authors', or a tag of `model`. None takes the model's published weights.
        budget: Memory the whole process (or the device) may hold, without the program files that the system shares:
            bytes, or like "4GB"; None is no limit.
        tile: Side of tiles with their overlap, input pixels, instead of a choice by `budget`.
        overlap: Of tiles, input pixels; None takes the receptive field, where the result is that of the whole picture.
        device: Where to run; None takes a given restorer's place, else CUDA where it is, else the CPU.
        dtype: Precision of the network, for example "bfloat16"; None is float32.
        self_ensemble: Average over eight flips and turns: better by about 0.1 dB, eight times as slow.
        progress: Called with (parts done, parts in all).
        sigma: Standard deviation of the noise, of 255: takes the weights trained for it.

    Returns:
        A Pillow image, or an array where an array was given.

    Raises:
        PictureError: The picture is unreadable, damaged, or of an unknown kind.
        ValueError: No weights fit, the scale or the noise is not the model's, or the budget or tile is too small.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
    """
    views = image if isinstance(image, tuple) else (image,)
    if len(views) > 2:
        raise ValueError(f"One picture is restored, or the two views of a dual-pixel sensor; got {len(views)}.")
    pictures = [open_picture(view) for view in views]
    picture = pair_views(*pictures) if len(pictures) == 2 else pictures[0]
    restorer = load_restorer(task, scale, model, weights, sigma=sigma, device=device, dtype=dtype)
    restored = restore_picture(
        picture,
        restorer,
        budget=budget,
        tile=tile,
        overlap=overlap,
        self_ensemble=self_ensemble,
        progress=progress,
    )
    return restored.to_array() if isinstance(views[0], np.ndarray) else restored.to_image()


def restore_picture(
    picture: Picture,
    model: nn.Module,
    *,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    inform: Callable[[str], object] | None = None,
) -> Picture:
    """Restore an opened picture, for example from a batch of files with one model; see `restore`.

    Args:
        picture: From `open_picture`, or from `pair_views`.
        model: From `load_restorer`, or any restorer.
        budget: Memory limit.
        tile: Side of tiles.
        overlap: Of tiles.
        self_ensemble: Average over eight flips and turns.
        progress: Called with (parts done, parts in all); black ink is not counted.
        inform: Told in words how the picture is run, see `restore_tensor`.

    Raises:
        ValueError: The budget or the tile is too small, or the network restores two views and got one, or the reverse.
        RuntimeError: The network's output is not finite.
    """
    if (picture.color.shape[2] == 6) != (getattr(model, "in_chans", 3) == 6):
        kinds = "one picture", "two views of a dual-pixel sensor"
        wanted, given = kinds if picture.color.shape[2] == 6 else kinds[::-1]
        raise ValueError(f"{type(model).__name__} with these weights restores {wanted}, got {given}.")
    levels = None if picture.peak == 1 else int(picture.peak)

    def run(planes: NDArray[Any], progress: Progress | None) -> NDArray[Any]:
        x = torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))[None]
        out = restore_tensor(
            model,
            x,
            budget=budget,
            tile=tile,
            overlap=overlap,
            self_ensemble=self_ensemble,
            levels=levels,
            progress=progress,
            inform=inform if planes is color else None,
        )
        if levels is None:
            out = out.clamp_(0, 1)
        return out[0].permute(1, 2, 0).numpy().astype(planes.dtype, copy=False)

    color = picture.color if picture.alpha is None else _bleed(picture.color, picture.alpha)
    restored = run(color, progress)
    size = restored.shape[:2]
    return Picture(
        color=restored,
        black=None if picture.black is None else run(picture.black, None),
        alpha=None if picture.alpha is None else _resize_plane(picture.alpha, size, picture.peak),
        mode=picture.mode,
        shape=picture.shape,
        icc_profile=picture.icc_profile,
        exif=picture.exif,
        name=picture.name,
    )


def _resize_plane(plane: NDArray[Any], size: tuple[int, int], peak: float) -> NDArray[Any]:
    """Enlarge opacity by bicubic interpolation."""
    if plane.shape[:2] == size:
        return plane
    flat = plane[..., 0] if plane.dtype == np.uint8 else plane[..., 0].astype(np.float32)
    out = np.asarray(Image.fromarray(flat).resize(size[::-1], Image.Resampling.BICUBIC))[..., None].clip(0, peak)
    return (out.round() if plane.dtype == np.uint16 else out).astype(plane.dtype, copy=False)


def _bleed(color: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Fill colour that full transparency hides from its visible surroundings, so that no dark seam grows at edges."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return color
    values = torch.from_numpy(color.astype(np.float32).transpose(2, 0, 1))[None]
    weight = torch.from_numpy((~hidden).astype(np.float32).transpose(2, 0, 1))[None]
    levels = [(values * weight, weight)]
    while max(levels[-1][1].shape[-2:]) > 1:  # ever coarser means of what is visible
        total, weight = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in levels[-1])
        levels.append((total, weight))
    filled = levels[-1][0] / levels[-1][1]
    for total, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, total.shape[-2:], mode="nearest")
        filled = torch.where(weight > 0, total / weight.clamp_min(1e-12), coarse)
    out = filled[0].permute(1, 2, 0).numpy().astype(color.dtype)
    return np.where(hidden, out, color)


def load_restorer(
    task: str = "sr",
    scale: int | None = None,
    model: str | nn.Module | None = None,
    weights: str | os.PathLike[str] | None = None,
    *,
    sigma: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Find, load and prepare a restorer: evaluation mode, re-parameterised, on its device; arguments as in `restore`.

    A restorer that is given as a module is used as it is, or copied where `device` or `dtype` ask for another place or
    precision.

    Raises:
        ValueError: There is no such restorer, nothing shipped fits, or the scale or the noise is not the model's.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
    """
    precision = _dtype(dtype)
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError("weights go with the name of a model; a restorer that is given has its own.")
        if sigma is not None:
            raise ValueError("sigma chooses weights; a restorer that is given has its own.")
        restorer = model
        parameter = next(model.parameters())
        place = parameter.device if device is None else torch.device(device)
        if (place, precision or parameter.dtype) != (parameter.device, parameter.dtype):
            restorer = copy.deepcopy(model).to(place, precision or parameter.dtype)
    else:
        restorer = _load(task, scale, model, weights, sigma).eval()
        reparameterize(restorer, measure=False)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        restorer = restorer.to(place, precision)
    own = int(getattr(restorer, "scale", 1))
    if scale is not None and scale != own:
        raise ValueError(f"This {type(restorer).__name__} restores at scale {own}, not {scale}.")
    return restorer


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f'dtype must be a floating-point type such as "float32" or "bfloat16", got {dtype!r}.')


def _load(
    task: str, scale: int | None, name: str | None, weights: str | os.PathLike[str] | None, sigma: float | None
) -> nn.Module:
    """Build a restorer and load its weights: published ones by name or by task, or those of a file."""
    if name is not None:
        _require_restorer(name)
        architecture = split_model_name_tag(name)[0]
        if weights is not None and f"{architecture}.{weights}" in get_arch_pretrained_cfgs(architecture):
            name, weights = f"{architecture}.{weights}", None
    if weights is None:
        name = _shipped(task, scale, sigma) if name is None else _for_noise(name, sigma)
        return timm.create_model(name, pretrained=True)
    if sigma is not None:
        raise ValueError(f"sigma chooses published weights; {weights} is one file, trained for its own noise.")
    state_dict = read_checkpoint(Path(weights))
    for family in FAMILIES:
        found = family.detect(state_dict)
        if found is None:
            continue
        known, arguments = found
        if name is not None and architecture != known:
            raise CheckpointError(f"{weights} holds {known}, not {architecture}.")
        model = timm.create_model(known, **arguments)
        load_strict(model, state_dict, family.checkpoint_filter_fn, source=str(weights))
        return model
    families = ", ".join(family.__name__.rpartition(".")[2] for family in FAMILIES)
    raise CheckpointError(f"{weights} is of no known restorer; known families are {families}.")


def _require_restorer(name: str) -> None:
    """Raise a ValueError that names what was meant, unless `name` is a restorer with this tag."""
    architecture, tag = split_model_name_tag(name)
    restorers = _restorers()
    if architecture not in restorers:
        if is_model(architecture):
            names = ", ".join(f"{family.__name__.rpartition('.')[2]}_*" for family in FAMILIES)
            raise ValueError(f"{name!r} does not restore images; {names} do, see `zoo list`.")
        raise ValueError(catalog.unknown(name))
    if tag and name not in get_arch_pretrained_cfgs(architecture):
        raise ValueError(catalog.unknown(name))


def _restorers() -> list[str]:
    return [name for family in FAMILIES for name in family.default_cfgs]


def _noise_error(cfg: RestorationCfg, sigma: float | None) -> float | None:
    """Return how badly weights fit a noise, 0 where they were trained for just this; None where they do not fit.

    Where no noise is asked for, weights for a range of noise fit best.
    """
    if sigma is None:
        return 0.0 if isinstance(cfg.sigma, tuple) or cfg.sigma is None else 1.0
    if cfg.sigma is None:
        return None
    low, high = cfg.sigma if isinstance(cfg.sigma, tuple) else (cfg.sigma, cfg.sigma)
    return high - low if low <= sigma <= high else None


def _noise_words(sigma: float | tuple[float, float] | None) -> str:
    if sigma is None:
        return "no stated noise"
    return f"sigma {sigma[0]:g} to {sigma[1]:g}" if isinstance(sigma, tuple) else f"sigma {sigma:g}"


def _for_noise(name: str, sigma: float | None) -> str:
    """Return NAME.TAG of the published weights of a restorer that fit a noise best."""
    if sigma is None:
        return name
    architecture, tag = split_model_name_tag(name)
    cfgs = cast(dict[str, RestorationCfg], get_arch_pretrained_cfgs(architecture))
    errors = {full: _noise_error(cfg, sigma) for full, cfg in cfgs.items() if not tag or full == name}
    fitting = {full: error for full, error in errors.items() if error is not None}
    if not fitting:
        known = ", ".join(f"{full} ({_noise_words(cfg.sigma)})" for full, cfg in cfgs.items())
        raise ValueError(f"{name} has no weights for noise of sigma {sigma:g}; there are {known}.")
    return min(fitting, key=lambda full: fitting[full])


def _measured(name: str) -> float:
    """Return the first PSNR on the card of published weights, dB; 0 without one. Cards of a task begin with one set."""
    architecture, tag = split_model_name_tag(name)
    metrics = catalog.load().get(architecture, {}).get("weights", {}).get(tag, {}).get("metrics", ())
    return max((metric["value"] for metric in metrics[:1] if metric["name"].startswith("PSNR")), default=0.0)


def _shipped(task: str, scale: int | None, sigma: float | None) -> str:
    """Return NAME.TAG of the shipped weights for a task, scale and noise: of several, those of the highest PSNR."""
    fitting: list[tuple[float, float, str]] = []
    others: list[str] = []
    wanted = scale or (2 if task == "sr" else 1)
    for architecture in _restorers():
        for name, cfg in get_arch_pretrained_cfgs(architecture).items():
            file = Path(cfg.file) if cfg.file else None
            if not isinstance(cfg, RestorationCfg) or file is None or not file.is_file():
                continue
            error = _noise_error(cfg, sigma)
            if (cfg.task, cfg.scale) == (task, wanted) and error is not None:
                fitting.append((-error, _measured(name), name))
            noise = "" if cfg.sigma is None else f", {_noise_words(cfg.sigma)}"
            others.append(f"{name} ({cfg.task}, x{cfg.scale}{noise})")
    if not fitting:
        noise = "" if sigma is None else f" and sigma {sigma:g}"
        raise ValueError(
            f"No weights for the task {task!r} at scale {wanted}{noise} are shipped; shipped are "
            f"{', '.join(others) or 'none'}. Give a weight file, or the name of a model with published weights."
        )
    return max(fitting)[2]
