"""The RePa feed-forward layer: some hidden channels are activated, the idle rest stays linear and merges away exactly.

RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers
(ICML 2025), https://arxiv.org/abs/2505.21847. Authors' code: https://github.com/Ackesnal/RePaViT (Apache-2.0).

Letters in comments: B batch, N tokens, C channels, H hidden channels, k active hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.kernels import repa_ffn
from zoo.layers.own import is_own, require_mergeable

__all__ = [
    "FFNFacts",
    "RePaFFN",
    "active_channels",
    "convert_ffn_keys",
    "ffn_facts",
    "idle_ratio_of",
    "idle_untold",
]

FeatureNorm = Literal["BatchNorm", "LayerNorm", "GroupNorm"]
Form = Literal["training", "folded", "merged"]

torch.fx.wrap("repa_ffn")  # its checks read values, which torch.fx does not have


def active_channels(hidden_dim: int, idle_ratio: float | Fraction, rounding: Literal["up", "down"] = "up") -> int:
    """Return how many of `hidden_dim` channels pass the activation when the share `idle_ratio` stays linear.

    The product is exact (0.7 means 7/10): rounding up a float that is 1e-17 too large would add a channel.

    Args:
        hidden_dim: Hidden channels H.
        idle_ratio: Share of idle channels, 0 ... 1.
        rounding: Direction in which a fraction of a channel is rounded.

    Raises:
        ValueError: `idle_ratio` lies outside 0 ... 1.
    """
    if not 0 <= idle_ratio <= 1:
        raise ValueError(f"idle_ratio must lie in 0 ... 1, got {idle_ratio}.")
    exact = hidden_dim * (1 - Fraction(idle_ratio).limit_denominator(10**6))
    return math.ceil(exact) if rounding == "up" else math.floor(exact)


def idle_ratio_of(dims: Iterable[tuple[int, int]], rounding: Literal["up", "down"] = "up") -> float | None:
    """Return an idle ratio that gives every layer its active channels, or None if no single one does.

    Args:
        dims: (hidden channels, active channels) of each layer.
        rounding: As in `active_channels`.
    """
    layers = list(dims)
    bounds = [1 - Fraction(active, hidden) for hidden, active in layers]
    ratio = max(bounds) if rounding == "up" else min(bounds)
    fits = all(active_channels(hidden, ratio, rounding) == active for hidden, active in layers)
    return float(ratio) if fits else None


class RePaFFN(nn.Module):
    """Compute `x + DropPath(layer_scale * FFN(x))`: norms and residual belong to the layer.

    The hidden layer has two branches; only the active one has a GELU, so all that the idle one does is linear:

        u = norm(x);   z = active_fc2(active_norm(GELU(active_fc1(u)))) + idle_fc2(idle_norm(idle_fc1(u)))

    The branches are separate modules: no mask is built, nothing is activated in vain, and a checkpoint's shapes say how
    many channels are active. `reparameterize()` turns the layer into one of two inference forms:

    - merged: `y = linear(x) + active_fc2(GELU(active_fc1(x)))`, where `linear` holds the idle branch, the residual and
      all biases in one C x C matrix: C * C + 2 * k * C products a token instead of 2 * H * C;
    - folded: only the norms and the layer scale are folded; with C >= 2 * (H - k) `linear` would be the slower way.

    Args:
        dim: Channels C of input and output.
        hidden_dim: Hidden channels H, active and idle together.
        active_dim: Hidden channels k that pass the GELU, 0 ... H.
        feature_norm: "BatchNorm": over samples and tokens, before each of the two products. "LayerNorm", "GroupNorm"
            (one group: over channels and tokens): once, before the first product; such a layer cannot be merged.
        layer_scale: Start value of a learned factor per output channel; None has none.
        drop: Dropout rate of the output, before the residual.
        drop_path: Rate at which a sample skips the layer in training.
        merged: Build the inference form that `reparameterize()` leaves, to load weights that were merged.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Shape:
        (B, ..., C) -> (B, ..., C).

    Raises:
        ValueError: `active_dim` or `feature_norm` is not one of the allowed values.
    """

    kernel_operators = ("repa_ffn",)

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        active_dim: int,
        *,
        feature_norm: FeatureNorm = "BatchNorm",
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        merged: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= active_dim <= hidden_dim:
            raise ValueError(f"active_dim must lie in 0 ... {hidden_dim} (hidden_dim), got {active_dim}.")
        if feature_norm not in ("BatchNorm", "LayerNorm", "GroupNorm"):
            raise ValueError(f"feature_norm must be 'BatchNorm', 'LayerNorm' or 'GroupNorm', got {feature_norm!r}.")
        self.dim, self.hidden_dim, self.active_dim = dim, hidden_dim, active_dim
        self.feature_norm = feature_norm
        idle_dim = hidden_dim - active_dim
        self.form: Form = "training"
        if merged and feature_norm == "BatchNorm":
            self.form = "merged" if self.collapses else "folded"
        training, batch_norm = self.form == "training", feature_norm == "BatchNorm"

        def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm(channels: int) -> nn.Module | None:
            return nn.BatchNorm1d(channels, device=device, dtype=dtype) if training and batch_norm else None

        self.norm: nn.Module | None
        if feature_norm == "LayerNorm":
            self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        elif feature_norm == "GroupNorm":
            self.norm = nn.GroupNorm(1, dim, device=device, dtype=dtype)
        else:
            self.norm = norm(dim)
        self.linear = linear(dim, dim) if self.form == "merged" else None
        self.active_fc1 = linear(dim, active_dim) if active_dim else None
        self.active_norm = norm(active_dim) if active_dim else None
        self.active_fc2 = linear(active_dim, dim, bias=self.linear is None) if active_dim else None
        has_idle = idle_dim > 0 and self.linear is None
        self.idle_fc1 = linear(dim, idle_dim) if has_idle else None
        self.idle_norm = norm(idle_dim) if has_idle else None
        self.idle_fc2 = linear(idle_dim, dim, bias=not active_dim) if has_idle else None  # one output bias is enough
        self.layer_scale: nn.Parameter | None = None
        if layer_scale is not None and training:
            self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale, device=device, dtype=dtype))
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @property
    def collapses(self) -> bool:
        """True where merging the idle branch into a C x C matrix saves work."""
        return self.dim < 2 * (self.hidden_dim - self.active_dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)  # (B * N, C): products and BatchNorm want plain rows, not (B, C, N)
        if self.linear is not None:
            if self.active_fc1 is None or self.active_fc2 is None:
                return self.linear(rows).view(x.shape)
            fc1, fc2 = self.active_fc1, self.active_fc2
            if torch.jit.is_scripting() or self._owns_parts():
                out = repa_ffn(rows, fc1.weight, fc1.bias, fc2.weight, self.linear.weight, self.linear.bias)
            else:
                out = self.linear(rows) + fc2(F.gelu(fc1(rows)))
            return out.view(x.shape)
        if self.norm is not None:
            if self.feature_norm == "GroupNorm":
                rows = self.norm(x.movedim(-1, 1)).movedim(1, -1).reshape(-1, self.dim)
            else:
                rows = self.norm(rows)
        z = None
        if self.active_fc1 is not None and self.active_fc2 is not None:
            hidden = F.gelu(self.active_fc1(rows))
            z = self.active_fc2(hidden if self.active_norm is None else self.active_norm(hidden))
        if self.idle_fc1 is not None and self.idle_fc2 is not None:
            hidden = self.idle_fc1(rows)
            hidden = hidden if self.idle_norm is None else self.idle_norm(hidden)
            z = self.idle_fc2(hidden) if z is None else z + self.idle_fc2(hidden)
        assert z is not None
        if self.layer_scale is not None:
            z = z * self.layer_scale
        return x + self.drop_path(self.drop(z).view(x.shape))

    @torch.jit.unused
    def _owns_parts(self) -> bool:
        """Tell whether the parts of the merged form are what merging left, without a bias where it left none."""
        parts = (self.linear, self.active_fc1, self.active_fc2)
        return all(is_own(part, nn.Linear) for part in parts) and self.active_fc2.bias is None  # type: ignore[union-attr]

    @torch.no_grad()
    def reparameterize(self) -> tuple[str, ...]:
        """Turn the layer into its inference form in place; the arithmetic is done in float64 and cast once.

        Returns:
            What was folded, in words; empty where there is nothing to fold (merged already, LayerNorm, GroupNorm).

        Raises:
            RuntimeError: The layer is in training mode, or a norm has no running statistics.
        """
        if self.form != "training" or self.feature_norm != "BatchNorm":
            return ()
        require_mergeable(self)
        kept = next(self.parameters())
        scale, shift = _affine(self.norm, "norm")
        gain = _exact(self.layer_scale) if self.layer_scale is not None else torch.ones_like(scale)
        bias = torch.zeros_like(scale)
        folded = {}
        for branch in ("active", "idle"):
            fc1, norm, fc2 = (getattr(self, f"{branch}_{part}") for part in ("fc1", "norm", "fc2"))
            if fc1 is None:
                continue
            in_weight = _exact(fc1.weight) * scale
            in_bias = _exact(fc1.bias) + _exact(fc1.weight) @ shift
            hidden_scale, hidden_shift = _affine(norm, f"{branch}_norm")
            out_weight = gain[:, None] * _exact(fc2.weight) * hidden_scale
            bias = bias + gain * (_exact(fc2.weight) @ hidden_shift)
            if fc2.bias is not None:
                bias = bias + gain * _exact(fc2.bias)
            folded[branch] = (in_weight, in_bias, out_weight)

        done = ["3 BatchNorms" if len(folded) == 2 else "2 BatchNorms"]
        if self.layer_scale is not None:
            done.append("layer scale")
        if self.collapses:
            in_weight, in_bias, out_weight = folded.pop("idle")
            identity = torch.eye(self.dim, dtype=bias.dtype, device=bias.device)
            self.linear = _linear(identity + out_weight @ in_weight, bias + out_weight @ in_bias, kept)
            self.idle_fc1 = self.idle_fc2 = None
            done += [f"{self.hidden_dim - self.active_dim} idle channels", "residual"]
        elif "idle" in folded:
            done.append(f"{self.hidden_dim - self.active_dim} idle channels kept: one matrix for them would cost more")
        for branch, (in_weight, in_bias, out_weight) in folded.items():
            holds_bias = self.linear is None and (branch == "active" or not self.active_dim)
            setattr(self, f"{branch}_fc1", _linear(in_weight, in_bias, kept))
            setattr(self, f"{branch}_fc2", _linear(out_weight, bias if holds_bias else None, kept))
        self.norm = self.active_norm = self.idle_norm = self.layer_scale = None
        self.form = "merged" if self.linear is not None else "folded"
        return tuple(done)

    def example_input(self) -> Tensor:
        """Return random tokens (1, 196, C), a 14 x 14 grid, in the layer's type and on its device."""
        kept = next(self.parameters())
        tokens = torch.randn(1, 196, self.dim, generator=torch.Generator().manual_seed(0))
        return tokens.to(kept)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.hidden_dim}, active_dim={self.active_dim}, form={self.form!r}"


