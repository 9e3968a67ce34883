"""Macaron: half a feed-forward layer before attention, half after, https://arxiv.org/abs/1906.02762.

x <- x + 1/2 FFN1(norm x); x <- x + attention; x <- x + 1/2 FFN2(norm x), after the Strang-Marchuk splitting of the
paper; half widths keep the number of parameters. Norms in front are our reading for vision transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.technique import Changes, FFNReport, replace_module, require_types, vit_blocks
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
        require_types(type(self), vars(self))


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
    changes = Changes(model, "macaron")
    blocks = _blocks(model)
    for name, block in blocks.items():
        before, macs = count_params(block), block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel()
        changed = _change(block, config.start)
        replace_module(model, name, changed)
        after = macs if config.start == "new" else 2 * macs
        changes.add(name, f"Macaron, {config.start}", (before, count_params(changed)), (macs, after))
    return changes.report({name: asdict(config) for name in blocks})


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a model the same blocks; weights are loaded after."""
    blocks = _blocks(model)
    for name, facts in layers.items():
        replace_module(model, name, _change(blocks[name], facts["start"]))
