"""Named caches with settings from mild to strong: what the command line offers and benchmarks measure."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig, TextKVCacheConfig

from zoo.caching.bac import BACConfig
from zoo.caching.calibration import Calibration, calibrate
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.core import cache_summary, cached
from zoo.caching.step_calibration import StepCalibration, calibrate_steps
from zoo.caching.step_forecast import StepForecastConfig
from zoo.caching.taylorseer import TaylorSeerConfig
from zoo.diffusion.blocks import as_patterns, attention_modules, feed_forward_modules

__all__ = [
    "CACHE_FAILURES",
    "HELD",
    "PRESETS",
    "STEPS",
    "CacheSetting",
    "Preset",
    "Subject",
    "cache_setting",
    "cache_settings",
    "notes_of",
    "planned_bac",
    "planned_steps",
    "reason_of",
]

STEPS = "steps computed"
HELD = "held (MiB)"
CACHE_FAILURES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What a cache that does not fit a model raises in mid-run, where the run without a cache goes well."""


@dataclass(frozen=True, kw_only=True)
class CacheSetting:
    """A cache to measure.

    Args:
        method: Its name, for people.
        setting: What is set, for people, for example "threshold 0.1".
        config: As `zoo.enable_cache` takes it.
    """

    method: str
    setting: str
    config: Any

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}"

    def on(self, pipe: Any) -> AbstractContextManager[None]:
        """Have the cache on a pipeline within a `with` block.

        Raises:
            ValueError: It cannot work on this pipeline.
        """
        return cached(pipe, self.config)

    def notes(self, pipe: Any) -> Mapping[str, float]:
        """Return steps computed and memory held in the last run, the cache being still on, as far as it tells."""
        return notes_of(pipe)


def reason_of(failure: Exception) -> str:
    """Return why a cache did not work, in one line; its kind where it says nothing."""
    return " ".join(str(failure).split()) or type(failure).__name__


def notes_of(pipe: Any) -> dict[str, float]:
    """Return steps computed and memory held in the last run with a cache that is still on, as far as it tells."""
    found = cache_summary(pipe).denoisers
    counts = [one.computed_steps for one in found if one.computed_steps is not None]
    held = [one.bytes_held for one in found if one.bytes_held is not None]
    values = {STEPS: sum(counts) / len(counts)} if counts else {}
    return values | ({HELD: sum(held) / 2**20} if held else {})


