"""Models by name, path or Hub id: one name space over classifiers, restorers and denoisers.

Classifiers and restorers live in timm's registry, denoisers in diffusers folders; there is no registry beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._registry import get_arch_pretrained_cfgs
from torch import nn

from zoo import catalog, hub
from zoo.loading import (
    FACTS,
    build_timm,
    families,
    from_record,
    load_file,
    load_folder,
    note_facts,
    record_of_file,
    require_architecture,
)
from zoo.profiling import count_macs, count_params
from zoo.record import CONFIG_NAME, KEY, RecordError, described, note_build, read_config, record_of
from zoo.sources import WEIGHT_FILES, CheckpointError, Source, describe, find, no_shipped_file, timm_names
from zoo.text import first_line
from zoo.weights import cards_dir, read_weights, verify_component

__all__ = ["create_model", "create_pipeline", "families", "image_size_args", "list_models", "model_info"]

_DENOISER_FILE = "diffusion_pytorch_model*.safetensors"  # how diffusers names the weights of its own models


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


def model_info(name: str | Path) -> dict[str, Any]:
    """Return what is known about a model: paper, licence, parameters, MACs, input, weights, metrics, parity.

    Of a user's file, folder or Hub repository: architecture, arguments, classes, input, metrics of its card.

    Args:
        name: Registered name, `NAME.TAG`, weight file, checkpoint, folder or Hub id.

    Raises:
        ValueError: There is no such model or tag; the message names the nearest.
        CheckpointError: The file or folder does not say what it is.
    """
    name = _text(name)
    source = _find(name)
    if source.kind == "hub":
        record = read_config(hub.download(str(source.repo_id), CONFIG_NAME))
        return describe(source, record)
    if source.kind == "file" and source.path is not None:
        return describe(source, source.record or record_of_file(source.path, {})[0])
    if source.kind == "folder":
        return describe(source)
    if source.kind == "pipeline" and source.path is not None:
        raise CheckpointError(f"{name} is a folder of diffusers: its model_index.json says what it holds.")
    if source.architecture in catalog.load():
        return catalog.entry(name)
    cfg: Any = get_pretrained_cfg(name)
    facts = describe(source, described(str(source.architecture), vars(cfg), {}))
    return facts | _counted(str(source.architecture), facts.get("input_size") or [3, 224, 224])


def _counted(architecture: str, input_size: Sequence[int]) -> dict[str, int]:
    """Return parameters and MACs of a model of timm's, built without memory; empty where timm cannot build it so."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture).eval()
            return {"params": count_params(model), "macs": count_macs(model, torch.empty(1, *input_size))}
    except (RuntimeError, NotImplementedError, TypeError):  # a few compute with values while they are built
        return {}


