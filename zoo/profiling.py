"""Count models: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_macs_of_copy", "count_params", "denoiser_inputs"]


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Return the multiply-accumulates of matrix products, convolutions and attention in one forward pass.

    Norms, activations and additions are not counted. What fused kernels would do, of which some count as nothing, is
    done by single products meanwhile, so that a count is the same on every device.

    Args:
        model: Usually on the meta device, where nothing is computed.
        *inputs: Arguments of `forward`, on the model's device.
        **named: Keyword arguments of `forward`.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of nn.TransformerEncoderLayer
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs, **named)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def count_macs_of_copy(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Count as `count_macs` does for a model that keeps its weights: on a copy on the meta device.

    A network whose forward reads values, as experts do, is counted where it is.

    Args:
        model: Anywhere; it stays as it is.
        *inputs: Arguments of `forward`, on the model's device: tensors, and lists, tuples and dictionaries of them.
        **named: Keyword arguments of `forward`, likewise.
    """
    try:
        return count_macs(copy.deepcopy(model).to("meta"), *_on_meta(inputs), **_on_meta(named))
    except RuntimeError:
        return count_macs(model, *inputs, **named)


def _on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_meta(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_on_meta, value))
    return value.to("meta") if isinstance(value, Tensor) else value


def denoiser_inputs(model: nn.Module, size: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one sample of noise for a denoiser of ours, and its other inputs by name.

    Args:
        model: The denoiser.
        size: Height and width of an image in pixels; None is the model's own.
    """
    config: Any = model.config
    named = {"timestep": torch.full((1,), 50.0)}
    if "observation_dim" in config:
        named["encoder_hidden_states"] = torch.randn(1, config.n_obs_steps, config.observation_dim)
        return torch.randn(1, config.horizon, config.action_dim), named
    side = size or config.sample_size
    named["class_labels"] = torch.zeros(1, dtype=torch.long)
    return torch.randn(1, config.in_channels, side, side), named
