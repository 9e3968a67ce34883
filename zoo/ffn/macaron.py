"""Macaron: half a feed-forward layer before attention, half after, https://arxiv.org/abs/1906.02762.

x <- x + 1/2 FFN1(norm x); x <- x + attention; x <- x + 1/2 FFN2(norm x), after the Strang-Marchuk splitting of the
paper; half widths keep the number of parameters. Norms in front are our reading for vision transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.technique import FFNReport, LayerChange, note_change, refuse_twice, replace_module, vit_blocks
from zoo.profiling import count_params

__all__ = ["HalfFFN", "MacaronBlock", "MacaronConfig", "apply", "restructure"]

Start = Literal["new", "exact"]


@dataclass(frozen=True, kw_only=True)
class MacaronConfig:
    """What the two layers start from.

    Args:
        start: "new": two layers of half the width with new weights, to be trained from scratch; "exact": the first one
            gives nothing, the second is the trained layer at full width, so that the model's output does not change.

    Raises:
        ValueError: `start` is unknown.
    """

    start: Start = "new"

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}.")


class HalfFFN(nn.Module):
    """Half of what a layer gives.

    Args:
        ffn: The layer.
    """

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.ffn(x)


class MacaronBlock(nn.Module):
    """A block with half a feed-forward layer in front.

    Args:
        block: timm's ViT block; its own layer is behind attention.
        ffn: Layer in front of attention.
        norm: Norm in front of that.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(self, block: Block, ffn: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm0, self.mlp0, self.block = norm, HalfFFN(ffn), block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(x + self.mlp0(self.norm0(x)), *args, **kwargs)


def _change(block: Any, start: Start) -> MacaronBlock:
    mlp: Any = block.mlp
    norm = copy.deepcopy(block.norm2)
    first, second = copy.deepcopy(mlp), mlp
    if start == "new":
        hidden = mlp.fc1.out_features // 2
        kind = {"device": mlp.fc1.weight.device, "dtype": mlp.fc1.weight.dtype}
        for part in (first, second):
            part.fc1 = nn.Linear(mlp.fc1.in_features, hidden, mlp.fc1.bias is not None, **kind)
            part.fc2 = nn.Linear(hidden, mlp.fc2.out_features, mlp.fc2.bias is not None, **kind)
        for layer in norm.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
    else:
        with torch.no_grad():
            first.fc2.weight.zero_()
            second.fc2.weight.mul_(2)
            if first.fc2.bias is not None:
                first.fc2.bias.zero_()
                second.fc2.bias.mul_(2)
    block.mlp = HalfFFN(second)
    return MacaronBlock(block, first, norm)


def _blocks(model: nn.Module) -> dict[str, Any]:
    found = vit_blocks(model)
    odd = [
        f"{name} has a {type(part).__name__}"
        for name, block in found.items()
        for part, kind in ((block.mlp, Mlp), *((getattr(block.mlp, key, None), nn.Linear) for key in ("fc1", "fc2")))
        if type(part) is not kind
    ]
    if not found or odd:
        what = odd[0] if odd else "it has none"
        raise ValueError(f"{type(model).__name__} needs timm's ViT blocks with an Mlp: {what}.")
    return found


def apply(model: nn.Module, config: MacaronConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a vision transformer Macaron blocks, in place.

    Args:
        model: timm ViT.
        config: What to start from.
        data: Not used.

    Raises:
        ValueError: The model has no blocks of this kind, or it was done before.
    """
    config = config or MacaronConfig()
    refuse_twice(model, "macaron")
    blocks = _blocks(model)
    params_before, changes = count_params(model), []
    for name, block in blocks.items():
        before, macs = count_params(block), block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel()
        changed = _change(block, config.start)
        replace_module(model, name, changed)
        after = macs if config.start == "new" else 2 * macs
        changes.append(
            LayerChange(
                name=name, what=f"Macaron, {config.start}", params=(before, count_params(changed)), macs=(macs, after)
            )
        )
    note_change(model, "macaron", {name: asdict(config) for name in blocks})
    return FFNReport(technique="macaron", layers=tuple(changes), params=(params_before, count_params(model)))


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a model the same blocks; weights are loaded after."""
    blocks = _blocks(model)
    for name, facts in layers.items():
        replace_module(model, name, _change(blocks[name], facts["start"]))
