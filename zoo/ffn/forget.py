"""Continual forgetting: GS-LoRA and GS-LoRA++ make a classifier lose some classes and keep the rest.

Continual Forgetting for Pre-trained Vision Models (CVPR 2024), https://arxiv.org/abs/2403.11530, and
https://arxiv.org/abs/2501.09705. LoRA of both products of every feed-forward layer, one group a layer; the backbone is
frozen. Bound and weights for cross entropy are readings of ours; the papers' figures could not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.technique import ffn_layers, replace_kind, replace_module

__all__ = [
    "ForgetConfig",
    "LoRALinear",
    "apply",
    "forget",
    "forget_loss",
    "group_norms",
    "harmonic_mean",
    "merge",
    "soft_threshold",
    "zero_group_ratio",
]


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """How classes are forgotten.

    Args:
        rank: Of LoRA.
        alpha: Weight of the group sparsity; with `proximal` what every step takes off a group's norm.
        beta: Weight of forgetting.
        bound: Cross entropy of forgotten samples above which there is no gradient; None is twice ln(classes).
        proximal: Take the group sparsity by soft thresholds after a step, which gives exact zeros, in place of its
            gradient, which only makes groups small.
        prototypes: Weights of GS-LoRA++'s prototype terms (forget, retain) and its bound; None is GS-LoRA.
        lr: Learning rate of AdamW.
        epochs: Passes over the samples.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    rank: int = 8
    alpha: float = 1e-2
    beta: float = 0.15
    bound: float | None = None
    proximal: bool = True
    prototypes: tuple[float, float, float] | None = None
    lr: float = 1e-2
    epochs: int = 20
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1:
            raise ValueError(f"rank and epochs must be at least 1, got {self.rank} and {self.epochs}.")
        if min(self.alpha, self.beta, self.lr) < 0:
            raise ValueError(f"alpha, beta and lr must not be negative, got {self.alpha}, {self.beta}, {self.lr}.")


class LoRALinear(nn.Module):
    """y = base(x) + up(down(x)); `up` starts at zero.

    Args:
        base: A product, frozen here.
        rank: r.

    Shape:
        (..., in_features) -> (..., out_features).
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        kind = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, **kind)
        self.up = nn.Linear(rank, base.out_features, bias=False, **kind)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return one product with the same result."""
        self.base.weight += self.up.weight @ self.down.weight
        return self.base.requires_grad_(True)


def apply(model: nn.Module, config: ForgetConfig | None = None) -> dict[str, list[LoRALinear]]:
    """Freeze a model and put LoRA around the products of its feed-forward layers, in place; return the groups by layer.

    Raises:
        ValueError: No layer is known.
    """
    config = config or ForgetConfig()
    ffns = ffn_layers(model, config.pattern, "linear")
    names = {id(module): name for name, module in model.named_modules()}
    model.requires_grad_(False)
    groups: dict[str, list[LoRALinear]] = {}
    for layer, ffn in ffns.items():
        groups[layer] = []
        for part in ffn.products:
            wrapped = LoRALinear(part, config.rank)
            replace_module(model, names[id(part)], wrapped)
            groups[layer].append(wrapped)
    return groups


def merge(model: nn.Module) -> list[str]:
    """Merge every LoRA of a model into its product, in place, and return the products' names."""
    return replace_kind(model, LoRALinear, LoRALinear.merge)


def group_norms(groups: dict[str, list[LoRALinear]]) -> dict[str, Tensor]:
    """Return sqrt(sum |A|^2 + |B|^2) of every group, with a finite gradient at zero."""
    return {
        name: torch.stack([weight.square().sum() for lora in group for weight in (lora.down.weight, lora.up.weight)])
        .sum()
        .add(1e-12)
        .sqrt()
        for name, group in groups.items()
    }


@torch.no_grad()
def soft_threshold(groups: dict[str, list[LoRALinear]], amount: float) -> None:
    """Shrink every group towards zero by `amount` of its norm: the proximal step, which gives exact zeros."""
    for name, norm in group_norms(groups).items():
        scale = max(0.0, 1 - amount / float(norm))
        for lora in groups[name]:
            lora.down.weight.mul_(scale)
            lora.up.weight.mul_(scale)


