"""zoo: vision and diffusion models whose feed-forward networks are made fast.

Importing zoo registers its backbones and restorers with timm, and nothing else: no download, no device query, no global
setting. All other names are imported when first used. `import zoo.diffusion` makes its pipelines known to diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import zoo.backbones  # noqa: F401  imported for what it registers
import zoo.restoration  # noqa: F401  the same
from zoo.version import __version__ as __version__

if TYPE_CHECKING:
    from zoo.acceleration import accelerate
    from zoo.bench.tuning import tune_cache
    from zoo.caching import (
        BACConfig,
        CGTaylorConfig,
        StepForecastConfig,
        TaylorSeerConfig,
        cache_summary,
        cached,
        calibrate_cache,
        disable_cache,
        enable_cache,
    )
    from zoo.factory import create_model, create_pipeline, list_models, model_info
    from zoo.ffn.compressing import compress
    from zoo.ffn.reparam import reparameterize
    from zoo.moe import MoEConfig
    from zoo.pictures.restore import restore

_LAZY = {
    "BACConfig": "zoo.caching",
    "CGTaylorConfig": "zoo.caching",
    "MoEConfig": "zoo.moe",
    "StepForecastConfig": "zoo.caching",
    "TaylorSeerConfig": "zoo.caching",
    "accelerate": "zoo.acceleration",
    "cache_summary": "zoo.caching",
    "cached": "zoo.caching",
    "calibrate_cache": "zoo.caching",
    "compress": "zoo.ffn.compressing",
    "create_model": "zoo.factory",
    "create_pipeline": "zoo.factory",
    "disable_cache": "zoo.caching",
    "enable_cache": "zoo.caching",
    "list_models": "zoo.factory",
    "model_info": "zoo.factory",
    "reparameterize": "zoo.ffn.reparam",
    "restore": "zoo.pictures.restore",
    "tune_cache": "zoo.bench.tuning",
}

_LAZY_MODULES = ("caching", "diffusion", "ffn", "moe", "spandrel")

__all__ = [
    "BACConfig",
    "CGTaylorConfig",
    "MoEConfig",
    "StepForecastConfig",
    "TaylorSeerConfig",
    "accelerate",
    "cache_summary",
    "cached",
    "calibrate_cache",
    "compress",
    "create_model",
    "create_pipeline",
    "disable_cache",
    "enable_cache",
    "list_models",
    "model_info",
    "reparameterize",
    "restore",
    "tune_cache",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"zoo.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_LAZY_MODULES])