def _exact(tensor: Tensor) -> Tensor:
    """Return a float64 copy, on the CPU where the device has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _affine(norm: nn.Module | None, name: str) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a BatchNorm in evaluation, in float64."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise RuntimeError(f"{name} ({type(norm).__name__}) keeps no running statistics and cannot be folded.")
    scale = _exact(norm.weight) / torch.sqrt(_exact(norm.running_var) + norm.eps)
    return scale, _exact(norm.bias) - _exact(norm.running_mean) * scale


def _linear(weight: Tensor, bias: Tensor | None, kept: Tensor) -> nn.Linear:
    """Return an evaluation-mode Linear with these values, in the type and on the device of `kept`."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta").eval()  # meta: no random start values
    layer.weight = nn.Parameter(weight.to(kept), requires_grad=kept.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(kept), requires_grad=kept.requires_grad)
    return layer


@dataclass(frozen=True, kw_only=True)
class FFNFacts:
    """What a checkpoint tells about one layer.

    Args:
        merged: Its weights are in inference form.
        feature_norm: Norm of the training form; GroupNorm cannot be told from LayerNorm.
        active_dim: Active hidden channels; None in the authors' training form, whose shapes do not depend on them.
    """

    merged: bool
    feature_norm: Literal["BatchNorm", "LayerNorm"]
    active_dim: int | None


