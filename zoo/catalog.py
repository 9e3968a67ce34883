"""What `zoo list` and `zoo info` know without importing torch: facts about every model, in `catalog.json`.

`make catalog` writes the file (`zoo.cards.catalog_writer.write_catalog`); a test says when it is out of date.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["PATH", "PIPELINE_TASKS", "did_you_mean", "entry", "load", "nearest", "normalisation", "select", "unknown"]

PATH = Path(__file__).with_name("catalog.json")
PIPELINE_TASKS = ("generation", "policy")
"""Tasks of diffusers pipelines; the models of all other tasks are in timm's registry."""

_FARTHER = 0.15
"""Of likeness, 0 to 1: what is farther than the nearest name by this is not meant."""


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """Return name -> facts of every model: task, family, paper, params, macs, input_size, weights, ..."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def nearest(name: str, names: list[str], most: int = 3, *, cutoff: float = 0.5) -> list[str]:
    """Return the names most like `name`, nearest first, each once, and none that is much farther than the first.

    Capitals and small letters are the same.

    Args:
        name: What was asked for.
        names: What there is.
        most: So many at most.
        cutoff: Least likeness, 0 to 1.
    """
    small = {each.lower(): each for each in reversed(names)}
    found = difflib.get_close_matches(name.lower(), [*reversed(small)], most, cutoff=cutoff)
    like = [difflib.SequenceMatcher(None, each, name.lower()).ratio() for each in found]
    return [small[each] for each, ratio in zip(found, like, strict=True) if ratio > like[0] - _FARTHER]


def did_you_mean(name: str, names: Iterable[str], *, quoted: bool = False, cutoff: float = 0.5) -> str:
    """Return " Did you mean NAME?", which goes behind a sentence; nothing where no name is near."""
    near = nearest(name, list(names), 1, cutoff=cutoff)
    return f" Did you mean {repr(near[0]) if quoted else near[0]}?" if near else ""


def unknown(name: str, others: Iterable[str] = ()) -> str:
    """Return the message for a name that no model has.

    Args:
        name: What was asked for.
        others: Further names that would be right.
    """
    models = load()
    architecture, _, tag = name.partition(".")
    if tag and architecture in models:
        tags = sorted(models[architecture]["weights"])
        likely = nearest(tag, tags, 1)
        hint = f"Did you mean {architecture}.{likely[0]}? " if likely and len(tags) > 1 else ""
        have = f"It has {', '.join(f'{architecture}.{t}' for t in tags)}." if tags else "None are published for it."
        return f"{architecture!r} has no weights called {tag!r}. {hint}{have}"
    names = [*models, *(f"{model}.{tag}" for model, facts in models.items() for tag in facts["weights"]), *others]
    near: dict[str, str] = {}
    begun = [each for each in names if f"{each}_".startswith(f"{name.lower()}_") and "." not in each]
    for each in sorted(begun, key=len) or nearest(name, names, 9, cutoff=0.6):
        near.setdefault(each.partition(".")[0], each)  # a model once, not again with its weights
    hint = f"Did you mean {' or '.join([*near.values()][:3])}? " if near else ""
    return f"No model is called {name!r}. {hint}`zoo list` shows all names."


def entry(name: str) -> dict[str, Any]:
    """Return the facts of a model, by its name or by `NAME.TAG` (then with its `tag`).

    Raises:
        ValueError: There is no such model or tag; the message names the nearest.
    """
    architecture, _, tag = name.partition(".")
    facts = load().get(architecture)
    if facts is None or (tag and tag not in facts["weights"]):
        raise ValueError(unknown(name))
    return {"name": architecture, **facts, **({"tag": tag} if tag else {})}


def select(
    pattern: str = "*",
    *,
    task: str | None = None,
    max_params: float | None = None,
    license: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the models that fit all conditions, in the catalogue's order.

    Args:
        pattern: Shell-style pattern of the name or of `NAME.TAG`.
        task: Exact task; None is all.
        max_params: Upper bound of the parameter count.
        license: Licence of at least one published weight, in any case.

    Raises:
        ValueError: No model has this task.
    """
    models = load()
    tasks = sorted({facts["task"] for facts in models.values()})
    if task is not None and task not in tasks:
        raise ValueError(f"No model has the task {task!r}.{did_you_mean(task, tasks)} Tasks: {', '.join(tasks)}.")
    return {
        name: facts
        for name, facts in models.items()
        if any(fnmatch.fnmatch(full, pattern) for full in (name, *(f"{name}.{tag}" for tag in facts["weights"])))
        and (task is None or facts["task"] == task)
        and (max_params is None or facts["params"] <= max_params)
        and (license is None or any(_same(weight["license"], license) for weight in facts["weights"].values()))
    }


def normalisation(weight: dict[str, Any]) -> str:
    """Return in words how pixels in [0, 1] are normalised for a published weight; empty where that is unknown."""
    if "mean" not in weight:
        return ""
    mean, std = ({f"{value:g}" for value in weight[key]} for key in ("mean", "std"))
    if (mean, std) == ({"0"}, {"1"}):
        return "none: pixels in [0, 1]"
    parts = (f"{key} {', '.join(f'{value:.3f}' for value in weight[key])}" for key in ("mean", "std"))
    return "; ".join(parts)


def _same(license: str | None, wanted: str) -> bool:
    return license is not None and license.lower() == wanted.lower()
