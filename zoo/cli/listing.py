"""`zoo list` and `zoo info`: what models there are, from the catalogue, without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from zoo import catalog
from zoo.cli.output import (
    FailureError,
    UsageError,
    billions,
    change,
    joined,
    millions,
    number,
    print_json,
    print_table,
    table,
)
from zoo.sources import Source, describe, find

_SORT = {
    "name": lambda name, facts: name,
    "task": lambda name, facts: (facts["task"], facts["params"]),
    "family": lambda name, facts: (facts["family"], facts["params"]),
    "params": lambda name, facts: facts["params"],
    "macs": lambda name, facts: facts["macs"],
    "merged-params": lambda name, facts: facts.get("merged_params", facts["params"]),
    "merged-macs": lambda name, facts: facts.get("merged_macs", facts["macs"]),
}


def add_parser(subparsers: Any) -> None:
    """Add `list` and `info`."""
    parser = subparsers.add_parser("list", help="list the models", description="List the models that fit all options.")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="name with wildcards, for example 'repa*' (default: all)"
    )
    parser.add_argument("--task", help="classification, sr, denoise, generation, ...")
    parser.add_argument("--license", help="with weights under this licence, for example apache-2.0")
    parser.add_argument("--max-params", type=number, metavar="N", help="at most so many parameters: 30e6 or 30M")
    parser.add_argument("--pretrained", action="store_true", help="with published weights only")
    parser.add_argument("--sort", choices=list(_SORT), help="order, smallest first (default: task, family, size)")
    parser.add_argument("--reverse", action="store_true", help="largest first")
    parser.set_defaults(run=run_list)

    parser = subparsers.add_parser("info", help="show one model", description="Show what is known about a model.")
    parser.add_argument("name", metavar="NAME[.TAG]", help="model, one of its weights, file, folder or Hub id")
    parser.set_defaults(run=run_info)


def run_list(args: argparse.Namespace) -> int:
    """Print the models that fit; exit code 1 if none does."""
    models = catalog.select(args.pattern, task=args.task, max_params=args.max_params, license=args.license)
    chosen = [(name, facts) for name, facts in models.items() if facts["weights"] or not args.pretrained]
    if args.sort:
        chosen.sort(key=lambda item: _SORT[args.sort](*item))
    if args.reverse:
        chosen.reverse()
    if args.json:
        print_json([{"name": name, **facts} for name, facts in chosen])
    elif args.quiet:
        for name, _ in chosen:
            print(name)
    elif chosen:
        _print_list(chosen)
    if chosen:
        return 0
    if args.license and not catalog.select(license=args.license):
        known = {weight["license"] for facts in catalog.load().values() for weight in facts["weights"].values()}
        licences = sorted(known - {None})
        hint = catalog.did_you_mean(args.license, licences)
        raise UsageError(f"No weights are under {args.license!r}.{hint} Licences: {', '.join(licences)}.")
    near = catalog.nearest(args.pattern.strip("*?"), list(catalog.load()))
    hint = f" Did you mean {' or '.join(near)}?" if near else " `zoo list` shows all."
    if not args.json:
        raise FailureError(f"No model fits.{hint}")
    return 1


def _print_list(chosen: list[tuple[str, dict[str, Any]]]) -> None:
    columns = ("name", "task", "params", "MACs", "input", "shipped", "authors' weights", "licence")
    drop = ("input", "licence", "MACs", "authors' weights", "params")
    rows = table(*columns, right=("params", "MACs"), drop=drop)
    rows.columns[0].no_wrap = True
    for name, facts in chosen:
        licences = sorted({weight["license"] or "not stated" for weight in facts["weights"].values()})
        rows.add_row(
            name,
            facts["task"] + (f" x{facts['scale']}" if facts.get("scale", 1) > 1 else ""),
            change(millions(facts["params"]), _merged(facts, "params", millions)),
            change(billions(facts["macs"]), _merged(facts, "macs", billions)),
            _size(facts),
            joined([tag for tag, weight in facts["weights"].items() if weight["source"] == "shipped"]),
            joined([tag for tag, weight in facts["weights"].items() if weight["source"] != "shipped"]),
            joined(licences),
        )
    merged = any("merged_params" in facts for _, facts in chosen)
    free = any(facts.get("any_size") for _, facts in chosen)
    print_table(
        rows,
        "Weights are called NAME.TAG; shipped ones are in ffn-zoo-weights, the authors' are fetched over the net once.",
        f"{len(chosen)} model{'s' if len(chosen) > 1 else ''}. MACs: multiply-accumulates for one input of that size"
        f"{' (* any size works)' if free else ''}.{' a -> b: before and after merging.' if merged else ''}",
    )


def _merged(facts: dict[str, Any], key: str, form: Any) -> str | None:
    return form(facts[f"merged_{key}"]) if f"merged_{key}" in facts else None


def _size(facts: dict[str, Any]) -> str:
    """Return height and width of a picture, or number and size of actions."""
    return "x".join(map(str, facts["input_size"][-2:])) + ("*" if facts.get("any_size") else "")


def run_info(args: argparse.Namespace) -> int:
    """Print the facts of one model, of one of its weights, or of a user's file or folder."""
    source = find(args.name)
    if source.path is not None or source.kind == "hub" or source.architecture not in catalog.load():
        return _run_own(args, source)
    facts = catalog.entry(args.name)
    if args.json:
        print_json(facts)
        return 0
    tag = facts.get("tag")
    shown = facts | facts["weights"][tag] if tag else facts
    head = table("", "")
    head.show_header = False
    for label, value in info_lines(facts, shown, tag):
        if value:
            head.add_row(label, value)
    parts: list[Any] = [f"{args.name}: {facts['summary']}", head]  # as a title it would be as narrow as the table
    weights = {tag: facts["weights"][tag]} if tag else facts["weights"]
    if weights and not tag:
        rows = table("weights", "licence", "classes", "input", "from", title="Published weights")
        for key, weight in weights.items():
            classes = str(weight["num_classes"] or "-")
            rows.add_row(
                f"{facts['name']}.{key}", weight["license"] or "not stated", classes, _size(weight), weight["source"]
            )
        parts.append(rows)
    metrics = [(key, metric) for key, weight in weights.items() for metric in weight.get("metrics", ())]
    if metrics:
        rows = table("weights", "metric", "value", "data", "protocol", title="Metrics", right=("value",))
        for key, metric in metrics:
            value = f"{metric['value']:g} {metric['unit']}".strip()
            rows.add_row(key, metric["name"], value, metric["dataset"], metric["protocol"])
        parts.append(rows)
    print_table(*parts)
    return 0


