"""Caches that save computation between the steps of a diffusion model."""

from zoo.caching.core import cached, disable_cache, enable_cache, reset_cache

__all__ = ["cached", "disable_cache", "enable_cache", "reset_cache"]
