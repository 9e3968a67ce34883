"""RePa from a pretrained model: hidden channels whose activation is nearly linear leave it, and merge into one matrix.

RePaViT (ICML 2025, https://arxiv.org/abs/2505.21847) trains with idle channels from the start. Here they are chosen in
a model that was trained without: those that lose least when their activation is replaced by its best straight line on
the data. What the idle channels gave is then fitted by least squares as a linear map of the layer's input, together
with the second product of the active ones. Choice and fit are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN, keep_channels
from zoo.ffn.technique import (
    ERROR_SAMPLES,
    Changes,
    FFNReport,
    Moments,
    at_least_float32,
    evaluating,
    ffn_layers,
    listed,
    output_error,
    outputs_of,
    replace_module,
    require_seen,
    thinned,
    with_diagonal,
)
from zoo.profiling import count_params

__all__ = ["LinearPlusFFN", "RePaConfig", "apply", "restructure"]


@dataclass(frozen=True, kw_only=True)
class RePaConfig:
    """How many channels become linear.

    Args:
        idle: Share of the hidden channels that leave the activation, above 0, at most 1.
        round_to: Active channels are a multiple of this.
        damping: Added to the normal equations, relative to their mean diagonal.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range.
    """

    idle: float = 0.5
    round_to: int = 8
    damping: float = 1e-4
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.idle < 1:
            raise ValueError(f"idle is a share of the hidden channels, above 0 and below 1, got {self.idle}.")
        if self.round_to < 1 or self.damping < 0:
            raise ValueError(
                f"round_to must be at least 1 and damping not negative, got {self.round_to}, {self.damping}."
            )

    def active(self, hidden: int) -> int:
        """Return the active channels of a layer."""
        return max(self.round_to, round((1 - self.idle) * hidden / self.round_to) * self.round_to)


class LinearPlusFFN(nn.Module):
    """y = linear(x) + ffn(x): merged idle channels beside the active ones.

    Args:
        ffn: The layer with its active channels.
        dim: Channels of x and y.
        device: Of the matrix.
        dtype: Of the matrix.

    Shape:
        (..., dim) -> (..., dim).
    """

    def __init__(
        self,
        ffn: nn.Module,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.ffn = ffn

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.linear(x) + self.ffn(x, *args, **kwargs)


def apply(model: nn.Module, config: RePaConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Make channels of a model's feed-forward layers idle and merge them, in place.

    Multiply-accumulates of a layer fall from 2 H C to C C + 2 k C for k active of H channels.

    Args:
        model: Trained, of timm or diffusers.
        config: How.
        data: Batches of inputs, or of (inputs, labels).

    Raises:
        ValueError: No layer is known, data is missing, a layer is gated or saves nothing, or it was done before.
    """
    config = config or RePaConfig()
    changes = Changes(model, "repa")
    ffns = ffn_layers(model, config.pattern)
    for name, ffn in ffns.items():
        _check(name, ffn, config.active(ffn.hidden_dim))
    batches = listed(data, "RePa from a pretrained model")
    outputs: list[Tensor] = []
    inputs = {name: Moments() for name in ffns}
    sums = {name: _Sums() for name in ffns}
    with evaluating(model), _watch(ffns, inputs, sums, len(batches)):
        outputs = outputs_of(model, batches)
    require_seen(inputs)
    facts = {}
    for name, ffn in ffns.items():
        macs, params = ffn.macs(), count_params(model.get_submodule(name))
        hidden, active = ffn.hidden_dim, config.active(ffn.hidden_dim)
        merged = _merge(model.get_submodule(name), ffn, inputs[name], sums[name], active, config.damping)
        replace_module(model, name, merged)
        facts[name] = active
        what = f"{hidden - active} of {hidden} channels idle, merged"
        changes.add(name, what, (params, count_params(merged)), (macs, ffn.macs() + ffn.dim * ffn.out_dim))
    return changes.report(facts, output_error(model, batches, outputs, ERROR_SAMPLES))


def _check(name: str, ffn: DenseFFN, active: int) -> None:
    if not name:  # nothing could be put in its place, once its weights are changed
        raise ValueError("The model is the layer itself: put it into nn.Sequential first.")
    if ffn.gated or ffn.first_column:
        raise ValueError(f"{name} is gated or shares a product with attention: its channels cannot become linear.")
    if ffn.dim != ffn.out_dim or not ffn.owns_output_bias:
        raise ValueError(f"{name} must map {ffn.dim} channels to as many, with a bias, to take a merged matrix.")
    saved = 2 * (ffn.hidden_dim - active) - ffn.dim
    if saved <= 0:
        raise ValueError(
            f"{name}: {ffn.hidden_dim - active} idle channels cost less than a {ffn.dim} x {ffn.dim} matrix; "
            f"take idle above {ffn.dim / 2 / ffn.hidden_dim:.2f}."
        )


