"""Layouts: the order of a vision transformer's attention (s) and feed-forward (f) sub-layers, as a word like "sfsfff".

PAR, Pay Attention when Required (https://arxiv.org/abs/2009.04534): one sub-layer of five is attention, and these are
spread evenly over the first two thirds; Sandwich, Improving Transformer Models by Reordering their Sublayers (ACL 2020,
https://arxiv.org/abs/1911.03864): s^k (sf)^(n-k) f^k. Both are on language models; abstracts and public notes on them
were read. Which places within the first two thirds PAR takes was not: here i * (2/3 of all) / count, rounded down.
Brainformers (https://arxiv.org/abs/2306.00008) are left out: their block also has mixtures and its own norms and
activations, and its exact order was not found in what could be read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import trunc_normal_
from torch import Tensor, nn

from zoo.ffn.technique import Changes, FFNReport, block_macs, replace_module, require_types, vit_blocks
from zoo.profiling import count_params

__all__ = [
    "LayoutBlock",
    "LayoutConfig",
    "SubLayer",
    "apply",
    "par_layout",
    "restructure",
    "sandwich_layout",
]

Missing = Literal["new", "refuse"]


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Which sub-layers, in which order.

    Args:
        layout: "par", "sandwich", or letters s and f, as a word or one by one. The i-th s is the model's i-th attention
            with its norm, the i-th f its i-th feed-forward layer; what the layout lacks goes.
        ratio: Of "par": sub-layers for one attention; the paper's 5.
        coefficient: Of "sandwich": k, attentions that go to the front; 6 of 16 is the paper's best.
        missing: Sub-layers beyond those that the model has: "new" ones, to be trained, or "refuse" the layout.

    Raises:
        ValueError: A word or letter is unknown, or `ratio` is below 2.
    """

    layout: str | tuple[str, ...] = "par"
    ratio: int = 5
    coefficient: int = 6
    missing: Missing = "new"

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if self.layout not in ("par", "sandwich") and (not self.layout or set(self.layout) - {"s", "f"}):
            raise ValueError(f"layout must be par, sandwich, or letters s and f like sfsfff, got {self.layout!r}.")
        if self.ratio < 2:
            raise ValueError(f"ratio must be at least 2, sub-layers for one attention, got {self.ratio}.")

    def letters(self, depth: int) -> str:
        """Return the layout of a model with so many blocks.

        Raises:
            ValueError: The sandwich's coefficient does not fit, or there are fewer letters than blocks.
        """
        if self.layout == "par":
            return par_layout(depth, self.ratio)
        if self.layout == "sandwich":
            return sandwich_layout(depth, self.coefficient)
        if len(self.layout) < depth:
            raise ValueError(f"layout needs a letter for each of {depth} blocks at least, got {len(self.layout)}.")
        return "".join(self.layout)


