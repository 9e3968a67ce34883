"""Writes the pages that follow from the code, the catalogue, the cards and the benchmarks.

`python docs/pages.py` writes errors.md and models.md, which are kept in the repository; building the site writes the
others too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import zoo
from zoo import catalog
from zoo.cli.errors import KINDS
from zoo.cli.restoring import TASKS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = {
    "Call": "Z1", "Models and weights": "Z2", "Pictures": "Z3", "Pipelines and caches": "Z4",
    "Feed-forward networks": "Z5", "Data, training, evaluation": "Z6", "Hub": "Z7",
    "Benchmarks, kernels, exports, the page": "Z8", "Others": "Z9",
}  # fmt: skip


def errors() -> str:
    """Return the page of error codes."""
    lines = [
        "# Errors and their cures",
        "",
        "Every error of the `zoo` command is one line: what was given, what fits, the nearest right choice, and the",
        "code of its kind, as `[Z201]`. `--debug` shows the traceback. Exit codes: 0 all done, 1 some of the work",
        "failed, 2 the call was wrong. In Python the same lines are raised without the code, as `ValueError` and its",
        "kin.",
    ]
    for title, beginning in PARTS.items():
        lines += ["", f"## {title}"]
        for kind in sorted((kind for kind in KINDS if kind.code.startswith(beginning)), key=lambda kind: kind.code):
            lines += ["", f"({kind.code.lower()})=", f"### {kind.code}: {kind.title}", "", kind.cure]
    return "\n".join(lines) + "\n"


def models() -> str:
    """Return the page that helps to choose a model."""
    record = json.loads((HERE / "benchmarks" / "models.json").read_text(encoding="utf-8"))["benchmarks"][0]
    lines = [
        "# Which model do I pick",
        "",
        "What is shipped works offline. Numbers of your machine take one command: `zoo bench NAME NAME ...` measures",
        "seconds, `zoo evaluate NAME --data NAME=FOLDER` dB on your photos.",
        "",
        "## I want to classify my own pictures",
        "",
        "`zoo finetune PHOTOS --model NAME -o mine`, from shipped weights: [the walk](tutorials/own_classifier.ipynb).",
        "",
        "| start from | top-1 | parameters, merged | MACs, merged | input |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, _, weight in _shipped("classification"):
        lines.append(
            f"| `{name}` | {_metric(weight)} | {weight['merged_params'] / 1e6:.2f} M | "
            f"{weight['merged_macs'] / 1e9:.3f} G | {'x'.join(map(str, weight['input_size'][-2:]))} |"
        )
    lines += ["", "## I want to restore photos", ""]
    lines += [
        "`zoo restore photo.jpg -o out/` looks at the photo and takes the fast one of what is shipped;",
        "`--quality best` takes longer. [Photos as they are](benchmarks/photos.md) gives dB and seconds.",
        "",
        "| task | weights | what is measured | value | GMACs |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for task in TASKS:
        for name, facts, weight in _shipped(task):
            metric = (weight.get("metrics") or [None])[0]
            what, value = (
                (f"{metric['name']}, {metric['dataset']}", f"{metric['value']:g} {metric['unit']}")
                if metric
                else ("", "")
            )
            size = "x".join(map(str, weight.get("input_size", facts["input_size"])[-2:]))
            macs = weight.get("merged_macs", weight.get("macs", facts.get("merged_macs", facts["macs"])))
            lines.append(f"| {task}: {TASKS[task]} | `{name}` | {what} | {value} | {macs / 1e9:.1f} at {size} |")
    lines += [
        "",
        "For the other tasks (deblur, derain, defocus) the authors' weights of Restormer load:",
        "`zoo list --task deblur` names them.",
        "",
        "## I want to generate, faster",
        "",
        "Any pipeline of diffusers takes a cache; [caching a pipeline](tutorials/caching.ipynb) reads its summary, and",
        "[the measurements](benchmarks/caching.md) give seconds and dB. For `pixeldit.cifar10` at 50 steps:",
        "",
        "| cache | seconds for 10 pictures, 1 thread | PSNR to uncached | computed steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    caching = json.loads((HERE / "benchmarks" / "caching.json").read_text(encoding="utf-8"))["benchmarks"][0]
    best: dict[str, dict] = {}
    for entry in caching["entries"]:
        method = entry["name"].partition(",")[0]
        if entry["time"] and (method == "no cache" or entry["values"].get("PSNR (dB)", 0) >= 30):
            kept = best.get(method)
            if kept is None or (method != "no cache" and entry["time"]["median"] < kept["time"]["median"]):
                best[method] = entry
    for entry in sorted(best.values(), key=lambda entry: -entry["time"]["median"]):
        psnr, steps = entry["values"].get("PSNR (dB)"), entry["values"].get("steps computed")
        lines.append(
            f"| {entry['name']} | {entry['time']['median'] / 1000:.2f} | {'' if psnr is None else f'{psnr:.1f} dB'} | "
            f"{'' if steps is None else f'{steps:.3g}'} |"
        )
    conditions = record["conditions"]
    lines += [
        "",
        "Of each method the fastest setting that keeps 30 dB.",
        "",
        "## I want a backbone for ImageNet-1k, detection or segmentation",
        "",
        f"One picture, {conditions['dtype']}, {conditions['threads']} threads of {record['environment']['device']}, "
        f"torch {record['environment']['torch']}, merged; top-1 as the authors give it. None of the others is both",
        "faster and better ([all](benchmarks/models.md)):",
        "",
        "| model | ms | top-1 | parameters | GMACs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    top = -1.0
    for entry in sorted((e for e in record["entries"] if e["values"]), key=lambda entry: entry["time"]["median"]):
        value = next(iter(entry["values"].values()))
        if value > top:
            top = value
            name = entry["name"].removesuffix(" (merged)")
            lines.append(
                f"| `{name}` | {entry['time']['median']:.0f} | {value:g} % | {entry['params'] / 1e6:.1f} M | "
                f"{entry['macs'] / 1e9:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _shipped(task: str):
    for architecture, facts in catalog.load().items():
        for tag, weight in facts["weights"].items():
            if facts["task"] == task and weight["source"] == "shipped":
                yield f"{architecture}.{tag}", facts, weight


def _metric(weight: dict) -> str:
    metric = weight["metrics"][0]
    return f"{metric['value']:g} {metric['unit']}, {metric['dataset']}"


def families() -> dict[str, str]:
    """Return a page a family: its card, and what its module says."""
    found = {}
    for card in sorted((ROOT / "model_cards").glob("*.md")):
        text = card.read_text(encoding="utf-8")
        if text.startswith("---\n"):
            text = text.partition("\n---")[2].partition("\n")[2]
        module = next(
            (f"zoo.{kind}.{card.stem}" for kind in ("backbones", "restoration")
             if (ROOT / "zoo" / kind / f"{card.stem}.py").is_file()), None,
        )  # fmt: skip
        text = re.sub(r"\[`?([^\]`]+)`?\]\(\1\)", r"`\1`", text)  # folders of weights are no pages here
        found[card.stem] = text.strip() + (_automodule(module, "## Reference") if module else "") + "\n"
    found["index"] = "# Families\n\n```{toctree}\n:maxdepth: 1\n:glob:\n\n*\n```\n"
    return found


def _automodule(module: str, heading: str) -> str:
    """Return the reference of a module, without names that it only passes on: they stand with their own module."""
    loaded = importlib.import_module(module)
    own = {name: getattr(getattr(loaded, name), "__module__", module) for name in getattr(loaded, "__all__", ())}
    others = [name for name, where in own.items() if where != module and str(where).startswith("zoo.")]
    left = ", ".join(["ModelMixin", *others])
    directive = f".. automodule:: {module}\n   :members:\n   :exclude-members: {left}\n   :show-inheritance:\n"
    return f"\n\n{heading}\n\n```{{eval-rst}}\n{directive}```\n"


def modules() -> dict[str, list[str]]:
    """Return the modules with public names, by package; those with a page of their family are left out."""
    found: dict[str, list[str]] = {}
    for info in pkgutil.walk_packages([str(ROOT / "zoo")], "zoo."):
        name = info.name
        skipped = name.startswith(("zoo.cli", "zoo.export", "zoo.configs", "zoo.benchmarks"))
        if skipped or ".triton_" in name or name.endswith("__main__"):
            continue
        source = ROOT / Path(*name.split("."))
        file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        package = name.split(".")[1]
        family = (
            package in ("backbones", "restoration") and (ROOT / "model_cards" / f"{name.split('.')[-1]}.md").is_file()
        )
        passes_on = source.is_dir() and package != "demo"  # its names stand with the modules that define them
        if "__all__" in file.read_text(encoding="utf-8") and not family and not passes_on:
            found.setdefault(package, []).append(name)
    for file in sorted((ROOT / "export").glob("[!_]*.py")):  # it stands beside the package in a checkout
        if "__all__" in file.read_text(encoding="utf-8"):
            found.setdefault("export", []).append(f"zoo.export.{file.stem}")
    return found


def reference() -> dict[str, str]:
    """Return the pages of the reference."""
    names = "\n".join(
        f"| `zoo.{name}` | {(inspect.getdoc(getattr(zoo, name)) or '').splitlines()[0]} | "
        f"[{zoo._LAZY[name]}]({zoo._LAZY[name].split('.')[1]}.md) |"
        for name in zoo.__all__
    )
    pages = {
        "index": "# Reference\n\nWhat `import zoo` offers at once:\n\n| name | what | from |\n| --- | --- | --- |\n"
        f"{names}\n\n```{{toctree}}\n:maxdepth: 1\n:glob:\n\n*\n```\n"
    }
    for package, found in modules().items():
        parts = "".join(_automodule(name, f"## {name}") for name in found)
        pages[package] = f"# zoo.{package}{parts}"
    return pages


def configuration() -> str:
    """Return the page of everything that configs of `zoo train` may set."""
    from jsonargparse import ArgumentParser

    used: dict[str, list[str]] = {}
    listed = []
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        text = path.read_text(encoding="utf-8")
        first = text.splitlines()[0].removeprefix("# ") if text.startswith("#") else ""
        listed.append(f"| `{path.parent.name}/{path.stem}` | {first} |")
        for key, name in re.findall(r"^(model|data):\n  class_path: (\S+)", text, re.M):
            used.setdefault(key, []).append(name)
    lines = [
        "# Configuration of training", "",
        "`zoo train fit --config TASK/NAME` runs a config; every key can be set on the command line, as",
        "`--model.init_args.optim.lr 0.001`. `--print_config` shows all keys with their values, an unknown key is an",
        "error that names the nearest. `trainer` is Lightning's Trainer.", "",
        "| config | what |", "| --- | --- |", *listed,
    ]  # fmt: skip
    for key in ("model", "data"):
        for name in sorted(set(used[key])):
            module, _, cls = name.rpartition(".")
            parser = ArgumentParser(prog="zoo train fit", usage="", exit_on_error=False)
            parser.add_class_arguments(getattr(importlib.import_module(module), cls), f"{key}.init_args")
            text = re.sub(r"\x1b\[[0-9;]*m", "", parser.format_help())
            text = re.sub(r"^.*?(?=^[^\n]*init_args)", "", text, count=1, flags=re.S | re.M)
            lines += ["", f"## {key}: {cls}", "", "```text", f"class_path: {name}", "", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def write_kept(folder: Path = HERE) -> None:
    """Write the pages that are kept in the repository."""
    _write(folder / "errors.md", errors())
    _write(folder / "models.md", models())


def write_all(folder: Path = HERE) -> None:
    """Write every generated page."""
    write_kept(folder)
    _write(folder / "configuration.md", configuration())
    for name, text in families().items():
        _write(folder / "families" / f"{name}.md", text)
    for name, text in reference().items():
        _write(folder / "reference" / f"{name}.md", text)


def _write(path: Path, text: str) -> None:
    """Write a file where it changed: Sphinx reads what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_kept()
