"""StructuredFFN: low-rank, block-shuffle and block-dense products, with self-guided training.

Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers (NeurIPS 2024),
https://arxiv.org/abs/2406.16450. The guide starts as the structured product's true matrix; in the released code that of
block-shuffle lacks the permutation. That a trained dense product is projected block by block (Monarch) is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.low_rank import LowRankLinear
from zoo.ffn.technique import Changes, FFNReport, ffn_layers, replace_module, require_types

__all__ = [
    "BlockDense",
    "BlockShuffle",
    "SelfGuided",
    "StructuredConfig",
    "apply",
    "drop_guides",
    "guide_share",
    "restructure",
    "set_guide",
]

Structure = Literal["low_rank", "block_shuffle", "block_dense"]


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """How the products of feed-forward layers are built.

    Args:
        structure: "low_rank": U V; "block_shuffle": block-diagonal, permutation, block-diagonal (Monarch);
            "block_dense": block-diagonal, then dense.
        blocks: b of the two block structures.
        rank: r of "low_rank" and "block_dense" as a share of the input width.
        guided: Train a dense product beside each structured one and fade it out (self-guided training).
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: A number is out of range, or `structure` is unknown.
    """

    structure: Structure = "low_rank"
    blocks: int = 4
    rank: float = 0.25
    guided: bool = False
    pattern: str | None = None

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if self.blocks < 1 or not 0 < self.rank <= 1:
            raise ValueError(f"blocks must be at least 1 and rank in 0 ... 1, got {self.blocks} and {self.rank}.")

    def build(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Return a structured product (outputs, inputs).

        Raises:
            ValueError: The widths are not divisible by the blocks.
        """
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        rank = max(1, round(self.rank * inputs))
        if self.structure == "low_rank":
            return LowRankLinear(inputs, rank, outputs, bias, **dd)
        if self.structure == "block_dense":
            rank = max(self.blocks, round(rank / self.blocks) * self.blocks)
            return BlockDense(inputs, rank, outputs, self.blocks, bias, **dd)
        return BlockShuffle(inputs, outputs, self.blocks, bias, **dd)


