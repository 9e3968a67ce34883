"""Starting points for training that are better than noise."""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor, nn

__all__ = ["mimetic_init_"]


def _factor(scale: float, identity: float, rank: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return A (dim, rank), B (rank, dim) with A @ B near `scale * noise + identity * I`."""
    target = scale * torch.randn(dim, dim) / dim**0.5 + identity * torch.eye(dim)
    u, s, vh = torch.linalg.svd(target)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


@torch.no_grad()
def mimetic_init_(model: nn.Module) -> int:
    """Start a vision transformer's attention as a trained one looks: q k^T near the identity, v proj near its negative.

    Transformers on small data learn much faster from here. The position embedding, if it is a learned grid, starts as
    two-dimensional sines. Source: Mimetic Initialization of Self-Attention Layers (Trockman and Kolter, ICML 2023),
    https://arxiv.org/abs/2305.09828, equations 5 to 8, with its constants 0.7 and 0.4.

    Args:
        model: Any model with timm `Attention` layers; changed in place.

    Returns:
        Number of attention layers changed.

    Raises:
        ValueError: The model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no timm Attention layer to initialise.")
    for layer in layers:
        dim, heads = layer.qkv.in_features, layer.num_heads
        q, k, v = layer.qkv.weight.chunk(3)
        for head in range(heads):
            rows = slice(head * dim // heads, (head + 1) * dim // heads)
            a, b = _factor(0.7, 0.7, dim // heads, dim)
            q[rows], k[rows] = a.T, b
        a, b = _factor(0.4, -0.4, dim, dim)
        layer.proj.weight.copy_(a)
        v.copy_(b)
    position, patches = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    if isinstance(position, nn.Parameter) and patches is not None:
        grid = build_sincos2d_pos_embed(list(patches.grid_size), dim=position.shape[-1])
        position[0, -grid.shape[0] :] = 0.2 * grid
    return len(layers)
