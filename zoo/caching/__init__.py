"""Caches that save computation between the steps of a diffusion model."""

from zoo.caching.bac import BACConfig
from zoo.caching.blocks import BlockList, ModelBlocks, register_blocks
from zoo.caching.calibration import calibrate_cache
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.core import cache_summary, cached, disable_cache, enable_cache, reset_cache
from zoo.caching.saved import SavedSetting
from zoo.caching.schedules import BACSchedule
from zoo.caching.step_forecast import StepForecastConfig
from zoo.caching.step_schedules import StepSchedule
from zoo.caching.summary import CacheSummary
from zoo.caching.taylorseer import TaylorSeerConfig
from zoo.caching.timeline import timeline

__all__ = [
    "BACConfig",
    "BACSchedule",
    "BlockList",
    "CGTaylorConfig",
    "CacheSummary",
    "ModelBlocks",
    "SavedSetting",
    "StepForecastConfig",
    "StepSchedule",
    "TaylorSeerConfig",
    "cache_summary",
    "cached",
    "calibrate_cache",
    "disable_cache",
    "enable_cache",
    "register_blocks",
    "reset_cache",
    "timeline",
]
