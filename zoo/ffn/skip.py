"""Skip feed-forward layers where the residual stream no longer turns: for good, or token by token.

After FFN-SkipLLM (https://arxiv.org/abs/2404.03865), which is on language models and was read in public notes only. The
signal is the cosine of a token before and after the layer was added. Static: the layers in the middle that turn the
stream least on the data are removed. By token: where the cosine at one layer is above a threshold, the token skips the
next `horizon` layers; only kept tokens are computed. First and last layers are never skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.dense_ffn import read_ffn
from zoo.ffn.depth import Nothing
from zoo.ffn.technique import (
    Changes,
    FFNReport,
    evaluating,
    listed,
    output_error,
    outputs_of,
    replace_module,
    require_types,
    vit_blocks,
)
from zoo.profiling import count_params

__all__ = ["SkipConfig", "SkippingBlock", "apply", "executed_share", "restructure", "token_cosines"]

Mode = Literal["static", "token"]


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """What is skipped.

    Args:
        mode: "static": whole layers; "token": by every token's cosine.
        threshold: Cosine above which a token skips the next layers; above 1 nothing is skipped.
        horizon: Layers that such a token skips.
        cold_start: First layers that are never skipped.
        cold_end: Last layers that are never skipped.
        max_ratio: Largest share of the layers that "static" removes.

    Raises:
        ValueError: A number is out of range.
    """

    mode: Mode = "static"
    threshold: float = 0.99
    horizon: int = 2
    cold_start: int = 2
    cold_end: int = 2
    max_ratio: float = 0.25

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if self.horizon < 1 or min(self.cold_start, self.cold_end) < 0 or not 0 < self.max_ratio <= 1:
            raise ValueError(
                f"horizon is at least 1, cold_start and cold_end not negative, max_ratio in 0 ... 1: got "
                f"{self.horizon}, {self.cold_start}, {self.cold_end}, {self.max_ratio}."
            )


class SkippingBlock(nn.Module):
    """A ViT block whose feed-forward layer runs only for the tokens that are not told to skip it.

    Args:
        block: timm's block.
        config: When tokens skip.
        warm: The layer is among the first or last ones and always runs.

    Attributes:
        previous: The block before, whose counters say how many layers a token still skips; None in the first.
        executed: Tokens that ran the layer in the last call, and all tokens.
    """

    def __init__(self, block: Block, config: SkipConfig, warm: bool) -> None:
        super().__init__()
        self.block, self.config, self.warm = block, config, warm
        self._before: tuple[SkippingBlock, ...] = ()
        self.waiting: Tensor | None = None  # (B, N), layers that each token still skips
        self.executed = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        waiting = self._before[0].waiting if self._before else None
        if waiting is None:
            waiting = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        runs = torch.ones_like(waiting, dtype=torch.bool) if self.warm else waiting == 0
        added = torch.zeros_like(x)
        if bool(runs.all()):
            added = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        elif bool(runs.any()):
            added[runs] = block.ls2(block.mlp(block.norm2(x[runs])))  # gather, compute, scatter
        y = x + added
        turned = F.cosine_similarity(x.float(), y.float(), dim=-1)
        self.waiting = torch.where(
            runs & (turned > self.config.threshold), self.config.horizon, (waiting - 1).clamp_min(0)
        )
        self.executed = (int(runs.sum()), runs.numel())
        return y


@torch.no_grad()
def token_cosines(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Return the mean cosine between tokens before and after each block's feed-forward layer was added.

    Raises:
        ValueError: The model has no ViT blocks of timm, or there are no data.
    """
    blocks = _blocks(model)
    batches = listed(data, "Skipping")
    sums = {name: [0.0, 0] for name in blocks}
    handles = []
    for name, block in blocks.items():

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            streams[name] = args[0].detach()

        def after(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            cosine = F.cosine_similarity(streams.pop(name).float(), output.float(), dim=-1)
            sums[name][0] += float(cosine.sum())
            sums[name][1] += cosine.numel()

        handles += [block.norm2.register_forward_pre_hook(before), block.register_forward_hook(after)]
    streams: dict[str, Tensor] = {}
    try:
        with evaluating(model):
            for batch in batches:
                outputs_of(model, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


def _blocks(model: nn.Module) -> dict[str, Block]:
    found = vit_blocks(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no ViT blocks of timm: skipping needs the residual stream of those."
        )
    return found


def apply(model: nn.Module, config: SkipConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Skip feed-forward layers of a trained vision transformer, in place.

    Args:
        model: timm ViT.
        config: What is skipped.
        data: Batches; needed for "static", and for the report's share of work.

    Raises:
        ValueError: The model has no such blocks or too few, data is missing, or it was done before.
    """
    config = config or SkipConfig()
    changes = Changes(model, "skip")
    facts: dict[str, dict[str, Any]] = {}
    blocks = _blocks(model)
    names = list(blocks)
    middle = names[config.cold_start : len(names) - config.cold_end]
    if not middle:
        raise ValueError(
            f"cold_start {config.cold_start} and cold_end {config.cold_end} leave none of {len(names)} layers to skip."
        )
    batches = listed(data, "Skipping", needed=config.mode == "static")
    with evaluating(model):
        outputs = outputs_of(model, batches)
    work = {}
    for name, block in blocks.items():
        ffn = read_ffn(block.mlp)
        work[name] = 0 if ffn is None else ffn.macs()
    if config.mode == "static":
        cosines = token_cosines(model, batches)
        most = max(1, int(config.max_ratio * len(names)))
        gone = [n for n in sorted(middle, key=lambda n: -cosines[n]) if cosines[n] > config.threshold][:most]
        for name in gone:
            changes.replace(f"{name}.mlp", Nothing(), f"skipped, cosine {cosines[name]:.4f}", (work[name], 0))
            facts[name] = {"mode": "static"}
    else:
        facts = {name: {**asdict(config), "warm": name not in middle} for name in names}
        restructure(model, facts)
        with evaluating(model):
            shares = {name: [0, 0] for name in names}
            for batch in batches:
                outputs_of(model, [batch])
                for name in names:
                    changed = model.get_submodule(name)
                    assert isinstance(changed, SkippingBlock)
                    shares[name] = [a + b for a, b in zip(shares[name], changed.executed, strict=True)]
        for name in middle:
            share = shares[name][0] / shares[name][1] if shares[name][1] else 1.0
            params = count_params(model.get_submodule(name))
            what = f"{100 * share:.0f} % of the tokens run it"
            changes.add(name, what, (params, params), (work[name], round(share * work[name])))
    return changes.report(facts, output_error(model, batches, outputs) if batches else None)


def executed_share(model: nn.Module) -> float:
    """Return the share of tokens that ran a feed-forward layer in the last call, over all layers."""
    layers = [module for module in model.modules() if isinstance(module, SkippingBlock)]
    return sum(layer.executed[0] for layer in layers) / max(1, sum(layer.executed[1] for layer in layers))


def restructure(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give a dense model the same skipping."""
    blocks = _blocks(model)
    before: SkippingBlock | None = None
    for name, facts in layers.items():
        if facts["mode"] == "static":
            replace_module(model, f"{name}.mlp", Nothing())
            continue
        arguments = {key: value for key, value in facts.items() if key != "warm"}
        block = SkippingBlock(blocks[name], SkipConfig(**arguments), facts["warm"])
        block._before = () if before is None else (before,)  # a tuple, so that it is no child
        replace_module(model, name, block)
        before = block
