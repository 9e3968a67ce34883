"""Mixture of blocks: of a group of consecutive blocks every sample runs a few, chosen anew at every step.

Dense2MoE (ICCV 2025), https://arxiv.org/abs/2510.09094. The paper gives the router and the group loss; how gradients
reach the router and which blocks form groups are readings of our own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from zoo.kernels.dispatch import no_autocast

__all__ = ["BlockGroup", "MixtureOfBlocks", "MoBConfig", "block_groups", "mix_blocks"]

_OF_SAMPLES = (
    "hidden_states",
    "encoder_hidden_states",
    "temb",
    "timestep",
    "class_labels",
    "attention_mask",
    "encoder_attention_mask",
)  # arguments of blocks whose first dimension is the batch
_FLUX_SIZES = {"M": (14, 30), "S": (12, 23), "XS": (11, 16)}  # active double and single blocks of 19 and 38


@dataclass(frozen=True, kw_only=True)
class BlockGroup:
    """Consecutive blocks of a transformer.

    Args:
        blocks: Name of the model's list of blocks.
        first: Number of the first one in the dense model.
        count: How many there are.
        active: How many of them a sample runs.
    """

    blocks: str = "transformer_blocks"
    first: int
    count: int
    active: int


@dataclass(frozen=True, kw_only=True)
class MoBConfig:
    """Which blocks form groups.

    Args:
        groups: Blocks outside of all groups always run.
        alpha: Share of the tokens in the router's scores; the rest is the conditioning's.
    """

    groups: tuple[BlockGroup, ...]
    alpha: float = 0.5

    def __post_init__(self) -> None:
        groups = tuple(BlockGroup(**group) if isinstance(group, dict) else group for group in self.groups)
        object.__setattr__(self, "groups", groups)  # as JSON gives them
        for group in groups:
            if group.first < 0 or group.count < 2 or not 0 <= group.active <= group.count:
                raise ValueError(f"A group has 2 or more blocks, of which 0 or more are active, got {group}.")

    @classmethod
    def flux(cls, size: str) -> MoBConfig:
        """Return groups that lead FLUX.1 to the paper's sizes M, S and XS; the paper does not name its groups.

        Raises:
            ValueError: The size has another name.
        """
        if size not in _FLUX_SIZES:
            raise ValueError(f"size must be one of {', '.join(_FLUX_SIZES)}, got {size!r}; L has no groups.")
        double, single = _FLUX_SIZES[size]
        return cls(
            groups=(
                BlockGroup(first=0, count=19, active=double),
                BlockGroup(blocks="single_transformer_blocks", first=0, count=38, active=single),
            )
        )


class MixtureOfBlocks(nn.Module):
    """Run, of consecutive blocks, those with the highest scores, in their order; the others pass their input on.

        scores = alpha W_x [mean image token, mean text token] + (1 - alpha) W_y conditioning

    One decision a sample. The gradient reaches the router through a factor softmax(scores)_i / its own value on what
    block i adds: 1, so that with all blocks active the output is exactly the dense model's.

    Args:
        blocks: Of one class of diffusers.
        active: Blocks that a sample runs.
        dim: Channels of a token.
        condition_dim: Channels of the conditioning.
        text: The blocks hand on a stream of text tokens too.
        alpha: See above.
    """

    def __init__(
        self, blocks: list[nn.Module], active: int, dim: int, condition_dim: int, text: bool, alpha: float = 0.5
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.active, self.alpha, self.has_text = active, alpha, text
        self.noise = 0.0  # temperature of Gumbel noise on the scores in training, so that every block is tried
        kept = next(blocks[0].parameters())
        dd: dict[str, Any] = {"bias": False, "device": kept.device, "dtype": kept.dtype}
        self.tokens = nn.Linear(dim * (2 if text else 1), len(blocks), **dd)
        self.condition = nn.Linear(condition_dim, len(blocks), **dd)
        for linear in (self.tokens, self.condition):
            if not linear.weight.is_meta:
                nn.init.normal_(linear.weight, std=1e-3 / linear.in_features**0.5)
        self._signature = inspect.signature(type(blocks[0]).forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what a block does."""
        bound = dict(self._signature.bind(None, *args, **kwargs).arguments)
        bound.pop("self")
        scores = self.scores(bound)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, self._noisy(scores).topk(self.active, dim=1).indices, True)
        shares = torch.softmax(scores, dim=1)
        gates = shares / shares.detach() - 1  # 0, with the gradient of the softmax
        hidden, text = bound["hidden_states"], None
        if self.has_text:
            text = bound["encoder_hidden_states"]
        for number, block in enumerate(self.blocks):
            rows = chosen[:, number].nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            whole = len(rows) == len(chosen)
            inputs = bound if whole else {key: _rows(key, value, rows) for key, value in bound.items()}
            out = block(**inputs)
            streams = out if isinstance(out, tuple) else (None, out)
            gate = gates[rows, number].view(-1, 1, 1).to(hidden.dtype)
            before = (inputs["encoder_hidden_states"] if self.has_text else None, inputs["hidden_states"])
            updated = [_gated(new, old, gate) for new, old in zip(streams, before, strict=True)]
            text = updated[0] if whole or text is None else text.index_copy(0, rows, updated[0])
            hidden = updated[1] if whole else hidden.index_copy(0, rows, updated[1])
            bound["hidden_states"] = hidden
            if self.has_text:
                bound["encoder_hidden_states"] = text
        return (text, hidden) if self.has_text else hidden

    @property
    def norm1(self) -> nn.Module:
        """Norm of the first block, which diffusers' DiT asks for its embedding of step and class."""
        block: Any = self.blocks[0]
        return block.norm1

    def scores(self, bound: dict[str, Any]) -> Tensor:
        """Return the scores (B, blocks) in float32 of a block's arguments by name."""
        pooled = bound["hidden_states"].mean(1)
        if self.has_text:
            pooled = torch.cat([pooled, bound["encoder_hidden_states"].mean(1)], dim=1)
        condition = _condition(self.blocks[0], bound).to(pooled.dtype)
        with no_autocast(pooled):
            tokens = F.linear(pooled.float(), self.tokens.weight.float())
            return self.alpha * tokens + (1 - self.alpha) * F.linear(condition.float(), self.condition.weight.float())

    def _noisy(self, scores: Tensor) -> Tensor:
        if not self.training or self.noise == 0:
            return scores
        gumbel = -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)))
        return scores + self.noise * gumbel