def zero_group_ratio(groups: dict[str, list[LoRALinear]], threshold: float = 1e-3) -> float:
    """Return the share of groups whose norm is at most `threshold`: layers that were left alone."""
    norms = group_norms(groups).values()
    return sum(float(norm) <= threshold for norm in norms) / len(norms)


def forget_loss(logits: Tensor, labels: Tensor, bound: float) -> Tensor:
    """Return relu(bound - cross entropy): bounded maximisation."""
    return F.relu(bound - F.cross_entropy(logits, labels))


def harmonic_mean(accuracy_before: float, accuracy_after: float, accuracy_retained: float) -> float:
    """Return H = 2 drop retained / (drop + retained), where drop is how much accuracy on forgotten classes fell."""
    drop = accuracy_before - accuracy_after
    total = drop + accuracy_retained
    return 2 * drop * accuracy_retained / total if total > 0 else 0.0


def _prototype_loss(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Divergence of softmaxed features from the softmaxed prototype of their class."""
    return F.kl_div(features.log_softmax(1), prototypes[labels].log_softmax(1), log_target=True, reduction="batchmean")


def forget(
    model: nn.Module,
    forgotten: Iterable[tuple[Tensor, Tensor]],
    retained: Iterable[tuple[Tensor, Tensor]],
    config: ForgetConfig | None = None,
) -> dict[str, float]:
    """Make a classifier forget, in place; the result is merged and has the model's own structure.

    Args:
        model: timm classifier.
        forgotten: Batches of (images, labels) of classes to forget.
        retained: Batches of some samples of the other classes.
        config: How.

    Returns:
        "zero_group_ratio", and the last "forget_loss" and "retain_loss".

    Raises:
        ValueError: There are no batches of one kind, or no layer is known.
    """
    config = config or ForgetConfig()
    lost, kept = list(forgotten), list(retained)
    if not lost or not kept:
        raise ValueError("Forgetting needs batches to forget and batches to retain: one of the two has none.")
    prototypes = _prototypes(model, [*lost, *kept]) if config.prototypes is not None else None
    groups = apply(model, config)
    weights = [weight for group in groups.values() for lora in group for weight in (lora.down.weight, lora.up.weight)]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    forget_value = retain_value = 0.0
    model.eval()  # statistics of norms and dropout are those of the trained model
    for _ in range(config.epochs):
        for step in range(max(len(lost), len(kept))):
            (images_f, labels_f), (images_r, labels_r) = lost[step % len(lost)], kept[step % len(kept)]
            features_f, features_r = (model.forward_features(x) for x in (images_f, images_r))  # type: ignore[operator]
            logits_f, logits_r = (model.forward_head(f) for f in (features_f, features_r))  # type: ignore[operator]
            bound = 2 * math.log(logits_f.shape[1]) if config.bound is None else config.bound
            losing, keeping = forget_loss(logits_f, labels_f, bound), F.cross_entropy(logits_r, labels_r)
            loss = keeping + config.beta * losing
            if prototypes is not None and config.prototypes is not None:
                weight_f, weight_r, bound_p = config.prototypes
                pooled = [model.forward_head(f, pre_logits=True) for f in (features_f, features_r)]  # type: ignore[operator]
                loss = loss + weight_f * F.relu(bound_p - _prototype_loss(pooled[0], labels_f, prototypes))
                loss = loss + weight_r * _prototype_loss(pooled[1], labels_r, prototypes)
            if not config.proximal:
                loss = loss + config.alpha * torch.stack(list(group_norms(groups).values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if config.proximal:
                soft_threshold(groups, config.alpha)
            forget_value, retain_value = float(losing.detach()), float(keeping.detach())
    ratio = zero_group_ratio(groups)
    merge(model)
    model.requires_grad_(True)
    return {"zero_group_ratio": ratio, "forget_loss": forget_value, "retain_loss": retain_value}


@torch.no_grad()
def _prototypes(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean feature of each class, (classes, D)."""
    model.eval()
    features = torch.cat(
        [model.forward_head(model.forward_features(images), pre_logits=True) for images, _ in batches]  # type: ignore[operator]
    )
    labels = torch.cat([labels for _, labels in batches])
    members = F.one_hot(labels).to(features)  # (N, classes)
    return members.t() @ features / members.sum(0).clamp_min(1)[:, None]
