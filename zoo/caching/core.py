"""Switch caches of diffusion models on and off, with one call for every method and model."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CacheMixin, DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from zoo.caching import (  # noqa: F401  they register their configurations
    bac,
    builtin,
    cg_taylor,
    step_forecast,
    taylorseer,
)
from zoo.caching.discovery import require_own_blocks
from zoo.caching.hooks import (
    PlacedHook,
    PrivateStates,
    placed_hooks,
    refresh_contexts,
    refuse_copy,
    remove_hooks,
    share_contexts,
    tell_contexts,
)
from zoo.caching.registry import place
from zoo.caching.runs import RunTracker, takes_time
from zoo.caching.saved import find_setting
from zoo.caching.summary import CacheSummary, DenoiserSummary
from zoo.layers.own import engine_in

__all__ = [
    "active_cache",
    "cache_summary",
    "cached",
    "denoisers",
    "disable_cache",
    "enable_cache",
    "is_pipeline",
    "require_one_denoiser",
    "reset_cache",
]

_ACTIVE = "_zoo_cache"
_RESET = "_reset_stateful_cache"  # what pipelines call on each component at the end
_DISABLE = "disable_cache"  # the model's own, which knows diffusers' caches only


@dataclass
class _ActiveCache:
    """What has to be undone."""

    config: Any
    hooks: list[PlacedHook]
    run: RunTracker
    handles: tuple[torch.utils.hooks.RemovableHandle, ...]

    __reduce__ = refuse_copy

    def reset(self, recurse: bool = True) -> None:
        """Forget everything stored, so that the next call begins a run; `recurse` is what diffusers calls it with."""
        self.run.private.reset()
        for placed in self.hooks:
            if placed.in_place and placed.hook._is_stateful:
                placed.hook.reset_state(placed.module)
        self.run.forget()

    def nbytes(self) -> int | None:
        """Memory held by stored features now, bytes; None for those of diffusers' caches that do not tell."""
        caches = {id(cache): cache for placed in self.hooks if (cache := getattr(placed.hook, "cache", None))}
        holders = [*caches.values(), *self.run.observed]
        return sum(holder.nbytes for holder in holders) if holders else None