def ffn_facts(state_dict: Mapping[str, Tensor], prefix: str) -> FFNFacts | None:
    """Read the form of the layer at `prefix` (with its dot) from our keys or the authors'; None if there is none."""
    leaves = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not leaves.keys() & {"fc1.weight", "linear.weight", "active_fc1.weight", "idle_fc1.weight"}:
        return None
    layer_norm = "norm.weight" in leaves and "norm.running_var" not in leaves
    merged = not layer_norm and not any(leaf.endswith("running_var") for leaf in leaves)
    active = leaves.get("active_fc1.bias")
    if "fc1.weight" in leaves:
        active = leaves.get("fc2.bias") if merged and "fc3.weight" in leaves else None
    known = active is not None or merged or "fc1.weight" not in leaves
    return FFNFacts(
        merged=merged,
        feature_norm="LayerNorm" if layer_norm else "BatchNorm",
        active_dim=(0 if active is None else active.shape[0]) if known else None,
    )


def idle_untold(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Return that the idle ratio has to be given, where some layer is in the authors' training form.

    Its hidden layer is not split, and so does not show how many channels are active.
    """
    ends = (".mlp.fc2.weight", ".mlp_channels.fc2.weight")
    prefixes = {key.removesuffix("fc2.weight") for key in state_dict if key.endswith(ends)}
    facts = [ffn_facts(state_dict, prefix) for prefix in sorted(prefixes)]
    hidden = any(fact is not None and not fact.merged and fact.active_dim is None for fact in facts)
    return {"idle_ratio": "share of the hidden channels, in the papers 0.5 or 0.75"} if hidden else {}


def convert_ffn_keys(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring the entries of every `RePaFFN` of `model` into that layer's naming and form; leave all others as they are.

    Taken are the authors' training form (`fc1`, `fc2`, `norm1`, `norm2`, `ls`), their vanilla form (`norm`), their
    merged form (`fc1` = C x C, `fc2`, `fc3`), 1x1 convolutions for products, and our own forms. Training weights that
    meet a layer in inference form are merged.

    Args:
        state_dict: Keys of the model, except inside the feed-forward layers.
        model: Receives the weights later; it is only read.

    Raises:
        ValueError: The weights are merged and a layer is in training form; merging cannot be undone.
    """
    converted = dict(state_dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, RePaFFN):
            continue
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): converted.pop(key) for key in state_dict if key.startswith(prefix)}
        converted.update({f"{prefix}{key}": value for key, value in _convert(own, layer, name).items()})
    return converted


