"""The record of a model: what its tensors do not tell, as plain data that travels with its weights.

A record is what timm calls the `config.json` of a Hub folder (architecture, constructor arguments, classes and their
names, input size and normalisation), with a section `zoo` for what timm has no word for (task; scale, noise level and
value range of restorers; the weights it was trained from; what an FFN technique changed). It is written

- into every safetensors file: `zoo.weights.save_checkpoint(state_dict, path, record=record)`,
- into a training checkpoint: `checkpoint["zoo_record"] = record.to_config()`, loadable under `weights_only=True`,
- into a folder: `write_config(folder, record)`; `zoo.cards.write_own_model` writes the whole folder,

and read from all of them by `read_record`. After a training:

```python
record = record_of(task.model).of_own_weights("emov2_1m.cifar10")  # knows constructor arguments and classes
record = record.updated(label_names=classes, input_size=(3, 64, 64), mean=mean, std=std, crop_pct=1.0)
checkpoint[KEY] = record.to_config()
```

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.catalog import did_you_mean
from zoo.text import first_line

__all__ = [
    "CONFIG_NAME",
    "KEY",
    "ModelRecord",
    "RecordError",
    "attach",
    "described",
    "is_safetensors",
    "kept_by_lightning",
    "note_build",
    "note_merged",
    "read_config",
    "read_record",
    "record_in",
    "record_of",
    "write_config",
]

KEY = "zoo_record"
"""Where a record is kept: an entry of a training checkpoint, an attribute of a model, text in a safetensors header."""

CONFIG_NAME = "config.json"

_TIMM_FIELDS = (
    "tag",
    "custom_load",
    "input_size",
    "test_input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "label_offset",
    "label_descriptions",
    "pool_size",
    "test_pool_size",
    "first_conv",
    "classifier",
    "license",
    "description",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
)
_ZOO_FIELDS = ("scale", "multiple_of", "value_range", "sigma", "temperature", "threshold")
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture")
_PUBLISHED = ("tag", "notes", "license", "description", "temperature", "threshold")  # of these weights, of no others
_NOT_ARGUMENTS = (
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "out_indices",
    "feature_cls",
    "scriptable",
    "exportable",
    "no_jit",
    "device",
    "dtype",
)


class RecordError(ValueError):
    """A record that cannot be read, or a fact that none has."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What a model is, apart from its weights.

    Args:
        architecture: Registered name ("emov2_1m", "vit_tiny_patch16_224"), or class of a diffusers denoiser
            ("PixelDiT").
        task: "classification", "sr", "denoise", ..., "generation", "policy", "detection".
        num_classes: Number of outputs of the classifier; 0 for features and restorers.
        label_names: Names of the classes, in the order of the outputs.
        model_args: Constructor arguments that differ from the variant's own, as JSON data; `config` of a denoiser.
        pretrained_cfg: timm's facts about input and weights, in timm's words: input_size (C, H, W), mean, std,
            interpolation, crop_pct, crop_mode, first_conv, classifier, ..., license; of classifiers also temperature
            (of the probabilities) and threshold (below which no class is likely); for restorers also scale,
            multiple_of, value_range (least and largest pixel value), sigma (noise, of 255).
        base: Weights that the training started from, for example "emov2_1m.cifar10".
        changes: What was done to the layers after construction, in order, one mapping each: "technique" and its
            configuration. A loader that does not know a technique refuses the record.
        not_recorded: Constructor arguments that are no plain data (functions, classes); a loader has to be given them.
    """

    architecture: str
    task: str = "classification"
    num_classes: int = 0
    label_names: tuple[str, ...] | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    changes: tuple[Mapping[str, Any], ...] = ()
    not_recorded: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Return a fact of `pretrained_cfg` (`record.mean`, `record.input_size`); None where it is not stated."""
        if name in _TIMM_FIELDS or name in _ZOO_FIELDS:
            return self.pretrained_cfg.get(name)
        raise AttributeError(f"ModelRecord has no {name!r}")

    def updated(self, **facts: Any) -> ModelRecord:
        """Return a copy with other facts.

        Args:
            **facts: Fields of the record, or of its `pretrained_cfg` (input_size, mean, std, interpolation, crop_pct,
                license, scale, sigma, ...). None removes a fact of `pretrained_cfg`.

        Raises:
            RecordError: No record has such a fact (the message names the nearest), there is not one name a class, or
                neither one mean (std) nor one a channel.
        """
        own = {entry.name for entry in dataclasses.fields(self)}
        known = [*own, *_TIMM_FIELDS, *_ZOO_FIELDS]
        for name in facts:
            if name not in known:
                raise RecordError(
                    f"A model's record has no {name!r}.{did_you_mean(name, known, quoted=True)} "
                    f"It has: {', '.join(sorted(known))}."
                )
        fields = {name: value for name, value in facts.items() if name in own}
        cfg = {**self.pretrained_cfg, **fields.pop("pretrained_cfg", {})}
        cfg |= {name: value for name, value in facts.items() if name not in own}
        cfg = {name: _tuples(value) for name, value in cfg.items() if value is not None}
        for name in ("mean", "std"):
            if facts.get(name) is not None:
                cfg[name] = _a_channel(name, facts[name], (cfg.get("input_size") or (3,))[0])
        for name in ("label_names", "changes", "not_recorded"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        if "model_args" in fields:
            fields["model_args"] = _tuples(dict(fields["model_args"]))
        record = dataclasses.replace(self, **fields, pretrained_cfg=cfg)
        if record.label_names is not None and len(record.label_names) != record.num_classes:
            raise RecordError(f"{len(record.label_names)} label names for {record.num_classes} classes.")
        return record

    def of_own_weights(self, base: str | None = None) -> ModelRecord:
        """Return the record for weights that the user trained: without tag, licence, notes of those they began with.

        Args:
            base: What the training started from; None takes architecture and tag, if there is a tag.
        """
        tag = self.pretrained_cfg.get("tag")
        name = base or self.base or (f"{self.architecture}.{tag}" if tag else None)
        return self.updated(base=name, **dict.fromkeys(_PUBLISHED))

    def to_config(self) -> dict[str, Any]:
        """Return the record as JSON data, laid out as timm's `config.json`."""
        cfg = {key: value for key, value in self.pretrained_cfg.items() if key in _TIMM_FIELDS and value is not None}
        own: dict[str, Any] = {"task": self.task, "base": self.base}
        own |= {key: self.pretrained_cfg.get(key) for key in _ZOO_FIELDS}
        own |= {"changes": self.changes or None, "not_recorded": self.not_recorded or None}
        config = {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "label_names": self.label_names,
            "model_args": self.model_args,
            "pretrained_cfg": {**cfg, "num_classes": self.num_classes},
            "zoo": {key: value for key, value in own.items() if value is not None},
        }
        data: dict[str, Any] = _plain({key: value for key, value in config.items() if value is not None})
        return data

    @classmethod
    def from_config(cls, config: Any, source: str | Path = "The record") -> ModelRecord:
        """Read a record from `to_config`'s data, or from the `config.json` of any timm folder.

        Args:
            config: The data.
            source: Name for the message.

        Raises:
            RecordError: It names no architecture, or a part is not what it should be.
        """
        if isinstance(config, Mapping) and "architecture" not in config and "_class_name" in config:
            raise RecordError(
                f"{source} is that of one part of a diffusers pipeline, {config['_class_name']}: give the folder of "
                "the whole, which holds model_index.json."
            )
        if not isinstance(config, Mapping) or not isinstance(config.get("architecture"), str):
            raise RecordError(f"{source} is no config of a timm model: it names no architecture.")
        stated = config.get("pretrained_cfg")
        cfg = dict(config if stated is None else stated) if isinstance(stated, Mapping | None) else None
        own, args = ({} if config.get(key) is None else config[key] for key in ("zoo", "model_args"))
        if cfg is None or not isinstance(own, Mapping) or not isinstance(args, Mapping):
            raise RecordError(f"{source} is damaged: pretrained_cfg, model_args and zoo must be mappings.")
        facts = {**cfg, **own}
        labels = config.get("label_names", cfg.get("label_names"))
        if config.get("label_descriptions"):
            facts["label_descriptions"] = config["label_descriptions"]
        classes = config.get("num_classes", cfg.get("num_classes", len(labels or ())))
        if not isinstance(classes, int) or isinstance(labels, str):
            raise RecordError(f"{source} is damaged: num_classes must be a number and label_names a list.")
        return cls(
            architecture=config["architecture"],
            task=str(facts.get("task") or "classification"),
            num_classes=classes,
            label_names=tuple(map(str, labels)) if labels and len(labels) == classes else None,
            model_args=_tuples(dict(args)),
            pretrained_cfg={
                key: _tuples(facts[key]) for key in (*_TIMM_FIELDS, *_ZOO_FIELDS) if facts.get(key) is not None
            },
            base=own.get("base"),
            changes=tuple(own.get("changes") or ()),
            not_recorded=tuple(own.get("not_recorded") or ()),
        )

    def to_text(self) -> str:
        """Return the record as one line of JSON, for the header of a safetensors file."""
        return json.dumps(self.to_config(), ensure_ascii=False, separators=(",", ":"))

    def cfg_fields(self) -> dict[str, Any]:
        """Return the fields of a `PretrainedCfg`, `ModelCfg` or `RestorationCfg`, as `pretrained_cfg=` takes them."""
        fields = {**self.pretrained_cfg, "architecture": self.architecture, "num_classes": self.num_classes}
        if self.label_names is not None:
            fields["label_names"] = self.label_names
        if self.task != "classification":
            fields["task"] = self.task
        return fields


def described(architecture: str, cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> ModelRecord:
    """Return the record of a model that is being built.

    Args:
        architecture: Registered name.
        cfg: Fields of its pretrained cfg.
        arguments: Constructor arguments beyond the variant's own; what is no plain data is listed in `not_recorded`.
    """
    classes = arguments.get("num_classes", cfg.get("num_classes", 0))
    arguments = {key: value for key, value in arguments.items() if key not in _NOT_ARGUMENTS and value is not None}
    plain = {key: _plain(value) for key, value in arguments.items() if _is_plain(value)}
    size = tuple(cfg.get("input_size") or (3, 224, 224))
    if cfg.get("fixed_input_size"):  # timm then takes the image size from the cfg, whose size training may change
        plain.setdefault("img_size", list(size[-2:]))
    facts = dict(cfg)
    chans = plain.get("in_chans", size[0])
    side = plain.get("img_size", size[-2:])
    facts["input_size"] = (chans, *((side, side) if isinstance(side, int) else side))
    facts |= {key: _for_channels(facts[key], chans) for key in ("mean", "std") if facts.get(key)}
    record = ModelRecord.from_config(
        {
            "architecture": architecture,
            "num_classes": classes,
            "label_names": cfg.get("label_names"),
            "model_args": plain,
            "pretrained_cfg": facts,
        }
    )
    return dataclasses.replace(record, not_recorded=tuple(key for key in arguments if key not in plain))


def note_build(model: Any, record: ModelRecord) -> None:
    """Keep a record on a model that has just been built; its `pretrained_cfg` gets the input size it was built for.

    The rest of `pretrained_cfg` stays what it is in timm: facts of the published weights.
    """
    setattr(model, KEY, record)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        cfg.update({key: value for key, value in record.pretrained_cfg.items() if key in cfg})  # tuples for lists
        if record.label_names is None:
            cfg.pop("label_names", None)


def note_merged(model: Any) -> None:
    """Say in a model's record that it is in inference form, where its class has an argument for that."""
    record = getattr(model, KEY, None)
    if isinstance(record, ModelRecord) and "merged" in inspect.signature(type(model).__init__).parameters:
        setattr(model, KEY, dataclasses.replace(record, model_args={**record.model_args, "merged": True}))


def attach(model: Any, record: ModelRecord) -> None:
    """Make a record the model's own: `record_of` returns it, and timm's `model.pretrained_cfg` agrees with it.

    Args:
        model: A classifier or restorer, for whose weights the record was made.
        record: What it is.
    """
    setattr(model, KEY, record)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        cfg.update(record.cfg_fields())
        if record.label_names is None:
            cfg.pop("label_names", None)


def record_of(model: Any) -> ModelRecord:
    """Return the record of a model that zoo or timm built; the number of classes is the model's present one.

    Args:
        model: A classifier or restorer. Of timm's own architectures it is built with `zoo.create_model`, since those of
            `timm.create_model` have no record of their constructor arguments.

    Raises:
        RecordError: The model was built from its class, so that its architecture has no name.
    """
    record = getattr(model, KEY, None)
    if not isinstance(record, ModelRecord):
        cfg = getattr(model, "pretrained_cfg", None)
        if not isinstance(cfg, Mapping) or not cfg.get("architecture"):
            raise RecordError(
                f"{type(model).__name__} was built from its class and has no record of its architecture: build it with"
                " zoo.create_model."
            )
        record = described(cfg["architecture"], cfg, {})
    changes = getattr(model, "ffn_changes", None)  # what techniques of zoo.ffn noted
    if changes is not None:
        record = dataclasses.replace(record, changes=tuple(changes))
    classes = getattr(model, "num_classes", record.num_classes)
    if isinstance(classes, int) and classes != record.num_classes:
        record = dataclasses.replace(record, num_classes=classes, label_names=None)
    if record.label_names is not None and len(record.label_names) != record.num_classes:
        record = dataclasses.replace(record, label_names=None)
    return record


def record_in(checkpoint: Mapping[str, Any], source: str | Path = "The checkpoint") -> ModelRecord | None:
    """Return the record that a training checkpoint holds, or None.

    Raises:
        RecordError: It is damaged.
    """
    return ModelRecord.from_config(checkpoint[KEY], source) if KEY in checkpoint else None


def kept_by_lightning(checkpoint: Mapping[str, Any]) -> ModelRecord | None:
    """Return what the hyper-parameters of a checkpoint without a record tell: name, arguments, number of classes."""
    kept = checkpoint.get("hyper_parameters")
    name = kept.get("model") if isinstance(kept, Mapping) else None
    if not isinstance(kept, Mapping) or not isinstance(name, str) or not name.replace(".", "_").isidentifier():
        return None
    return ModelRecord(
        architecture=name.partition(".")[0],
        num_classes=int(kept.get("num_classes") or 0),
        model_args=_tuples(dict(kept.get("model_args") or {})),
        base=name,
    )


def read_config(path: str | Path) -> ModelRecord:
    """Read a record from a `config.json`.

    Raises:
        RecordError: It is not JSON, or no config of a timm model.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not JSON and names no architecture: {first_line(error)}") from error
    return ModelRecord.from_config(config, path)


def write_config(folder: str | Path, record: ModelRecord) -> Path:
    """Write `config.json` into a folder, as timm reads it, and return its path."""
    path = Path(folder) / CONFIG_NAME
    path.write_text(json.dumps(record.to_config(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_record(path: str | Path, *, beside: bool = True) -> ModelRecord | None:
    """Return the record that lies in or beside a weight file or folder, or None.

    Looked at, in this order: `config.json` of a folder; the header of a safetensors file; `config.json` beside a file.
    A training checkpoint holds its record inside: `zoo.weights.read_weights` returns it.

    Args:
        path: Folder, or weight file.
        beside: Look beside a file, too.

    Raises:
        RecordError: There is one, and it is damaged.
    """
    path = Path(path)
    if path.is_file() and is_safetensors(path):
        found = _header(path).get(KEY)
        if found is not None:
            try:
                return ModelRecord.from_config(json.loads(found), path)
            except json.JSONDecodeError as error:
                raise RecordError(f"The record in {path} is not JSON: {error}") from error
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config.is_file() or not (beside or path.is_dir()):
        return None
    try:
        return read_config(config)
    except RecordError:
        if path.is_dir():
            raise
        return None  # the config of something else


def is_safetensors(path: str | Path) -> bool:
    """Tell whether a file is one of safetensors: by its suffix, or its first bytes, as copies and blobs lack it."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") + 8 <= path.stat().st_size


def _header(path: Path) -> dict[str, str]:
    """Return the text entries of a safetensors file; empty where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # whoever reads the tensors says what is wrong


def _a_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    """Return what the user states of the channels as one number each; a single one holds for all, as in timm."""
    numbers = tuple(values) if isinstance(values, list | tuple) else (values,)
    fits = all(isinstance(value, int | float) and (name == "mean" or value > 0) for value in numbers)
    if len(numbers) not in (1, channels) or not fits:
        kind = "numbers above 0" if name == "std" else "numbers"
        raise RecordError(f"{name} must be {channels} {kind}, one a channel, or one for all; got {values!r}.")
    return tuple(map(float, numbers)) if len(numbers) == channels else tuple(map(float, numbers)) * channels


def _for_channels(values: Iterable[float], channels: int) -> tuple[float, ...]:
    """Return means or deviations for another number of channels, as timm makes its weights: summed or repeated."""
    known = tuple(values)
    if channels == len(known):
        return known
    if channels == 1:
        return (round(sum(known) / len(known), 6),)
    return tuple(known[index % len(known)] for index in range(channels))


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any) -> Any:
    """Return data with lists for tuples, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value


def _tuples(value: Any) -> Any:
    """Return data with tuples for lists, as constructors and timm's cfgs have them."""
    if isinstance(value, Mapping):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value
