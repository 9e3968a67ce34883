"""Settings that `zoo tune-cache` found, in files that `zoo.enable_cache(pipe, "auto")` looks for."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from torch import Tensor, nn

from zoo.caching.registry import place
from zoo.caching.schedules import BACSchedule, keyed_name
from zoo.caching.step_schedules import StepSchedule
from zoo.files import cache_dir, whole
from zoo.weights import cards_dir

__all__ = ["SavedSetting", "default_guidance", "find_setting", "fingerprint", "folder_for"]

LEAST_STEPS = 8
"""Of a run that a setting is looked for: in fewer there is next to nothing to skip."""
_VERSION = 1
_KIND = "cache"


def fingerprint(model: nn.Module) -> str:
    """Return eight digits that differ between models of one class built with other arguments."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


def default_guidance(pipe: Any) -> float | None:
    """Return the guidance scale that a pipeline takes where none is given, None where it has none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return parameter.default if parameter and isinstance(parameter.default, int | float) else None


@dataclass(frozen=True, kw_only=True)
class SavedSetting:
    """A cache for one model, scheduler, number of steps and guidance scale.

    Args:
        model: Class of the denoiser.
        fingerprint: Of its configuration.
        scheduler: Class of the scheduler.
        num_steps: Steps of the scheduler.
        guidance: Guidance scale; None where the pipeline has none.
        name: Method and setting, for people.
        config: As `zoo.enable_cache` takes it; a `BACConfig` with its schedule.
        measured: What was found, for people: times as fast, PSNR, conditions.
    """

    model: str
    fingerprint: str
    scheduler: str
    num_steps: int
    guidance: float | None
    name: str
    config: Any
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def filename(self) -> str:
        """Name of its file: it says model, scheduler, steps and guidance."""
        return keyed_name(_KIND, f"{self.model}-{self.fingerprint}", self.scheduler, self.num_steps, self.guidance)

    def save(self, folder: str | Path) -> Path:
        """Write JSON, whole or not at all, in place of a file of the same key.

        Args:
            folder: Made where it is missing.

        Returns:
            The file.

        Raises:
            ValueError: The configuration holds what JSON cannot, a function for instance.
        """
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        text = json.dumps({"version": _VERSION, **values, "config": _to_values(self.config)}, indent=1) + "\n"
        target = Path(folder) / self.filename
        with whole(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return target

    @classmethod
    def load(cls, file: str | Path) -> SavedSetting:
        """Read what `save` wrote.

        Raises:
            ValueError: It is no such file.
        """
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            if values.pop("version") != _VERSION:
                raise ValueError("of another version")
            return cls(**{**values, "config": _from_values(values["config"], str(file))})
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} is no saved setting of a cache: {error}") from error


def _to_values(config: Any) -> dict[str, Any]:
    """Return plain data of a configuration: its class and those fields that are not None."""
    fields = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if isinstance(value, torch.dtype):
            value = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, BACSchedule | StepSchedule):
            value = {"schedule": value.to_values()}
        elif isinstance(value, Tensor):
            value = value.tolist()
        elif not isinstance(value, bool | int | float | str | list | tuple | None):
            raise ValueError(f"{type(config).__name__}: {one.name}={value!r} cannot be saved.")
        if value is not None:
            fields[one.name] = value
    return {"class": type(config).__name__, "fields": fields}


def _from_values(values: dict[str, Any], name: str) -> Any:
    classes = {cls.__name__: cls for cls in place.registry}
    if values["class"] not in classes:
        raise ValueError(f"it asks for {values['class']}, which is unknown")
    fields = dict(values["fields"])
    for key, value in fields.items():
        if isinstance(value, dict) and "dtype" in value:
            fields[key] = getattr(torch, value["dtype"])
        elif isinstance(value, dict):
            kind: Any = StepSchedule if "forecasts" in value["schedule"] else BACSchedule
            fields[key] = kind.from_values(value["schedule"], name)
    return classes[values["class"]](**fields)


def _source(pipe_or_model: DiffusionPipeline | nn.Module) -> str:
    """Return the folder or Hub id that it was loaded from; empty if it was not."""
    return str(dict(getattr(pipe_or_model, "config", {})).get("_name_or_path") or "")


def _own_folder(pipe_or_model: DiffusionPipeline | nn.Module) -> Path | None:
    """Return the folder that it was loaded from, of a denoiser that of its pipeline."""
    folder = Path(source) if (source := _source(pipe_or_model)) else None
    if folder is None or not folder.is_dir():
        return None
    return folder.parent if (folder.parent / "model_index.json").is_file() else folder


def folder_for(pipe_or_model: DiffusionPipeline | nn.Module) -> Path:
    """Return where a setting is to be saved: beside the model, or in the user's folder.

    It is the latter where the model was not loaded from a folder, where that cannot be written to, or where it belongs
    to this package or to the Hub client's cache.
    """
    folder = _own_folder(pipe_or_model)
    if folder is None or not os.access(folder, os.W_OK):
        return cache_dir()
    foreign = (cards_dir(), Path(constants.HF_HUB_CACHE))
    return cache_dir() if any(folder.resolve().is_relative_to(each.resolve()) for each in foreign) else folder


def _candidates(pipe_or_model: DiffusionPipeline | nn.Module, model: nn.Module) -> Iterator[SavedSetting]:
    """Yield all settings for a model, of one file name only that in the user's folder."""
    seen: set[str] = set()
    for folder in (cache_dir(), _own_folder(pipe_or_model)):
        if folder is None:
            continue
        for file in sorted(folder.glob(f"{_KIND}_{type(model).__name__}-{fingerprint(model)}_*.json")):
            if file.name not in seen:
                seen.add(file.name)
                yield SavedSetting.load(file)


def find_setting(
    pipe_or_model: DiffusionPipeline | nn.Module,
    model: nn.Module,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> SavedSetting:
    """Return the setting that was saved for a model, its pipeline's scheduler, steps and guidance.

    Args:
        pipe_or_model: A pipeline, whose scheduler has to be that of the setting, or a denoiser.
        model: The denoiser.
        steps: Steps of the scheduler; None takes any, where only one number of them was tuned for.
        guidance: Guidance scale; None likewise.

    Raises:
        ValueError: None is saved, or several fit; the message says what to do.
    """
    scheduler = getattr(pipe_or_model, "scheduler", None)
    wanted = {
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "num_steps": steps,
        "guidance": guidance,
    }
    wanted = {key: value for key, value in wanted.items() if value is not None}
    saved = list(_candidates(pipe_or_model, model))
    fitting = [each for each in saved if all(getattr(each, key) == value for key, value in wanted.items())]
    if len(fitting) == 1:
        return fitting[0]
    there = "; ".join(f"{each.scheduler}, steps={each.num_steps}, guidance={each.guidance}" for each in saved)
    name = type(model).__name__
    if fitting:
        raise ValueError(f"Several cache settings are saved for {name}: say which by steps= and guidance=: {there}.")
    given = "".join(f" {key} {value}" for key, value in wanted.items())
    source = _source(pipe_or_model)
    pipeline = Path(source).name if source and Path(source).parent == cards_dir() else source or "PIPELINE"
    tune = f"`zoo tune-cache {pipeline}{'' if steps is None else f' --steps {steps}'} --budget 'psnr>=30'`"
    few = f"With {steps} steps there is next to nothing to skip: a cache needs {LEAST_STEPS} or more"
    raise ValueError(
        f"No cache setting is saved for {name}{',' if given else ''}{given} (saved: {there or 'none'}). "
        f"{few if steps is not None and steps < LEAST_STEPS else f'Find one: {tune}'}."
    )
