"""What commands that take a model share: what its name stands for, said before torch is imported, and its arguments."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from zoo import catalog
from zoo.cli.output import UsageError
from zoo.sources import Source, find, weight_file

__all__ = ["add_model_args", "find_model", "key_values", "model_args"]


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Add --model-args."""
    parser.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the model, and facts that its file does not tell: window_size=7,7,4,2 input_size=3,64,64",
    )


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """Read --model-args: numbers, truth values, text, and tuples of them with commas.

    Raises:
        UsageError: One is not KEY=VALUE.
    """
    return key_values(args.model_args, "--model-args", "window_size=7,7,4,2")


def key_values(given: Sequence[str], option: str, example: str) -> dict[str, Any]:
    """Read KEY=VALUE: numbers, truth values, text, and tuples of them with commas.

    Args:
        given: As the user wrote them.
        option: They stand behind, for the message.
        example: A right one, for the message.

    Raises:
        UsageError: One is not KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"{option} takes KEY=VALUE, for example {example}; got {text!r}.")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return tuple(_value(part) for part in text.split(",")) if "," in text else text


def find_model(name: str, *, task: str | None = None, weights: bool = True) -> Source:
    """Tell what a name stands for, and refuse what is known to be wrong, before any work.

    Args:
        name: What the user wrote.
        task: What the model has to do, for example "classification"; None is anything.
        weights: It has to have weights.

    Raises:
        UsageError: It is for something else, or has no published weights.
        ValueError: There is no such model or file; the message names the nearest.
    """
    source = find(name)
    if source.kind == "folder" and source.path is not None:
        weight_file(source.path)
    known = source.task or ("generation" if source.kind == "pipeline" else None)
    if task is not None and known not in (None, task):
        does = "cannot classify" if task == "classification" else f"is not for {task}"
        raise UsageError(f"{name} is a model for {known}: it {does}.")
    facts = catalog.load().get(source.architecture or "") if source.kind == "model" else None
    if weights and facts is not None:
        if not facts["weights"]:
            raise UsageError(f"No weights are published for {name}.")
        if source.tag and source.tag not in facts["weights"]:
            have = ", ".join(f"{source.architecture}.{tag}" for tag in facts["weights"])
            raise UsageError(f"No weights are published for {name}; there are {have}.")
    return source