class _Sums:
    """Joint moments of input x (C), pre-activation u and activation a (H)."""

    def __init__(self) -> None:
        self.hidden = Moments()
        self.pre = Moments(second=False)
        self.joint: Tensor | None = None  # sum of u * a (H,)
        self.cross: Tensor | None = None  # sum of x a^T (C, H)
        self.x: Tensor | None = None
        self.u: Tensor | None = None

    def see_activation(self, rows: Tensor) -> None:
        assert self.x is not None
        assert self.u is not None
        a = at_least_float32(rows)
        self.hidden.add(a)
        joint, cross = (self.u * a).sum(0).double(), (self.x.t() @ a).double()
        self.joint = joint if self.joint is None else self.joint + joint
        self.cross = cross if self.cross is None else self.cross + cross
        self.x = self.u = None


def _watch(ffns: Mapping[str, DenseFFN], inputs: Mapping[str, Moments], sums: Mapping[str, _Sums], parts: int) -> Any:
    def rows(value: Tensor, name: str) -> Tensor:
        return thinned(value.detach().flatten(0, -2), ffns[name].hidden_dim, parts)

    stack = ExitStack()
    for name, ffn in ffns.items():

        def see_up(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            x, u = (at_least_float32(rows(value, name)) for value in (args[0], output))
            inputs[name].add(x)
            sums[name].pre.add(u)
            sums[name].x, sums[name].u = x, u

        def see_down(module: nn.Module, args: Any, name: str = name) -> None:
            sums[name].see_activation(rows(args[0], name))

        stack.callback(ffn.up.register_forward_hook(see_up).remove)
        stack.callback(ffn.down.register_forward_pre_hook(see_down).remove)
    return stack


@torch.no_grad()
def _merge(
    module: nn.Module, ffn: DenseFFN, inputs: Moments, sums: _Sums, active: int, damping: float
) -> LinearPlusFFN:
    """Choose the idle channels, fit, cut the layer down to the active ones, and put the matrix beside it."""
    assert sums.joint is not None
    assert sums.cross is not None
    down, bias = ffn.channels().down.double(), ffn.down.bias.detach().double()
    a_mean, u_mean, x_mean, count = sums.hidden.mean, sums.pre.mean, inputs.mean, inputs.count
    # what a straight line through (u, a) leaves of each activation, times what the channel adds to the output
    a_var = sums.hidden.covariance.diagonal()
    u_var = (sums.pre.rms.square() - u_mean.square()).clamp_min(1e-12)
    covariance = sums.joint / count - u_mean * a_mean
    residual = (a_var - covariance.square() / u_var).clamp_min(0)
    loss = residual * down.square().sum(0)
    order = loss.argsort(descending=True, stable=True)
    kept = order[:active].sort().values
    # dense output about its mean: down (a - mean); regress it on [x, active a]
    cross = sums.cross / count - torch.outer(x_mean, a_mean)  # (C, H)
    hidden = sums.hidden.covariance
    gram = torch.cat(
        [
            torch.cat([inputs.covariance, cross[:, kept]], 1),
            torch.cat([cross[:, kept].t(), hidden[kept][:, kept]], 1),
        ]
    )
    start = torch.cat([torch.zeros_like(down[:, :1]).expand(-1, ffn.dim), down[:, kept]], 1)
    target = torch.cat([cross, hidden[kept]]) @ down.t() - gram @ start.t()
    scale = gram.diagonal().clamp_min(1e-12).sqrt()  # inputs and activations have units of their own
    normal = with_diagonal(gram / torch.outer(scale, scale), damping)
    solution = start + (torch.linalg.solve(normal, target / scale[:, None]) / scale[:, None]).t()
    matrix, weight = solution[:, : ffn.dim], solution[:, ffn.dim :]
    new_bias = bias + down @ a_mean - matrix @ x_mean - weight @ a_mean[kept]
    keep_channels(ffn, kept)
    ffn.down.weight.copy_(weight)
    ffn.down.bias.copy_(new_bias)
    kind = ffn.up.weight
    merged = LinearPlusFFN(module, ffn.dim, device=kind.device, dtype=kind.dtype)
    merged.linear.weight.copy_(matrix).requires_grad_(kind.requires_grad)  # a frozen model stays so
    return merged


def restructure(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Give a dense model the merged layers; weights are loaded after."""
    ffns = ffn_layers(model)
    for name, active in layers.items():
        ffn = ffns[name]
        keep_channels(ffn, torch.arange(active))
        kind = ffn.up.weight
        replace_module(
            model, name, LinearPlusFFN(model.get_submodule(name), ffn.dim, device=kind.device, dtype=kind.dtype)
        )
