"""diffusers' own caches, checked before they are placed and fitted to models that they leave out."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_faster_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_sea_cache,
    apply_taylorseer_cache,
    apply_text_kv_cache,
)
from diffusers.hooks.first_block_cache import (
    _FBC_BLOCK_HOOK,
    _FBC_LEADER_BLOCK_HOOK,
    FBCBlockHook,
    FBCHeadBlockHook,
    FBCSharedBlockState,
)
from diffusers.hooks.taylorseer_cache import _PROJ_OUT_IDENTIFIERS, _TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from zoo.caching.hooks import ContextStates
from zoo.caching.registry import is_count, is_threshold, place, require
from zoo.caching.runs import RunTracker
from zoo.diffusion.blocks import (
    as_patterns,
    attention_modules,
    block_metadata,
    feed_forward_modules,
    takes,
    transformer_blocks,
)

_KEEP_TEXT_HOOK = "zoo_keep_text"


def _block_stack(config: Any, model: nn.Module, least: int) -> list[nn.Module]:
    """Return the blocks of a model if a cache that skips all but the first can do so."""
    cache, name = type(config).__name__, type(model).__name__
    blocks = transformer_blocks(model)
    if len(blocks) < least:
        raise ValueError(
            f"{cache} needs at least {least} transformer blocks, {name} has {len(blocks)} that it can see."
        )
    if hasattr(model, "temporal_transformer_blocks"):
        raise ValueError(f"{cache} cannot skip blocks of {name}: its spatial and temporal blocks take turns.")
    pairs = {block_metadata(block).return_encoder_hidden_states_index is not None for block in blocks.values()}
    if len(pairs) > 1:
        raise ValueError(
            f"{cache} cannot skip blocks of {name}: some return image and text apart, others joined. "
            f"TaylorSeerCacheConfig works on it."
        )
    return list(blocks.values())


class _Gate(FBCHeadBlockHook):
    """First block of First Block Cache that computes where the change is not a number, and always at threshold 0."""

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: Tensor) -> bool:
        previous = self.state_manager.get_state().head_block_residual
        if previous is None or self.threshold == 0 or previous.shape != hidden_states_residual.shape:
            return True
        change = (hidden_states_residual - previous).abs().mean() / previous.abs().mean()
        return not (change <= self.threshold).item()


class _KeepText(ModelHook):
    """Return the text stream as it came in from a last block that drops it, for First Block Cache to subtract."""

    def __init__(self) -> None:
        super().__init__()
        self._text: Tensor | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._metadata = block_metadata(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = self._metadata.encoder_hidden_states_argument_name
        self._text = self._metadata._get_parameter_from_args_kwargs(name, args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        text, self._text = self._text, None
        return tuple(text if value is None else value for value in output)


@place.register
def _first_block(config: FirstBlockCacheConfig, model: nn.Module, run: RunTracker) -> None:
    require(is_threshold(config.threshold), config, "threshold", "a number from 0")
    blocks = _block_stack(config, model, least=2)
    for block in blocks:
        if not takes(block, "hidden_states"):
            raise ValueError(f"FirstBlockCacheConfig needs blocks that take hidden_states, not {type(block).__name__}.")
    if getattr(unwrap_module(blocks[-1]), "context_pre_only", False):  # SD3: it returns None for the text
        HookRegistry.check_if_exists_or_initialize(blocks[-1]).register_hook(_KeepText(), _KEEP_TEXT_HOOK)
    # diffusers' hooks under diffusers' names; only the gate is ours, since theirs skips on NaN
    states = ContextStates(FBCSharedBlockState)
    states.unit = "other blocks"
    gate = _Gate(states, config.threshold)
    HookRegistry.check_if_exists_or_initialize(blocks[0]).register_hook(gate, _FBC_LEADER_BLOCK_HOOK)
    for block in blocks[1:]:
        hook = FBCBlockHook(states, is_tail=block is blocks[-1])
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _FBC_BLOCK_HOOK)


@place.register
def _mag(config: MagCacheConfig, model: nn.Module, run: RunTracker) -> None:
    require(is_threshold(config.threshold), config, "threshold", "a number from 0")
    require(is_count(config.max_skip_steps, 0), config, "max_skip_steps", "a whole number from 0")
    require(is_count(config.num_inference_steps, 1), config, "num_inference_steps", "a whole number from 1")
    require(is_threshold(config.retention_ratio), config, "retention_ratio", "a number from 0 to 1")
    for block in _block_stack(config, model, least=1):
        name = block_metadata(block).hidden_states_argument_name
        if not takes(block, name):
            raise ValueError(f"MagCacheConfig needs blocks that take {name}, not {type(block).__name__}.")
    if config.threshold == 0:
        config.max_skip_steps = 0  # diffusers skips at an error of exactly 0; threshold 0 is to mean no cache
    apply_mag_cache(model, config)


@place.register
def _taylor_seer(config: TaylorSeerCacheConfig, model: nn.Module, run: RunTracker) -> None:
    require(is_count(config.cache_interval, 1), config, "cache_interval", "a whole number from 1")
    require(is_count(config.max_order, 0), config, "max_order", "a whole number from 0")
    first, last = config.disable_cache_before_step, config.disable_cache_after_step
    # nothing can be forecast before a first full step
    require(is_count(first, 1), config, "disable_cache_before_step", "a whole number from 1")
    require(last is None or is_count(last, 0), config, "disable_cache_after_step", "None or a whole number from 0")
    names = [name for name, _ in model.named_modules()]

    def matching(patterns: Any) -> list[str]:
        return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]

    suggested = as_patterns([*attention_modules(model), *feed_forward_modules(model)])
    hint = f"Modules that fit {type(model).__name__}: cache_identifiers={suggested}." if suggested else ""
    if config.use_lite_mode and not matching(_PROJ_OUT_IDENTIFIERS):
        raise ValueError(
            f"use_lite_mode forecasts a module called proj_out, and {type(model).__name__} has none: its blocks would "
            f"be left out and nothing put in their place. {hint}"
        )
    if not config.use_lite_mode and not matching(config.cache_identifiers or _TRANSFORMER_BLOCK_IDENTIFIERS):
        if config.cache_identifiers or config.skip_predict_identifiers or not attention_modules(model):
            tried = config.cache_identifiers or "diffusers' default"
            raise ValueError(f"cache_identifiers={tried} match no module of {type(model).__name__}. {hint}".rstrip())
        # the default is meant to match all attention modules of the blocks, but knows only those called "attn"
        config.cache_identifiers = as_patterns(attention_modules(model))
    apply_taylorseer_cache(model, config)


@place.register
def _pyramid(config: PyramidAttentionBroadcastConfig, model: nn.Module, run: RunTracker) -> None:
    kinds = ("spatial", "temporal", "cross")
    for kind in kinds:
        name = f"{kind}_attention_block_skip_range"
        value = getattr(config, name)
        require(value is None or is_count(value, 1), config, name, "None or a whole number from 1")
    if all(getattr(config, f"{kind}_attention_block_skip_range") is None for kind in kinds):
        config.spatial_attention_block_skip_range = 2  # diffusers' default, without its warning
    if config.current_timestep_callback is None:
        config.current_timestep_callback = run.current_timestep
    apply_pyramid_attention_broadcast(model, config)


@place.register
def _faster(config: FasterCacheConfig, model: nn.Module, run: RunTracker) -> None:
    for name in ("spatial_attention_block_skip_range", "unconditional_batch_skip_range"):
        require(is_count(getattr(config, name), 1), config, name, "a whole number from 1")
    timestep = config.current_timestep_callback or run.current_timestep
    # diffusers takes any timestep within its range for one with features stored, also that of a run's first step
    config.current_timestep_callback = lambda: math.inf if run.begins_branch else timestep()
    if takes(model, "class_labels"):  # batched for guidance like the rest, but unknown to diffusers' list
        config._unconditional_conditional_input_kwargs_identifiers = (
            *config._unconditional_conditional_input_kwargs_identifiers,
            "class_labels",
        )
    apply_faster_cache(model, config)


@place.register
def _sea(config: SeaCacheConfig, model: nn.Module, run: RunTracker) -> None:
    if config.raw_vision_callback is None and type(model).__name__ not in (
        "Cosmos3OmniTransformer",
        "WanTransformer3DModel",
    ):
        raise ValueError(
            f"SeaCacheConfig knows Wan and Cosmos3 only: on {type(model).__name__} it would compute every step in full."
            f" Give it a raw_vision_callback."
        )
    apply_sea_cache(model, config)


@place.register
def _text_kv(config: TextKVCacheConfig, model: nn.Module, run: RunTracker) -> None:
    apply_text_kv_cache(model, config)
