"""Denoisers and their pipelines, made known to diffusers.

`DiffusionPipeline.from_pretrained` looks up the class that a folder's `model_index.json` names as an attribute of the
`diffusers` package, and has no registry for others. So the pipelines here become attributes of it, as soon as its own
pipelines are imported: importing zoo neither imports diffusers nor changes anything but that one name.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.diffusion.diffusion_policy import DiffusionPolicyPipeline, DiffusionPolicyTransformer
    from zoo.diffusion.pipelines import PixelDiTPipeline
    from zoo.diffusion.pixel_dit import PixelDiT

__all__ = ["DiffusionPolicyPipeline", "DiffusionPolicyTransformer", "PixelDiT", "PixelDiTPipeline"]

_LAZY = {
    "DiffusionPolicyPipeline": "zoo.diffusion.diffusion_policy",
    "DiffusionPolicyTransformer": "zoo.diffusion.diffusion_policy",
    "PixelDiT": "zoo.diffusion.pixel_dit",
    "PixelDiTPipeline": "zoo.diffusion.pipelines",
}
_PIPELINES = ("zoo.diffusion.diffusion_policy", "zoo.diffusion.pipelines")
_AWAITED = "diffusers.pipelines.pipeline_utils"  # defines DiffusionPipeline


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo.diffusion' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def _register() -> None:
    """Import our pipelines, which make themselves attributes of diffusers."""
    for name in _PIPELINES:
        importlib.import_module(name)


class _AfterDiffusers(importlib.abc.MetaPathFinder):
    """Wait for diffusers' pipelines to be imported, then register ours, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AWAITED in sys.modules:
    _register()
elif not any(isinstance(finder, _AfterDiffusers) for finder in sys.meta_path):
    sys.meta_path.insert(0, _AfterDiffusers())
