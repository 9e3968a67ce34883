"""Experts weights averaging: train some feed-forward layers as several experts, end as one dense layer.

Experts Weights Averaging: A New General Training Scheme for Vision Transformers, https://arxiv.org/abs/2308.06093. The
paper's number of experts, share rate and schedule could not be read; the defaults are ours.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

__all__ = [
    "EWAConfig",
    "ExpertsWeightsAveraging",
    "apply",
    "average",
    "collapse",
    "collapse_state_dict",
    "expert_spread",
]

_EXPERT_KEY = re.compile(r"(.*\.)?experts\.\d+\.(.+)")
_TIMM = (Mlp, GluMlp, SwiGLU)


@dataclass(frozen=True, kw_only=True)
class EWAConfig:
    """How feed-forward layers are trained.

    Args:
        experts: Experts of a layer.
        share_rate: How far each expert moves to the mean of the others after an optimizer step, 0 ... 1.
        every: Take every so many feed-forward layers, the last one included.
        noise: Standard deviation of noise on the experts' start weights, relative to each weight's own; 0 starts all
            as copies, for fine-tuning.
        pattern: Regular expression for the names of the layers; None takes all.

    Raises:
        ValueError: A number is out of range.
    """

    experts: int = 4
    share_rate: float = 0.3
    every: int = 2
    noise: float = 0.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"experts must be at least 2, got {self.experts}.")
        if not 0 <= self.share_rate <= 1:
            raise ValueError(f"share_rate must lie in 0 ... 1, got {self.share_rate}.")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}.")
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}.")


class ExpertsWeightsAveraging(nn.Module):
    """Several feed-forward experts: in training each takes a random equal part of the tokens, else their mean runs.

    There is no router and no loss of its own: a step costs what the dense layer does.

    Args:
        dense: The layer; all experts start from its weights.
        experts: How many.
        noise: See `EWAConfig`.

    Shape:
        (..., C) -> (..., C'), as the dense layer.
    """

    def __init__(self, dense: nn.Module, experts: int, noise: float = 0.0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(experts))
        if noise > 0:
            with torch.no_grad():
                for parameter in self.experts.parameters():
                    scale = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
                    parameter.add_(noise * scale * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if not self.training:
            return torch.func.functional_call(self.experts[0], self.mean(), (x,))
        order = torch.randperm(len(rows), device=rows.device)
        parts = [
            expert(rows[part]) for expert, part in zip(self.experts, order.tensor_split(len(self.experts)), strict=True)
        ]
        out = torch.cat(parts)[order.argsort()]
        return out.view(*x.shape[:-1], out.shape[-1])

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the experts' weights by name."""
        names = [name for name, _ in self.experts[0].named_parameters()]
        return {name: torch.stack([expert.get_parameter(name) for expert in self.experts]).mean(0) for name in names}

    @torch.no_grad()
    def average(self, share_rate: float) -> None:
        """Move every expert towards the mean of the others, in place; the optimizer's moments are left alone.

        theta_i <- (1 - b) theta_i + b / (N - 1) sum of the others: the mean of all stays, and every deviation from it
        is multiplied by 1 - b N / (N - 1).
        """
        count = len(self.experts)
        for name, mean in self.mean().items():
            for expert in self.experts:
                expert.get_parameter(name).lerp_(mean, share_rate * count / (count - 1))

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return one layer with the mean of the experts' weights."""
        dense = copy.deepcopy(self.experts[0])
        for name, mean in self.mean().items():
            dense.get_parameter(name).copy_(mean)
        return dense.train(self.training)


def apply(model: nn.Module, config: EWAConfig | None = None) -> list[str]:
    """Turn feed-forward layers into experts, in place, and return their names.

    Call `average` after every optimizer step, and `collapse` at the end. In a training
    `zoo.tasks.callbacks.AverageExperts` applies and averages, and `collapse_state_dict` makes its checkpoints dense.

    Args:
        model: With feed-forward layers of timm or diffusers.
        config: How.

    Raises:
        ValueError: No layer fits, or the model has such experts already.
    """
    config = config or EWAConfig()
    if _layers(model):
        raise ValueError(f"{type(model).__name__} has experts to average already.")
    found = [
        name
        for name, module in model.named_modules()
        if _is_ffn(module) and (config.pattern is None or re.search(config.pattern, name))
    ]
    chosen = found[::-1][:: config.every][::-1]
    if not chosen:
        wanted = f" whose name matches {config.pattern!r}" if config.pattern else ""
        raise ValueError(f"{type(model).__name__} has no feed-forward layer of timm or diffusers{wanted}.")
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        dense = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, ExpertsWeightsAveraging(dense, config.experts, config.noise))
    return chosen


def _is_ffn(module: nn.Module) -> bool:
    """Tell a feed-forward layer; diffusers is not imported for it."""
    kind = type(module)
    return isinstance(module, _TIMM) or (kind.__name__ == "FeedForward" and kind.__module__.startswith("diffusers."))


def average(model: nn.Module, share_rate: float) -> None:
    """Move the experts of every layer towards each other; call it after an optimizer step."""
    for layer in _layers(model).values():
        layer.average(share_rate)


def collapse(model: nn.Module) -> list[str]:
    """Replace the experts of every layer by their mean, in place, and return the layers' names."""
    layers = _layers(model)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to_dense())
    return list(layers)


def collapse_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense model's state dict from one with experts; other entries are kept.

    Args:
        state_dict: Keys NAME.experts.NUMBER.PARAMETER become NAME.PARAMETER.
    """
    dense: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for key, value in state_dict.items():
        found = _EXPERT_KEY.fullmatch(key)
        if found is None:
            dense[key] = value
        else:
            experts.setdefault(f"{found[1] or ''}{found[2]}", []).append(value)
    return dense | {key: torch.stack(values).mean(0) for key, values in experts.items()}


@torch.no_grad()
def expert_spread(model: nn.Module) -> float:
    """Return how far experts are from their mean, relative to its norm, the mean over all of them."""
    spreads = []
    for layer in _layers(model).values():
        mean = layer.mean()
        norm = torch.stack([value.double().square().sum() for value in mean.values()]).sum().sqrt()
        for expert in layer.experts:
            squares = [(expert.get_parameter(name) - value).double().square().sum() for name, value in mean.items()]
            spreads.append(float(torch.stack(squares).sum().sqrt() / norm))
    return sum(spreads) / len(spreads) if spreads else 0.0


def _layers(model: nn.Module) -> dict[str, ExpertsWeightsAveraging]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertsWeightsAveraging)}