def _gated(new: Tensor | None, old: Tensor | None, gate: Tensor) -> Any:
    """Return `new` with the gate's gradient on what was added to `old`; the value is `new` to the bit."""
    if new is None or old is None or not torch.is_grad_enabled():
        return new
    return new + gate * (new - old)


def _rows(name: str, value: Any, rows: Tensor) -> Any:
    return value[rows] if name in _OF_SAMPLES and isinstance(value, Tensor) else value


def _width(block: Any) -> int:
    """Return the channels of a block's tokens."""
    return next(module.normalized_shape[0] for module in block.modules() if isinstance(module, nn.LayerNorm))


def _condition(block: Any, bound: dict[str, Any]) -> Tensor:
    """Return the conditioning (B, channels) of a block's arguments: the embedded step, class, pooled text."""
    if "temb" in bound:
        return bound["temb"]
    embedder = getattr(getattr(block, "norm1", None), "emb", None)
    if embedder is not None:
        return embedder(bound["timestep"], bound["class_labels"], hidden_dtype=bound["hidden_states"].dtype)
    return bound["timestep"].flatten(1)  # PixArt hands the modulation itself to its blocks


def _condition_dim(block: Any, dim: int) -> int:
    arguments = inspect.signature(type(block).forward).parameters
    shares_modulation = "temb" not in arguments and getattr(getattr(block, "norm1", None), "emb", None) is None
    return 6 * dim if shares_modulation else dim


def block_groups(model: nn.Module) -> dict[str, MixtureOfBlocks]:
    """Return the mixtures of blocks of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfBlocks)}


def mix_blocks(model: nn.Module, config: MoBConfig) -> None:
    """Put groups of blocks in the place of single ones, in place.

    Args:
        model: A DiT, PixArt, SD3 or Flux transformer, dense or with experts.
        config: Groups in terms of the model as it is.

    Raises:
        ValueError: A list of blocks is unknown, a group goes beyond it, overlaps another one, or holds a block that
            drops the text.
    """
    for name in dict.fromkeys(group.blocks for group in config.groups):
        groups = sorted((group for group in config.groups if group.blocks == name), key=lambda group: group.first)
        blocks = getattr(model, name, None)
        if not isinstance(blocks, nn.ModuleList):
            known = [key for key, child in model.named_children() if isinstance(child, nn.ModuleList)]
            raise ValueError(f"{type(model).__name__} has no list of blocks {name!r}; known: {', '.join(known)}.")
        mixed: list[nn.Module] = []
        last = 0
        for group in groups:
            end = group.first + group.count
            own = list(blocks[group.first : end])
            if group.first < last or end > len(blocks):
                raise ValueError(f"{group} overlaps another group or goes beyond the {len(blocks)} blocks of {name}.")
            if any(getattr(block, "context_pre_only", False) for block in own):
                raise ValueError(f"{group} holds the last block, which drops the text: leave it outside.")
            dim = _width(own[0])
            text = not isinstance(own[0], BasicTransformerBlock)  # it takes text without handing it on
            mixture = MixtureOfBlocks(own, group.active, dim, _condition_dim(own[0], dim), text, config.alpha)
            mixed += [*blocks[last : group.first], mixture.train(own[0].training)]
            last = end
        setattr(model, name, nn.ModuleList([*mixed, *blocks[last:]]))