def par_layout(depth: int, ratio: int = 5) -> str:
    """Return PAR's layout of as many sub-layers as `depth` blocks have, one of `ratio` attention."""
    total = 2 * depth
    count = max(1, total // ratio)
    places = {place * (2 * total // 3) // count for place in range(count)}
    return "".join("s" if place in places else "f" for place in range(total))


def sandwich_layout(depth: int, coefficient: int) -> str:
    """Return s^k (sf)^(n-k) f^k.

    Raises:
        ValueError: `coefficient` is not within 0 ... depth - 1.
    """
    if not 0 <= coefficient < depth:
        raise ValueError(f"coefficient must lie in 0 ... {depth - 1} for {depth} blocks, got {coefficient}.")
    return "s" * coefficient + "sf" * (depth - coefficient) + "f" * coefficient


class SubLayer(nn.Module):
    """x + drop_path(scale(layer(norm(x)))).

    Args:
        norm: In front.
        layer: Attention or feed-forward layer.
        scale: Layer scale, or the identity.
        drop_path: Stochastic depth, or the identity.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(self, norm: nn.Module, layer: nn.Module, scale: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer, self.scale, self.drop_path = norm, layer, scale, drop_path

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.drop_path(self.scale(self.layer(self.norm(x), **kwargs)))


class LayoutBlock(nn.Module):
    """Sub-layers one after the other, in the place of a block.

    Args:
        letters: s or f for each.
        sublayers: As many.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(self, letters: str, sublayers: Iterable[SubLayer]) -> None:
        super().__init__()
        self.letters, self.sublayers = letters, nn.ModuleList(sublayers)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        for letter, sublayer in zip(self.letters, self.sublayers, strict=True):
            x = sublayer(x, attn_mask=attn_mask, is_causal=is_causal) if letter == "s" else sublayer(x)
        return x

    def extra_repr(self) -> str:
        return self.letters


def _blocks(model: nn.Module) -> dict[str, Any]:
    """Return a plain transformer's blocks by name.

    Raises:
        ValueError: There are none, or they do not follow each other in one list.
    """
    blocks = vit_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no ViT blocks of timm: layouts reorder the sub-layers of those.")
    parent = next(iter(blocks)).rpartition(".")[0]
    others = [module for module in model.get_submodule(parent).children() if module not in set(blocks.values())]
    outside = [name for name in blocks if name.rpartition(".")[0] != parent]
    if others or outside:
        what = f"{outside[0]} is outside of it" if outside else f"it also holds {type(others[0]).__name__}"
        raise ValueError(
            f"Layouts need one list of ViT blocks of timm alone, as {parent or 'the model'} would be, but {what}."
        )
    return blocks


def _new(example: SubLayer) -> SubLayer:
    """Return a sub-layer of the same kind with new weights, drawn as timm draws a ViT's."""
    new = copy.deepcopy(example)
    for module in new.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return new


def _arrange(blocks: Mapping[str, Any], layout: Mapping[str, str]) -> dict[str, LayoutBlock]:
    """Return what stands in each block's place, with as many of the model's own sub-layers as there are."""
    own = {
        "s": [SubLayer(block.norm1, block.attn, block.ls1, block.drop_path1) for block in blocks.values()],
        "f": [SubLayer(block.norm2, block.mlp, block.ls2, block.drop_path2) for block in blocks.values()],
    }
    last = {letter: sublayers[-1] for letter, sublayers in own.items()}
    return {
        name: LayoutBlock(letters, [own[key].pop(0) if own[key] else _new(last[key]) for key in letters])
        for name, letters in layout.items()
    }


def apply(model: nn.Module, config: LayoutConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Reorder the sub-layers of a vision transformer, in place; "sfsf..." is the model itself and changes nothing.

    The letters are shared out among the blocks' places, so that the model keeps its number of blocks.

    Args:
        model: timm ViT.
        config: Which order.
        data: Not used.

    Raises:
        ValueError: The model has no plain list of ViT blocks, the layout does not fit it, or it was done before.
    """
    config = config or LayoutConfig()
    changes = Changes(model, "layout")
    blocks = _blocks(model)
    depth, letters = len(blocks), config.letters(len(blocks))
    for letter, what in (("s", "attention"), ("f", "feed-forward")):
        if config.missing == "refuse" and letters.count(letter) > depth:
            raise ValueError(
                f"{letters} has {letters.count(letter)} {what} sub-layers, the model {depth}: missing='new' makes more."
            )
    if letters == "sf" * depth:
        return changes.report({})
    bounds = [place * len(letters) // depth for place in range(depth + 1)]
    layout = {name: letters[start:end] for name, start, end in zip(blocks, bounds, bounds[1:], strict=False)}
    tokens = getattr(getattr(model, "patch_embed", None), "num_patches", 0) + getattr(model, "num_prefix_tokens", 0)
    before = {name: (count_params(block), block_macs(block, tokens)) for name, block in blocks.items()}
    for name, new in _arrange(blocks, layout).items():
        params, macs = before[name]
        changes.add(name, new.letters, (params, count_params(new)), (macs, block_macs(new, tokens)))
        replace_module(model, name, new)
    return changes.report(layout)


def restructure(model: nn.Module, layers: Mapping[str, str]) -> None:
    """Give a model the same layout; weights are loaded after."""
    if layers:
        for name, new in _arrange(_blocks(model), layers).items():
            replace_module(model, name, new)
