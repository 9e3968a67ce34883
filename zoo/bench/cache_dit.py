"""cache-dit as a rival: its DBCache with and without TaylorSeer, set as its documents advise for few blocks.

It is optional (`pip install cache-dit`), and works on the pipelines that it knows, and on our PixelDiT through its own
adapter for DiT. Its state is made anew at each call of the pipeline, so that every run is a first one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoo.caching.presets import STEPS, CacheSetting
from zoo.diffusion.pixel_dit import PixelDiT

__all__ = ["CacheDitSetting", "cache_dit_settings"]

_WARMUP = 4  # first steps computed in full: its default of 8 of 50 steps leaves it slower
_THRESHOLDS = (0.06, 0.12, 0.24)


@dataclass(frozen=True, kw_only=True)
class CacheDitSetting(CacheSetting):
    """A setting of cache-dit; `config` is its `DBCacheConfig`.

    Args:
        calibrator: Its TaylorSeer configuration; None reuses what is stored.
    """

    calibrator: Any = None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """Have the cache within a `with` block.

        Raises:
            ValueError: cache-dit does not know the pipeline.
        """
        import cache_dit

        model = pipe.transformer
        before = set(vars(model))
        target = _adapter(pipe) if isinstance(model, PixelDiT) else pipe
        try:
            cache_dit.enable_cache(target, cache_config=self.config, calibrator_config=self.calibrator)
            yield
        finally:
            cache_dit.disable_cache(pipe)
            for name in set(vars(model)) - before:  # its patched forward stays behind
                delattr(model, name)

    def notes(self, pipe: Any) -> Mapping[str, float]:
        """Return the steps computed in the last run."""
        import cache_dit

        found = cache_dit.summary(pipe, logging=False)
        stats = found[0] if isinstance(found, list) else found
        return {STEPS: float(stats.accumulated_executed_steps - stats.accumulated_cached_steps)}


def cache_dit_settings(steps: int) -> list[CacheSetting]:
    """Return what of cache-dit is measured, mild to strong; nothing where it is not installed.

    Args:
        steps: Of the scheduler.
    """
    if importlib.util.find_spec("cache_dit") is None:
        return []
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it reads it when it is imported
    import cache_dit

    found: list[CacheSetting] = []
    for method, calibrator in (
        ("cache-dit DBCache", None),
        ("cache-dit DBCache, TaylorSeer", cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)),
    ):
        for threshold in _THRESHOLDS:
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=threshold,
                max_warmup_steps=_WARMUP,
                num_inference_steps=steps,
            )
            setting = f"F1B0, threshold {threshold}"
            found.append(CacheDitSetting(method=method, setting=setting, config=config, calibrator=calibrator))
    return found


def _adapter(pipe: Any) -> Any:
    """Say how a PixelDiT is cached: as a DiT whose blocks take the conditioning vector in place of the timestep."""
    import cache_dit
    from cache_dit.caching.patch_functors.functor_dit import DiTPatchFunctor

    class PixelDiTFunctor(DiTPatchFunctor):  # type: ignore[misc]
        def apply(self, transformer: Any, *args: Any, **kwargs: Any) -> Any:
            self._apply(transformer)
            forward = transformer.forward

            def conditioned(hidden_states: Any, timestep: Any = None, class_labels: Any = None, **more: Any) -> Any:
                vector = transformer.conditioning(timestep, class_labels, hidden_dtype=hidden_states.dtype)
                return forward(hidden_states, timestep=vector, **more)

            transformer.forward = conditioned
            return transformer

    return cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=PixelDiTFunctor(),
        has_separate_cfg=False,
    )
