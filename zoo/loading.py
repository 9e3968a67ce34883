"""Models from weight files and folders: which model a file is of, without guessing, then built and loaded strictly.

What tensors do not tell (windows, strides, an idle ratio, input size and normalisation) is taken from, in this order:
arguments of the caller; the record in the file; what Lightning kept of a training; `config.json` or a card beside the
file; the digest of a published file. Only then the tensors themselves are asked (`detect` of the families). What is
still unknown and would change the numbers is asked for, by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    split_model_name_tag,
)
from torch import Tensor, nn

import zoo.backbones
import zoo.restoration
from zoo import catalog, hub
from zoo.cfg import ModelCfg
from zoo.ffn.ewa import collapse_state_dict
from zoo.ffn.structured import drop_guides
from zoo.ffn.technique import rebuild
from zoo.record import CONFIG_NAME, KEY, ModelRecord, RecordError, attach, described, read_record, record_of
from zoo.sources import CheckpointError, Source, card_sha256, front_matter, task_of, timm_names, weight_file
from zoo.weights import (
    FilterFn,
    cards_dir,
    load_pretrained,
    load_strict,
    merge_adapters,
    pretrained_cfg_of,
    read_weights,
    require_known,
    sha256_of,
)

__all__ = [
    "FACTS",
    "build_timm",
    "families",
    "from_record",
    "load_file",
    "load_folder",
    "note_facts",
    "published_record",
    "record_of_file",
    "require_architecture",
]

FACTS = ("label_names", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Facts of a record that `create_model` takes as arguments, beside those of the constructor."""

_NEEDED = {"input_size": "input_size=(3, H, W)", "mean": "mean=(r, g, b)", "std": "std=(r, g, b)"}


def families() -> Iterator[ModuleType]:
    """Yield the module of every backbone and restorer family."""
    for package in (zoo.backbones, zoo.restoration):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            if hasattr(module, "default_cfgs"):  # what else is in the package serves the families
                yield module


def load_folder(source: Source, **kwargs: Any) -> nn.Module:
    """Load the model of a folder with `config.json` and weights.

    Args:
        source: From `zoo.sources.find`.
        **kwargs: Arguments of the model, which win over the record's, and `FACTS`.

    Raises:
        CheckpointError: The weights are damaged or do not fit, or are not those of the card.
    """
    assert source.path is not None
    assert source.record is not None
    require_architecture(source.record, str(source.path / CONFIG_NAME))
    path = weight_file(source.path)
    state_dict, _ = read_weights(path, card_sha256(source.path, path.name) or hub.blob_digest(path))
    return from_record(source.record, state_dict, str(path), **kwargs)


def load_file(path: Path, **kwargs: Any) -> nn.Module:
    """Load the model of a weight file.

    Args:
        path: The file.
        **kwargs: Arguments of the model, which win over the record's, `FACTS`, and `architecture` for a file that does
            not tell it.

    Raises:
        CheckpointError: The file is damaged, of no known architecture, does not fit, or does not tell an argument that
            changes the numbers; the message says which to give.
    """
    try:
        record, state_dict = record_of_file(path, kwargs)
    except UnknownArchitectureError as error:
        other = foreign_restorer(error.state_dict, path)
        if other is None:
            raise
        return other
    kwargs.pop("architecture", None)
    return from_record(record, state_dict, str(path), **kwargs)