def _run_own(args: argparse.Namespace, source: Source) -> int:
    """Print what a file, folder or Hub repository says of itself; only files of PyTorch have to be read for it."""
    if source.record is not None:
        facts = describe(source)
    else:
        from zoo.factory import model_info

        facts = model_info(args.name)
    if args.json:
        print_json(facts)
        return 0
    head = table("", "")
    head.show_header = False
    shown = {key: value for key, value in facts.items() if key not in ("name", "summary", "metrics", "mean", "std")}
    if facts["task"] == "classification":
        shown["normalisation"] = catalog.normalisation(facts)
    for label, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={entry}" for key, entry in value.items())
        elif label == "input_size":
            value = "x".join(map(str, value))
        elif label in ("params", "macs") and isinstance(value, int):
            value = (millions if label == "params" else billions)(value)
        elif isinstance(value, list | tuple):
            value = joined(list(value), "")
        if value not in ("", None):
            head.add_row(_LABELS.get(label, label.replace("_", " ")), str(value))
    parts: list[Any] = [args.name if "summary" not in facts else f"{args.name}: {facts['summary']}", head]
    if facts.get("metrics"):
        rows = table("metric", "value", "data", "protocol", title="Metrics", right=("value",))
        for metric in facts["metrics"]:
            value = f"{metric['value']:g} {metric['unit']}".strip()
            rows.add_row(metric["name"], value, metric["dataset"], metric["protocol"])
        parts.append(rows)
    print_table(*parts)
    return 0


_LABELS = {
    "license": "licence",
    "crop_pct": "share that is cropped",
    "base": "trained from",
    "num_classes": "classes",
    "label_names": "names of classes",
    "params": "parameters",
    "macs": "MACs",
}


def info_lines(facts: dict[str, Any], shown: dict[str, Any], tag: str | None) -> Iterator[tuple[str, str]]:
    """Yield label and value of what is known; the value is empty where it is not."""
    yield "task", facts["task"] + (f" x{facts['scale']}" if facts.get("scale", 1) > 1 else "")
    yield "paper", joined([part for part in (facts["paper"], *map(_link, facts["paper_ids"])) if part], "")
    yield "authors' code", facts["origin"] or ""
    yield (
        "input",
        f"{_size(shown)} {'actions' if facts['task'] == 'policy' else 'pixels'}"
        + (" (* any size works; MACs are for this one)" if "any_size" in shown else ""),
    )
    yield "parameters", change(millions(shown["params"]), _merged(shown, "params", millions)) + _merging(shown)
    yield "MACs", change(billions(shown["macs"]), _merged(shown, "macs", billions)) + _merging(shown)
    if tag:
        yield "classes", str(shown["num_classes"] or "")
        yield "licence", shown["license"] or "not stated"
        yield "normalisation", catalog.normalisation(shown)
        yield "from", shown["source"]
        yield "trained on", joined(shown.get("datasets", ()), "")
        yield "config", shown.get("config") or ""
    else:
        yield "weights", "" if facts["weights"] else "none published"
    yield "parity", shown.get("parity") or facts["parity"] or ""
    yield "note", " ".join(shown["notes"])


def _merging(facts: dict[str, Any]) -> str:
    return " (merged)" if "merged_params" in facts else ""


def _link(paper: str) -> str:
    return f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" if paper.startswith("arXiv:") else paper