def create_model(name: str | Path, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model by name, or load one from a weight file, a folder, a checkpoint or a Hub id.

    A file or folder brings its own constructor arguments, label names, input size and normalisation: in a record that
    zoo wrote, in a `config.json` or card beside it, or because it is a published file. Where none of them tells what
    changes the numbers, the error says which arguments to give.

    Args:
        name: Registered name of ours or timm's, with or without weight tag ("repavit_large", "cfsr_x2.bsds"); shipped
            denoiser ("pixeldit.cifar10"); weight file or training checkpoint (.safetensors, .ckpt, .pth, .pt, .bin);
            folder of a model card, of a training or of `save_pretrained`; Hub id ("org/name", "org/name@revision",
            "hf-hub:org/name").
        pretrained: Load the published weights of a registered name. Files and folders are always loaded.
        **kwargs: Arguments of the model. `num_classes` and `in_chans` other than those of the weights make a new
            classifier and adapt the first layer, as in timm. Also facts that a user's record lacks or has wrong:
            for example `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, `label_names`; for a
            file, `architecture`.

    Returns:
        The model, in evaluation mode where weights were loaded. `zoo.record.record_of(model)` says what it is.

    Raises:
        ValueError: There is no such model; the message names the nearest.
        TypeError: The model has no such argument; the message names the nearest.
        CheckpointError: The weights do not exist, are damaged, do not fit, or do not tell what changes the numbers.
    """
    name = _text(name)
    _require_kinds(kwargs)
    source = _find(name)
    if source.kind == "model":
        return _registered(source, pretrained, kwargs)
    if source.kind == "pipeline":
        if source.path is None and not pretrained:
            raise ValueError(f"{name!r} is a published denoiser: create it with pretrained=True, or build its class.")
        folder = name if source.path is None else str(source.path)
        return create_pipeline(folder, requires="transformer", **kwargs).transformer
    if source.kind == "hub":
        return _from_hub(str(source.repo_id), kwargs)
    kwargs.pop("cache_dir", None)
    if source.kind == "folder":
        return load_folder(source, **kwargs)
    assert source.path is not None
    return load_file(source.path, **kwargs)


def image_size_args(name: str | Path, size: int, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments with which `create_model` makes a classifier one for square images of another size.

    Args:
        name: As `create_model` takes it.
        size: Side, pixels.
        **kwargs: Its other arguments.

    Raises:
        ValueError: The network cannot take images of this size.
    """
    model = create_model(name, **kwargs)
    record = record_of(model)
    chans, *usual = record.input_size or (3, 224, 224)
    built = bool(record.pretrained_cfg.get("fixed_input_size"))
    arguments: dict[str, Any] = {"img_size": size} if built else {"input_size": (chans, size, size)}
    if size >= usual[-1]:
        return arguments
    try:  # small maps vanish on their way down
        model = create_model(name, **(kwargs | arguments)) if built else model
        with torch.no_grad():
            model.eval()(torch.zeros(1, chans, size, size))
    except (RuntimeError, ValueError, AssertionError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"{name} cannot take images of {size} pixels ({first_line(error)}): its own have {usual[-1]}; 32 and more "
            "are usual."
        ) from error
    return arguments


def _text(name: str | Path) -> str:
    """Return a name as text; a `Path` is a file or folder, also where a model is called the same."""
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f'A model is named, as "repavit_tiny.cifar10", by a file, a folder or a Hub id; got {name!r}.')
    return name if isinstance(name, str) else str(name) if name.is_absolute() else f"./{name}"


def _require_kinds(kwargs: dict[str, Any]) -> None:
    """Refuse values that the models themselves would stumble over, or take without a word."""
    classes, size = kwargs.get("num_classes"), kwargs.get("input_size")
    if classes is not None and (not isinstance(classes, int) or classes < 0):
        raise ValueError(f"num_classes must be a whole number from 0, got {classes!r}.")
    sides = list(size) if isinstance(size, tuple | list) else []
    if size is not None and not (len(sides) == 3 and all(isinstance(side, int) and side > 0 for side in sides)):
        raise ValueError(f"input_size must be (channels, height, width), got {size!r}.")


def _find(name: str) -> Source:
    """Tell what a name stands for; names that a program registered with timm itself count, too."""
    try:
        return find(name)
    except CheckpointError:
        raise
    except ValueError:
        architecture, tag = split_model_name_tag(name)
        if not is_model(architecture) or architecture in {*catalog.load(), *timm_names()}:
            raise
        return Source(name=name, kind="model", architecture=architecture, tag=tag, task="classification")


def _registered(source: Source, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build a model of timm's registry, with a record of its arguments."""
    try:
        if source.tag:
            get_pretrained_cfg(source.name)
    except RuntimeError as error:
        tags = ", ".join(tag.partition(".")[2] for tag in get_arch_pretrained_cfgs(str(source.architecture))) or "none"
        raise ValueError(f"{source.architecture!r} has no weights called {source.tag!r}; there are: {tags}.") from error
    facts = {key: kwargs.pop(key) for key in FACTS if key in kwargs}
    fetched = _fetch_timm(source, kwargs) if pretrained else {}
    model = build_timm(source.name, pretrained=pretrained, **kwargs, **fetched)
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if fetched and isinstance(cfg, dict):
        cfg |= {"file": None, "custom_load": vars(get_pretrained_cfg(source.name))["custom_load"]}
    if not hasattr(model, KEY) and isinstance(cfg, dict) and not kwargs.get("features_only"):
        note_build(model, described(cfg.get("architecture") or str(source.architecture), cfg, kwargs))
    note_facts(model, facts)
    return model.eval() if pretrained else model


def _fetch_timm(source: Source, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Fetch the weights of one of timm's own models: timm itself asks an absent Hub again and again, for half a minute.

    Returns:
        Arguments of `timm.create_model`; none where timm finds the weights by itself.
    """
    cfg: Any = get_pretrained_cfg(source.name)
    elsewhere = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
    if source.architecture in catalog.load() or cfg is None or not cfg.hf_hub_id or cfg.custom_load == "hf":
        return {}
    if cfg.file or cfg.state_dict or any(kwargs.get(key) for key in elsewhere):
        return {}
    first: hub.HubError | None = None
    for filename in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHT_FILES[:2]:
        try:
            path = hub.download(cfg.hf_hub_id, filename, cache_dir=kwargs.get("cache_dir"))
        except hub.HubError as error:
            first = first or error
            if isinstance(error, hub.HubFileMissingError) or hub.is_offline():
                continue  # older repositories, and caches, hold the other file
            raise
        return {"pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
    assert first is not None
    raise first


def _from_hub(repo_id: str, kwargs: dict[str, Any]) -> nn.Module:
    """Load a timm model or the denoiser of a diffusers pipeline from the Hub."""
    cache_dir = kwargs.pop("cache_dir", None)
    try:
        config = hub.download(repo_id, CONFIG_NAME, cache_dir=cache_dir)
    except hub.HubFileMissingError:
        return create_pipeline(repo_id, requires="transformer", cache_dir=cache_dir, **kwargs).transformer
    try:
        record = read_config(config)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    require_architecture(record, repo_id)
    for filename in WEIGHT_FILES:
        try:
            path = hub.download(repo_id, filename, cache_dir=cache_dir)
        except hub.HubFileMissingError as error:
            missing = error
            continue
        state_dict, _ = read_weights(path, hub.blob_digest(path))
        return from_record(record, state_dict, f"{repo_id}/{filename}", **kwargs)
    raise missing


def _denoiser_folder(name: str) -> Path:
    """Return the shipped diffusers folder of `NAME` or `NAME.TAG`."""
    architecture, tag = split_model_name_tag(name)
    if architecture not in catalog.load() or (tag and tag not in catalog.load()[architecture]["weights"]):
        raise ValueError(catalog.unknown(name, timm.list_models()))
    entry = catalog.entry(name)
    if entry["task"] not in catalog.PIPELINE_TASKS:
        raise ValueError(f"{name!r} is a {entry['task']} model, not a diffusion pipeline.")
    folder = cards_dir() / f"{architecture}.{tag or next(iter(entry['weights']))}"
    if not folder.is_dir():
        raise CheckpointError(no_shipped_file(folder) or f"{name!r} is listed, but its files are not at {folder}.")
    return folder


def create_pipeline(name: str, *, requires: str | None = None, **kwargs: Any) -> Any:
    """Load a diffusion pipeline: a published name ("pixeldit.cifar10"), a folder, or a Hub id.

    Args:
        name: What to load.
        requires: Part that it must have, for example "transformer"; looked for before weights are read.
        **kwargs: Arguments of `DiffusionPipeline.from_pretrained`, for example `dtype` (default: float32, also where
            the weights are stored in half precision).

    Returns:
        The pipeline. diffusers' `DiTPipeline` comes as `zoo.diffusion.DiTPipeline`, for any number of classes.

    Raises:
        ValueError: There is no such pipeline; the message names the nearest.
        CheckpointError: It is damaged, or lacks the required part; the message names those that it has.
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline

        from zoo.diffusion import DiTPipeline  # also makes our classes known to diffusers
    except ImportError as error:
        raise ImportError(
            f"Diffusion pipelines need {error.name}, which is missing: pip install 'ffn-zoo[diffusion]'."
        ) from error
    path = Path(name := _text(name))
    if not path.is_dir() and "/" not in name:
        path = _denoiser_folder(name)
    if not path.is_dir():
        find(name)  # refuses what is neither there nor a Hub id
        hub.download(name, "model_index.json", cache_dir=kwargs.get("cache_dir"))  # says clearly what is wrong
        path = Path(DiffusionPipeline.download(name, use_safetensors=True, **kwargs))
    index = path / "model_index.json"
    if (path / "modular_model_index.json").is_file():
        raise CheckpointError(f"{path} is a modular pipeline: load it with diffusers' ModularPipeline; caches take it.")
    if not index.is_file():
        raise CheckpointError(f"{path} is no diffusers pipeline: it has no model_index.json.")
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{index} does not say what the pipeline is made of: {error}") from error
    parts = [part for part, value in names.items() if isinstance(value, list) and any(value)]
    if requires is not None and requires not in parts:
        raise CheckpointError(f"{path} has no {requires}: a {names.get('_class_name')} has {', '.join(parts)}.")
    loader = DiTPipeline if names.get("_class_name") == DiTPipeline.__name__ else DiffusionPipeline
    components = [name for name in names if any((path / name).glob(_DENOISER_FILE))]
    for component in components:
        verify_component(path, component)
    try:
        pipeline = loader.from_pretrained(path, **{"use_safetensors": True, **kwargs})
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not load: {' '.join(str(error).split())}") from error
    for component in components:
        verify_component(path, component, getattr(pipeline, component))
    return pipeline
