"""Model cards: a folder for each published weight, laid out as its Hub repository, written and checked here.

`model_cards/NAME.TAG/` holds README.md (front matter for the Hub and for us, then text), the weights, their config and
at least one picture. After a training run, one call makes the folder:

```python
from zoo.profiling import count_params
from zoo.cards.card import Metric, make_card

make_card(
    "repavit_tiny.cifar10",
    "runs/repavit_tiny_cifar10/checkpoints/last.ckpt",  # or a state dict; for a denoiser, a folder of save_pretrained
    metrics=[Metric(name="Top-1 accuracy", value=93.1, unit="%", dataset="CIFAR-10 test", protocol="10 000 images")],
    config="configs/classification/repavit_tiny_cifar10.yaml",
    datasets=["uoft-cs/cifar10"],
    training="24 epochs, batch 128, bf16, on 2 CPU cores.",
    core_hours=10.3,
    data="CIFAR-10 comes without a licence and is used for research.",
    commands=["zoo bench repavit_tiny.cifar10 --data DIR --samples 10000"],
    limitations="Knows ten classes of 32x32 pictures ...",
    parity="Layers agree with the authors' code to 3e-15 (relative, float64).",
    picture="samples.png",
    dtype=torch.float16,
)
```
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from timm.models import get_pretrained_cfg, is_model, model_entrypoint, split_model_name_tag
from torch import Tensor

from zoo.cfg import RestorationCfg
from zoo.factory import create_model, create_pipeline, families
from zoo.files import whole
from zoo.profiling import count_params
from zoo.record import record_of, write_config
from zoo.sources import card_metrics, configs_dir
from zoo.text import first_line
from zoo.weights import (
    WEIGHTS_NAME,
    CheckpointError,
    cards_dir,
    front_matter,
    load_strict,
    read_checkpoint,
    save_checkpoint,
    sha256_of,
)

__all__ = ["Metric", "card_facts", "check_card", "denoiser_cards", "make_card", "published"]

_PIPELINE_TAGS = {
    "classification": "image-classification",
    "generation": "unconditional-image-generation",
    "policy": "robotics",
}
_OWN_SECTIONS = ("How it was trained", "Results", "How to use it")  # what the card of a user's own model has to have
_SECTIONS = (*_OWN_SECTIONS, "Data", "Limitations", "Parity")
_WATTS = 15  # of one busy core of a server processor with its share of memory: an estimate


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number of a published weight.

    Args:
        name: What was measured, for example "Top-1 accuracy" or "PSNR (Y)".
        value: The number.
        unit: Its unit, for example "%" or "dB".
        dataset: What it was measured on, for example "CIFAR-10 test".
        protocol: How, so that somebody else gets the same number: images, size, crop, colour space, seeds.
    """

    name: str
    value: float
    unit: str = ""
    dataset: str
    protocol: str


def published() -> list[Path]:
    """Return the folders of all model cards, sorted by name."""
    root = cards_dir()
    return sorted(card.parent for card in root.glob("[!.]*/README.md")) if root.is_dir() else []


