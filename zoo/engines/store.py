"""Where built engines are kept: a folder a network, under a digest of all that changes what it computes."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.engines.watch import hooks_of, own_attributes
from zoo.files import cache_dir, whole
from zoo.version import __version__
from zoo.weights import sha256_of

__all__ = ["digest", "engines_dir", "facts_of", "fingerprint", "is_known", "note_facts"]

_VERSION = 3
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


def is_known(model: nn.Module) -> bool:
    """Tell whether a digest tells all of a model: code of known packages, no hooks, no `forward` of its own."""
    return all(
        type(module).__module__.startswith((*_OTHERS, "zoo."))
        and not hooks_of(module)
        and "forward" not in own_attributes(module)
        for module in model.modules()
    )


def _plain(module: nn.Module) -> Iterator[str]:
    """Yield a module's own attributes."""
    for key, value in sorted(own_attributes(module).items()):
        yield f"{key}={_told(value)}\n"
    yield from (f"hook {_told(hook)}\n" for hook in hooks_of(module))


def _told(value: Any, depth: int = 4) -> str:
    """Return what tells a value from others, without addresses, which differ from run to run."""
    if isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | None):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if depth and isinstance(value, list | tuple):
        return f"[{', '.join(_told(item, depth - 1) for item in value)}]"
    if depth and isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_told(item, depth - 1)}' for key, item in value.items())}}}"
    name = str(getattr(value, "__qualname__", type(value).__qualname__))
    known = isinstance(value, nn.Module | type | ModuleType)  # told elsewhere, or code
    inside = vars(value) if depth and hasattr(value, "__dict__") and not known else {}
    if isinstance(value, functools.partial):
        inside = {"func": value.func, "args": value.args, "keywords": value.keywords}
    return f"{name} {_told(dict(inside), depth - 1)}" if inside else name


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
