"""Let diffusers' own calls, `pipe.transformer.enable_cache(config)` and `disable_cache()`, take our caches too.

diffusers has no registry for caches, so this exchanges two methods of its `CacheMixin`; nothing does so by itself. On
a denoiser alone, a cache cannot know how many steps are to come; `zoo.enable_cache(pipe, config)` can.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers import CacheMixin

from zoo.caching.bac import BACConfig
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.core import disable_cache, enable_cache
from zoo.caching.step_forecast import StepForecastConfig
from zoo.caching.taylorseer import TaylorSeerConfig

__all__ = ["install", "uninstall"]

_OURS = (BACConfig, CGTaylorConfig, StepForecastConfig, TaylorSeerConfig)
_METHODS = ("enable_cache", "disable_cache")


def install() -> None:
    """Exchange the methods; once is enough."""
    if hasattr(CacheMixin.enable_cache, "__wrapped__"):
        return
    theirs_on, theirs_off = CacheMixin.enable_cache, CacheMixin.disable_cache

    @functools.wraps(theirs_on)
    def on(self: Any, config: Any) -> None:
        if isinstance(config, _OURS):
            enable_cache(self, config)
        else:
            theirs_on(self, config)

    @functools.wraps(theirs_off)
    def off(self: Any) -> None:
        if isinstance(self._cache_config, _OURS):
            disable_cache(self)
        else:
            theirs_off(self)

    CacheMixin.enable_cache, CacheMixin.disable_cache = on, off


def uninstall() -> None:
    """Put diffusers' methods back; caches that are on stay on, and `zoo.disable_cache` takes them away."""
    for name in _METHODS:
        method = getattr(CacheMixin, name)
        setattr(CacheMixin, name, getattr(method, "__wrapped__", method))
