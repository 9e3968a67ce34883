"""Restore pictures: a picture in, the same kind of picture out, with any restorer of the zoo."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from zoo.engines import EngineName
from zoo.pictures.judging import Judgement, Kind, judge
from zoo.pictures.metadata import stripped
from zoo.pictures.picture import Picture, PictureError, pair_views
from zoo.pictures.plans import held_bytes, parse_bytes
from zoo.pictures.read import open_picture
from zoo.pictures.restored_image import as_image
from zoo.pictures.restorers import REAL, Quality, load_restorer, shipped_scales
from zoo.pictures.sizes import Size, chain, crop_box, resize
from zoo.pictures.tiling import Progress, restore_tensor

__all__ = [
    "Networks",
    "Picture",
    "PictureError",
    "Size",
    "load_restorer",
    "open_picture",
    "pair_views",
    "restore",
    "restore_picture",
    "restore_tensor",
]

_log = logging.getLogger(__name__)

_MARGIN = 64  # most pixels around a part that its networks see

Source = str | os.PathLike[str] | Image.Image | NDArray[Any]


def restore(
    image: Source | tuple[Source, Source],
    task: str = "sr",
    scale: float | None = None,
    model: str | os.PathLike[str] | nn.Module | None = None,
    weights: str | os.PathLike[str] | None = None,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    sigma: float | None = None,
    width: int | None = None,
    height: int | None = None,
    max_side: int | None = None,
    crop: str | tuple[int, int, int, int] | None = None,
    max_pixels: int | None = None,
    strip: bool = False,
    exact: bool = False,
    quality: Quality | None = None,
    kind: Literal["auto", "clean", "real"] = "auto",
    engine: EngineName | None = None,
) -> Any:
    """Restore a picture of any kind and size.

    The result is upright and has the mode of the input (gray, colour, alpha, palette, CMYK, 16-bit gray); its plain
    `save` keeps 16 bits, frames, colour profile, EXIF, XMP, IPTC, resolution and text, as far as the format can.
    Opacity is scaled apart, and colour under full transparency is filled from its surroundings before.

    Args:
        image: Path, Pillow image, or array (H, W) or (H, W, 1 to 4) of uint8, uint16, bool, or floats in [0, 1]; or a
            tuple of two, the left and the right view of a dual-pixel sensor.
        task: "sr", "denoise", ...: chooses shipped weights where neither `model` nor `weights` is given.
        scale: Output pixels per input pixel, also 2.5, 3 or 8: networks follow each other, and Lanczos in linear light
            makes up the rest. None takes the model's, or 2 for "sr" where there is no model.
        model: Name of a restorer ("cfsr_x2", "cfsr_x2.authors"), file, folder or Hub id of one, or a restorer. None
            recognises it from `weights`.
        weights: Weight file, ours or the authors', or a tag of `model`. None takes the model's published weights.
        budget: Memory the whole process (or the device) may hold, without the program files that the system shares:
            bytes, or like "4GB"; None is no limit.
        tile: Side of tiles with their overlap, input pixels, instead of a choice by `budget`.
        overlap: Of tiles, input pixels; None takes the receptive field, where the result is that of the whole picture,
            or less where that more than doubles the work.
        device: Where to run; None takes a given restorer's place, else CUDA where it is, else the CPU.
        dtype: Precision of the network, for example "bfloat16"; None is float32.
        self_ensemble: Average over eight flips and turns: better by about 0.1 dB, eight times as slow.
        progress: Called with (parts done, parts in all).
        sigma: Standard deviation of the noise, of 255: takes the weights trained for it.
        width: Of the result, pixels, instead of `scale`; the height follows unless it is given too.
        height: Of the result, pixels.
        max_side: The longer side of the result, pixels.
        crop: Restore only a part: (left, top, right, bottom) or "640x480+100+50" in pixels of the upright picture; it
            looks as it does in the whole.
        max_pixels: Most pixels of a file that are read; None is 179 million.
        strip: Leave out all metadata but what colours depend on.
        exact: Insist on tiles that give the result of the whole picture, whatever they cost.
        quality: "fast" takes the shipped network of the least work, "balanced" the one of the highest PSNR, "best"
            averages that over flips and turns. None is "fast" on a CPU, else "balanced".
        kind: Shipped weights for "clean" pictures, or for "real" photos with JPEG blocks and noise; "auto" looks.
        engine: What runs the networks, as in `zoo.accelerate`: tiles then run side by side, one on each thread.

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
    size = Size(scale=scale, width=width, height=height, max_side=max_side)
    pictures = [open_picture(view, every_frame=len(views) == 1, max_pixels=max_pixels) for view in views]
    picture = pair_views(*pictures) if len(pictures) == 2 else pictures[0]
    if strip:
        picture = dataclasses.replace(picture, metadata=stripped(picture.metadata))
    options: dict[str, Any] = dict(sigma=sigma, device=device, dtype=dtype, quality=quality, engine=engine)
    networks = Networks(size, task, model, weights, kind=kind, **options)
    restored = restore_picture(
        picture,
        networks.reaching(picture.size, picture),
        budget=budget,
        tile=tile,
        overlap=overlap,
        exact=exact,
        self_ensemble=self_ensemble or quality == "best",
        progress=progress,
        size=size,
        crop=crop,
    )
    return restored.to_array() if isinstance(views[0], np.ndarray) else as_image(restored)


