"""A mixture of feed-forward experts: one shared expert that always runs, and normal experts of which a token takes k.

Dense2MoE (ICCV 2025), https://arxiv.org/abs/2510.09094; no authors' code was found.

Letters: T tokens, D input and O output channels, S shared hidden channels, n normal experts of W hidden channels, k
chosen experts, G = 2 in gated layers (value, gate), else 1.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import Channels, DenseFFN, read_ffn
from zoo.kernels import routed_experts
from zoo.kernels.dispatch import runs_kernel
from zoo.kernels.experts import ACTIVATIONS
from zoo.moe.router import Gate, Router

__all__ = ["LinearPlusMoE", "MoEFFN", "masked_experts", "sorted_experts"]


def _grouped_types() -> frozenset[torch.dtype]:
    """Return the types whose grouped products compilers can trace: torch 2.11 knows bfloat16 alone."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        options: dict[str, Any] = dict(dtype=dtype, device="meta")
        ends = torch.empty(1, dtype=torch.int32, device="meta")
        try:
            F.grouped_mm(torch.empty(16, 16, **options), torch.empty(1, 16, 16, **options), offs=ends)
            found.append(dtype)
        except (RuntimeError, NotImplementedError):
            pass
    return frozenset(found)


_GROUPED_TYPES = _grouped_types()


