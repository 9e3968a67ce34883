"""Which network restores a picture: named, recognised from its weights, or chosen among the shipped ones."""

from __future__ import annotations

import copy
import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag
from torch import nn

from zoo import catalog
from zoo.cfg import RestorationCfg
from zoo.engines import EngineName, attach, check_engine, engine_of
from zoo.factory import create_model
from zoo.ffn.reparam import reparameterize
from zoo.loading import foreign_hint, foreign_restorer, from_record
from zoo.pictures.judging import Kind
from zoo.processor import tell_of_emulation
from zoo.restoration import FAMILIES
from zoo.sources import find, no_shipped_weights
from zoo.weights import CheckpointError, load_strict, read_weights

__all__ = ["REAL", "Offer", "Quality", "load_restorer", "offers", "shipped_scales", "usual_quality"]

Quality = Literal["fast", "balanced", "best"]
"""The shipped network of the least work; the one of the highest PSNR; that one, averaged over flips and turns."""

REAL = "real"
"""Tag of weights for compressed and noisy photos."""
_ENSEMBLE = 8  # times the work


@dataclass(frozen=True)
class Offer:
    """A network that a quality takes, and what it costs.

    Args:
        name: `NAME.TAG`.
        self_ensemble: Averaged over flips and turns.
        work: Multiply-accumulates over those of the fastest.
    """

    name: str
    self_ensemble: bool
    work: float


def load_restorer(
    task: str = "sr",
    scale: int | None = None,
    model: str | os.PathLike[str] | nn.Module | None = None,
    weights: str | os.PathLike[str] | None = None,
    *,
    sigma: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quality: Quality | None = None,
    kind: Kind = "clean",
    engine: EngineName | None = None,
) -> nn.Module:
    """Find, load and prepare a restorer: evaluation mode, re-parameterised, on its device; arguments as in `restore`.

    A restorer that is given as a module is used as it is, or copied where `device` or `dtype` ask for another place or
    precision. Where nothing is named, `kind` chooses between shipped weights for clean and for real photos.

    Raises:
        ValueError: There is no such restorer, quality or engine, nothing shipped fits, or the scale or the noise is
            not the model's.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
        ImportError: The engine is not installed.
    """
    if quality not in (None, *get_args(Quality)):
        raise ValueError(f'quality is "fast", "balanced" or "best", got {quality!r}; `save` takes that of a file.')
    engine = None if engine is None else check_engine(engine)
    precision = _dtype(dtype)
    if sigma is not None and not isinstance(sigma, numbers.Real):
        raise ValueError(f"sigma must be a number, got {sigma!r}.")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str | nn.Module | None):
        raise ValueError(f"model must be a name, a path or a network, got {model!r}.")
    if isinstance(model, str) and weights is None and find(model).kind in ("file", "folder", "hub"):
        model, device = _from_source(model), device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, nn.Module) and hasattr(model, "require_dtype"):
        cast(Any, model).require_dtype(precision)
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
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        restorer = _load(task, scale, model, weights, sigma, quality or usual_quality(place), kind).eval()
        if hasattr(restorer, "require_dtype"):  # spandrel's networks
            cast(Any, restorer).require_dtype(precision)
        reparameterize(restorer, measure=False)
        restorer = restorer.to(place, precision)
    own = int(getattr(restorer, "scale", 1))
    if scale is not None and scale != own:
        raise ValueError(f"This {type(restorer).__name__} restores at scale {own}, not {scale}.")
    tell_of_emulation(precision, place, "float32 for dtype")
    if engine not in (None, "eager") and engine_of(restorer) is None:
        if restorer is model:
            restorer = copy.deepcopy(restorer).eval()
        attach(restorer, engine)
    return restorer


def _from_source(name: str) -> nn.Module:
    """Return the restorer in a file or folder, or from the Hub."""
    model = create_model(name, pretrained=True).eval()
    if not hasattr(model, "scale"):
        raise ValueError(f"{name} holds a {type(model).__name__}, which does not restore images.")
    reparameterize(model, measure=False)
    return model


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f'dtype must be a floating-point type such as "float32" or "bfloat16", got {dtype!r}.')


def usual_quality(device: torch.device) -> Quality:
    """Return the quality that is taken where none is asked for."""
    return "fast" if device.type == "cpu" else "balanced"