class UnknownArchitectureError(CheckpointError):
    """Weights that no family of ours recognises.

    Args:
        message: What is wrong.
        state_dict: The weights.
    """

    def __init__(self, message: str, state_dict: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.state_dict = state_dict


def foreign_restorer(state_dict: dict[str, Tensor], source: str | Path) -> nn.Module | None:
    """Return a restorer of one of spandrel's architectures in evaluation mode, or None where it knows none.

    Raises:
        CheckpointError: An architecture is recognised and does not load.
    """
    if importlib.util.find_spec("spandrel") is None:
        return None
    from zoo.spandrel import foreign  # needs a second to import

    found = foreign(state_dict, source)
    return None if found is None else found.eval()


def foreign_hint() -> str:
    """Return what a message adds where more restorers would be recognised."""
    missing = importlib.util.find_spec("spandrel") is None
    return "; `pip install 'ffn-zoo[spandrel]'` adds those of spandrel" if missing else ", and those of spandrel"


def record_of_file(path: Path, kwargs: Mapping[str, Any]) -> tuple[ModelRecord, dict[str, Tensor]]:
    """Return what a weight file is of, and its weights; arguments and errors as in `load_file`."""
    architecture = kwargs.get("architecture")
    state_dict, record = read_weights(path, card_sha256(path.parent, path.name) or hub.blob_digest(path))
    if record is None and architecture is None:
        record = _beside(path, state_dict) or published_record(sha256_of(path))
    if record is None:
        record = (
            _named(architecture, state_dict, path, kwargs) if architecture else _recognised(state_dict, path, kwargs)
        )
    elif architecture not in (None, record.architecture):
        raise CheckpointError(f"{path} holds {record.architecture}, not {architecture}.")
    return record, state_dict


def from_record(record: ModelRecord, state_dict: dict[str, Tensor], source: str, **kwargs: Any) -> nn.Module:
    """Build what a record describes and load weights strictly; a new head and other channels as timm adapts them.

    Args:
        record: What the weights are of.
        state_dict: The weights, in our or the authors' naming.
        source: Name for messages.
        **kwargs: Arguments of the model, which win over the record's, and `FACTS`.

    Returns:
        The model in evaluation mode, with the record as its own.

    Raises:
        CheckpointError: The record names no model here, lacks an argument that changes the numbers, or the weights do
            not fit.
        TypeError: The model has no such argument; the message names the nearest.
    """
    if record.task in catalog.PIPELINE_TASKS:
        return _denoiser(record, state_dict, source, kwargs)
    require_architecture(record, source)
    facts = {key: kwargs.pop(key) for key in FACTS if kwargs.get(key) is not None}
    record = _complete(record, facts, kwargs, source)
    record, state_dict = _as_used(record, state_dict)
    classes = kwargs.pop("num_classes", None)
    given = {key: value for key, value in kwargs.items() if value is not None}
    arguments = {key: value for key, value in {**record.model_args, **given}.items() if key != "num_classes"}
    ours = _family(record.architecture)
    fields = record.cfg_fields()
    if ours is None:
        fields = {key: value for key, value in fields.items() if key in _PLAIN_FIELDS}
    cfg = pretrained_cfg_of({**fields, "file": source, "state_dict": state_dict})
    built: dict[str, Any] = {"num_classes": record.num_classes if classes is None else classes, **arguments}
    if task_of(record) != "classification":
        del built["num_classes"]
    if kwargs.get("features_only"):  # loaded before timm takes the network apart
        if record.changes:
            names = ", ".join(dict.fromkeys(change["technique"] for change in record.changes))
            raise CheckpointError(
                f"{source} was changed after construction ({names}), and features_only builds the unchanged network: "
                "load it whole and call its forward_intermediates."
            )
        return timm.create_model(record.architecture, True, pretrained_cfg=vars(cfg), **built).eval()
    model = build_timm(record.architecture, pretrained_cfg={**fields, "file": source}, **built)
    try:
        rebuild(model, record.changes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    load_pretrained(model, cfg, ours or _timm_filter(record.architecture, model, state_dict))
    now = described(record.architecture, fields, built)
    now = dataclasses.replace(now, task=task_of(record), base=record.base, changes=record.changes)
    if given.get("img_size") is None:  # a network built for one size may have been trained for another
        now = now.updated(input_size=(now.input_size[0], *record.input_size[1:]))
    model.pretrained_cfg.pop("file", None)
    stated = {key: fact for key in ("temperature", "threshold") if (fact := record.pretrained_cfg.get(key)) is not None}
    model.pretrained_cfg.update(stated)  # timm's own cfgs know no such fields
    attach(model, now.updated(label_names=facts["label_names"]) if "label_names" in facts else now)
    return model.eval()


def _as_used(record: ModelRecord, state_dict: dict[str, Tensor]) -> tuple[ModelRecord, dict[str, Tensor]]:
    """Return the weights without what only training has, averaged experts, adapters and guides, and such a record."""
    kept = []
    for change in record.changes:
        if change["technique"] == "ewa":
            state_dict = collapse_state_dict(state_dict)
        elif change["technique"] == "lora":
            state_dict = merge_adapters(state_dict)
        else:
            if change["technique"] == "structured":
                state_dict = drop_guides(state_dict)
            kept.append(change)
    return dataclasses.replace(record, changes=tuple(kept)), state_dict


def require_architecture(record: ModelRecord, source: str) -> None:
    """Refuse a record of a network that neither zoo nor timm has.

    Raises:
        CheckpointError: There is no such network; the message names the nearest.
    """
    if record.task not in catalog.PIPELINE_TASKS and not is_model(record.architecture):
        unknown = catalog.unknown(record.architecture, timm_names())
        raise CheckpointError(f"{source} asks for the architecture {record.architecture!r}. {unknown}")


_PLAIN_FIELDS = {entry.name for entry in dataclasses.fields(PretrainedCfg)}


def build_timm(name: str, **kwargs: Any) -> Any:
    """Call `timm.create_model`; an argument that the model does not know is named with the nearest that it does.

    Raises:
        TypeError: The model has no such argument.
    """
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        _, found, argument = str(error).partition("unexpected keyword argument ")
        architecture = split_model_name_tag(name)[0]
        module = sys.modules[model_entrypoint(architecture).__module__]
        owner = getattr(module, str(error).partition(".")[0], None)
        if found and owner is not None:
            require_known(architecture, owner, [argument.strip("'\"")])
        raise


def note_facts(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Make facts that the caller states (`FACTS`) those of a model and of its record."""
    stated = {key: value for key, value in facts.items() if value is not None}
    if stated:
        attach(model, record_of(model).updated(**stated))


def published_record(digest: str) -> ModelRecord | None:
    """Return the record of the published weight file with a SHA-256 digest; None if there is none."""
    for card in sorted(cards_dir().glob("[!.]*/README.md")):
        if digest not in card.read_text(encoding="utf-8"):
            continue
        digests = front_matter(card).get("sha256")
        if isinstance(digests, dict) and digest in digests.values() and (card.parent / "config.json").is_file():
            return read_record(card.parent)
    for family in families():
        for name, default in family.default_cfgs.items():
            for tag, cfg in default.cfgs.items():
                if getattr(cfg, "sha256", None) == digest:
                    return _of_cfg(name, dataclasses.replace(cfg, tag=tag))
    return None


def _of_cfg(architecture: str, cfg: PretrainedCfg, **arguments: Any) -> ModelRecord:
    """Return the record of weights that a cfg describes."""
    own = cfg.model_args if isinstance(cfg, ModelCfg) else {}
    return described(architecture, vars(cfg), {**own, **arguments})


def _beside(path: Path, state_dict: dict[str, Tensor]) -> ModelRecord | None:
    """Return the record in a `config.json` or a card beside a file, unless the tensors are of something else."""
    try:
        record = read_record(path.parent)
    except RecordError:
        record = None  # the config of something else
    if record is None:
        record = _carded(path)
    if record is None:
        return None
    found = _detect(state_dict)
    same = found is None or _family_name(found[1]) == _family_name(record.architecture)
    return record if same else None


def _carded(path: Path) -> ModelRecord | None:
    """Return the record of published weights whose card lies beside a file and states a digest for it."""
    if card_sha256(path.parent, path.name) is None:
        return None
    index = front_matter(path.parent / "README.md").get("model-index")
    name = index[0].get("name") if isinstance(index, list) and index and isinstance(index[0], dict) else None
    if not isinstance(name, str) or not is_model(split_model_name_tag(name)[0]):
        return None
    architecture, tag = split_model_name_tag(name)
    cfg = get_arch_pretrained_cfgs(architecture).get(name) if tag else None
    return None if cfg is None else _of_cfg(architecture, cfg)


def _detect(state_dict: dict[str, Tensor]) -> tuple[ModuleType, str, dict[str, Any]] | None:
    """Return family, registered name and constructor arguments that the tensors tell."""
    for family in families():
        found = family.detect(state_dict) if hasattr(family, "detect") else None
        if found is not None:
            return family, *found
    return None


def _recognised(state_dict: dict[str, Tensor], path: Path, kwargs: Mapping[str, Any]) -> ModelRecord:
    """Return the record of a file that only its tensors tell of.

    Raises:
        CheckpointError: They are of no known architecture, or do not tell what changes the numbers.
    """
    found = _detect(state_dict)
    if found is None:
        known = ", ".join(family.__name__.rsplit(".", 1)[-1] for family in families() if hasattr(family, "detect"))
        raise UnknownArchitectureError(
            f"{path} is of no known architecture; known families are {known}{foreign_hint()}. No record, config.json or"
            " card says what it is: say architecture=NAME and the arguments that it was built with.",
            state_dict,
        )
    family, name, arguments = found
    cfg, known_args = _published(name, arguments, path)
    told = {**arguments, **known_args}
    untold = dict(family.untold(state_dict)) if hasattr(family, "untold") else {}
    missing = {key: words for key, words in untold.items() if key not in kwargs and key not in known_args}
    default: Any = cfg or get_pretrained_cfg(name)
    facts = described(name, vars(default), told)
    if cfg is None:
        facts = dataclasses.replace(facts.of_own_weights(), base=None)
    if facts.task == "classification" and cfg is None and arguments.get("num_classes"):
        missing |= {key: "" for key in _NEEDED if kwargs.get(key) is None}
    if missing:
        raise CheckpointError(_ask(path, f"is recognised as {name}, but its tensors do not tell", missing))
    return facts


def _published(name: str, arguments: Mapping[str, Any], path: Path) -> tuple[PretrainedCfg | None, dict[str, Any]]:
    """Return the cfg of published weights that a recognised file must be of, and the arguments that only it tells.

    A file that is called as its published address is that file. One with the number of classes, of channels of
    published weights has their normalisation where all of them agree.
    """
    cfgs = [cfg for cfg in get_arch_pretrained_cfgs(name).values() if not cfg.file and cfg.tag != "untrained"]
    for cfg in cfgs:
        address = cfg.url if isinstance(cfg.url, str) else cfg.hf_hub_filename
        if address and address.rpartition("/")[2] == path.name and cfg.num_classes == arguments.get("num_classes", 0):
            return cfg, dict(cfg.model_args) if isinstance(cfg, ModelCfg) else {}
    if not cfgs:
        return None, {}
    size = arguments.get("in_chans", cfgs[0].input_size[0]), arguments.get("num_classes", 0)
    fitting = [cfg for cfg in cfgs if (cfg.input_size[0], cfg.num_classes) == size]
    kinds = {(cfg.input_size, cfg.mean, cfg.std) for cfg in fitting}
    return (fitting[0] if len(kinds) == 1 else None), {}


def _ask(path: str | Path, what: str, missing: Mapping[str, str]) -> str:
    """Return the message that asks for arguments: in Python, on the command line, or as a config beside the file."""
    words = ", ".join(key + (f" ({text})" if text else "") for key, text in missing.items())
    python = ", ".join(_NEEDED.get(key, f"{key}=...") for key in missing)
    line = " ".join(f"{key}=..." for key in missing)
    return (
        f"{path} {what} {words}: give zoo.create_model(..., {python}), on the command line --model-args {line}, or lay"
        " the model's config.json beside it."
    )


def _named(architecture: str, state_dict: dict[str, Tensor], path: Path, kwargs: Mapping[str, Any]) -> ModelRecord:
    """Return the record of a file whose architecture the caller states."""
    name, tag = split_model_name_tag(architecture)
    if not is_model(name):
        raise ValueError(catalog.unknown(architecture, timm_names()))
    cfg: Any = get_pretrained_cfg(architecture)
    record = _of_cfg(name, cfg)
    heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier or ()
    outputs = [state_dict[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state_dict]
    if not outputs or tag:
        return record
    record = dataclasses.replace(record, num_classes=outputs[0], label_names=None)
    if outputs[0] != cfg.num_classes:
        missing = {key: "" for key in _NEEDED if kwargs.get(key) is None}
        if missing:
            raise CheckpointError(_ask(path, f"has {outputs[0]} classes, and nothing tells", missing))
    return record


def _complete(record: ModelRecord, facts: Mapping[str, Any], kwargs: Mapping[str, Any], source: str) -> ModelRecord:
    """Return a record with the facts that the caller states, and those that belong to the architecture.

    Raises:
        CheckpointError: An argument or a fact that changes the numbers is not known.
    """
    missing = {name: "no plain data, so it was not recorded" for name in record.not_recorded if name not in kwargs}
    if record.task == "classification" and record.num_classes and not record.pretrained_cfg:
        missing |= {key: "" for key in _NEEDED if key not in facts}
    if missing:
        raise CheckpointError(_ask(source, "does not tell", missing))
    base = record.base if record.base and not record.pretrained_cfg else record.architecture
    cfg: Any = get_pretrained_cfg(base) or get_pretrained_cfg(record.architecture)
    if cfg is not None:
        parts = ("first_conv", "classifier", "pool_size", "fixed_input_size", "multiple_of", "value_range", "scale")
        own = {key: getattr(cfg, key, None) for key in parts if record.pretrained_cfg.get(key) is None}
        if not record.pretrained_cfg and isinstance(cfg, ModelCfg):  # what Lightning kept: name and arguments only
            record = record.updated(model_args={**cfg.model_args, **record.model_args}, task=cfg.task)
        record = record.updated(**own)
    plain = PretrainedCfg()  # what a config.json leaves out has timm's default
    record = dataclasses.replace(
        record, pretrained_cfg={**{key: getattr(plain, key) for key in _NEEDED}, **record.pretrained_cfg}
    )
    stated = {key: value for key, value in facts.items() if key != "label_names"}
    size = stated.pop("input_size", record.pretrained_cfg["input_size"])
    chans = kwargs.get("in_chans") or size[0]  # of the new first layer; `input_size` stays that of the weights
    return record.updated(input_size=(chans, *size[1:]), **stated).updated(input_size=size)


def _family(architecture: str) -> FilterFn | None:
    """Return the `checkpoint_filter_fn` of one of our architectures, None for timm's."""
    module = model_entrypoint(architecture).__module__
    if not module.startswith(("zoo.backbones.", "zoo.restoration.")):
        return None
    convert: FilterFn = sys.modules[module].checkpoint_filter_fn
    return convert


def _family_name(architecture: str) -> str:
    return model_entrypoint(architecture).__module__ if is_model(architecture) else architecture


def _timm_filter(architecture: str, model: nn.Module, state_dict: Mapping[str, Tensor]) -> FilterFn | None:
    """Return the filter of one of timm's families where keys or shapes are not those of the model."""
    own = model.state_dict()
    if own.keys() == state_dict.keys() and all(own[key].shape == value.shape for key, value in state_dict.items()):
        return None
    convert: FilterFn | None = getattr(
        sys.modules[model_entrypoint(architecture).__module__], "checkpoint_filter_fn", None
    )
    return convert


def _denoiser(record: ModelRecord, state_dict: dict[str, Tensor], source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a denoiser of ours by its class and configuration, and load weights strictly."""
    try:
        import zoo.diffusion.diffusion_policy
        import zoo.diffusion.pixel_dit
        import zoo.moe.transformers
    except ImportError as error:
        raise ImportError(
            f"Denoisers need {error.name}, which is missing: pip install 'ffn-zoo[diffusion]'."
        ) from error
    modules = (zoo.diffusion.pixel_dit, zoo.diffusion.diffusion_policy, zoo.moe.transformers)
    classes = {name: getattr(module, name) for module in modules for name in module.__all__}
    found = classes.get(record.architecture)
    if found is None:
        raise CheckpointError(
            f"{source} asks for the denoiser {record.architecture!r}; known are {', '.join(classes)}."
        )
    if kwargs:
        raise TypeError(f"{source} holds a denoiser, which takes no arguments: {', '.join(kwargs)}.")
    model: nn.Module = found.from_config(dict(record.model_args))
    load_strict(model, state_dict, source=source)
    setattr(model, KEY, record)
    return model.eval()