class MoEFFN(nn.Module):
    """Compute the shared expert, and for every token the chosen normal experts with their weights.

        y = b2 + F_S(x) + sum over chosen i of g_i(x) F_i(x),   F_I(x) = W2[:, I] act(W1[I] x + b1[I])

    With all experts on, weights of 1 and the channels of a dense layer this is that layer, whatever the partition.

    Args:
        dim: Input channels D.
        out_dim: Output channels O.
        shared_dim: Hidden channels of the shared expert S, 0 or more.
        expert_dim: Hidden channels of a normal expert W.
        experts: Normal experts n.
        top_k: Chosen experts k, from 0 to all; may be set anew at any time.
        activation: Key of `ACTIVATIONS`.
        gated: Hidden channels are values times activated gates.
        bias: Hidden channels have biases.
        out_bias: The shared expert holds an output bias.
        gate: How a chosen expert is weighted, see `Router`.
        zero: Experts that give nothing (MoE++).
        copies: Experts that give their input back (MoE++); needs D = O.
        constants: Experts that give a learned mix of the input and a learned vector (MoE++); needs D = O.
        dropout: Rate at which outputs are dropped in training.

    Shape:
        (..., D) -> (..., O).

    Raises:
        ValueError: `top_k` is not within 0 and the number of experts, or an argument does not fit.
    """

    kernel_operators = ("routed_experts",)
    channel_index: Tensor

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        shared_dim: int,
        expert_dim: int,
        experts: int,
        top_k: int,
        activation: str,
        gated: bool = False,
        bias: bool = True,
        out_bias: bool = True,
        gate: Gate = "softmax_n",
        zero: int = 0,
        copies: int = 0,
        constants: int = 0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        if (copies or constants) and dim != out_dim:
            raise ValueError(f"Copy and constant experts need as many outputs as inputs, got {dim} and {out_dim}.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.out_dim, self.shared_dim, self.expert_dim = dim, out_dim, shared_dim, expert_dim
        self.experts, self.zero, self.copies, self.constants = experts, zero, copies, constants
        self.activation, self.gated = activation, gated
        self.set_top_k(top_k)
        halves = 2 if gated else 1
        self.router = Router(dim, experts, outputs=self.outputs, gate=gate, **dd)
        self.shared_up = _linear(dim, halves * shared_dim, bias, **dd)
        self.shared_down = _linear(shared_dim, out_dim, out_bias, **dd)
        self.experts_up = nn.Parameter(torch.empty(experts, halves * expert_dim, dim, **dd))
        self.experts_up_bias = nn.Parameter(torch.empty(experts, halves * expert_dim, **dd)) if bias else None
        self.experts_down = nn.Parameter(torch.empty(experts, out_dim, expert_dim, **dd))
        self.constant_mix = nn.Parameter(torch.empty(constants, 2, dim, **dd)) if constants else None
        self.constant_vector = nn.Parameter(torch.empty(constants, dim, **dd)) if constants else None
        self.drop = nn.Dropout(dropout)
        # where each hidden channel was in the dense layer: the shared ones, then expert by expert
        hidden = torch.arange(shared_dim + experts * expert_dim, device=device)
        self.register_buffer("channel_index", hidden)
        self.dense: nn.Module | None = None  # its module on the meta device, to be rebuilt by `to_dense`
        self.reset_parameters()

    @property
    def outputs(self) -> int:
        """Experts that the router chooses from, with those that compute nothing."""
        return self.experts + self.zero + self.copies + self.constants

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token, with the router."""
        hidden = self.shared_dim + min(self.top_k, self.experts) * self.expert_dim
        return hidden * ((2 if self.gated else 1) * self.dim + self.out_dim) + self.router.weight.numel()

    def set_top_k(self, k: int) -> None:
        """Set the number of chosen experts, without any other change.

        Raises:
            ValueError: k is negative or above the number of experts.
        """
        if not 0 <= k <= self.outputs:
            raise ValueError(f"top_k must lie in 0 ... {self.outputs} (all experts), got {k}.")
        self.top_k = k

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does; the router with small noise; constants as copies with a zero vector."""
        if self.experts_up.is_meta:
            return
        for weight, bias in ((self.experts_up, self.experts_up_bias), (self.experts_down, None)):
            bound = weight.shape[-1] ** -0.5 if weight.shape[-1] else 0.0
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
        for linear in (self.shared_up, self.shared_down):
            bound = max(1, linear.in_features) ** -0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.uniform_(linear.bias, -bound, bound)
        if self.constant_mix is not None and self.constant_vector is not None:
            nn.init.zeros_(self.constant_mix)
            nn.init.zeros_(self.constant_vector)
        self.router.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        ffn: DenseFFN,
        *,
        shared_dim: int,
        experts: int,
        top_k: int,
        order: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEFFN:
        """Regroup the hidden channels of a dense layer; its weights are copied.

        Args:
            ffn: The layer.
            shared_dim: Hidden channels of the shared expert.
            experts: Normal experts, which share the rest evenly.
            top_k: Chosen experts.
            order: (H,) int64: the dense layer's channels in the order shared, expert 0, expert 1, ...; None keeps it.
            **kwargs: `gate`, `zero`, `copies`, `constants`.

        Raises:
            ValueError: The rest cannot be shared evenly.
        """
        rest = ffn.hidden_dim - shared_dim
        if shared_dim < 0 or experts < 1 or rest <= 0 or rest % experts:
            raise ValueError(f"{rest} hidden channels cannot be split evenly among {experts} experts.")
        channels = ffn.channels()
        moe = cls(
            ffn.dim,
            ffn.out_dim,
            shared_dim=shared_dim,
            expert_dim=rest // experts,
            experts=experts,
            top_k=top_k,
            activation=ffn.activation,
            gated=ffn.gated,
            bias=channels.up_bias is not None,
            out_bias=ffn.owns_output_bias,
            dropout=ffn.dropout,
            device=channels.up.device,
            dtype=channels.up.dtype,
            **kwargs,
        )
        if channels.up.is_meta:
            return moe
        moe.load_channels(channels, order)
        if ffn.owns_output_bias:
            with torch.no_grad():
                moe.shared_down.bias.copy_(ffn.down.bias)
        return moe

    @torch.no_grad()
    def load_channels(self, channels: Channels, order: Tensor | None = None) -> None:
        """Set the experts' weights from a dense layer's channels.

        Args:
            channels: Of the dense layer.
            order: As in `from_dense`.
        """
        if order is not None:
            self.channel_index.copy_(order)
        index, s, n = self.channel_index, self.shared_dim, self.experts
        up, down = channels.up[:, index], channels.down[:, index]  # (G, H, D), (O, H)
        self.shared_up.weight.copy_(up[:, :s].flatten(0, 1))
        self.experts_up.copy_(up[:, s:].unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 2))
        self.shared_down.weight.copy_(down[:, :s])
        self.experts_down.copy_(down[:, s:].unflatten(1, (n, -1)).transpose(0, 1))
        if channels.up_bias is not None and self.experts_up_bias is not None:
            bias = channels.up_bias[:, index]  # (G, H)
            self.shared_up.bias.copy_(bias[:, :s].flatten())
            self.experts_up_bias.copy_(bias[:, s:].unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 2))

    @torch.no_grad()
    def channels(self) -> Channels:
        """Return the hidden channels in the dense layer's order: bit for bit what `load_channels` was given."""
        g = 2 if self.gated else 1
        up = torch.cat(
            [
                self.shared_up.weight.unflatten(0, (g, -1)),
                self.experts_up.unflatten(1, (g, -1)).transpose(0, 1).flatten(1, 2),
            ],
            dim=1,
        )
        down = torch.cat([self.shared_down.weight, self.experts_down.transpose(0, 1).flatten(1, 2)], dim=1)
        back = torch.argsort(self.channel_index)
        bias = None
        if self.experts_up_bias is not None:
            experts_bias = self.experts_up_bias.unflatten(1, (g, -1)).transpose(0, 1).flatten(1, 2)
            bias = torch.cat([self.shared_up.bias.unflatten(0, (g, -1)), experts_bias], dim=1)[:, back]
        return Channels(up=up[:, back], up_bias=bias, down=down[:, back])

    @torch.no_grad()
    def keep_experts(self, kept: Tensor) -> None:
        """Drop all normal experts but some, in place; the dense layer cannot be had back.

        Args:
            kept: (m,) int64, experts that stay, in their new order.

        Raises:
            ValueError: Fewer experts would be left than a token takes.
        """
        free = self.outputs - self.experts
        if not len(kept) > 0 or self.top_k > len(kept) + free:
            raise ValueError(f"{len(kept)} experts cannot stay where a token takes {self.top_k}: call set_top_k first.")
        kept = kept.to(self.channel_index.device)
        places = self.channel_index[self.shared_dim :].view(self.experts, -1)[kept].flatten()
        self.channel_index = torch.cat([self.channel_index[: self.shared_dim], places])
        for name in ("experts_up", "experts_up_bias", "experts_down"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old[kept].clone(), requires_grad=old.requires_grad))
        self.router.keep(kept)
        self.experts = len(kept)

    def remember(self, dense: nn.Module) -> None:
        """Keep the kind of module that this came from, without its weights."""
        self.__dict__["dense"] = copy.deepcopy(dense).to("meta")  # not a submodule: it has no weights of its own

    def to_dense(self) -> nn.Module:
        """Return a dense module of the kind that this was made from, with all experts' channels, weights at 1.

        Raises:
            ValueError: The layer was not made from a dense one.
        """
        if self.dense is None:
            raise ValueError("This layer was not made from a dense one: there is no kind of module to return.")
        if self.router.scale != self.experts:
            raise ValueError(
                f"{self.router.scale - self.experts} experts were pruned: no dense layer holds the others."
            )
        module = copy.deepcopy(self.dense).to_empty(device=self.experts_up.device).to(self.experts_up.dtype)
        ffn = read_ffn(module)
        assert ffn is not None
        ffn.write(self.channels())
        if ffn.owns_output_bias:
            with torch.no_grad():
                ffn.down.bias.copy_(self.shared_down.bias)
        return module.train(self.training)

    def activate(self, hidden: Tensor) -> Tensor:
        """Return hidden channels (..., W) of their products (..., G * W)."""
        if not self.gated:
            return ACTIVATIONS[self.activation](hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * ACTIVATIONS[self.activation](gate)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer; further arguments are what a dense layer of diffusers ignores too."""
        rows = x.reshape(-1, self.dim)
        out = self.shared_down(self.activate(self.shared_up(rows)))
        if self.top_k > 0 and rows.shape[0] > 0:
            weights, index, _ = self.router(rows, self.top_k)
            out = self._add_experts(out, rows, weights.to(out.dtype), index)
        return self.drop(out).view(*x.shape[:-1], self.out_dim)

    def _add_experts(self, out: Tensor, rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        if self.outputs > self.experts:
            out = self._add_free_experts(out, rows, weights, index)
        if self.top_k == self.outputs:
            return out + self._all_experts(rows, weights)
        up, bias, down = self.experts_up, self.experts_up_bias, self.experts_down
        if not torch.is_grad_enabled() and runs_kernel("routed_experts", rows, weights, up, down):
            # not in training: its backward pass computes every expert for every token
            return out + routed_experts(
                rows, weights, index, up, bias, down, activation=self.activation, gated=self.gated
            )
        if torch.compiler.is_compiling() and rows.dtype not in _GROUPED_TYPES:
            return out + masked_experts(self, rows, weights, index)
        return sorted_experts(self, rows, weights, index, out)

    def _all_experts(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Compute every expert for every token, as two large products."""
        bias = None if self.experts_up_bias is None else self.experts_up_bias.flatten()
        hidden = F.linear(rows, self.experts_up.flatten(0, 1), bias).unflatten(1, (self.experts, -1))
        hidden = self.activate(hidden) * weights[:, : self.experts, None]
        return F.linear(hidden.flatten(1), self.experts_down.transpose(0, 1).flatten(1, 2))

    def _add_free_experts(self, out: Tensor, rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Add the experts without computation: zero, copy and constant experts, in this order behind the others."""
        first_copy = self.experts + self.zero
        first_constant = first_copy + self.copies
        if self.copies:
            is_copy = (index >= first_copy) & (index < first_constant)
            out = out + (weights * is_copy).sum(1, keepdim=True) * rows
        if self.constant_mix is not None and self.constant_vector is not None:
            for number in range(self.constants):
                mix = torch.softmax(F.linear(rows.float(), self.constant_mix[number].float()), dim=-1).to(rows.dtype)
                constant = mix[:, :1] * rows + mix[:, 1:] * self.constant_vector[number]
                out = out + (weights * (index == first_constant + number)).sum(1, keepdim=True) * constant
        return out

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """Return the activated hidden channels (T, W) of one expert."""
        bias = None if self.experts_up_bias is None else self.experts_up_bias[number]
        return self.activate(F.linear(rows, self.experts_up[number], bias))

    def extra_repr(self) -> str:
        free = "".join(
            f", {name}={count}" for name in ("zero", "copies", "constants") if (count := getattr(self, name))
        )
        return (
            f"{self.dim}, {self.out_dim}, shared_dim={self.shared_dim}, expert_dim={self.expert_dim}, "
            f"experts={self.experts}, top_k={self.top_k}, activation={self.activation!r}, gated={self.gated}{free}"
        )


def _linear(
    inputs: int,
    outputs: int,
    bias: bool,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """Return an `nn.Linear` whose weights are set by the caller; 0 inputs are allowed without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=device or "cpu", dtype=dtype)


def masked_experts(moe: MoEFFN, rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Compute every expert for every token and mask: exact and slow, the reference; no shape depends on the data.

    Args:
        moe: The layer.
        rows: (T, D).
        weights: (T, k).
        index: (T, k).

    Returns:
        (T, O), the sum of the chosen experts.
    """
    out = rows.new_zeros(rows.shape[0], moe.out_dim)
    for number in range(moe.experts):
        weight = (weights * (index == number)).sum(1, keepdim=True)
        out = out + F.linear(moe.expert(number, rows) * weight, moe.experts_down[number])
    return out


def sorted_experts(moe: MoEFFN, rows: Tensor, weights: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Sort the pairs of token and expert by expert and compute each expert once, on its own tokens.

    On a GPU the products of all experts are two grouped ones without waiting for the counts; elsewhere one product an
    expert, on rows that are still in the cache when they are added up.

    Args:
        moe: The layer.
        rows: (T, D).
        weights: (T, k).
        index: (T, k).
        out: (T, O), what the experts are added to; overwritten where no gradient is recorded.

    Returns:
        (T, O).
    """
    flat, order = index.flatten().sort(stable=True)
    token = order // index.shape[1]
    weight = weights.flatten()[order].unsqueeze(1)
    if rows.is_cuda or torch.compiler.is_compiling():
        return _grouped(moe, rows, weight, flat, token, order, out)
    ends = torch.bincount(flat, minlength=moe.outputs)[: moe.experts].cumsum(0).tolist()
    parts = []
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            continue
        own = token[start:end]
        added = F.linear(
            moe.expert(number, rows.index_select(0, own)) * weight[start:end], moe.experts_down[number]
        ).to(out.dtype)
        if torch.is_grad_enabled():
            parts.append(added)
        else:
            out.index_add_(0, own, added)
    return out.index_add(0, token[: ends[-1]], torch.cat(parts)) if parts else out


def _grouped(
    moe: MoEFFN, rows: Tensor, weight: Tensor, flat: Tensor, token: Tensor, order: Tensor, out: Tensor
) -> Tensor:
    """Compute all experts by two grouped products."""
    counts = torch.zeros(moe.outputs, dtype=torch.int32, device=rows.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts[: moe.experts].cumsum(0).to(torch.int32)
    computed = (flat < moe.experts).unsqueeze(1)  # pairs with experts that compute nothing lie behind the last group
    hidden = F.grouped_mm(rows[token], moe.experts_up.transpose(1, 2), offs=ends)
    hidden = torch.where(computed, hidden, 0)  # what lies behind the last group is not written
    if moe.experts_up_bias is not None:
        hidden = hidden + moe.experts_up_bias[flat.clamp(max=moe.experts - 1)]
    hidden = moe.activate(hidden) * weight
    added = torch.where(computed, F.grouped_mm(hidden, moe.experts_down.transpose(1, 2), offs=ends), 0)
    return out + added[order.argsort()].view(rows.shape[0], -1, moe.out_dim).sum(1)  # not scattered: the order is fixed


class LinearPlusMoE(nn.Module):
    """Add a mixture of experts to a linear map: a merged RePa layer whose activated channels became experts.

    Args:
        linear: (C -> C), idle channels, residual and biases.
        moe: The activated channels.
    """

    def __init__(self, linear: nn.Linear, moe: MoEFFN) -> None:
        super().__init__()
        self.linear, self.moe = linear, moe

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.moe(x)
