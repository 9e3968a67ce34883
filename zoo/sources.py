"""What the user names: a model, published weights, a file, a folder, a Hub id; told apart without importing torch.

`find` is the one place that decides what a text means. What can be known without loading is known here: whether there
is such a thing, what it is for, and the nearest right name if there is none. `zoo.factory.create_model` loads it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zoo import catalog
from zoo.record import CONFIG_NAME, ModelRecord, RecordError, read_record

__all__ = [
    "PIPELINE_INDEX",
    "WEIGHT_FILES",
    "WEIGHT_SUFFIXES",
    "CheckpointError",
    "Source",
    "beside",
    "card_metrics",
    "card_sha256",
    "cards_dir",
    "configs_dir",
    "describe",
    "find",
    "front_matter",
    "metrics_of",
    "no_shipped_file",
    "no_shipped_weights",
    "timm_names",
    "weight_file",
]

_WEIGHTS_PACKAGE = "ffn_zoo_weights"
PIPELINE_INDEX = "model_index.json"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".tar")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""How the weights in a folder with a `config.json` are called; the first that is there is taken."""

_UNPUBLISHED = ("untrained", "in1k", "df2k")
"""Tags of cfgs of ours whose weights are not at an address; the catalogue lists published weights only."""

_TIMM_NAME = re.compile(
    r"^@register_model\s+def (?P<model>\w+)\("
    r"|^ +['\"](?P<name>\w+)(?:\.(?P<tag>\w+)\*?['\"] *:|['\"] *: *['\"](?P<new>\w+)(?:\.\w+)?['\"])",
    re.MULTILINE,
)

_DESCRIBED = ("mean", "std", "interpolation", "crop_pct", "scale", "sigma", "license")

Kind = Literal["model", "pipeline", "folder", "file", "hub"]


class CheckpointError(ValueError):
    """A weight file or folder that cannot be read, is not what it should be, or does not fit the model."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a name stands for.

    Args:
        name: As the user gave it.
        kind: "model": a registered name of ours or timm's; "pipeline": published denoiser, or a folder of diffusers;
            "folder": with config.json; "file": of weights; "hub": a Hub id.
        architecture: Registered name, where it is known without loading.
        tag: Which published weights; "" for none.
        task: "classification", "sr", ...; None where only loading tells.
        path: The file or folder.
        repo_id: "org/name" or "org/name@revision".
        record: What the folder or file says of itself.
    """

    name: str
    kind: Kind
    architecture: str | None = None
    tag: str = ""
    task: str | None = None
    path: Path | None = None
    repo_id: str | None = None
    record: ModelRecord | None = None


def find(name: str) -> Source:
    """Tell what a name stands for.

    Registered names win over folders that are called the same; "./NAME" is the folder.

    Args:
        name: Registered name, `NAME.TAG`, weight file, folder, Hub id, "hf-hub:ID", "local-dir:FOLDER".

    Raises:
        CheckpointError: A file or folder does not exist, or holds no model.
        ValueError: No model is called that; the message names the nearest.
    """
    scheme, colon, target = name.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub"):
        return Source(name=name, kind="hub", repo_id=target)
    if colon and scheme == "local-dir":
        return _folder(name, Path(target))
    path = Path(name).expanduser()
    if path.suffix in WEIGHT_SUFFIXES and not path.is_dir():
        return _file(name, path)
    registered = _registered(name)
    if registered is not None:
        return registered
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        return _file(name, path)
    if "/" in name or "\\" in name:
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not name.startswith(".") and not path.parent.is_dir():
            return Source(name=name, kind="hub", repo_id=name)
        raise CheckpointError(f"There is no file or folder {name}.{beside(path)}")
    raise ValueError(catalog.unknown(name, timm_names()))


