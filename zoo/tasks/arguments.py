"""What is wrong with a training's config, in one line: the option, what it takes, and the nearest right name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from zoo.catalog import did_you_mean

__all__ = ["COMMANDS", "explained", "refuse_nulls"]

_TORCH = {"optimizer": "AdamW", "lr_scheduler": "CosineAnnealingLR"}
COMMANDS = ("fit", "validate", "test")
_SECTIONS = ("config", "model", "data", "trainer", "ckpt_path", "seed_everything", "weights_only")


def explained(message: str) -> str:
    """Return what jsonargparse says, which takes ten lines, in one.

    Args:
        message: Of its error.
    """
    if choice := re.search(r"subcommand: invalid choice: '([^']+)'", message):
        asked = choice[1]
        done = "" if asked != "predict" else " Trained models predict by zoo classify, restore and generate."
        return f"A training takes fit, validate or test, got {asked!r}.{did_you_mean(asked, COMMANDS)}{done}"
    path = _path(message)
    name = path.partition(".")[0]
    if (example := _TORCH.get(name)) and "NestedArg(key=" in message:  # no class was given before
        return (
            f"--{name} takes a class of torch first: --{name} {example}. The tasks of this zoo have settings of their "
            "own instead: --model.init_args.optim.lr, .opt, .sched and others."
        )
    unknown = re.search(r"unrecognized arguments: (?:--)?([^\s=]+)|[Oo]ption '([^']+)' is not accepted", message)
    unknown = unknown or re.search(r"does not accept option '([^']+)'()", message)
    if unknown:
        group = re.search(r"Group '([^']+)'", message)
        name = unknown[1] or unknown[2]
        return _unknown(path, f"{group[1]}.{name}" if group else name, _class(message))
    if 'expected "subcommand"' in message or "arguments are required" in message:
        example = "zoo train fit --config classification/repavit_tiny_cifar10 --data.init_args.data_dir DIR"
        return f"A training takes fit, validate or test, and a config: {example}"
    given = re.search(r"Got value: (.*)|Given value: (.*)", message)
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        classes = [name for name in getattr(importlib.import_module(absent[1]), "__all__", ()) if name[0].isupper()]
        near = did_you_mean(absent[2], classes)
        return f"{path.removesuffix('.init_args')}.class_path: {absent[1]} has no {absent[2]}.{near}"
    if missing := re.search(r"Expected a dot import path string: (\S+)|No module named '([^']+)'", message):
        told = f"takes a class with its module, such as zoo.{_EXAMPLES.get(path, 'tasks.callbacks.ExactResume')}"
        return f"{path} {told}; got {missing[1] or missing[2]!r}."
    if path and given:
        value = given[1] or given[2]
        inner = message.split("Problem with given class_path")[-1]
        takes, names = _expected(inner)
        if takes:
            return f"{path} takes {' or '.join(takes)}, got {value!r}.{did_you_mean(value, names)}"
    lines = (line.strip(" -") for line in message.splitlines())
    return " ".join(line for line in lines if line and not line.startswith(("Given value", "Subtypes:")))


_EXAMPLES = {"model": "tasks.classification.Classification", "data": "data.images.ImageClassification"}


def _path(message: str) -> str:
    """Return the option as it is typed: data.init_args.batch_size."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if keys and _class(message):
        keys.insert(1, "init_args")
    return ".".join(keys)


def _class(message: str) -> str:
    found = re.search(r"class_path '([^']+)'", message)
    return found[1] if found else ""


def _unknown(path: str, name: str, class_path: str) -> str:
    """Say that there is no such option, and which is near."""
    parents, _, last = name.rpartition(".")
    if class_path:
        owner = _import(class_path)
        for parent in filter(None, parents.split(".")):
            owner = _nested(owner, parent)
        options = _options(owner)
    elif parents == "trainer":
        options = _options(_import("lightning.pytorch.Trainer"))
    else:
        first = name.partition(".")[0]
        return f"There is no option {first!r}.{did_you_mean(first, _SECTIONS)}"
    where = ".".join(part for part in (path, parents) if part)
    return f"{where} has no option {last!r}.{did_you_mean(last, options)}"


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _options(owner: Any) -> list[str]:
    return [] if owner is None else [name for name in inspect.signature(owner).parameters if name != "self"]


def _nested(owner: Any, name: str) -> Any:
    """Return the dataclass that an argument takes, where its default is one."""
    parameter = inspect.signature(owner).parameters.get(name) if owner is not None else None
    default = None if parameter is None else parameter.default
    return type(default) if dataclasses.is_dataclass(default) else None


def _expected(message: str) -> tuple[list[str], list[str]]:
    """Return what would be taken, in words, and the names among it."""
    words: list[str] = []
    names: list[str] = []
    for found in re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.M):
        if literal := re.match(r"typing\.Literal\[(.*)\]", found):
            names += [part.strip(" '") for part in literal[1].split(",")]
        elif plain := re.match(r"<class '([\w.]+)'>", found):
            words += [] if plain[1] == "NoneType" else [plain[1].rpartition(".")[2]]
        else:
            words.append(found)
    listed = [", ".join(dict.fromkeys(names))] if names else []
    return [*listed, *dict.fromkeys(words)], names


def refuse_nulls(config: Mapping[str, Any]) -> None:
    """Refuse null for an argument that takes none: jsonargparse lets it pass for all.

    Args:
        config: Of one subcommand, with `model` and `data` as class_path and init_args.

    Raises:
        ValueError: The message names the option.
    """
    for section in ("model", "data"):
        chosen = config.get(section)
        if not chosen or not chosen.get("class_path"):
            continue
        parameters = inspect.signature(_import(chosen["class_path"])).parameters
        for name, value in vars(chosen.get("init_args") or Namespace()).items():
            stated = str(parameters[name].annotation) if name in parameters else "Any"
            if value is None and not re.search(r"None|Any|Optional|_empty", stated):
                raise ValueError(f"{section}.init_args.{name} takes {stated.replace(' | ', ' or ')}, got null.")
