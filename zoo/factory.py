"""Models by name, path or Hub id: one name space over classifiers, restorers and denoisers.

Classifiers and restorers live in timm's registry, denoisers in diffusers folders; there is no registry beside them.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

import zoo.backbones
import zoo.restoration
from zoo import catalog, hub
from zoo.weights import CheckpointError, cards_dir, load_strict, read_checkpoint, verify_component

__all__ = ["create_model", "create_pipeline", "families", "list_models", "model_info"]

_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".tar")
_DENOISER_FILE = "diffusion_pytorch_model*.safetensors"  # how diffusers names the weights of its own models


def families() -> Iterator[ModuleType]:
    """Yield the module of every backbone and restorer family."""
    for package in (zoo.backbones, zoo.restoration):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            if hasattr(module, "default_cfgs"):  # what else is in the package serves the families
                yield module


def list_models(
    pattern: str = "*",
    *,
    task: str | None = None,
    max_params: float | None = None,
    license: str | None = None,
    pretrained: bool = False,
) -> list[str]:
    """Return the names of this zoo's models, sorted.

    Args:
        pattern: Shell-style pattern of the name, for example "repa*".
        task: "classification", "sr", "generation", ...; None is all.
        max_params: Upper bound of the parameter count before merging.
        license: Only models with weights under this licence, for example "apache-2.0".
        pretrained: Return `NAME.TAG` of every published weight instead of model names.

    Raises:
        ValueError: No model has this task; the message lists the tasks.
    """
    chosen = catalog.select(pattern, task=task, max_params=max_params, license=license)
    if not pretrained:
        return sorted(chosen)
    return sorted(f"{name}.{tag}" for name, entry in chosen.items() for tag in entry["weights"])


def model_info(name: str) -> dict[str, Any]:
    """Return what is known about a model: paper, licence, parameters, MACs, input, weights, metrics, parity.

    Args:
        name: Registered name, or `NAME.TAG`.

    Raises:
        ValueError: There is no such model or tag; the message names the nearest.
    """
    return catalog.entry(name)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model by name, or load one from a weight file, a diffusers folder or a Hub id.

    Args:
        name: Registered name of ours or timm's, with or without weight tag ("repavit_large", "cfsr_x2.bsds"); shipped
            denoiser ("pixeldit.cifar10"); path of a weight file, whose architecture is recognised; folder of a model
            card or of `save_pretrained`; Hub id ("org/name", "org/name@revision").
        pretrained: Load the published weights of a registered name. Files and folders are always loaded.
        **kwargs: Arguments of the model.

    Returns:
        The model, in evaluation mode where weights were loaded.

    Raises:
        ValueError: There is no such model; the message names the nearest.
        CheckpointError: The weights do not exist, are damaged, or do not fit.
    """
    architecture, tag = split_model_name_tag(name)
    path = Path(name)
    if is_model(architecture):
        try:
            if tag:
                get_pretrained_cfg(name)
        except RuntimeError as error:
            raise ValueError(_unknown(name)) from error
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
        return model.eval() if pretrained else model
    if path.suffix in _WEIGHT_SUFFIXES and not path.is_dir():
        return _from_file(path, kwargs)
    source, separator, target = name.partition(":")
    if separator and source in ("hf-hub", "local-dir"):
        return _from_folder(Path(target), kwargs) if source == "local-dir" else _from_hub(target, kwargs)
    if path.is_dir():
        return _from_folder(path, kwargs)
    if "/" in name:
        return _from_hub(name, kwargs)
    folder = _denoiser_folder(name)
    if not pretrained:
        raise ValueError(f"{name!r} is a published denoiser: create it with pretrained=True, or build its class.")
    return create_pipeline(str(folder), **kwargs).transformer


def _unknown(name: str) -> str:
    """Return the message for a name that is neither ours nor timm's."""
    architecture, tag = split_model_name_tag(name)
    if is_model(architecture) and architecture not in catalog.load():
        tags = ", ".join(get_arch_pretrained_cfgs(architecture)) or "none"
        return f"timm's {architecture!r} has no weights called {tag!r}; there are: {tags}."
    return catalog.unknown(name, timm.list_models())