def enable_cache(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: Any,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> None:
    """Let a diffusion model leave out computation that an earlier step has done.

    Works on models with and without diffusers' `CacheMixin`, and whether or not their pipeline enters a
    `cache_context`. Where it enters none and calls its denoiser more than once a step, the branches of guidance are
    told apart by what they are conditioned on; a call that fits none of them is computed in full. What is stored is
    dropped at the start of each run, also after a run that was aborted, and whichever pipeline makes it. In training
    mode everything is computed. Two threads in one model at the same time are refused.

    Compile and offload first, enable the cache second. Disable it before copying or pickling the model, which is
    refused otherwise.

    Args:
        pipe_or_model: A pipeline, all of whose denoisers get the cache, or a denoiser. Modular pipelines count.
        config: `StepForecastConfig`, `CGTaylorConfig`, `BACConfig` or `TaylorSeerConfig`, or one of diffusers' own
            (`FirstBlockCacheConfig`, `TaylorSeerCacheConfig`, `MagCacheConfig`, `PyramidAttentionBroadcastConfig`,
            `FasterCacheConfig`, `SeaCacheConfig`, `TextKVCacheConfig`). A missing `current_timestep_callback` is filled
            in. A `TaylorSeerCacheConfig` without identifiers takes the attention modules. Threshold 0, interval 1 and a
            schedule of all steps give exactly what the model gives without a cache. "auto" is the setting that
            `zoo tune-cache` has saved for this model and scheduler.
        steps: Of the scheduler, where "auto" has several settings to choose from.
        guidance: Guidance scale, likewise.

    Raises:
        ValueError: A cache is on already; "auto" finds no setting; a number is out of range; the method cannot work on
            this model, or would find nothing to do in it. Nothing is left behind then.
        TypeError: What was given is no pipeline or model, or no configuration of a cache.

    Example:
        >>> zoo.enable_cache(pipe, zoo.CGTaylorConfig(threshold=0.02))
        >>> images = pipe(class_labels=["cat"] * 8).images
        >>> print(zoo.cache_summary(pipe))
        >>> zoo.disable_cache(pipe)
    """
    pipeline, models = denoisers(pipe_or_model)
    tuned_steps = None
    if isinstance(config, str) and config == "auto":
        saved = find_setting(
            pipe_or_model if pipeline is not None else models[0], models[0], steps=steps, guidance=guidance
        )
        config, tuned_steps = saved.config, saved.num_steps
    elif steps is not None or guidance is not None:
        raise ValueError('steps and guidance choose among saved settings: they go with config="auto".')
    for model in models:
        if (active := _active_config(model)) is not None:
            raise ValueError(
                f"{type(model).__name__} has a cache already ({type(active).__name__}): call zoo.disable_cache first."
            )
        if engine_in(model) is not None:
            raise ValueError(
                f"A cache skips blocks of the denoiser, and an engine runs this {type(model).__name__} whole: choose "
                'one; zoo.accelerate(..., engine="eager") takes the engine off.'
            )
    enabled: list[nn.Module] = []
    try:
        for model in models:
            _enable(model, config, pipeline, tuned_steps)
            enabled.append(model)
    except BaseException:
        for model in enabled:
            _disable(model)
        raise


def disable_cache(pipe_or_model: DiffusionPipeline | nn.Module) -> None:
    """Take the cache away; the model then computes exactly what it did before. Does nothing where there is none.

    Args:
        pipe_or_model: What `enable_cache`, zoo's or diffusers', was called on.

    Raises:
        RuntimeError: Another hook was placed over the cache and has to go first.
    """
    for model in denoisers(pipe_or_model)[1]:
        if _ACTIVE in model.__dict__:
            _disable(model)
        elif isinstance(model, CacheMixin) and model.is_cache_enabled:
            model.disable_cache()


@contextmanager
def cached(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: Any,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Iterator[None]:
    """Have a cache within a `with` block; afterwards it is gone, also after an exception.

    Args:
        pipe_or_model: As for `enable_cache`.
        config: As for `enable_cache`.
        steps: As for `enable_cache`.
        guidance: As for `enable_cache`.
    """
    enable_cache(pipe_or_model, config, steps=steps, guidance=guidance)
    try:
        yield
    finally:
        disable_cache(pipe_or_model)


def reset_cache(pipe_or_model: DiffusionPipeline | nn.Module) -> None:
    """Forget what the cache has stored. Runs do this themselves; LoRA or prompt changes within one are up to you.

    Args:
        pipe_or_model: As for `enable_cache`.
    """
    for model in denoisers(pipe_or_model)[1]:
        if _ACTIVE in model.__dict__:
            model.__dict__[_ACTIVE].reset()
        elif isinstance(model, CacheMixin):
            model._reset_stateful_cache()


def cache_summary(pipe_or_model: DiffusionPipeline | nn.Module) -> CacheSummary:
    """Say what the cache did in the last run: what was computed and skipped, gate errors, memory, time.

    Args:
        pipe_or_model: As for `enable_cache`.

    Raises:
        ValueError: No cache of zoo's is on.

    Example:
        >>> print(zoo.cache_summary(pipe))
    """
    found = []
    for model in denoisers(pipe_or_model)[1]:
        active = model.__dict__.get(_ACTIVE)
        if active is None:
            raise ValueError(f"{type(model).__name__} has no cache of zoo's: call zoo.enable_cache and run it first.")
        found.append(DenoiserSummary.of(type(model).__name__, active.config, active.run.log, active.nbytes()))
    return CacheSummary(tuple(found))


def active_cache(pipe_or_model: DiffusionPipeline | nn.Module) -> Any:
    """Return the configuration of the cache that is on, zoo's or diffusers'; None where there is none.

    Args:
        pipe_or_model: As for `enable_cache`; of several denoisers the first one with a cache counts.
    """
    found = (_active_config(model) for model in denoisers(pipe_or_model)[1])
    return next((config for config in found if config is not None), None)


def is_pipeline(value: Any) -> bool:
    """Return whether it is a pipeline of diffusers, perhaps a modular one."""
    modular = sys.modules.get("diffusers.modular_pipelines.modular_pipeline")  # not imported: nothing is of it
    return isinstance(value, DiffusionPipeline) or (modular is not None and isinstance(value, modular.ModularPipeline))


def denoisers(pipe_or_model: Any) -> tuple[DiffusionPipeline | None, list[nn.Module]]:
    """Return the pipeline, if it is one, and the denoisers.

    Args:
        pipe_or_model: As for `enable_cache`.

    Raises:
        ValueError: The pipeline has no denoiser.
        TypeError: It is neither a pipeline nor a model.
    """
    if is_pipeline(pipe_or_model):
        components = pipe_or_model.components
        denoisers = [unwrap_module(each) for name, each in components.items() if _is_denoiser(name, each)]
        if not denoisers:
            raise ValueError(
                f"{type(pipe_or_model).__name__} has no denoiser among its parts: {', '.join(components)}."
            )
        return pipe_or_model, denoisers
    if isinstance(pipe_or_model, nn.Module):
        return None, [unwrap_module(pipe_or_model)]
    raise TypeError(f"A cache needs a diffusers pipeline or a model, got {type(pipe_or_model).__name__}.")


def require_one_denoiser(pipe_or_model: Any) -> None:
    """Raise ValueError that names them where a pipeline has several denoisers."""
    pipeline, models = denoisers(pipe_or_model)
    if pipeline is not None and len(models) > 1:
        names = [f"pipe.{name}" for name, each in pipeline.components.items() if _is_denoiser(name, each)]
        raise ValueError(f"A calibration is of one denoiser: give it {' or '.join(names)}.")


def _is_denoiser(name: str, component: Any) -> bool:
    """Return whether a part of a pipeline denoises: by its name, or a model that takes a time and is no ControlNet."""
    if not isinstance(component, nn.Module) or "controlnet" in name:
        return False
    named = name.startswith(("transformer", "unet"))
    return named or (isinstance(component, ModelMixin) and takes_time(unwrap_module(component)))


def _active_config(model: nn.Module) -> Any:
    """Return the configuration of the cache that is on, ours or diffusers', or None."""
    if isinstance(model, CacheMixin):
        return model._cache_config
    ours = model.__dict__.get(_ACTIVE)
    return None if ours is None else ours.config


def _enable(model: nn.Module, config: Any, pipeline: DiffusionPipeline | None, tuned_steps: int | None) -> None:
    before = {id(placed.hook) for placed in placed_hooks(model)}
    run = RunTracker(model, pipeline)

    def new_hooks() -> list[PlacedHook]:
        return [placed for placed in placed_hooks(model) if id(placed.hook) not in before]

    try:
        require_own_blocks(model)
        place(copy.copy(config), model, run)
        hooks = new_hooks()
        name, method = type(model).__name__, type(config).__name__
        if all(placed.module is model and not hasattr(placed.hook, "works_alone") for placed in hooks):
            raise ValueError(f"{method} finds no module to work on in {name}.")
        if hasattr(model, "_hf_hook") and any(placed.module is model for placed in hooks):
            raise ValueError(f"{method} must be enabled before offloading: it hooks the whole {name}.")
    except BaseException:
        remove_hooks(model, new_hooks())
        raise
    run.states = share_contexts(hooks) or [tell_contexts(hooks)]
    run.observed = [states for states in run.states if states.unit]
    run.private = PrivateStates(hooks)
    run.tuned_steps = tuned_steps
    active = _ActiveCache(config, hooks, run, run.attach(model))
    run.on_new_run = active.reset
    refresh_contexts(model)
    setattr(model, _ACTIVE, active)
    setattr(model, _RESET, active.reset)
    setattr(model, _DISABLE, functools.partial(_disable, model))
    if isinstance(model, CacheMixin):
        model._cache_config = config


def _disable(model: nn.Module) -> None:
    active = model.__dict__[_ACTIVE]
    remove_hooks(model, active.hooks)
    for handle in active.handles:
        handle.remove()
    for name in (_ACTIVE, _RESET, _DISABLE):
        delattr(model, name)
    if isinstance(model, CacheMixin):
        model._cache_config = None
