"""Write the catalogue, `catalog.json`, from the registry and the model cards: `python -m zoo.cards.catalog_writer`.

Every model is built on the meta device: nothing is downloaded and no weight is allocated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from timm.models._registry import get_arch_pretrained_cfgs

from zoo import catalog
from zoo.cards.card import card_facts, denoiser_cards
from zoo.cards.family import write_family_cards
from zoo.cfg import ModelCfg, RestorationCfg
from zoo.ffn.reparam import reparameterize
from zoo.files import whole
from zoo.profiling import count_macs, count_params, denoiser_inputs
from zoo.weights import cards_dir, front_matter

__all__ = ["build_catalog", "write_catalog"]

_SR_OUTPUT = (720, 1280)  # super-resolution papers count the work for this output, in pixels
_RESTORE_INPUT = (256, 256)  # other restoration papers count it for this input, in pixels


def build_catalog() -> dict[str, dict[str, Any]]:
    """Return the facts of every model, as `catalog.json` holds them, ordered by task, family and size."""
    models = {name: _registered_facts(name) for name in timm.list_models() if _is_ours(name)}
    for name, folders in denoiser_cards().items():
        models[name] = _denoiser_facts(name, folders)
    return dict(sorted(models.items(), key=lambda item: (item[1]["task"], item[1]["family"], item[1]["params"])))


def write_catalog(path: str | Path = catalog.PATH) -> dict[str, dict[str, Any]]:
    """Write `catalog.json` whole or not at all, and return its content."""
    models = build_catalog()
    with whole(path) as temporary:
        temporary.write_text(_dump(models), encoding="utf-8")
    return models


def _dump(models: Mapping[str, Any]) -> str:
    """One model a line, so that a change of one model is a change of one line."""
    lines = (f"{json.dumps(name)}: {json.dumps(facts, ensure_ascii=False)}" for name, facts in models.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__.startswith(("zoo.backbones.", "zoo.restoration."))


def _registered_facts(name: str) -> dict[str, Any]:
    entry_point = model_entrypoint(name)
    cfgs = {tag.partition(".")[2]: cfg for tag, cfg in get_arch_pretrained_cfgs(name).items()}
    default = next(iter(cfgs.values()))
    known: dict[Any, dict[str, int]] = {}
    return {
        "task": default.task if isinstance(default, ModelCfg) else "classification",
        "family": entry_point.__module__.rpartition(".")[2],
        "summary": (entry_point.__doc__ or "").partition("\n")[0].partition(":")[0].rstrip("."),
        "paper": default.paper_name,
        "paper_ids": _listed(default.paper_ids),
        "origin": default.origin_url,
        "notes": _listed(default.notes),
        "parity": getattr(default, "parity", None),
        "top1": next((top1 for cfg in cfgs.values() if (top1 := getattr(cfg, "top1", None))), None),
        **_measured(name, default, known),
        "weights": {tag: _weight_facts(f"{name}.{tag}", cfg, known) for tag, cfg in cfgs.items() if _is_published(cfg)},
    }


def _listed(value: str | tuple[str, ...] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _is_published(cfg: Any) -> bool:
    if cfg.file:
        return Path(cfg.file).exists()
    return bool(cfg.hf_hub_id or cfg.url)


def _weight_facts(name: str, cfg: Any, known: dict[Any, dict[str, int]]) -> dict[str, Any]:
    source = "shipped" if cfg.file else f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    return {
        "license": cfg.license,
        "source": source,
        "num_classes": cfg.num_classes,
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "notes": _listed(cfg.notes),
        **({"metrics": [_authors_top1(cfg)]} if getattr(cfg, "top1", None) else {}),
        **_measured(name, cfg, known),
        **card_facts(cards_dir() / name),
    }


def _authors_top1(cfg: ModelCfg) -> dict[str, Any]:
    """Return the authors' accuracy in the form of a card's metric."""
    return {
        "name": "Top-1 accuracy",
        "value": cfg.top1,
        "unit": "%",
        "dataset": "ImageNet-1k",
        "protocol": f"the authors' figure at {cfg.input_size[-1]} pixels, not measured by us",
    }


def _input_size(cfg: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) for which the work of a model is stated."""
    if not isinstance(cfg, RestorationCfg):
        return tuple(cfg.input_size)
    height, width = _RESTORE_INPUT if cfg.task != "sr" else (side // cfg.scale for side in _SR_OUTPUT)
    step = cfg.multiple_of
    return cfg.input_size[0], math.ceil(height / step) * step, math.ceil(width / step) * step


def _measured(name: str, cfg: Any, known: dict[Any, dict[str, int]]) -> dict[str, Any]:
    """Return the input for which the work is stated, and the counts; `known` has those of the other tags."""
    shape = _input_size(cfg)
    key = (cfg.num_classes, repr(getattr(cfg, "model_args", None)), shape)
    if key not in known:
        known[key] = _counts(name, shape)
    facts: dict[str, Any] = {"input_size": list(shape)}
    if isinstance(cfg, RestorationCfg):
        facts |= {"scale": cfg.scale, "any_size": True}
    return facts | known[key]


def _counts(name: str, shape: tuple[int, int, int]) -> dict[str, int]:
    """Build a model without memory and count it before and after merging."""
    model = timm.create_model(name, device="meta").eval()
    sample = torch.empty(1, *shape, device="meta")
    counts = {"params": count_params(model), "macs": count_macs(model, sample)}
    if reparameterize(model, measure=False).layers:
        counts |= {"merged_params": count_params(model), "merged_macs": count_macs(model, sample)}
    return counts


def _denoiser_facts(name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Facts of a denoiser, from the diffusers folders of its published weights (tag -> folder)."""
    weights: dict[str, Any] = {}
    for tag, folder in folders.items():
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        module, class_name = index["transformer"]
        denoiser = getattr(importlib.import_module(module), class_name)
        config = denoiser.load_config(folder / "transformer")
        # routing sorts tokens by data, which meta tensors have none of
        with torch.device("cpu" if config.get("moe") else "meta"), torch.no_grad():
            model = denoiser.from_config(config).eval()
            sample, named = denoiser_inputs(model)
            macs = count_macs(model, sample, **named)
        weights[tag] = {
            "source": "shipped",
            "num_classes": model.config.get("num_classes"),
            "notes": [],
            "input_size": list(sample.shape[1:]),
            "params": count_params(model),
            "macs": macs,
            **card_facts(folder),
        }
    first = next(iter(weights.values()))
    front = front_matter(next(iter(folders.values())) / "README.md")
    return {
        "task": front["task"],
        "family": name,
        "summary": (denoiser.__doc__ or "").partition("\n")[0].rstrip("."),
        "paper": front.get("paper"),
        "paper_ids": _listed(front.get("paper_ids")),
        "origin": front.get("origin"),
        "notes": [],
        "parity": first.get("parity"),
        "top1": None,
        **{key: first[key] for key in ("input_size", "params", "macs")},
        "weights": weights,
    }


def main(argv: list[str] | None = None) -> int:
    """Write the catalogue and the cards of all families, or say with --check whether it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m zoo.cards.catalog_writer", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the file is out of date")
    args = parser.parse_args(argv)
    if args.check:
        current = catalog.PATH.is_file() and catalog.PATH.read_text(encoding="utf-8") == _dump(build_catalog())
        print(f"{catalog.PATH} is {'current' if current else 'out of date: run `make catalog`'}.")
        return 0 if current else 1
    print(f"{len(write_catalog())} models written to {catalog.PATH}.")
    catalog.load.cache_clear()
    print(f"{len(write_family_cards())} cards of families written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
