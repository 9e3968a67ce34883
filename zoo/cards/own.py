"""The folder of a model that a user trained: config.json, model.safetensors, card, training config, picture.

It is laid out as a Hub repository of timm's kind, so that `zoo classify`, `export`, `bench`, `verify`, `publish` and
`timm.create_model("local-dir:FOLDER", pretrained=True)` take it. Its card says who trained the model: not us.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import is_model, model_entrypoint
from torch import nn

from zoo.cards.card import (
    CLASSIFY,
    Metric,
    check_card,
    classes_told,
    metric_results,
    metric_table,
    picture_link,
    pipeline_tag,
    scaled_logits,
)
from zoo.files import whole
from zoo.profiling import count_params
from zoo.record import CONFIG_NAME, ModelRecord, record_of, write_config
from zoo.weights import WEIGHTS_NAME, save_checkpoint

__all__ = ["is_own_folder", "write_own_model"]

_USE = {
    "classification": CLASSIFY.replace("{remark}", "").replace(
        "{model}", 'zoo.create_model("{name}")  # this folder, or its Hub id'
    ),
    "restoration": """\
import zoo

zoo.restore("photo.png", model="{name}").save("restored.png")  # this folder, or its Hub id""",
}


def write_own_model(
    folder: str | Path,
    model: nn.Module,
    record: ModelRecord | None = None,
    *,
    metrics: Sequence[Metric],
    training: str,
    config: str | Path | Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    limitations: str = "",
    picture: str | Path | None = None,
    caption: str = "",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write and check the folder of a model that the user trained, whole or not at all.

    Args:
        folder: Where to write.
        model: The trained classifier or restorer; its weights are saved as they are.
        record: What it is: label names, input size, normalisation. None takes the model's own record.
        metrics: What was measured, each with data and protocol; at least one.
        training: How it was trained, in a sentence or two.
        config: Config that repeats the training: a file, which is copied, or its content; written as `training.yaml`.
        datasets: What it was trained on, as words or Hub ids.
        license: Licence of the weights, as a Hub identifier; None states none.
        limitations: What it cannot do.
        picture: Image file for the card, for example the confusion matrix; it is copied.
        caption: What the picture shows.
        dtype: Save floating-point weights in this type; None keeps theirs.
        overwrite: Replace a folder that this function wrote; any other folder is never replaced.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists, and is not to be replaced.
        ValueError: The finished card has a problem; all are listed.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not is_own_folder(target):
            raise FileExistsError(f"{target} exists and is no folder of an own model: it is not replaced.")
        if not overwrite:
            raise FileExistsError(f"{target} exists; overwrite=True replaces it.")
    record = record if record is not None else record_of(model).of_own_weights()
    with whole(target) as work:
        work.mkdir()
        digest = save_checkpoint(model.state_dict(), work / WEIGHTS_NAME, dtype=dtype, record=record)
        write_config(work, record)
        if isinstance(config, Mapping):
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            (work / "training.yaml").write_text(text, encoding="utf-8")
        elif config is not None:
            shutil.copyfile(config, work / "training.yaml")
        if picture is not None:
            shutil.copyfile(picture, work / Path(picture).name)
        tags = ["zoo", *(["timm"] if record.task == "classification" else []), *_family(record), record.task]
        front: dict[str, Any] = {
            "license": license,
            "library_name": "ffn-zoo",
            "pipeline_tag": pipeline_tag(record.task),
            "tags": tags,
            "datasets": list(datasets) or None,
            "own_model": True,
            "task": record.task,
            "architecture": record.architecture,
            "base": record.base,
            "parameters": count_params(model),
            "sha256": {WEIGHTS_NAME: digest},
            "config": None if config is None else "training.yaml",
            "model-index": [{"name": target.name, "results": metric_results(metrics, record.task)}],
        }
        head = yaml.safe_dump(
            {key: value for key, value in front.items() if value is not None},
            sort_keys=False,
            allow_unicode=True,
            width=120,
        )
        shown = None if picture is None else picture_link(picture, caption or target.name)
        text = _text(target.name, record, front, metrics, training, limitations, shown)
        (work / "README.md").write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
        problems = check_card(work)
        if problems:
            raise ValueError(f"The card of {target.name} is not complete: {' '.join(problems)}")
    return target


def is_own_folder(folder: str | Path) -> bool:
    """Tell whether `write_own_model` wrote a folder."""
    folder = Path(folder)
    card = folder / "README.md"
    if not (folder / CONFIG_NAME).is_file() or not card.is_file():
        return False
    return "\nown_model: true\n" in card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0] + "\n"


def _family(record: ModelRecord) -> list[str]:
    if not is_model(record.architecture):
        return []
    return [model_entrypoint(record.architecture).__module__.rpartition(".")[2]]


def _text(
    name: str,
    record: ModelRecord,
    front: Mapping[str, Any],
    metrics: Sequence[Metric],
    training: str,
    limitations: str,
    shown: str | None,
) -> str:
    begun = f", trained from `{record.base}`" if record.base else ""
    what = f"classifier of {record.num_classes} classes" if record.task == "classification" else f"{record.task} model"
    labels = f" {classes_told(record.label_names)}".rstrip()
    command = (
        f"zoo classify photo.png --model {shlex.quote(name)}"
        if record.task == "classification"
        else f"zoo restore photo.png --model {shlex.quote(name)} -o restored/"
    )
    use = _USE.get(record.task, _USE["restoration"]).format(
        name=name, logits=scaled_logits(record.pretrained_cfg.get("temperature"))
    )
    if (record.input_size or (3,))[0] == 1:
        use = use.replace('("photo.png"))', '("photo.png", "L"))')
    parts = [
        f"# {name}",
        f"`{record.architecture}`{begun}: a {what}, {front['parameters']:,} parameters.{labels} It was trained by"
        " whoever publishes this page, with [ffn-zoo](https://github.com/ffn-zoo/zoo), whose authors have not seen it.",
        *([shown] if shown else []),
        f"## How it was trained\n\n{training}"
        + ("\n\nThe run is repeated by `zoo train fit --config training.yaml`." if front["config"] else ""),
        f"## Results\n\n{metric_table(metrics)}",
        f"## How to use it\n\n```\npip install ffn-zoo\n{command}\n```\n\n```python\n{use}\n```",
        *([f"## Limitations\n\n{limitations}"] if limitations else []),
    ]
    return "\n\n".join(parts) + "\n"