@dataclass(kw_only=True)
class Subject:
    """A pipeline that caches are to be chosen for; it is calibrated where one asks for it, once.

    Args:
        pipe: The pipeline, without a cache.
        run: Makes one uncached run, with the steps, scheduler and guidance of later use.
        steps: Of the scheduler in `run`.
        guidance: Scale of guidance in `run`, to be noted in schedules.
    """

    pipe: Any
    run: Callable[[], object] = field(repr=False)
    steps: int
    guidance: float | None = None

    @cached_property
    def calibration(self) -> Calibration:
        """How alike the outputs of the units are at any two steps, for BAC."""
        return calibrate(self.pipe, BACConfig(), self.run)

    @cached_property
    def step_calibration(self) -> StepCalibration:
        """The denoiser's outputs at all steps, for step forecasts."""
        return calibrate_steps(self.pipe, StepForecastConfig(), self.run)

    @cached_property
    def magnitude_ratios(self) -> list[float]:
        """How the blocks' residual changes from step to step, for MagCache.

        Raises:
            RuntimeError: diffusers tells them in another way now.
        """
        printed = io.StringIO()  # diffusers prints them; there is no other way to them
        config = MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
        with cached(self.pipe, config), contextlib.redirect_stdout(printed):
            self.run()
        lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
        if not lists:
            raise RuntimeError("MagCache's calibration gave no ratios: diffusers prints them in another form now.")
        return [float(ratio) for ratio in ast.literal_eval(lists[-1])]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A cache with one knob.

    Args:
        method: Its name, for people.
        knob: What is set; empty where nothing is.
        label: The setting for people, the value as {}.
        values: Values from mild to strong for so many steps.
        standard: Which of them is the default; of fewer values the last one.
        config: Makes the configuration.
    """

    method: str
    knob: str
    label: str
    values: Callable[[int], Sequence[float]]
    config: Callable[[Subject, Any], Any]
    standard: int = 1

    def default(self, steps: int) -> float:
        """Return the value to take where none is asked for."""
        values = self.values(steps)
        return values[min(self.standard, len(values) - 1)]


def planned_bac(subject: Subject, updates: int, **settings: Any) -> BACConfig:
    """Return BAC with a schedule made on a subject; `settings` are more of `BACConfig`."""
    config = BACConfig(updates=updates, **settings)
    return replace(config, schedule=subject.calibration.plan(config, subject.guidance))


def planned_steps(subject: Subject, updates: int) -> StepForecastConfig:
    """Return step forecasts with a schedule made on a subject."""
    config = StepForecastConfig(updates=updates)
    return replace(config, schedule=subject.step_calibration.plan(config, subject.guidance))


def _shares(steps: int, speeds: Sequence[float]) -> Sequence[int]:
    return sorted({max(2, round(steps / each)) for each in speeds}, reverse=True)


def _updates(steps: int) -> Sequence[int]:
    return _shares(steps, (2, 3, 5))


def _diffusers_taylorseer(subject: Subject, interval: int) -> TaylorSeerCacheConfig:
    model = subject.pipe.transformer
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=1,
        cache_identifiers=as_patterns([*attention_modules(model), *feed_forward_modules(model)]),
        taylor_factors_dtype=model.dtype,
    )


def _mag(subject: Subject, threshold: float) -> MagCacheConfig:
    ratios = subject.magnitude_ratios
    return MagCacheConfig(threshold=threshold, num_inference_steps=subject.steps, mag_ratios=list(ratios))


def _half(module: Any) -> float:
    """FasterCache's weight of the attention extrapolation, diffusers' default without its warning."""
    return 0.5


PRESETS: dict[str, Preset] = {
    "step-forecast": Preset(
        method="Step forecast",
        knob="updates",
        label="{} steps computed",
        # a little more than 3 and 4 times, of which some is lost to what else a step takes
        values=lambda steps: _shares(steps, (1.3, 1.6, 2, 2.5, 3.2, 4.2, 6)),
        config=planned_steps,
        standard=4,
    ),
    "cg-taylor": Preset(
        method="CG-Taylor",
        knob="threshold",
        # on pixeldit.cifar10 at threshold 0.03 6 dB better than with first order 1, 12 dB than with last order 1
        label="threshold {}, orders 2",
        values=lambda steps: (0.01, 0.02, 0.03, 0.04),
        config=lambda subject, value: CGTaylorConfig(threshold=value, first_order=2, last_order=2),
    ),
    "bac": Preset(
        method="BAC",
        knob="updates",
        label="{} updates",
        values=_updates,
        config=planned_bac,
    ),
    "bac-shared": Preset(
        method="BAC, shared steps",
        knob="updates",
        label="{} updates",
        values=_updates,
        config=partial(planned_bac, shared=True),
    ),
    "taylorseer": Preset(
        method="TaylorSeer",
        knob="interval",
        label="every {} steps",
        values=lambda steps: (2, 3, 5),
        config=lambda subject, value: TaylorSeerConfig(interval=value),
    ),
    "diffusers-taylorseer": Preset(
        method="TaylorSeer of diffusers",
        knob="interval",
        label="every {} steps",
        values=lambda steps: (2, 3, 5),
        config=_diffusers_taylorseer,
    ),
    "first-block": Preset(
        method="First Block Cache",
        knob="threshold",
        label="threshold {}",
        values=lambda steps: (0.05, 0.1, 0.2),
        config=lambda subject, value: FirstBlockCacheConfig(threshold=value),
    ),
    "mag": Preset(
        method="MagCache",
        knob="threshold",
        label="threshold {}",
        values=lambda steps: (0.06, 0.24),
        config=_mag,
    ),
    "pyramid": Preset(
        method="Pyramid Attention Broadcast",
        knob="interval",
        label="every {} steps",
        values=lambda steps: (2, 4),
        config=lambda subject, value: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=value),
    ),
    "faster": Preset(
        method="FasterCache",
        knob="",
        label="defaults",
        values=lambda steps: (0,),
        config=lambda subject, value: FasterCacheConfig(tensor_format="BCHW", attention_weight_callback=_half),
    ),
    "sea": Preset(
        method="SeaCache",
        knob="",
        label="defaults",
        values=lambda steps: (0,),
        config=lambda subject, value: SeaCacheConfig(),
    ),
    "text-kv": Preset(
        method="Text KV Cache",
        knob="",
        label="defaults",
        values=lambda steps: (0,),
        config=lambda subject, value: TextKVCacheConfig(),
    ),
}


def cache_setting(name: str, subject: Subject, value: float | None = None) -> CacheSetting:
    """Return a cache by name.

    Args:
        name: One of `PRESETS`.
        subject: What it is for.
        value: Of its knob; None takes the default.

    Raises:
        ValueError: There is no such preset, or the value is more updates than the subject has steps.
    """
    if name not in PRESETS:
        raise ValueError(f"No cache is called {name!r}; there are {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    if value is not None and preset.knob == "updates" and value > subject.steps:
        raise ValueError(f"{name}={value:g}: a run of {subject.steps} steps computes at most {subject.steps}.")
    value = preset.default(subject.steps) if value is None else value
    return CacheSetting(method=preset.method, setting=preset.label.format(value), config=preset.config(subject, value))


def cache_settings(subject: Subject, names: Sequence[str] = tuple(PRESETS)) -> list[CacheSetting]:
    """Return all settings of the named caches, each cache mild to strong."""
    return [cache_setting(name, subject, value) for name in names for value in PRESETS[name].values(subject.steps)]
