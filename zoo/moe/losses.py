"""Losses of the distillation of mixtures of experts (Dense2MoE, https://arxiv.org/abs/2510.09094)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.router import Router

__all__ = ["balance_loss", "feature_loss", "feature_weights", "record_balance"]


def balance_loss(logits: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return n sum_i s_i f_i P_i: 1 where tokens are spread evenly, n where all take one expert at k = 1.

    f_i is the share of choices that went to expert i and gives no gradient, P_i the mean softmax probability.

    Args:
        logits: (T, n).
        index: (T, k), the chosen experts.
        scale: (n,) weight of each expert, s; None is 1. MoE++ gives experts without computation less.
    """
    count = logits.shape[1]
    share = torch.bincount(index.flatten(), minlength=count).to(logits.dtype) / index.numel()
    terms = share * torch.softmax(logits, dim=-1).mean(0)
    return count * (terms if scale is None else terms * scale).sum()


@contextmanager
def record_balance(model: nn.Module, free_weight: float = 0.75) -> Iterator[list[Tensor]]:
    """Collect the balance loss of every router that runs inside the context.

    What gradient checkpointing runs again in the backward pass is not collected again.

    Args:
        model: Holds the routers.
        free_weight: Weight of experts without computation, tau of MoE++; less draws more tokens to them.

    Yields:
        The losses, one a router; their mean does not depend on the depth.
    """
    losses: list[Tensor] = []

    def keep(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        assert isinstance(router, Router)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass, as torch.utils.checkpoint asks too
            return
        _, index, logits = output
        scale = None
        if logits.shape[1] > router.experts:
            scale = torch.where(torch.arange(logits.shape[1], device=logits.device) < router.experts, 1.0, free_weight)
        # what the loss saves is none of what a checkpoint around the router saves and computes again
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            losses.append(balance_loss(logits, index, scale))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Router):
                hooks.callback(module.register_forward_hook(keep).remove)
        yield losses


def feature_weights(distance: Tensor, errors: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weight of each layer's feature error; numbers without a gradient.

    w_l = L_distill / L_l * mean over layers of the teacher's norm / its norm in layer l: every weighted term has the
    size of the output loss, and only its gradient tells of the layer. So log the errors, not the weighted sum.

    Args:
        distance: Mean squared error of the outputs, a scalar.
        errors: Mean squared error of each layer's features.
        teacher: The teacher's features.
    """
    norms = {name: features.detach().float().norm() for name, features in teacher.items()}
    mean = torch.stack(list(norms.values())).mean()
    weights = {}
    for name, error in errors.items():
        least = 1e-8 * norms[name].square() / teacher[name].numel()  # where both agree wholly there is nothing to weigh
        tiny = torch.finfo(error.dtype).tiny
        weights[name] = (
            distance.detach() / error.detach().clamp_min(least.clamp_min(tiny)) * mean / norms[name].clamp_min(tiny)
        )
    return weights


def feature_loss(
    distance: Tensor, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the layers' feature errors, and the errors themselves.

    Args:
        distance: Mean squared error of the outputs, a scalar.
        student: Features by name.
        teacher: Features of the same names and shapes.
    """
    pairs = {name: (student[name].float(), teacher[name].detach().float()) for name in teacher}
    errors = {name: (ours - theirs).square().mean() for name, (ours, theirs) in pairs.items()}
    weights = feature_weights(distance, errors, teacher)
    return torch.stack([weights[name] * error for name, error in errors.items()]).sum(), errors
