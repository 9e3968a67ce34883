"""One modulation for all blocks, in place of one a block: what else shrinks FLUX to Dense2MoE's published sizes.

Dense2MoE, https://arxiv.org/abs/2510.09094, counts 5.15 B activated parameters for FLUX.1-MoE-L; experts alone lead to
8.32 B. The difference costs no work a token, and one shared modulation with a table a block (adaLN-single of
PixArt-alpha, https://arxiv.org/abs/2310.00426) gives the count exactly. The paper does not say it: our inference.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from zoo.profiling import count_params

__all__ = ["TableModulation", "share_modulation"]

_CHUNKS: dict[Any, int] = {AdaLayerNormZero: 6, AdaLayerNormZeroSingle: 3}


class TableModulation(nn.Module):
    """Take the shared modulation's first channels and add a learned row.

    Args:
        shared: The one product of all blocks; it belongs to the model and is not a submodule here.
        channels: Channels that the block needs.
        table: (channels,) start value.

    Shape:
        (B, D) -> (B, channels).
    """

    def __init__(self, shared: nn.Linear, channels: int, table: Tensor) -> None:
        super().__init__()
        self.__dict__["shared"] = shared
        self.channels = channels
        self.table = nn.Parameter(table)

    def forward(self, emb: Tensor) -> Tensor:
        return self.__dict__["shared"](emb)[..., : self.channels] + self.table


@torch.no_grad()
def share_modulation(model: nn.Module) -> int:
    """Replace the modulations of all blocks by one, in place; returns the parameters saved.

    The shared weights start as the mean of the blocks', the tables as what each block's bias differs by: the model has
    to be distilled afterwards.

    Raises:
        ValueError: The blocks have no modulation of this kind, of different widths, or share one already (PixArt).
    """
    found: list[Any] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, tuple(_CHUNKS)) and isinstance(getattr(module, "linear", None), nn.Linear) and "." in name
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no modulation of its own in its blocks: nothing can be shared.")
    widths = {(module.linear.in_features, module.linear.out_features // _chunks(module)) for module in found}
    if len(widths) > 1:
        raise ValueError(
            f"The blocks of {type(model).__name__} have modulations of different widths: {sorted(widths)}."
        )
    (inputs, dim), before = widths.pop(), count_params(model)
    kept = found[0].linear.weight
    shared = nn.Linear(inputs, 6 * dim, device=kept.device, dtype=kept.dtype)
    for chunk in range(6):  # blocks that need three chunks only have no say in the others
        rows = slice(chunk * dim, (chunk + 1) * dim)
        having = [module.linear for module in found if module.linear.out_features > chunk * dim]
        if not having:
            shared.weight[rows].zero_()
            shared.bias[rows].zero_()
            continue
        shared.weight[rows] = torch.stack([linear.weight[rows].float() for linear in having]).mean(0).to(kept.dtype)
        shared.bias[rows] = torch.stack([linear.bias[rows].float() for linear in having]).mean(0).to(kept.dtype)
    for module in found:
        outputs = module.linear.out_features
        module.linear = TableModulation(shared, outputs, module.linear.bias - shared.bias[:outputs])
    model.modulation = shared
    return before - count_params(model)


def _chunks(module: nn.Module) -> int:
    return next(number for cls, number in _CHUNKS.items() if isinstance(module, cls))