def weight_file(folder: Path) -> Path:
    """Return the weight file of a folder with a `config.json`.

    Raises:
        CheckpointError: There is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weight file; it should be called {WEIGHT_FILES[0]}.")


def cards_dir() -> Path:
    """Return the folder of the model cards and shipped weights, which need not exist.

    In a checkout it is beside the package; else it is the distribution `ffn-zoo-weights`, where that is installed.
    """
    beside = Path(__file__).resolve().parents[1] / "model_cards"
    found = None if beside.is_dir() else importlib.util.find_spec(_WEIGHTS_PACKAGE)
    return beside if found is None else Path(next(iter(found.submodule_search_locations or ())))


def no_shipped_file(path: Path) -> str | None:
    """Return what to do where a shipped file is missing because shipped weights are not installed; None otherwise."""
    root = cards_dir()
    if root.is_dir() or not path.is_relative_to(root):
        return None
    return f"{path.relative_to(root).parts[0]} is in a distribution of its own: pip install ffn-zoo-weights."


def no_shipped_weights() -> str | None:
    """Return what to do where no shipped weights are installed; None where they are."""
    return (
        None
        if cards_dir().is_dir()
        else "Shipped weights are a distribution of their own: pip install ffn-zoo-weights."
    )


def configs_dir() -> Path:
    """Return the folder of the configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def front_matter(card: str | Path) -> dict[str, Any]:
    """Return the YAML front matter of a model card.

    Raises:
        ValueError: There is none, or it is no YAML mapping.
    """
    import yaml  # lists and help do without

    head, fence, rest = Path(card).read_text(encoding="utf-8").partition("---\n")
    block, closing, _ = rest.partition("\n---")
    if head or not fence or not closing:
        raise ValueError(f"{card} does not begin with front matter between two lines of '---'.")
    try:
        front = yaml.load(block, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # nine times as fast in C
    except yaml.YAMLError as error:
        raise ValueError(f"The front matter of {card} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(front, dict):
        raise ValueError(f"The front matter of {card} is not a mapping.")
    return front


def card_sha256(folder: Path, filename: str = WEIGHT_FILES[0]) -> str | None:
    """Return the digest that the card in `folder` states for `filename`, or None without card or entry."""
    card = folder / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").startswith("---\n"):
        return None
    digests = front_matter(card).get("sha256")
    return digests.get(filename) if isinstance(digests, dict) else None


def card_metrics(front: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of a card's front matter (the Hub's `model-index`): name, value, unit, dataset, protocol.

    Entries without a protocol get an empty one.
    """
    found = []
    for model in front.get("model-index") or ():
        for result in model.get("results") or ():
            for metric in result.get("metrics") or ():
                args = metric.get("args") or {}
                found.append(
                    {
                        "name": str(metric.get("name", metric.get("type"))),
                        "value": metric.get("value"),
                        "unit": args.get("unit", ""),
                        "dataset": str((result.get("dataset") or {}).get("name", "")),
                        "protocol": str(args.get("protocol", "")),
                    }
                )
    return found


def metrics_of(source: Source) -> list[dict[str, Any]]:
    """Return the metrics of published weights, or of the card in a folder."""
    if source.kind in ("model", "pipeline") and source.path is None:
        facts = catalog.load().get(source.architecture or "", {})
        found: list[dict[str, Any]] = facts.get("weights", {}).get(source.tag, {}).get("metrics", [])
        return found
    return card_metrics(_card_of(source))


def task_of(record: ModelRecord) -> str:
    """Return a record's task; where it states none, as a plain timm folder does, that of the architecture."""
    if record.task != "classification":
        return record.task
    return str(catalog.load().get(record.architecture, {}).get("task", record.task))


def describe(source: Source, record: ModelRecord | None = None) -> dict[str, Any]:
    """Return what a user's file or folder says of itself: its record, and its card.

    Args:
        source: A folder, or a file.
        record: What the file holds, where `source` does not know yet.

    Raises:
        CheckpointError: There is no record.
    """
    record = record or source.record
    if record is None:
        raise CheckpointError(f"{source.name} holds no record of what it is.")
    front = _card_of(source)
    facts = catalog.load().get(record.architecture, {})
    size = record.input_size
    known = {
        "name": source.name,
        "task": task_of(record),
        "architecture": record.architecture,
        "family": facts.get("family"),
        "summary": facts.get("summary"),
        "base": record.base,
        "num_classes": record.num_classes,
        "label_names": record.label_names,
        "model_args": dict(record.model_args),
        "input_size": None if size is None else list(size),
        **{key: getattr(record, key) for key in _DESCRIBED},
        "changes": [str(change.get("technique")) for change in record.changes] or None,
        "params": front.get("parameters"),
        "datasets": front.get("datasets"),
        "metrics": card_metrics(front),
        "config": front.get("config"),
    }
    return {key: value for key, value in known.items() if value is not None}


def _card_of(source: Source) -> dict[str, Any]:
    """Return the front matter of the card in a folder; empty without one."""
    card = source.path / "README.md" if source.path is not None and source.path.is_dir() else None
    if card is None or not card.is_file():
        return {}
    try:
        return front_matter(card)
    except ValueError:
        return {}


def _file(name: str, path: Path) -> Source:
    if not path.is_file():
        raise CheckpointError(f"No weight file at {path}.{beside(path)}")
    try:
        record = read_record(path, beside=False)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    known = dict(architecture=record.architecture, task=task_of(record)) if record else {}
    return Source(name=name, kind="file", path=path, record=record, **known)


def _folder(name: str, folder: Path) -> Source:
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.{beside(folder)}")
    if (folder / PIPELINE_INDEX).is_file():
        return Source(name=name, kind="pipeline", path=folder)
    if not (folder / CONFIG_NAME).is_file():
        files = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
        held = f" It holds {', '.join(files[:4])}: name one of these files." if files else ""
        raise CheckpointError(f"{folder} holds neither config.json (timm) nor model_index.json (diffusers).{held}")
    try:
        record = read_record(folder)
    except RecordError as error:
        raise CheckpointError(str(error)) from error
    assert record is not None  # there is a config.json
    return Source(
        name=name, kind="folder", path=folder, record=record, architecture=record.architecture, task=task_of(record)
    )


def _registered(name: str) -> Source | None:
    """Return a model of ours or timm's, None for any other name.

    Raises:
        ValueError: The model has no such tag.
    """
    architecture, _, tag = name.partition(".")
    facts = catalog.load().get(architecture)
    if facts is not None:
        pipeline = facts["task"] in catalog.PIPELINE_TASKS
        if tag and tag not in facts["weights"] and (pipeline or tag not in _UNPUBLISHED):
            raise ValueError(catalog.unknown(name))
        kind: Kind = "pipeline" if pipeline else "model"
        return Source(name=name, kind=kind, architecture=architecture, tag=tag, task=facts["task"])
    tags = timm_names().get(architecture)
    if tags is None:
        return None
    if tag and tags and tag not in tags:  # where timm makes the tags by a program, timm itself says what is wrong
        near = catalog.nearest(tag, list(tags), 1)
        hint = f"Did you mean {architecture}.{near[0]}? There are" if near and len(tags) > 1 else "There are"
        raise ValueError(f"timm's {architecture!r} has no weights called {tag!r}. {hint}: {', '.join(tags)}.")
    return Source(name=name, kind="model", architecture=architecture, tag=tag, task="classification")


@functools.cache
def timm_names() -> dict[str, tuple[str, ...]]:
    """Return timm's models and their tags, read from its sources: importing timm would import torch."""
    spec = importlib.util.find_spec("timm")
    found: dict[str, list[str]] = {}
    renamed: dict[str, str] = {}
    for location in spec.submodule_search_locations or () if spec else ():
        for file in sorted((Path(location) / "models").glob("*.py")):
            text = file.read_text(encoding="utf-8")
            for match in _TIMM_NAME.finditer(text):  # models, tags, and old names that timm still takes
                if match["new"]:
                    renamed[match["name"]] = match["new"]
                    continue
                tags = found.setdefault(match["model"] or match["name"], [])
                if match["tag"]:
                    tags.append(match["tag"])
    for old, new in renamed.items():  # settings look like old names
        if new in found:
            found.setdefault(old, [])
    return {name: tuple(tags) for name, tags in found.items()}


def beside(path: Path) -> str:
    """Return which file or folder may have been meant where there is none, or a file is no folder, to end a message."""
    if os.path.islink(path):
        return f" It is a link to {os.readlink(path)}."
    if os.path.isfile(path):
        return f" It is a file: give its folder, {path.parent}."
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return f" There is no folder {path.parent}." if path.parent != Path() else ""
    near = catalog.nearest(path.name, names, 1, cutoff=0.6)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