class Networks:
    """The networks that make pictures as large as is asked for: one, or several after each other; each loaded once.

    Args:
        size: How large results are to be.
        task: As in `restore`.
        model: As in `restore`.
        weights: As in `restore`.
        kind: As in `restore`.
        **options: Further ones of `load_restorer`.

    Attributes:
        first: The network that a clean picture of the usual size gets first.
        name: `NAME.TAG` of the first network of the last picture, where it was chosen for it.
        reason: Why.

    Raises:
        ValueError: There is no such restorer or kind, nothing shipped fits, or it cannot reach the scale.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
    """

    def __init__(
        self,
        size: Size,
        task: str = "sr",
        model: str | os.PathLike[str] | nn.Module | None = None,
        weights: str | os.PathLike[str] | None = None,
        kind: Literal["auto", "clean", "real"] = "auto",
        **options: Any,
    ) -> None:
        if kind not in ("auto", "clean", "real"):
            raise ValueError(f'kind is "auto", "clean" or "real", got {kind!r}.')
        self.size, self._task, self._options, self._kind = size, task, options, kind
        self._loaded: dict[tuple[int, Kind], nn.Module] = {}
        self._is_named = model is not None or weights is not None
        if self._is_named and kind != "auto":
            raise ValueError(f'kind="{kind}" chooses among shipped weights: leave it out, or the model.')
        self.name = self.reason = ""
        known: Kind = "real" if kind == "real" else "clean"
        self._scales: dict[Kind, tuple[int, ...]]
        kinds: tuple[Kind, ...] = ("clean", "real")
        chosen = model is None and weights is None and options.get("sigma") is None
        by_kind = {each: shipped_scales(task, each) if chosen else () for each in kinds}
        shipped = by_kind[known]
        asked = size.scale
        self._by_scale = any(scale > 1 for scale in shipped)
        if self._by_scale and asked is not None and asked <= 1:
            raise ValueError(
                f"The task {task!r} enlarges; scale {asked:g} does not. `width`, `height` and `max_side` also make "
                "pictures smaller."
            )
        if self._by_scale and asked is not None and asked > 1:
            first = chain(asked, shipped)[0]
        elif self._by_scale:
            first = 2 if 2 in shipped else min(scale for scale in shipped if scale > 1)
        else:
            whole = asked is not None and asked == int(asked) and model is None and weights is None
            scale = int(asked) if whole and asked else None
            self.first = load_restorer(task, scale, model, weights, kind=known, **options)
            own = int(getattr(self.first, "scale", 1))
            if own == 1 and asked not in (None, 1):
                raise ValueError(f"This {type(self.first).__name__} restores at scale 1, not {asked:g}.")
            self._loaded[own, known], self._scales = self.first, dict.fromkeys(kinds, (own,))
            return
        self.first = load_restorer(task, first, kind=known, **options)
        self._loaded[first, known], self._scales = self.first, by_kind

    def reaching(self, size: tuple[int, int], picture: Picture | None = None) -> list[nn.Module]:
        """Return the networks for a picture of a height and width, in their order; none where it is to become smaller.

        Where the network is for scale 1, it is alone. Where nothing is named, the first one is for clean or for real
        photos, as the picture looks.
        """
        kind: Kind = "real" if self._kind == "real" else "clean"
        seen = None
        if self._kind == "auto" and not self._is_named and picture is not None:
            seen = judge(picture.color, picture.peak)
            kind = seen.kind
        sizes = [size] if picture is None else [size, *(page.size for page in picture.frames)]
        scales = max((self._scales_for(each, kind) for each in sizes), key=math.prod)  # pages may differ in size
        found = [self._of(scale, kind if step == 0 else "clean") for step, scale in enumerate(scales)]
        cfg: Any = getattr(found[0], "pretrained_cfg", None) if found else None
        self.name = ".".join(str(cfg.get(key)) for key in ("architecture", "tag") if cfg.get(key)) if cfg else ""
        self.reason = self._why(kind, seen)
        if picture is not None and not self._is_named and found:
            _log.info("%s: %s.", self.name, self.reason)
        return found

    def _why(self, kind: Kind, seen: Judgement | None) -> str:
        """Say in words why `name` was chosen; weights of the kind that is looked for may not be shipped for a task."""
        is_other = bool(self.name) and (kind == "real") != self.name.endswith(f".{REAL}")
        if seen is None:
            if self._kind == "auto":
                return ""
            asked = f"{self._kind} weights are asked for"
            return f"{asked}, and the task {self._task!r} has none" if is_other else asked
        if not is_other:
            return seen.words
        if kind == "clean":
            return f"the task {self._task!r} has no others; {seen.words}"
        if self._task == "denoise" and seen.is_blocky:
            return f'{seen.words}; this is for noise alone, the task "restore" for compressed photos'
        return (
            seen.words if self._task == "denoise" else f"{seen.words}, but the task {self._task!r} has no real weights"
        )

    def _of(self, scale: int, kind: Kind) -> nn.Module:
        """Return the network for a scale, loaded once."""
        if self._is_named:
            kind = "real" if self._kind == "real" else "clean"
        if (scale, kind) not in self._loaded:
            self._loaded[scale, kind] = load_restorer(self._task, scale, kind=kind, **self._options)
        return self._loaded[scale, kind]

    def _scales_for(self, size: tuple[int, int], kind: Kind) -> tuple[int, ...]:
        own = int(getattr(self.first, "scale", 1))
        scales = self._scales[kind]
        if scales == (1,) or (self.size.scale is None and not self.size.in_pixels):
            return (own,)
        wanted = self.size.of(size, own)
        factor = max(new / old for new, old in zip(wanted, size, strict=True))
        if self.size.scale is not None:
            factor = self.size.scale
        return tuple(chain(factor, scales))


