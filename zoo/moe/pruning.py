"""Expert pruning: normal experts that a trained mixture hardly uses leave it.

"reap" is the score of REAP (https://arxiv.org/abs/2510.13999): the mean, over the tokens that take an expert, of its
gate weight times the norm of what it gives. Its abstract and summaries were read, not its experiments, which are on
language models; that every layer of a model loses as many experts (so that one layout describes it) is our reading.
Softmax gates run over the experts that stay, so that their weights rise by what went; "softmax_renorm", "sigmoid" and
"unit" change no token whose experts all stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.technique import FFNReport, LayerChange, evaluating, listed, output_error, outputs_of, require_types
from zoo.moe.dense2moe import amend_record, expert_layers
from zoo.moe.experts import MoEFFN
from zoo.profiling import count_params

__all__ = ["ExpertPruneConfig", "ExpertScores", "prune_experts"]

ExpertScores = Literal["reap", "usage", "random"]


@dataclass(frozen=True, kw_only=True)
class ExpertPruneConfig:
    """How many normal experts stay in every layer, and which.

    Args:
        keep: Normal experts that stay, at least 1.
        scores: "reap": mean of gate weight times norm of the expert's output over its tokens; "usage": tokens that take
            it; "random".
        seed: Of random scores.

    Raises:
        ValueError: `keep` is below 1, or `scores` is unknown.
    """

    keep: int
    scores: ExpertScores = "reap"
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if self.keep < 1:
            raise ValueError(f"keep is a number of experts, at least 1, got {self.keep}.")


def prune_experts(model: nn.Module, config: ExpertPruneConfig, data: Iterable[Any] | None = None) -> FFNReport:
    """Drop normal experts of every mixture of a trained model, in place; a diffusers class is saved with what is left.

    Args:
        model: Made by `zoo.moe.convert` or `zoo.moe.sigma_moe.apply`.
        config: How.
        data: Batches of inputs, or of a denoiser's arguments; not needed for random scores.

    Raises:
        ValueError: The model has no experts, has as few already or takes more for a token, or data is missing.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts: zoo.moe.convert makes some.")
    for name, layer in layers.items():
        free = layer.outputs - layer.experts
        if not config.keep < layer.experts or layer.top_k > config.keep + free:
            raise ValueError(
                f"{name} has {layer.experts} experts of which a token takes {layer.top_k}: keep must lie in "
                f"{max(1, layer.top_k - free)} ... {layer.experts - 1}, got {config.keep}."
            )
    batches = listed(data, "Pruning experts", needed=config.scores != "random")
    sums = {name: torch.zeros(2, layer.experts, dtype=torch.float64) for name, layer in layers.items()}
    outputs: list[Tensor] = []
    if batches:
        with evaluating(model), ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.router.register_forward_hook(_watch(layer, sums[name])).remove)
            outputs = outputs_of(model, batches)
    generator = torch.Generator().manual_seed(config.seed)
    params_before, changes = count_params(model), []
    for name, layer in layers.items():
        counts, strengths = sums[name]
        scores = strengths / counts.clamp_min(1)
        if config.scores != "reap":
            scores = counts if config.scores == "usage" else torch.rand(layer.experts, generator=generator)
        kept = scores.argsort(descending=True, stable=True)[: config.keep].sort().values
        before, params, macs = layer.experts, count_params(layer), layer.macs
        layer.keep_experts(kept)
        changes.append(
            LayerChange(
                name=name,
                what=f"{before} -> {config.keep} experts",
                params=(params, count_params(layer)),
                macs=(macs, layer.macs),
            )
        )
    amend_record(model, lambda facts: _less(facts, config.keep))
    return FFNReport(
        technique="prune_experts",
        layers=tuple(changes),
        params=(params_before, count_params(model)),
        error=output_error(model, batches, outputs) if batches else None,
    )


def _less(facts: dict[str, Any], keep: int) -> None:
    """Note that so many experts are left."""
    facts.pop("kept", None)  # of older files
    facts["pruned"] = facts["experts"] - keep


def _watch(layer: MoEFFN, sums: Tensor) -> Any:
    """Return a hook of a layer's router that adds up tokens, and weights times norms, of every expert."""

    def hook(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        rows, (weights, index, _) = args[0], output
        for number in range(layer.experts):
            token, place = (index == number).nonzero(as_tuple=True)
            if len(token):
                given = F.linear(layer.expert(number, rows[token]), layer.experts_down[number])
                sums[0, number] += len(token)
                sums[1, number] += float((weights[token, place].abs() * given.float().norm(dim=1)).sum())

    return hook
