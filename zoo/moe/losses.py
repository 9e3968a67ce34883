"""Losses of mixtures of experts: of routers, and of their distillation (Dense2MoE, https://arxiv.org/abs/2510.09094)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.router import Router

__all__ = ["balance_loss", "entropy_loss", "feature_loss", "feature_weights", "record_balance", "record_entropy"]


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


def entropy_loss(logits: Tensor) -> Tensor:
    """Return sum_i p_i log p_i of the mean p over tokens of the softmax: -log n where it is even, 0 at one expert.

    sigma-MoE, https://arxiv.org/abs/2310.10837: a token may be sure of its experts as long as the batch uses all.

    Args:
        logits: (T, n).
    """
    log_mean = torch.log_softmax(logits, dim=-1).logsumexp(0) - math.log(len(logits))
    return (log_mean.exp() * log_mean).sum()


def record_balance(model: nn.Module, free_weight: float = 0.75) -> AbstractContextManager[list[Tensor]]:
    """Collect the balance loss of every router that runs inside the context.

    What gradient checkpointing runs again in the backward pass is not collected again.

    Args:
        model: Holds the routers.
        free_weight: Weight of experts without computation, tau of MoE++; less draws more tokens to them.

    Returns:
        A context with the losses, one a router; their mean does not depend on the depth.
    """

    def loss(router: Router, index: Tensor, logits: Tensor) -> Tensor:
        scale = None
        if logits.shape[1] > router.experts:
            scale = torch.where(torch.arange(logits.shape[1], device=logits.device) < router.experts, 1.0, free_weight)
        return balance_loss(logits, index, scale)

    return _record(model, loss)


def record_entropy(model: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Collect `entropy_loss` of every router that runs inside the context, as `record_balance` does."""
    return _record(model, lambda router, index, logits: entropy_loss(logits))


@contextmanager
def _record(model: nn.Module, loss: Callable[[Router, Tensor, Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collect a loss of every router's choice and logits."""
    losses: list[Tensor] = []

    def keep(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        assert isinstance(router, Router)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass, as torch.utils.checkpoint asks too
            return
        # what the loss saves is none of what a checkpoint around the router saves and computes again
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            losses.append(loss(router, output[1], output[2]))

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