def restore_picture(
    picture: Picture,
    model: nn.Module | Sequence[nn.Module],
    *,
    budget: int | float | str | None = "4GB",
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
    self_ensemble: bool = False,
    progress: Progress | None = None,
    inform: Callable[[str], object] | None = None,
    size: Size | None = None,
    crop: str | tuple[int, int, int, int] | None = None,
) -> Picture:
    """Restore an opened picture with all its frames, for example from a batch of files with one model; see `restore`.

    Args:
        picture: From `open_picture`, or from `pair_views`.
        model: From `load_restorer`, or any restorer; or several, which follow each other.
        budget: Memory limit.
        tile: Side of tiles.
        overlap: Of tiles.
        exact: Insist on exact tiles.
        self_ensemble: Average over eight flips and turns.
        progress: Called with (parts done, parts in all); black ink is not counted.
        inform: Told in words how the picture is run, see `restore_tensor`.
        size: How large the result is to be; None is as large as the networks make it.
        crop: Part that is restored.

    Raises:
        ValueError: The budget or the tile is too small, the part lies outside a page, or the network restores two views
            and got one, or the reverse.
        RuntimeError: The network's output is not finite.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    options: dict[str, Any] = dict(budget=budget, tile=tile, overlap=overlap, exact=exact, self_ensemble=self_ensemble)
    run = partial(restore_tensor, **options)
    pages = [dataclasses.replace(picture, frames=()), *picture.frames]
    size = size or Size()
    for page in pages:  # they may differ in size, and what is wrong with one is known before the first is restored
        _require_memory(page, models, size, crop, budget)
    done = []
    for index, page in enumerate(pages):
        steps = len(pages) * max(1, len(models))

        def tell(step: int, parts: int, total: int, index: int = index, steps: int = steps) -> None:
            if progress is not None:
                before = (index * max(1, len(models)) + step) * total
                progress(before + parts, steps * total)

        done.append(_restore_page(page, models, run, tell, inform if index == 0 else None, size, crop))
    if len(pages) > 1 and inform is not None:
        inform(f"{len(pages)} frames")
    return dataclasses.replace(done[0], frames=tuple(done[1:]))


def _require_memory(
    picture: Picture,
    models: Sequence[nn.Module],
    size: Size,
    crop: str | tuple[int, int, int, int] | None,
    budget: int | float | str | None,
) -> None:
    """Refuse a result that a budget of the CPU's memory does not hold where Lanczos makes it; networks have tiles."""
    left, top, right, bottom = (0, 0, *picture.size[::-1]) if crop is None else crop_box(crop, picture.size)
    scale = math.prod(int(getattr(model, "scale", 1)) for model in models)
    target = size.of(picture.size, scale)
    direct = len(models) == 1 and target == tuple(scale * side for side in picture.size)
    if budget is None or direct or (models and next(models[0].parameters()).device.type != "cpu"):
        return
    share = (right - left) * (bottom - top) / math.prod(picture.size)
    planes = picture.planes().shape[2]
    # float32: what the networks make, what Lanczos makes of it, and three planes at work
    need = 4 * share * (planes * math.prod(picture.size) * scale**2 + (planes + 3) * math.prod(target))
    allowed, held = parse_bytes(budget), held_bytes(torch.device("cpu"))
    if held + need > allowed:
        raise ValueError(
            f"A budget of {math.ceil(allowed / 1e6)} MB is too small for a result of {target[1]}x{target[0]} pixels: "
            f"allow at least {math.ceil((held + need) / 1e6)} MB."
        )


