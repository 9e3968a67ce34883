"""One card for each family, `model_cards/FAMILY.md`: all variants and all published weights, from the catalogue.

`make catalog` writes them. Weights that we trained ourselves have cards of their own, see `zoo.cards.card`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.models import model_entrypoint

from zoo import catalog
from zoo.weights import cards_dir

__all__ = ["family_card", "family_names", "write_family_cards"]

_USE = {
    "classification": """\
import timm
import zoo  # registers the models with timm

model = timm.create_model("{name}", num_classes=10)  # pretrained=True: published weights
features = timm.create_model("{name}", features_only=True)
print(zoo.reparameterize(model.eval()))  # exact, in place""",
    "restoration": """\
import zoo

zoo.restore("photo.png", {source}).save("restored.png")""",
}


def family_names(models: Mapping[str, Any] | None = None) -> list[str]:
    """Return the families of registered models, those of denoisers excepted."""
    models = catalog.load() if models is None else models
    return sorted({facts["family"] for facts in models.values() if facts["task"] not in catalog.PIPELINE_TASKS})


def family_card(family: str, models: Mapping[str, Any] | None = None) -> str:
    """Return the card of a family as Markdown.

    Args:
        family: Name of the file in `zoo.backbones` or `zoo.restoration`.
        models: The catalogue; None is the one on disk.
    """
    models = catalog.load() if models is None else models
    chosen = {name: facts for name, facts in models.items() if facts["family"] == family}
    first = next(iter(chosen.values()))
    module = importlib.import_module(model_entrypoint(next(iter(chosen))).__module__)
    title, _, about = (module.__doc__ or "").strip().partition(":")
    kind = "classification" if first["task"] == "classification" else "restoration"
    shipped = [
        f"{name}.{tag}"
        for name, facts in chosen.items()
        for tag, weight in facts["weights"].items()
        if weight["source"] == "shipped"
    ]
    links = ", ".join(f"[{name}]({name})" for name in shipped)
    ours = f"\nTrained by us, with cards of their own: {links}.\n" if shipped else ""
    name = next(iter(chosen))
    source = f'model="{shipped[0]}"' if shipped else f'model="{name}", weights="downloaded.pth"'
    notes = dict.fromkeys(
        note
        for facts in chosen.values()
        for note in (*facts["notes"], *(note for weight in facts["weights"].values() for note in weight["notes"]))
    )
    remarks = "".join(f"\n- {_linked(note)}" for note in notes)
    return f"""# {title}

{_linked(_sentence(about))}

## Variants

{_table(("name", "what", "parameters", "merged", "GMACs", "merged", "input"), map(_variant, chosen.items()))}

MACs are those of one input of the stated size. "Merged" is after `zoo.reparameterize`, which changes no output.

## Published weights

{_table(("name", "from", "licence", "normalisation"), _weights(chosen))}
{ours}{remarks and f"{chr(10)}{remarks[1:]}{chr(10)}"}
## How to use it

```python
{_USE[kind].format(name=name, source=source)}
```

## Parity

{first["parity"]}
"""


def write_family_cards() -> list[Path]:
    """Write the cards of all families, and return their paths."""
    paths = [cards_dir() / f"{family}.md" for family in family_names()]
    for path in paths:
        path.write_text(family_card(path.stem), encoding="utf-8")
    return paths


def _sentence(text: str) -> str:
    """Put a docstring on one line, with a capital."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]


def _linked(text: str) -> str:
    return re.sub(r"(https?://[^\s,;)]*[^\s,;).])", r"<\1>", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(head), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _variant(item: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, facts = item
    about = " ".join((model_entrypoint(name).__doc__ or "").partition("\n\n")[0].split())
    return (
        f"`{name}`",
        about,
        f"{facts['params']:,}",
        f"{facts['merged_params']:,}" if "merged_params" in facts else "",
        f"{facts['macs'] / 1e9:.2f}",
        f"{facts['merged_macs'] / 1e9:.2f}" if "merged_macs" in facts else "",
        "x".join(map(str, facts["input_size"][1:])),
    )


def _weights(chosen: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for name, facts in chosen.items():
        if not facts["weights"]:
            yield f"`{name}`", "none published", "", ""
        for tag, weight in facts["weights"].items():
            source = weight["source"].replace("hf-hub:", "https://huggingface.co/")
            licence = weight["license"] or "not stated"
            yield f"`{name}.{tag}`", _linked(source), licence, catalog.normalisation(weight)