def _load(
    task: str,
    scale: int | None,
    name: str | None,
    weights: str | os.PathLike[str] | None,
    sigma: float | None,
    quality: Quality,
    kind: Kind,
) -> nn.Module:
    """Build a restorer and load its weights: published ones by name or by task, or those of a file."""
    if name is not None:
        _require_restorer(name)
        architecture = split_model_name_tag(name)[0]
        if weights is not None and f"{architecture}.{weights}" in get_arch_pretrained_cfgs(architecture):
            name, weights = f"{architecture}.{weights}", None
    if weights is None:
        name = _shipped(task, scale, sigma, quality, kind) if name is None else _for_noise(name, sigma)
        return timm.create_model(name, pretrained=True)
    if sigma is not None:
        raise ValueError(f"sigma chooses published weights; {weights} is one file, trained for its own noise.")
    state_dict, record = read_weights(Path(weights))
    if record is not None and record.architecture in _restorers():  # a file of ours says what it is
        if name is not None and architecture != record.architecture:
            raise CheckpointError(f"{weights} holds {record.architecture}, not {architecture}.")
        return from_record(record, state_dict, str(weights))
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
    if name is None and (other := foreign_restorer(state_dict, os.fspath(weights))) is not None:
        return other
    families = ", ".join(family.__name__.rpartition(".")[2] for family in FAMILIES)
    raise CheckpointError(f"{weights} is of no known restorer; known families are {families}{foreign_hint()}.")


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


def shipped_scales(task: str, kind: Kind = "clean") -> tuple[int, ...]:
    """Return the scales at which weights for a task and kind are shipped, in rising order; else those of the other."""
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for architecture in _restorers():
        for cfg in get_arch_pretrained_cfgs(architecture).values():
            if isinstance(cfg, RestorationCfg) and cfg.task == task and cfg.file and Path(cfg.file).is_file():
                found[(cfg.tag == REAL) == (kind == "real")].add(cfg.scale)
    return tuple(sorted(found[True] or found[False]))


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


def offers(task: str, scale: int | None = None, sigma: float | None = None, kind: Kind = "clean") -> dict[str, Offer]:
    """Return what each quality takes of the shipped weights for a task, scale and noise.

    Args:
        task: "sr", "denoise", ...
        scale: None is 2 for "sr", else 1.
        sigma: Of the noise, of 255.
        kind: Weights trained for clean or for real photos; of the other kind where there are none.

    Raises:
        ValueError: There are none.
    """
    fitting: list[tuple[bool, float, str]] = []
    others: list[str] = []
    wanted = scale or (2 if task == "sr" else 1)
    for architecture in _restorers():
        for name, cfg in get_arch_pretrained_cfgs(architecture).items():
            file = Path(cfg.file) if cfg.file else None
            if not isinstance(cfg, RestorationCfg) or file is None or not file.is_file():
                continue
            error = _noise_error(cfg, sigma)
            if (cfg.task, cfg.scale) == (task, wanted) and error is not None:
                fitting.append(((cfg.tag == REAL) == (kind == "real"), -error, name))
            noise = "" if cfg.sigma is None else f", {_noise_words(cfg.sigma)}"
            others.append(f"{name} ({cfg.task}, x{cfg.scale}{noise})")
    if not fitting:
        noise = "" if sigma is None else f" and sigma {sigma:g}"
        raise ValueError(
            no_shipped_weights()
            or f"No weights for the task {task!r} at scale {wanted}{noise} are shipped; shipped are "
            f"{', '.join(others) or 'none'}. Give a weight file, or the name of a model with published weights."
        )
    best = max(fitting)[:2]
    names = [name for *fit, name in fitting if tuple(fit) == best]
    fast, balanced = min(names, key=lambda name: (_work(name), -_measured(name))), max(names, key=_measured)
    work = _work(balanced) / _work(fast)
    return {
        "fast": Offer(fast, False, 1.0),
        "balanced": Offer(balanced, False, work),
        "best": Offer(balanced, True, _ENSEMBLE * work),
    }


def _work(name: str) -> int:
    """Return the multiply-accumulates of a network, all for one input size a task and scale; 1 where unknown."""
    return int(catalog.load().get(split_model_name_tag(name)[0], {}).get("macs", 1))


def _shipped(
    task: str, scale: int | None, sigma: float | None, quality: Quality = "balanced", kind: Kind = "clean"
) -> str:
    """Return NAME.TAG of the shipped weights for a task, scale and noise."""
    return offers(task, scale, sigma, kind)[quality].name
