"""Dense feed-forward layers, as diffusers, timm and zoo build them, seen as hidden channels that can be regrouped."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, GlobalResponseNormMlp, GluMlp, Mlp
from timm.layers import SwiGLU as TimmSwiGLU
from torch import Tensor, nn

from zoo.kernels.experts import ACTIVATIONS
from zoo.layers.ffn import RePaFFN

__all__ = [
    "CONVOLUTIONS",
    "Channels",
    "DenseFFN",
    "Product",
    "has_rows",
    "keep_channels",
    "read_ffn",
    "read_torch",
    "set_hidden_dim",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Product = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""What makes hidden channels or outputs: a linear layer, or a 1x1 convolution of maps (B, C, ...)."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The weights of hidden channels, or their gradients.

    Args:
        up: (G, H, D): a row of D values makes hidden channel h of H; G is 1, or 2 in a gated layer: value, then gate.
        up_bias: (G, H) or None.
        down: (O, H): column h adds hidden channel h to the O outputs.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """y = down(act(up(x))), or down(value(x) * act(gate(x))), inside a module of some library.

    Args:
        up: Product that makes the hidden channels, or the values of a gated layer; with `packed`, values and gates.
        gate: Product that makes the gates where it is a module of its own.
        down: Product that makes the outputs.
        activation: Key of `zoo.kernels.experts.ACTIVATIONS`; None: another one.
        packed: Order of the halves of `up` in a gated layer; None: `up` is not packed.
        first_column: Where the hidden channels start in `down`'s input; attention comes before them in Flux.
        dropout: Rate at which outputs are dropped in training.
        between: Modules between the products that treat every hidden channel by itself, with parameters of its own:
            BatchNorm, depthwise convolutions; and timm's `GlobalResponseNorm`, which also takes a mean over channels.
        whole: The module does nothing else: its input goes into `up`, what `down` gives is its output.
        fused: The module reads the weights of its products itself, so that these stay linear layers.
        counters: Numbers of hidden channels that modules hold beside their weights, and reshape by: module and name.
    """

    up: Any  # Product; nn.Linear where `plain`
    gate: Any = None
    down: Any
    activation: Any  # str | None; str where `plain`
    packed: Literal["value first", "gate first"] | None = None
    first_column: int = 0
    dropout: float = 0.0
    between: tuple[nn.Module, ...] = ()
    whole: bool = True
    fused: bool = False
    counters: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def convolutional(self) -> bool:
        """The products are 1x1 convolutions."""
        return isinstance(self.up, CONVOLUTIONS)

    @property
    def plain(self) -> bool:
        """Linear products around a known activation: the layer can be written in another form."""
        return not self.convolutional and not self.between and self.activation is not None

    @property
    def dim(self) -> int:
        """Inputs."""
        return self.up.in_channels if self.convolutional else self.up.in_features

    @property
    def out_dim(self) -> int:
        """Outputs."""
        return self.down.out_channels if self.convolutional else self.down.out_features

    @property
    def hidden_dim(self) -> int:
        """Hidden channels."""
        return (self.down.in_channels if self.convolutional else self.down.in_features) - self.first_column

    @property
    def gated(self) -> bool:
        """Every hidden channel is a value times an activated gate."""
        return self.gate is not None or self.packed is not None

    @property
    def owns_output_bias(self) -> bool:
        """The output bias is the layer's own; Flux shares it with attention."""
        return self.first_column == 0 and self.down.bias is not None

    @property
    def products(self) -> list[Any]:
        """The products that make hidden channels, then the one that makes the outputs."""
        return [part for part in (self.up, self.gate, self.down) if part is not None]

    @property
    def num_parameters(self) -> int:
        """Number of weights and biases in `parameters`, and of what is between."""
        between = [parameter for module in self.between for parameter in module.parameters(recurse=False)]
        return sum(parameter.numel() for parameter in [*self.parameters(), *between])

    def macs(self, hidden_dim: int | None = None) -> int:
        """Return the multiply-accumulates for one token, at the layer's own number of hidden channels or another."""
        hidden = self.hidden_dim if hidden_dim is None else hidden_dim
        depthwise = sum(module.weight.numel() for module in self.between if isinstance(module, CONVOLUTIONS))
        return hidden * ((2 if self.gated else 1) * self.dim + self.out_dim + depthwise // self.hidden_dim)

    def rows(self, x: Tensor) -> Tensor:
        """Return what a product takes or gives as rows (T, C), one a token."""
        return (x.movedim(1, -1) if self.convolutional else x).flatten(0, -2)

    def parameters(self) -> list[Tensor]:
        """Return the weights and biases that hold the hidden channels."""
        layers = [self.up, *([self.gate] if self.gate is not None else [])]
        return [p for layer in layers for p in (layer.weight, layer.bias) if p is not None] + [self.down.weight]

    def channels(self, gradients: bool = False) -> Channels:
        """Return the hidden channels' weights, or their gradients; views where the layout allows.

        Raises:
            ValueError: A gradient is asked for and there is none.
        """

        def read(parameter: Tensor) -> Tensor:
            if not gradients:
                return parameter.detach()
            if parameter.grad is None:
                raise ValueError("A feed-forward weight got no gradient from the loss: does the loss use the output?")
            return parameter.grad

        weights = [read(self.up.weight)]
        biases = [] if self.up.bias is None else [read(self.up.bias)]
        if self.gate is not None:
            weights.append(read(self.gate.weight))
            biases += [] if self.gate.bias is None else [read(self.gate.bias)]
        halves = 2 if self.packed is not None else len(weights)
        up = (
            torch.cat(weights).view(halves, -1, self.dim) if len(weights) > 1 else weights[0].view(halves, -1, self.dim)
        )
        bias = torch.cat(biases).view(halves, -1) if biases else None
        if self.packed == "gate first":
            up, bias = up.flip(0), None if bias is None else bias.flip(0)
        return Channels(up=up, up_bias=bias, down=read(self.down.weight).flatten(1)[:, self.first_column :])

    @torch.no_grad()
    def write(self, channels: Channels) -> None:
        """Set the hidden channels' weights; the inverse of `channels()`."""
        up, bias = channels.up, channels.up_bias
        if self.packed == "gate first":
            up, bias = up.flip(0), None if bias is None else bias.flip(0)
        layers = [self.up] if self.gate is None else [self.up, self.gate]
        for layer, weight in zip(layers, up.reshape(len(layers), -1, self.dim), strict=True):
            layer.weight.copy_(weight.view_as(layer.weight))
        if bias is not None:
            for layer, values in zip(layers, bias.reshape(len(layers), -1), strict=True):
                layer.bias.copy_(values)
        self.write_down(channels.down)

    @torch.no_grad()
    def write_down(self, weight: Tensor) -> None:
        """Set the columns (O, H) of the hidden channels in the second product."""
        self.down.weight.flatten(1)[:, self.first_column :].copy_(weight)


def read_ffn(module: nn.Module) -> DenseFFN | None:
    """Return a module's feed-forward layer, or None if it is none.

    Known are diffusers' `FeedForward` and the hidden layer of Flux's single blocks, timm's `Mlp`, `GluMlp` and
    `SwiGLU`, and the activated channels of a merged `RePaFFN`. `zoo.ffn.discovery` finds many more.

    Raises:
        ValueError: It is one, with a part that hidden channels cannot be split around: a norm, an unknown activation,
            or a `RePaFFN` that is not merged.
    """
    # a module of diffusers exists only where its file was imported: classifiers do without diffusers
    attention = sys.modules.get("diffusers.models.attention")
    flux = sys.modules.get("diffusers.models.transformers.transformer_flux")
    if attention is not None and isinstance(module, attention.FeedForward):
        return _read_diffusers(module)
    if flux is not None and isinstance(module, flux.FluxSingleTransformerBlock) and hasattr(module, "proj_mlp"):
        first = module.proj_out.in_features - module.proj_mlp.out_features
        activation = _activation(module.act_mlp)
        return DenseFFN(up=module.proj_mlp, down=module.proj_out, activation=activation, first_column=first)
    if type(module) in (Mlp, GluMlp, TimmSwiGLU):
        return _read_timm(module)
    if isinstance(module, RePaFFN):
        if module.linear is None or module.active_fc1 is None or module.active_fc2 is None:
            raise ValueError(
                "A RePaFFN is converted in its merged form: call model.eval() and zoo.reparameterize first."
            )
        return DenseFFN(up=module.active_fc1, down=module.active_fc2, activation="gelu")
    return None


def read_torch(module: nn.Module) -> DenseFFN | None:
    """Return the feed-forward layer of one more known class, which cannot be split into experts; None if it is none.

    Known are PyTorch's `TransformerEncoderLayer` and `TransformerDecoderLayer`, timm's `ConvMlp`, `Mlp` of 1x1
    convolutions and `GlobalResponseNormMlp`.
    """
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        act = module.activation
        known = _activation_name(act) if isinstance(act, nn.Module) else {F.relu: "relu", F.gelu: "gelu"}.get(act)
        return DenseFFN(up=module.linear1, down=module.linear2, activation=known, whole=False, fused=True)
    if type(module) in (ConvMlp, Mlp, GlobalResponseNormMlp):
        between: tuple[nn.Module, ...] = ()
        if isinstance(module, GlobalResponseNormMlp):
            between = (module.grn,)
        elif not isinstance(module.norm, nn.Identity):
            return None
        name = _activation_name(module.act)  # type: ignore[arg-type]
        if name is not None:
            return DenseFFN(up=module.fc1, down=module.fc2, activation=name, between=between)
    return None


def _read_diffusers(module: Any) -> DenseFFN:
    from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU

    first, down = module.net[0], module.net[2]
    assert isinstance(down, nn.Linear)
    rates = {layer.p for layer in module.net if isinstance(layer, nn.Dropout)}
    dropout = max(rates, default=0.0)
    if isinstance(first, GELU):
        activation = "gelu_tanh" if first.approximate == "tanh" else "gelu"
    elif isinstance(first, ApproximateGELU):
        activation = "quick_gelu"
    elif isinstance(first, (GEGLU, SwiGLU)):
        activation = "gelu" if isinstance(first, GEGLU) else "silu"
        return DenseFFN(up=first.proj, down=down, activation=activation, packed="value first", dropout=dropout)
    elif isinstance(first, LinearActivation):
        activation = _activation(first.activation)
    else:
        raise ValueError(f"FeedForward with {type(first).__name__} cannot be split: known are GELU, GEGLU, SwiGLU.")
    return DenseFFN(up=first.proj, down=down, activation=activation, dropout=dropout)


def _read_timm(module: Any) -> DenseFFN:
    if not isinstance(module.norm, nn.Identity):
        raise ValueError(f"{type(module).__name__} has a norm between its products, which sees all hidden channels.")
    activation, dropout = _activation(module.act), module.drop2.p
    if isinstance(module, TimmSwiGLU):
        return DenseFFN(up=module.fc1_x, gate=module.fc1_g, down=module.fc2, activation=activation, dropout=dropout)
    if isinstance(module.fc1, nn.Conv2d):
        raise ValueError(f"{type(module).__name__} of convolutions cannot be split: build it with use_conv=False.")
    packed: Literal["value first", "gate first"] | None = None
    if isinstance(module, GluMlp):
        packed = "value first" if module.gate_last else "gate first"
    return DenseFFN(up=module.fc1, down=module.fc2, activation=activation, packed=packed, dropout=dropout)


def _activation(module: nn.Module) -> str:
    """Return the key of an activation module in `ACTIVATIONS`."""
    known = _activation_name(module)
    if known is None:
        name = type(module).__name__
        raise ValueError(f"Activation {name} is unknown: {', '.join(ACTIVATIONS)} can be split into experts.")
    return known


def _activation_name(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        return "gelu_tanh" if name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh" else "gelu"
    known = {"SiLU": "silu", "Swish": "silu", "ReLU": "relu", "QuickGELU": "quick_gelu", "Sigmoid": "sigmoid"}
    return known.get(name)


@torch.no_grad()
def keep_channels(ffn: DenseFFN, kept: Tensor) -> None:
    """Cut a layer's products, and what is between them, down to some hidden channels, in place.

    Args:
        ffn: The layer.
        kept: (K,) int64, channels that stay, in their new order.
    """
    hidden = ffn.hidden_dim
    rows = torch.cat([kept, kept + hidden]) if ffn.packed is not None else kept
    for product in (ffn.up, ffn.gate):
        if product is not None:
            _keep(product, rows, product.weight.shape[0])
    for module in ffn.between:  # of a packed layer before the halves meet, or after
        both = ffn.packed is not None and has_rows(module, 2 * hidden)
        _keep(module, rows if both else kept, 2 * hidden if both else hidden)
    for module, name in ffn.counters:
        setattr(module, name, len(kept) * (getattr(module, name) // hidden))
    columns = torch.cat([torch.arange(ffn.first_column), kept.cpu() + ffn.first_column])
    _set(ffn.down, "weight", ffn.down.weight[:, columns.to(ffn.down.weight.device)])
    setattr(ffn.down, "in_channels" if ffn.convolutional else "in_features", len(columns))


def has_rows(module: nn.Module, count: int) -> bool:
    """Tell whether a module itself, not its parts, holds values for so many channels."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.ndim > 0 and tensor.shape[0] == count for tensor in tensors)


def _keep(module: Any, rows: Tensor, count: int) -> None:
    """Keep rows of all tensors of a module that have `count` of them, and its numbers true."""
    tensors = {**module._parameters, **module._buffers}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.ndim and tensor.shape[0] == count:
            _set(module, name, tensor[rows.to(tensor.device)])
    depthwise = isinstance(module, CONVOLUTIONS) and module.groups > 1
    for name in ("out_features", "out_channels", "num_features", *(("groups", "in_channels") if depthwise else ())):
        if isinstance(vars(module).get(name), int):
            setattr(module, name, len(rows))


def _set(module: nn.Module, part: str, values: Tensor) -> None:
    old = getattr(module, part)
    values = values.detach().clone().contiguous()
    setattr(
        module, part, nn.Parameter(values, requires_grad=old.requires_grad) if part in module._parameters else values
    )


def set_hidden_dim(module: Any, width: int) -> None:
    """Keep the numbers that modules hold beside their weights true."""
    for name in ("hidden_dim", "active_dim", "mlp_hidden_dim", "hidden_features"):
        if isinstance(vars(module).get(name), int):
            idle = (
                module.hidden_dim - module.active_dim if name == "hidden_dim" and hasattr(module, "active_dim") else 0
            )
            setattr(module, name, width + idle)
