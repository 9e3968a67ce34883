"""Where built engines are kept: a folder a network, under a digest of all that changes what it computes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.files import cache_dir, whole
from zoo.version import __version__
from zoo.weights import sha256_of

__all__ = ["digest", "engines_dir", "facts_of", "fingerprint", "note_facts"]

_VERSION = 1
"""Of the artefacts' layout: another one is built anew."""

_FACTS = "facts.json"
_OTHERS = ("torch.", "timm.", "torchvision.", "diffusers.", "transformers.")  # told apart by their versions


def engines_dir() -> Path:
    """Return the folder of engines, in the user's folder of zoo."""
    return cache_dir() / "engines"


def fingerprint(model: nn.Module) -> str:
    """Return a digest of what a model computes: tensors, module tree, plain attributes, and the code of its classes.

    Weights alone do not tell: a window size or another activation leaves them as they are.
    """
    found = hashlib.sha256()
    sources: set[str] = set()
    for name, module in model.named_modules():
        kind = type(module)
        found.update(f"{name} {kind.__module__}.{kind.__qualname__} {module.extra_repr()}\n".encode())
        found.update("".join(_plain(module)).encode())
        if not kind.__module__.startswith(_OTHERS):
            sources.add(kind.__module__)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # also those that are not in state_dict
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(_bytes(tensor))
    for source in sorted(sources):
        file = getattr(importlib.import_module(source) if source != "__main__" else None, "__file__", None)
        if file and Path(file).is_file():
            found.update(Path(file).read_bytes())
    for name in ("timm", "torchvision", "diffusers"):
        if importlib.util.find_spec(name) is not None:
            found.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    return found.hexdigest()


def _plain(module: nn.Module) -> Iterator[str]:
    """Yield a module's own attributes that are numbers, text, or tuples of them."""
    for key, value in sorted(vars(module).items()):
        if not key.startswith("_") and key not in ("training", "zoo_report", "forward"):
            items = value if isinstance(value, list | tuple) else (value,)
            if all(isinstance(item, bool | int | float | str | None) for item in items):
                yield f"{key}={value!r}\n"
            elif callable(value):
                yield f"{key}={getattr(value, '__qualname__', type(value).__qualname__)}\n"


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def digest(**facts: Any) -> str:
    """Return the name of an artefact with these facts."""
    facts |= {"layout": _VERSION, "zoo": __version__, "machine": platform.machine()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what is noted of an artefact; nothing where it was never finished, or is damaged."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        sound = all(sha256_of(folder / name) == value for name, value in facts["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return dict(facts) if sound else {}


def note_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Note facts of an artefact, with the checksums of its files.

    Raises:
        OSError: The folder cannot be written to.
    """
    files = [path for path in folder.iterdir() if path.is_file() and path.name != _FACTS and path.suffix != ".json"]
    facts = {**facts, "files": {path.name: sha256_of(path) for path in files}}
    with whole(folder / _FACTS) as temporary:
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