def denoiser_cards() -> dict[str, dict[str, Path]]:
    """Return the diffusers folders among the model cards: name -> tag -> folder."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder in published():
        if (folder / "model_index.json").is_file():
            name, tag = split_model_name_tag(folder.name)
            found[name][tag] = folder
    return dict(found)


def card_facts(folder: str | Path) -> dict[str, Any]:
    """Return what the catalogue takes from a card: licence, data, metrics, parity, config; empty without a card."""
    card = Path(folder) / "README.md"
    if not card.is_file():
        return {}
    front = front_matter(card)
    return {
        "license": front.get("license"),
        "datasets": front.get("datasets", []),
        "metrics": [dataclasses.asdict(metric) for metric in _metrics(front)],
        "parity": front.get("parity"),
        "config": front.get("config"),
    }


def _metrics(front: Mapping[str, Any]) -> list[Metric]:
    return [Metric(**metric) for metric in card_metrics(front)]


def make_card(
    name: str,
    weights: str | Path | Mapping[str, Tensor],
    *,
    metrics: Sequence[Metric],
    config: str,
    datasets: Sequence[str],
    training: str,
    core_hours: float,
    data: str,
    commands: Sequence[str],
    limitations: str,
    parity: str,
    picture: str | Path,
    caption: str = "",
    curve: str | Path | None = None,
    curve_caption: str = "",
    license: str = "apache-2.0",
    dtype: torch.dtype | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    paper: Mapping[str, str] | None = None,
) -> Path:
    """Write and check the folder of a published weight, whole or not at all.

    Args:
        name: `NAME.TAG`. A classifier or restorer must be registered under it; any other is a denoiser.
        weights: Checkpoint or state dict; for a denoiser the folder that its pipeline's `save_pretrained` wrote.
        metrics: At least one, each with its protocol.
        config: Path of the file that repeats the training, from the root of the repository.
        datasets: Training data, as Hub ids where they have one.
        training: How it was trained: length, batch, precision, hardware; what was tried and left.
        core_hours: Hours of CPU cores that the training took; the card estimates its energy from them.
        data: Terms of the training data. The card of a classifier also lists its classes.
        commands: What measures the metrics, as typed.
        limitations: What it cannot do.
        parity: How closely the code agrees with the authors', and how that was measured.
        picture: Image file to show; it is copied.
        caption: What the picture shows.
        curve: Image file of the course of the training; it is copied.
        curve_caption: What the curve shows.
        license: Licence of the weights, as a Hub identifier.
        dtype: Save floating-point weights in this type; None keeps theirs.
        folder: Where to write; None is `model_cards/NAME.TAG`.
        overwrite: Replace an existing folder.
        paper: For a denoiser: "paper" (title), "paper_ids" (for example "arXiv:2212.09748") and "origin" (address of
            the authors' code). Registered models have these in their cfg.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and `overwrite` is not set.
        CheckpointError: The weights are damaged or do not fit.
        ValueError: The finished card has a problem; all are listed.
    """
    target = Path(folder) if folder is not None else cards_dir() / name
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True to replace it.")
    with whole(target) as work:
        work.mkdir()
        if is_model(split_model_name_tag(name)[0]):
            facts = _write_timm(name, weights, work, dtype)
        else:
            facts = _write_diffusers(weights, work, dtype) | dict(paper or {})
        for file in (picture, curve):
            if file is not None:
                shutil.copyfile(file, work / Path(file).name)
        front: dict[str, Any] = {
            "license": license,
            "library_name": "ffn-zoo",
            "pipeline_tag": pipeline_tag(facts["task"]),
            "tags": ["zoo", *facts.pop("tags"), facts["task"]],
            "datasets": list(datasets),
            **facts,
            "config": config,
            "parity": parity,
            "model-index": [{"name": name, "results": metric_results(metrics, facts["task"])}],
        }
        text = _text(
            name,
            front,
            picture=_shown(picture, caption, name),
            training=_paragraphs(
                training, _energy(core_hours), "" if curve is None else _shown(curve, curve_caption, name)
            ),
            results=_paragraphs(metric_table(metrics), _measured_by(commands)),
            data=_paragraphs(classes_told(_cfg_value(name, facts["task"], "label_names")), data),
            limitations=limitations,
        )
        head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)
        (work / "README.md").write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
        problems = check_card(work)
        if problems:
            raise ValueError(f"The card of {name} is not fit to publish: {' '.join(problems)}")
    return target


def _write_timm(
    name: str, weights: str | Path | Mapping[str, Tensor], work: Path, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Write weights and timm's config.json, and return the facts for the front matter."""
    architecture, tag = split_model_name_tag(name)
    cfg = get_pretrained_cfg(name) if tag else None
    if cfg is None:
        raise ValueError(f"Give NAME.TAG as registered in default_cfgs, got {name!r}.")
    model = timm.create_model(name)
    given = isinstance(weights, Mapping)
    state_dict = dict(weights) if isinstance(weights, Mapping) else read_checkpoint(weights)
    module = model_entrypoint(architecture).__module__
    filter_fn = next(family.checkpoint_filter_fn for family in families() if family.__name__ == module)
    load_strict(model, state_dict, filter_fn, source="The state dict" if given else str(weights))
    record = record_of(model)
    digest = save_checkpoint(model.state_dict(), work / WEIGHTS_NAME, dtype=dtype, record=record)
    write_config(work, record)
    facts: dict[str, Any] = {
        "task": record.task,
        "tags": ["timm", module.rpartition(".")[2]],
        "architecture": architecture,
        "parameters": count_params(model),
        "paper": cfg.paper_name,
        "paper_ids": cfg.paper_ids,
        "origin": getattr(get_pretrained_cfg(architecture), "origin_url", None) or cfg.origin_url,
        "sha256": {WEIGHTS_NAME: digest},
    }
    if isinstance(cfg, RestorationCfg):
        facts["scale"] = cfg.scale
    return {key: value for key, value in facts.items() if value is not None}


def _write_diffusers(
    weights: str | Path | Mapping[str, Tensor], work: Path, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Write a pipeline's folder with its weights in `dtype`, and return the facts for the front matter."""
    if isinstance(weights, Mapping) or not (Path(weights) / "model_index.json").is_file():
        raise ValueError("The weights of a denoiser are a folder written by its pipeline's save_pretrained.")
    stored: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    pipeline = create_pipeline(str(weights), **stored)
    pipeline.save_pretrained(work)
    for file in work.rglob("*.json"):  # diffusers writes down where the weights lay on this machine
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as diffusers does
    files = sorted(work.rglob("*.safetensors"))
    return {
        "task": "policy" if "observation_dim" in pipeline.transformer.config else "generation",
        "tags": ["diffusers"],
        "architecture": type(pipeline.transformer).__name__,
        "parameters": count_params(pipeline.transformer),
        "sha256": {path.relative_to(work).as_posix(): sha256_of(path) for path in files},
    }


def pipeline_tag(task: str) -> str:
    """Return the Hub's word for a task."""
    return _PIPELINE_TAGS.get(task, "image-to-image")


def metric_results(metrics: Sequence[Metric], task: str) -> list[dict[str, Any]]:
    """Return metrics as the results of the Hub's `model-index`, one entry a data set."""
    results: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        entry = results.setdefault(
            metric.dataset,
            {
                "task": {"type": pipeline_tag(task)},
                "dataset": {"name": metric.dataset, "type": _slug(metric.dataset)},
                "metrics": [],
            },
        )
        args = {"protocol": metric.protocol} | ({"unit": metric.unit} if metric.unit else {})
        entry["metrics"].append({"type": _slug(metric.name), "name": metric.name, "value": metric.value, "args": args})
    return list(results.values())


def metric_table(metrics: Sequence[Metric]) -> str:
    """Return metrics as a Markdown table."""
    rows = (
        f"| {metric.name} | {metric.value:g}{f' {metric.unit}' if metric.unit else ''} | {metric.dataset} |"
        f" {metric.protocol} |"
        for metric in metrics
    )
    return "\n".join(("| metric | value | data | protocol |", "| --- | --- | --- | --- |", *rows))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


CLASSIFY = """\
import timm
import torch

import zoo{remark}
from zoo.pictures.eight_bit import read_eight_bit

model = {model}
zoo.reparameterize(model)  # exact, and faster
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(read_eight_bit("photo.png"))  # upright, 8 bits a channel
with torch.inference_mode():
    probabilities = {logits}.softmax(-1)[0]
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))"""
"""Lines of Python of a card: how a classifier is made, a remark on the import, and `scaled_logits`."""

_USE = {
    "classification": CLASSIFY.replace("{remark}", "  # registers the model with timm").replace(
        "{model}", 'timm.create_model("{name}", pretrained=True).eval()'
    ),
    "restoration": """\
import zoo

zoo.restore("photo.png", model="{name}").save("restored.png")""",
    "generation": """\
import torch

import zoo

pipeline = zoo.create_pipeline("{name}")
images = pipeline(class_labels=[3, 8], num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")""",
    "policy": """\
import zoo
from zoo.environments import PointTask, evaluate_policy

pipeline = zoo.create_pipeline("{name}")
print(evaluate_policy(pipeline, PointTask(), episodes=20, num_inference_steps=100))""",
}


def scaled_logits(temperature: float | None) -> str:
    """Return the expression of logits whose softmax is what `zoo classify` says, for the lines of Python of a card.

    Args:
        temperature: What the weights' logits are divided by; None is 1.
    """
    return "model(image[None])" if temperature in (None, 1) else f"(model(image[None]) / {temperature:g})"


def _cfg_value(name: str, task: str, field: str) -> Any:
    """Return what the cfg of a classifier's weights says; None of other networks, and where it says nothing."""
    return getattr(get_pretrained_cfg(name), field, None) if task == "classification" else None


def picture_link(file: str | Path, text: str) -> str:
    """Return the Markdown of a picture in the folder of a card."""
    return f"![{text}]({Path(file).name})"


def classes_told(labels: Sequence[str] | None) -> str:
    """Return the sentence that names the classes of a classifier; empty where they have no names."""
    return f"Classes: {', '.join(labels)}." if labels else ""


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _shown(file: str | Path, caption: str, name: str) -> str:
    return _paragraphs(picture_link(file, caption or name), caption)


def _energy(core_hours: float) -> str:
    kwh = core_hours * _WATTS / 1000
    return f"About {core_hours:g} core hours: {kwh:.2g} kWh at {_WATTS} W a core (an estimate)."


def _measured_by(commands: Sequence[str]) -> str:
    return "Measured by\n\n```\n" + "\n".join(commands) + "\n```"


def _text(
    name: str,
    front: Mapping[str, Any],
    *,
    picture: str,
    training: str,
    results: str,
    data: str,
    limitations: str,
) -> str:
    task = front["task"]
    use = _USE.get(task, _USE["restoration"]).format(
        name=name, logits=scaled_logits(_cfg_value(name, task, "temperature"))
    )
    command = {
        "classification": f"zoo classify photo.png --model {name}",
        "generation": f"zoo generate --model {name} --classes 3,8 -o grid.png",
        "policy": "zoo bench policy",
    }.get(task, f"zoo restore photo.png --model {name} -o restored/")
    train = f"python train.py fit --config {front['config']}"
    papers = front.get("paper_ids") or ()
    links = ", ".join(
        f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper
        for paper in ([papers] if isinstance(papers, str) else papers)
    )
    source = " ".join(
        part
        for part in (
            f"Paper: {', '.join(filter(None, (front.get('paper'), links)))}." if links or front.get("paper") else "",
            f"Authors' code: {front['origin']}." if front.get("origin") else "",
        )
        if part
    )
    return f"""# {name}

`{front["architecture"]}` for {task}, {front["parameters"]:,} parameters, trained on {", ".join(front["datasets"])} by
the authors of [ffn-zoo](https://github.com/ffn-zoo/zoo), with code written anew. {source}

{picture}

## How it was trained

{training}

The run is repeated by `{train}`, whose first lines say with what data and weights.

## Data

{data}

## Results

{results}

## How to use it

```
pip install ffn-zoo ffn-zoo-weights
{command}
```

```python
{use}
```

## Limitations

{limitations}

## Parity

{front["parity"]}
"""


def check_card(folder: str | Path) -> list[str]:
    """Return what keeps a card from being published, one sentence each; an empty list is a good card.

    A user's own model (`zoo.cards.write_own_model`) need not have licence, data sets, parity, limitations, a picture.
    Checked: front matter with licence, digests of all weight files, metrics with values and protocols, the config file
    (in a checkout), text sections, pictures; then the weights load strictly, are finite and have the stated number of
    parameters.

    Args:
        folder: Folder of the card.
    """
    folder = Path(folder)
    card = folder / "README.md"
    if not card.is_file():
        if (folder / "model_index.json").is_file():
            return [
                f"There is no card at {card}; of a pipeline it is yours to write. push_to_hub of diffusers needs none."
            ]
        return [f"There is no card at {card}; `zoo finetune` and zoo.cards.write_own_model write one."]
    try:
        front = front_matter(card)
    except ValueError as error:
        return [str(error)]
    text = card.read_text(encoding="utf-8")
    return [
        *_front_problems(front, folder),
        *_text_problems(text, folder, own=bool(front.get("own_model"))),
        *_digest_problems(front, folder),
        *_weight_problems(front, folder),
    ]


def _front_problems(front: Mapping[str, Any], folder: Path) -> list[str]:
    own = bool(front.get("own_model"))
    needed = () if own else ("license", "datasets", "parity")
    problems = [f"The front matter has no {key}." for key in needed if not front.get(key)]
    metrics = _metrics(front)
    if not metrics:
        problems.append("The front matter has no metrics (model-index).")
    for metric in metrics:
        if not metric.protocol:
            problems.append(f"The metric {metric.name!r} has no protocol.")
        if not isinstance(metric.value, int | float) or not math.isfinite(metric.value):
            problems.append(f"The metric {metric.name!r} has the value {metric.value!r}, not a finite number.")
    config = front.get("config")
    if own:
        if config and not (folder / config).is_file():
            problems.append(f"The config {config} does not exist in the folder.")
    elif not config:
        problems.append("The front matter names no config that repeats the training.")
    elif not (configs_dir() / str(config).removeprefix("configs/")).is_file():
        problems.append(f"The config {config} does not exist.")
    return problems


def _text_problems(text: str, folder: Path, *, own: bool) -> list[str]:
    sections = _OWN_SECTIONS if own else _SECTIONS
    problems = [f"The section '## {name}' is missing." for name in sections if f"\n## {name}\n" not in text]
    pictures = [link for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in link]
    if not pictures and not own:
        problems.append("The card shows no picture.")
    for link in pictures:
        try:
            with Image.open(folder / link) as image:
                image.verify()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"The picture {link} cannot be read: {first_line(error)}.")
    return problems


def _digest_problems(front: Mapping[str, Any], folder: Path) -> list[str]:
    stated = front.get("sha256")
    if not isinstance(stated, dict) or not stated:
        return ["The front matter states no sha256 of the weights."]
    problems = []
    for file in sorted({*stated, *(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))}):
        if file not in stated:
            problems.append(f"{file} has no sha256 in the front matter.")
        elif not (folder / file).is_file():
            problems.append(f"{file} has a sha256 in the front matter and does not exist.")
        elif sha256_of(folder / file) != stated[file]:
            problems.append(f"{file} has another sha256 than the front matter states.")
    return problems


def _weight_problems(front: Mapping[str, Any], folder: Path) -> list[str]:
    """Load the weights on the public path and compare what it gives with the card."""
    try:
        if (folder / "model_index.json").is_file():
            model = create_pipeline(str(folder), requires="transformer").transformer
        elif (folder / "config.json").is_file():
            model = create_model(f"local-dir:{folder}")
        else:
            return ["There is neither config.json nor model_index.json."]
    except (CheckpointError, OSError, RuntimeError, TypeError, KeyError, ValueError, ImportError) as error:
        return [f"The weights do not load: {first_line(error)}"]
    count = count_params(model)
    if front.get("parameters") != count:
        return [f"The model has {count} parameters, the front matter states {front.get('parameters')}."]
    return []