def _block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each block: (..., b, p) by (b, q, p) -> (..., b, q)."""
    return torch.einsum("...bp,bqp->...bq", x, weight)


def _divisible(width: int, blocks: int, what: str) -> int:
    if width % blocks:
        near = max(block for block in range(1, blocks + 1) if width % block == 0)
        raise ValueError(f"{width} {what} are not divisible into {blocks} blocks; {near} blocks are.")
    return width // blocks


class BlockShuffle(nn.Module):
    """Block-diagonal, permutation, block-diagonal: every output depends on every input.

    Args:
        inputs: Channels of x.
        outputs: Channels of y.
        blocks: b; divides both.
        bias: Add one.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (..., inputs) -> (..., outputs).

    Raises:
        ValueError: A width is not divisible by `blocks`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.blocks = inputs, outputs, blocks
        p, s = _divisible(inputs, blocks, "inputs"), _divisible(outputs, blocks, "outputs")
        middle = p if inputs < outputs else s  # channels of a block between the two
        _divisible(blocks * middle, blocks, "channels")
        self.first = nn.Parameter(torch.empty(blocks, middle, p, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(blocks, s, middle, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start each block as the polar factor of a random one."""
        if self.first.is_meta:
            return
        for weight in (self.first, self.second):
            left, _, right = torch.linalg.svd(torch.randn_like(weight, dtype=torch.float32), full_matrices=False)
            weight.copy_(left @ right / math.sqrt(3))

    def forward(self, x: Tensor) -> Tensor:
        y = _block_linear(x.unflatten(-1, (self.blocks, -1)), self.first)  # (..., b, middle)
        y = y.transpose(-1, -2).flatten(-2).unflatten(-1, (self.blocks, -1))  # channels of all blocks meet
        y = _block_linear(y, self.second).flatten(-2)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return the (outputs, inputs) matrix of the product."""
        bias, self.bias = self.bias, None
        rows = self(torch.eye(self.in_features, device=self.first.device, dtype=self.first.dtype))
        self.bias = bias
        return rows.t()

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.first.numel() + self.second.numel()


class BlockDense(nn.Module):
    """Block-diagonal to r channels, then a dense product.

    Args:
        inputs: Channels of x.
        rank: r; divisible by `blocks`.
        outputs: Channels of y.
        blocks: b; divides `inputs`.
        bias: Add one.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (..., inputs) -> (..., outputs).

    Raises:
        ValueError: A width is not divisible by `blocks`.
    """

    def __init__(
        self,
        inputs: int,
        rank: int,
        outputs: int,
        blocks: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.blocks = inputs, outputs, blocks
        p, q = _divisible(inputs, blocks, "inputs"), _divisible(rank, blocks, "channels between")
        self.first = nn.Parameter(torch.empty(blocks, q, p, device=device, dtype=dtype))
        self.outward = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)
        if not self.first.is_meta:
            left, _, right = torch.linalg.svd(torch.randn(blocks, q, p), full_matrices=False)
            with torch.no_grad():
                self.first.copy_(left @ right)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(_block_linear(x.unflatten(-1, (self.blocks, -1)), self.first).flatten(-2))

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return the (outputs, inputs) matrix of the product."""
        return self.outward.weight @ torch.block_diag(*self.first)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.first.numel() + self.outward.weight.numel()


class SelfGuided(nn.Module):
    """y = a W x + (1 - a) structured(x): a dense guide that fades out in training and is then dropped.

    Args:
        structured: The product that stays; the guide starts as its matrix, so that the output does not depend on a.

    Attributes:
        share: a, from 1 to 0; see `set_guide`.
    """

    def __init__(self, structured: nn.Module) -> None:
        super().__init__()
        self.structured, self.share = structured, 1.0
        matrix = matrix_of(structured)
        self.guide = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            self.guide.weight.copy_(matrix)
        self.in_features, self.out_features = matrix.shape[1], matrix.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.structured(x)
        if self.share == 0 or not self.training:
            return y
        bias = bias_of(self.structured)
        plain = y if bias is None else y - bias
        return y + self.share * (self.guide(x) - plain)


def matrix_of(structured: nn.Module) -> Tensor:
    """Return the (outputs, inputs) matrix of a structured product."""
    if isinstance(structured, LowRankLinear):
        return structured.to_dense().weight.detach()
    assert isinstance(structured, (BlockShuffle, BlockDense))
    return structured.matrix()


def bias_of(structured: nn.Module) -> Tensor | None:
    """Return the bias of a structured product."""
    holder = structured if isinstance(structured, BlockShuffle) else structured.outward
    assert isinstance(holder, (BlockShuffle, nn.Linear))
    return holder.bias


def guide_share(step: int, total: int, until: float = 0.5) -> float:
    """Return a of an optimizer step: a cosine from 1 to 0 over the first share `until` of all steps (section 4)."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1.0, until * total))))


def set_guide(model: nn.Module, share: float) -> None:
    """Set a in every guided product; at 0 the guides are dropped, for good.

    Raises:
        ValueError: The share lies outside 0 ... 1, or the model has no guides.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The guide's share lies in 0 ... 1, got {share}.")
    guided = [(name, module) for name, module in model.named_modules() if isinstance(module, SelfGuided)]
    if not guided:
        raise ValueError(f"{type(model).__name__} has no guided products (any more).")
    for name, module in guided:
        module.share = share
        if share == 0:
            replace_module(model, name, module.structured)


def drop_guides(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a training with guides as those of its structured products alone."""
    guided = {key.removesuffix("guide.weight") for key in state_dict if key.endswith(".guide.weight")}
    kept = {}
    for key, value in state_dict.items():
        prefix = next((name for name in guided if key.startswith(name)), "")
        if key != f"{prefix}guide.weight":
            kept[prefix + key.removeprefix(prefix).removeprefix("structured.") if prefix else key] = value
    return kept


def apply(model: nn.Module, config: StructuredConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Give a model structured products with new weights, in place, to be trained; biases are kept.

    `zoo.ffn.low_rank` converts trained weights.

    Args:
        model: Of timm or diffusers.
        config: Which structure.
        data: Not used.

    Raises:
        ValueError: No layer is known, a width is not divisible, or it was done before.
    """
    config = config or StructuredConfig()
    changes, facts = Changes(model, "structured"), {}
    ffns = ffn_layers(model, config.pattern, "linear")
    names = {id(module): name for name, module in model.named_modules()}
    built: dict[str, nn.Module] = {}
    for layer, ffn in ffns.items():
        for part in _products(layer, ffn):
            try:
                built[names[id(part)]] = _build(part, config)
            except ValueError as error:
                raise ValueError(f"{layer}: {error}") from error
    for layer, ffn in ffns.items():
        params, macs = ffn.num_parameters, ffn.macs()
        after = 0
        for part in _products(layer, ffn):
            name = names[id(part)]
            product = built[name]
            after += int(product.macs)  # type: ignore[arg-type]
            replace_module(model, name, SelfGuided(product) if config.guided else product)
            facts[name] = {"structure": config.structure, "blocks": config.blocks, "rank": config.rank}
        change = f"{config.structure}, {config.blocks} blocks" if config.structure != "low_rank" else "low rank"
        changes.add(layer, change, (params, after), (macs, after))
    return changes.report(facts)


def _products(name: str, ffn: DenseFFN) -> list[nn.Linear]:
    if ffn.first_column:
        raise ValueError(f"{name} shares a product with attention: structures are for layers of their own.")
    return ffn.products


def _build(dense: nn.Linear, config: StructuredConfig) -> nn.Module:
    product = config.build(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        device=dense.weight.device,
        dtype=dense.weight.dtype,
    )
    bias = bias_of(product)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(dense.bias)
    if isinstance(product, LowRankLinear) and not dense.weight.is_meta:  # the SVD of a random matrix, split evenly
        random = nn.Linear(dense.in_features, dense.out_features, bias=False, device=dense.weight.device)
        start = LowRankLinear.from_dense(random, product.rank)
        with torch.no_grad():
            product.inward.weight.copy_(start.inward.weight)
            product.outward.weight.copy_(start.outward.weight)
    return product


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same structured products; weights are loaded after, guides are left out."""
    for name, facts in layers.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        replace_module(model, name, _build(dense, StructuredConfig(**facts)))