def _convert(state: dict[str, Tensor], layer: RePaFFN, name: str) -> dict[str, Tensor]:
    """Convert the entries of one layer; keys that are not understood stay, so that strict loading names them."""
    state = {key: value.flatten(1) if value.ndim == 4 else value for key, value in state.items()}
    if "fc3.weight" in state or ("fc1.weight" in state and "fc2.weight" not in state):  # the authors' merged form
        state.pop("ls", None)
        moved = {"fc1.weight": "linear.weight", "fc1.bias": "linear.bias", "fc3.weight": "active_fc2.weight"}
        moved |= {"fc2.weight": "active_fc1.weight", "fc2.bias": "active_fc1.bias"}
        state = {moved.get(key, key): value for key, value in state.items()}
    elif "fc1.weight" in state:
        state = _split(state, layer.active_dim)
    if "linear.weight" in state and layer.form == "training":
        raise ValueError(
            f"The weights of {name} are merged and the model is in training form: build the model with merged=True."
        )
    if (
        "linear.weight" in state
        and layer.form == "folded"
        and torch.equal(state["linear.weight"], torch.eye(layer.dim).to(state["linear.weight"]))
    ):  # the authors merge also where nothing is idle: the matrix is the identity
        del state["linear.weight"]
        state["active_fc2.bias"] = state.pop("linear.bias")
    if layer.form != "training" and "norm.running_var" in state:
        scratch = RePaFFN(
            layer.dim,
            layer.hidden_dim,
            layer.active_dim,
            layer_scale=1.0 if "layer_scale" in state else None,
            dtype=torch.float64,
        ).eval()
        shapes = {key: value.shape for key, value in scratch.state_dict().items()}
        if shapes == {key: value.shape for key, value in state.items()}:
            scratch.load_state_dict(state)
            scratch.reparameterize()
            state = scratch.state_dict()
    return state


def _split(state: dict[str, Tensor], active: int) -> dict[str, Tensor]:
    """Split the authors' hidden layer into its active and its idle branch."""
    hidden = state["fc1.weight"].shape[0]
    branches = {"active": slice(0, active), "idle": slice(active, hidden)}
    branches = {branch: part for branch, part in branches.items() if part.stop > part.start}
    split = {}
    for key, value in state.items():
        head, _, leaf = key.partition(".")
        if head in ("fc1", "norm2"):
            own = "fc1" if head == "fc1" else "norm"
            for branch, part in branches.items():
                split[f"{branch}_{own}.{leaf}"] = (value[part] if value.ndim else value).clone()
        elif key == "fc2.weight":
            for branch, part in branches.items():
                split[f"{branch}_fc2.weight"] = value[:, part].clone()
        elif key == "fc2.bias":
            split[f"{next(iter(branches))}_fc2.bias"] = value
        else:
            split["layer_scale" if key == "ls" else f"norm.{leaf}" if head == "norm1" else key] = value
    return split