Run = Callable[..., torch.Tensor]


def _restore_page(
    picture: Picture,
    models: Sequence[nn.Module],
    run: Run,
    tell: Callable[[int, int, int], None],
    inform: Callable[[str], object] | None,
    size: Size,
    crop: str | tuple[int, int, int, int] | None,
) -> Picture:
    """Restore one picture."""
    if models and (picture.color.shape[2] == 6) != (getattr(models[0], "in_chans", 3) == 6):
        kinds = "one picture", "two views of a dual-pixel sensor"
        wanted, given = kinds if picture.color.shape[2] == 6 else kinds[::-1]
        raise ValueError(f"{type(models[0]).__name__} with these weights restores {wanted}, got {given}.")
    scale = math.prod(int(getattr(model, "scale", 1)) for model in models)
    target = size.of(picture.size, scale)
    inner = (0, 0, *picture.size[::-1])
    if crop is not None:
        picture, inner, target = _part(picture, models, crop, target)
    levels = None if picture.peak == 1 else int(picture.peak)
    own = tuple(scale * (stop - start) for start, stop in ((inner[1], inner[3]), (inner[0], inner[2])))
    direct = len(models) == 1 and own == target

    def through(planes: NDArray[Any], counted: bool) -> NDArray[Any]:
        x = torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1)))[None]
        for step, model in enumerate(models):
            x = run(
                model,
                x,
                levels=levels if direct else None,
                progress=(lambda parts, total, step=step: tell(step, parts, total)) if counted else None,
                inform=inform if counted else None,
            )
            if levels is None or not direct:
                x = x.clamp_(0, 1)
        out = x[0].permute(1, 2, 0).numpy()
        out = out[scale * inner[1] : scale * inner[3], scale * inner[0] : scale * inner[2]]
        if direct:
            return out.astype(planes.dtype, copy=False)
        if not models:
            out = out.astype(np.float32) / np.float32(picture.peak)
        out = resize(out, target, picture, light=counted)
        return _quantised(out, planes.dtype, picture.peak)

    color = picture.color if picture.alpha is None else _bleed(picture.color, picture.alpha)
    alpha = picture.alpha
    if alpha is not None:
        alpha = alpha[inner[1] : inner[3], inner[0] : inner[2]]
    if inform is not None and not direct:
        notes = [f"{len(models)} networks after each other"] if len(models) > 1 else []
        notes += [f"Lanczos from {own[1]}x{own[0]} to {target[1]}x{target[0]}"] if own != target else []
        inform(", ".join(notes or ["whole"]))
    return dataclasses.replace(
        picture,
        color=through(color, True),
        black=None if picture.black is None else through(picture.black, False),
        alpha=None if alpha is None else _resize_plane(alpha, target, picture.peak),
        metadata=picture.metadata.resized(target),
    )


def _part(
    picture: Picture,
    models: Sequence[nn.Module],
    crop: str | tuple[int, int, int, int],
    target: tuple[int, int],
) -> tuple[Picture, tuple[int, int, int, int], tuple[int, int]]:
    """Cut a part out with what the networks see around it; return it, the part in it, and the size of its result."""
    left, top, right, bottom = crop_box(crop, picture.size)
    height, width = picture.size
    part = tuple(
        max(1, round((stop - start) * new / old))
        for start, stop, new, old in ((top, bottom, target[0], height), (left, right, target[1], width))
    )
    reach = [getattr(model, "receptive_field", None) for model in models]
    margin = max((_MARGIN if own is None else min(own, _MARGIN) for own in reach), default=0)
    multiple = math.lcm(1, *(int(getattr(model, "multiple_of", 1)) for model in models))
    start_x, start_y = (max(0, place - margin) // multiple * multiple for place in (left, top))
    stop_x, stop_y = min(width, right + margin), min(height, bottom + margin)

    def cut(plane: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if plane is None else plane[start_y:stop_y, start_x:stop_x]

    color = cut(picture.color)
    assert color is not None
    small = dataclasses.replace(picture, color=color, black=cut(picture.black), alpha=cut(picture.alpha))
    return small, (left - start_x, top - start_y, right - start_x, bottom - start_y), (part[0], part[1])


def _quantised(values: NDArray[Any], dtype: Any, peak: float) -> NDArray[Any]:
    """Return values from 0 to 1 in the dtype of a picture."""
    return values.astype(np.float32) if peak == 1 else np.round(values * peak).astype(dtype)


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
