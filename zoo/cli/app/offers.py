"""Which models the page offers: those whose weights are shipped, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo import catalog
from zoo.cli.classify import default_model
from zoo.cli.models import find_model
from zoo.cli.output import UsageError
from zoo.cli.restoring import TASKS
from zoo.sources import Source

__all__ = ["Offers"]


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Names of models, as every command takes them, the user's own first.

    Args:
        classifiers: They name what is in a picture.
        restorers: They restore pictures.
        pipelines: They generate.
        tasks: Tasks of `zoo restore` for which weights are shipped.
        own: Those of all that the user gave.
    """

    classifiers: tuple[str, ...]
    restorers: tuple[str, ...]
    pipelines: tuple[str, ...]
    tasks: tuple[str, ...]
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: Sequence[str] = ()) -> Offers:
        """Return the shipped models and some of the user's.

        Raises:
            UsageError: One of them neither classifies, restores nor generates, or has no weights.
            ValueError: There is no such model or file; the message names the nearest.
        """
        groups: dict[str, list[str]] = {"classifiers": [], "restorers": [], "pipelines": []}
        for name in dict.fromkeys(own):
            groups[_group(name)].append(name)
        tasks = []
        for architecture, facts in catalog.load().items():
            for tag, weight in facts["weights"].items():
                if weight["source"] != "shipped":
                    continue
                group = _GROUPS.get(facts["task"])
                if group is not None:
                    groups[group].append(f"{architecture}.{tag}")
                    tasks.append(facts["task"])
        usual = default_model() if groups["classifiers"] else ""  # which `zoo classify` takes: it knows photographs
        return cls(
            classifiers=tuple(sorted(groups["classifiers"], key=lambda name: (name not in own, name != usual))),
            restorers=tuple(groups["restorers"]),
            pipelines=tuple(groups["pipelines"]),
            tasks=tuple(task for task in TASKS if task in tasks),
            own=tuple(dict.fromkeys(own)),
        )


_GROUPS = {"classification": "classifiers", "generation": "pipelines"} | dict.fromkeys(TASKS, "restorers")


def _group(name: str) -> str:
    """Return where a model of the user's belongs."""
    source = find_model(name)
    if source.kind == "pipeline" and (source.path is not None or source.task == "generation"):
        return "pipelines"
    task = source.task or _task(source)
    if task not in _GROUPS:
        raise UsageError(f"{name} is for {task or 'nothing known'}: the page classifies, restores and generates.")
    return _GROUPS[task]


def _task(source: Source) -> str | None:
    """Return what a file or folder that does not say it is for, as its architecture tells."""
    if source.architecture in catalog.load():
        return str(catalog.load()[source.architecture]["task"])
    if source.kind == "hub" and source.repo_id is not None:
        from zoo import hub
        from zoo.sources import PIPELINE_INDEX

        try:
            hub.download(source.repo_id, PIPELINE_INDEX)
            return "generation"
        except hub.HubFileMissingError:
            pass
    from zoo.factory import create_model

    return "sr" if hasattr(create_model(source.name, pretrained=True), "scale") else "classification"
