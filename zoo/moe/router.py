"""Routers: which experts a token takes, and with what weight."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.dispatch import no_autocast

__all__ = ["Gate", "Router"]

Gate = Literal["softmax_n", "softmax", "softmax_renorm", "sigmoid", "unit"]


class Router(nn.Module):
    """Choose k of n experts for every token, from the very tensor that the feed-forward layer receives.

    Logits are z = W x, in float32 at least. The k largest are taken; none is dropped. The weight of a chosen
    expert i is, by `gate` (Dense2MoE, https://arxiv.org/abs/2510.09094; where the paper is silent, our reading):

    - "softmax_n": n softmax(z)_i, so that equal logits and k = n give weight 1: exactly the dense layer;
    - "softmax": softmax(z)_i; equals "softmax_n" after dividing the experts' output weights by n;
    - "softmax_renorm": softmax(z)_i over the sum of the chosen ones;
    - "sigmoid": 2 sigmoid(z_i);
    - "unit": 1, with the gradient of the softmax (straight through).

    With more `outputs` than experts the rest are experts without computation (MoE++,
    https://arxiv.org/abs/2410.07348): the softmax runs over all, and n counts the experts that compute.

    Args:
        dim: Channels of a token.
        experts: Experts that compute, n.
        outputs: All experts; None: as many as `experts`.
        gate: How a chosen expert is weighted.
        jitter: Standard deviation of noise on the logits in training; a task lowers it to 0.

    Shape:
        (T, dim) and k -> weights (T, k), indices (T, k), logits (T, outputs); weights and logits in float32 at least.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        outputs: int | None = None,
        gate: Gate = "softmax_n",
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {', '.join(get_args(Gate))}, got {gate!r}.")
        self.experts, self.gate, self.jitter = experts, gate, jitter
        self.scale = experts  # n of "softmax_n"; stays where experts are pruned
        outputs = outputs or experts
        self.weight = nn.Parameter(torch.empty(outputs, dim, device=device, dtype=dtype))
        free = outputs > experts
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if free else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw small weights: logits that are all exactly equal would send every token to the same k experts.

        Experts without computation start with a logit of -2: a token first goes to those that compute.
        """
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=1e-3 / math.sqrt(self.weight.shape[1]))
        if self.bias is not None:
            self.bias.zero_()
            self.bias[self.experts :] = -2.0

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(x)
        if self.training and self.jitter > 0:
            logits = logits + self.jitter * torch.randn_like(logits)
        index = self._largest(logits, k)
        return self._weights(logits, index), index, logits

    def logits(self, x: Tensor) -> Tensor:
        """Return W x, in float32 at least, under autocast too."""
        with no_autocast(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def _largest(self, logits: Tensor, k: int) -> Tensor:
        """Return the experts (T, k) of the k largest logits; all of them in their own order."""
        if k == logits.shape[1]:
            return torch.arange(k, device=logits.device).expand(logits.shape[0], k)
        return logits.topk(k, dim=-1).indices

    def _weights(self, logits: Tensor, index: Tensor) -> Tensor:
        if self.gate == "sigmoid":
            return 2 * torch.sigmoid(logits.gather(1, index))
        chosen = torch.softmax(logits, dim=-1).gather(1, index)
        if self.gate == "softmax_n":  # experts without computation have no share of the dense layer to restore
            return chosen if self.experts == 0 else chosen * torch.where(index < self.experts, self.scale, 1)
        if self.gate == "softmax_renorm":
            return chosen / chosen.sum(dim=-1, keepdim=True)
        if self.gate == "unit":
            return 1 + (chosen - chosen.detach())
        return chosen

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Choose from some experts only, and from those without computation; weights of `"softmax_n"` keep their n.

        Args:
            kept: (m,) int64, experts that stay, in their new order.
        """
        free = torch.arange(self.experts, len(self.weight), device=kept.device)
        rows = torch.cat([kept, free]).to(self.weight.device)
        self.weight = nn.Parameter(self.weight[rows].clone(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias[rows].clone(), requires_grad=self.bias.requires_grad)
        self.experts = len(kept)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, outputs={self.weight.shape[0]}, gate={self.gate!r}"