def _from_folder(folder: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Load a folder that holds a timm model (config.json) or a diffusers pipeline (model_index.json)."""
    if (folder / "model_index.json").is_file():
        return create_pipeline(str(folder), **kwargs).transformer
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds neither config.json (timm) nor model_index.json (diffusers).")
    return _from_timm(f"local-dir:{folder}", folder / "config.json", kwargs)


def _from_hub(repo_id: str, kwargs: dict[str, Any]) -> nn.Module:
    """Load a timm model or the denoiser of a diffusers pipeline from the Hub."""
    try:
        config = hub.download(repo_id, "config.json", cache_dir=kwargs.get("cache_dir"))
    except hub.HubFileMissingError:
        return create_pipeline(repo_id, **kwargs).transformer
    return _from_timm(f"hf-hub:{repo_id}", config, kwargs)


def _from_timm(name: str, config: Path, kwargs: dict[str, Any]) -> nn.Module:
    try:
        architecture = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config} is no config of a timm model: it names no architecture.") from error
    if not is_model(architecture):
        raise CheckpointError(f"{config} asks for the architecture {architecture!r}. {_unknown(architecture)}")
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def _from_file(path: Path, kwargs: dict[str, Any]) -> nn.Module:
    state_dict = read_checkpoint(path)
    for family in families():
        found = family.detect(state_dict) if hasattr(family, "detect") else None
        if found is not None:
            name, arguments = found
            model = timm.create_model(name, **{**arguments, **kwargs})
            load_strict(model, state_dict, family.checkpoint_filter_fn, source=str(path))
            return model.eval()
    known = ", ".join(family.__name__.rsplit(".", 1)[-1] for family in families() if hasattr(family, "detect"))
    raise CheckpointError(f"{path} is of no known architecture; known families are {known}.")


def _denoiser_folder(name: str) -> Path:
    """Return the shipped diffusers folder of `NAME` or `NAME.TAG`."""
    architecture, tag = split_model_name_tag(name)
    if architecture not in catalog.load() or (tag and tag not in catalog.load()[architecture]["weights"]):
        raise ValueError(_unknown(name))
    entry = catalog.entry(name)
    if entry["task"] not in catalog.PIPELINE_TASKS:
        raise ValueError(f"{name!r} is a {entry['task']} model, not a diffusion pipeline.")
    folder = cards_dir() / f"{architecture}.{tag or next(iter(entry['weights']))}"
    if not folder.is_dir():
        raise CheckpointError(f"{name!r} is listed, but its files are not at {folder}.")
    return folder


def create_pipeline(name: str, **kwargs: Any) -> Any:
    """Load a diffusion pipeline: a published name ("pixeldit.cifar10"), a folder, or a Hub id.

    Args:
        name: What to load.
        **kwargs: Arguments of `DiffusionPipeline.from_pretrained`, for example `dtype` (default: float32, also where
            the weights are stored in half precision).

    Raises:
        ValueError: There is no such pipeline; the message names the nearest.
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline

        import zoo.diffusion
    except ImportError as error:
        raise ImportError(
            f"Diffusion pipelines need {error.name}, which is missing: pip install 'ffn-zoo[diffusion]'."
        ) from error
    path = Path(name)
    if not path.is_dir() and "/" not in name:
        path = _denoiser_folder(name)
    if not path.is_dir():
        hub.download(name, "model_index.json", cache_dir=kwargs.get("cache_dir"))  # says clearly what is wrong
        path = Path(DiffusionPipeline.download(name, use_safetensors=True, **kwargs))
    index = path / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{path} is no diffusers pipeline: it has no model_index.json.")
    names = json.loads(index.read_text(encoding="utf-8"))
    components = [name for name in names if any((path / name).glob(_DENOISER_FILE))]
    for component in components:
        verify_component(path, component)
    if any("zoo.moe.transformers" in component for component in names.values() if isinstance(component, list)):
        import zoo.moe.transformers  # noqa: F401  diffusers loads only classes of modules that have been imported
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, **{"use_safetensors": True, **kwargs})
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not load: {' '.join(str(error).split())}") from error
    for component in components:
        verify_component(path, component, getattr(pipeline, component))
    return pipeline
