"""Every registered model, for tests that hold for all of them: a new family is tested without a new test.

Tests of numbers take the smallest variant of each family. Where that is slow on a CPU, `TINY` makes it smaller; a
family without an entry is tested as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from zoo import catalog
from zoo.factory import families


@dataclass(frozen=True)
class Tiny:
    """Arguments that make the smallest variant of a family fast, and the side of its input in pixels."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int | None = None


TINY = {
    "repavit": Tiny(dict(img_size=32, patch_size=8, embed_dim=48, depth=3), 32),
    "repaswin": Tiny(dict(img_size=64, embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=4), 64),
    "repamlpmixer": Tiny(dict(img_size=32, patch_size=8, embed_dim=48, num_blocks=3), 32),
    "repapoolformer": Tiny(dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)), 64),
    "ffnet": Tiny(dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)), 64),
    "lsnet": Tiny(dict(dims=(16, 24, 32, 48), depths=(1, 2, 1, 2)), 256),
    "emov2": Tiny(dict(depths=(1, 2, 2, 2), dims=(16, 24, 32, 40), dim_heads=(8, 8, 8, 8), window_size=3), 96),
    "affnet": Tiny(dict(dims=(8, 8, 16, 24, 32), depths=(1, 2, 1)), 64),
    "efficientvit_msra": Tiny(dict(embed_dim=(32, 48, 64), depth=(1, 1, 2), num_heads=(2, 3, 2)), 64),
    "cfsr": Tiny(dict(embed_dim=16, depths=(1, 1)), 16),
    "dat": Tiny(dict(embed_dim=64, depths=(4, 2), num_heads=4, split_size=(4, 8), expansion=2.0), 16),
    "ffnetsr": Tiny(dict(dim=16, depth=2, norm="BN"), 16),
    "restormer": Tiny(dict(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, mlp_ratio=2.0), 16),
}

SMALL_GRAPH: dict[str, dict[str, Any]] = {
    "repavit": dict(depth=1),
    "repaswin": dict(depths=(2, 1), num_heads=(1, 2)),
    "repamlpmixer": dict(num_blocks=1),
    "repapoolformer": dict(depths=(1, 1), dims=(16, 24)),
    "ffnet": dict(depths=(1, 1), dims=(8, 16), token_kernels=(3, 7), channel_kernels=(3, 3)),
    "lsnet": dict(dims=(16, 24), depths=(2, 2)),
    "emov2": dict(depths=(1, 1, 1, 1)),
    "affnet": dict(depths=(0, 0, 1)),
    "efficientvit_msra": dict(embed_dim=(32, 48), depth=(1, 1), num_heads=(2, 1)),
    "cfsr": dict(depths=(1,)),
    "dat": dict(depths=(3,)),
    "ffnetsr": dict(depth=1),
}
"""What leaves one block of every kind in a tiny model: compilers and exporters take as long as there are nodes."""

_LEFT_OUT = {
    "dat": ("layers.0.blocks.0",),  # windows; the third block has them too, shifted
    "restormer": ("encoder_level2.0", "encoder_level3.0", "decoder_level3.0", "decoder_level2.0", "decoder_level1.0"),
}
"""Blocks of a small graph whose kind others are of, which the constructors do not leave out."""


def _names(kind: str) -> dict[str, list[str]]:
    """Return the registered names of each family in `zoo.<kind>`."""
    found: dict[str, list[str]] = {}
    modules = {module.__name__ for module in families() if module.__name__.startswith(f"zoo.{kind}.")}
    for name in timm.list_models():
        module = model_entrypoint(name).__module__
        if module in modules:
            found.setdefault(module.rpartition(".")[2], []).append(name)
    return found


BACKBONES = _names("backbones")
RESTORERS = _names("restoration")
FAMILIES = {**BACKBONES, **RESTORERS}
ALL_NAMES = [name for names in FAMILIES.values() for name in names]


def smallest(family: str) -> str:
    """Return the variant of a family with the fewest parameters."""
    return min(FAMILIES[family], key=lambda name: catalog.load().get(name, {}).get("params", float("inf")))


_built: dict[str, tuple[nn.Module, Tensor]] = {}  # family and arguments -> the model, the random state after it


def build(family: str, **kwargs: Any) -> nn.Module:
    """Build the tiny smallest variant of a family in evaluation mode, ten classes, every weight random.

    A process builds each model once: the caller gets a copy, and the random state that building leaves.
    """
    tiny = TINY.get(family, Tiny())
    classes = {"num_classes": 10} if family in BACKBONES else {}
    arguments = {**classes, **tiny.kwargs, **kwargs}
    key = f"{family} {arguments} {torch.get_default_dtype()} {torch.is_inference_mode_enabled()}"
    if key not in _built:
        torch.manual_seed(0)
        model = randomize(timm.create_model(smallest(family), **arguments)).eval()
        _built[key] = model, torch.get_rng_state()
    model, state = _built[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def small_graph(family: str) -> nn.Module:
    """Build the tiny model of a family with as few blocks as `SMALL_GRAPH` says."""
    model = build(family, **SMALL_GRAPH.get(family, {}))
    for place in _LEFT_OUT.get(family, ()):
        blocks, _, index = place.rpartition(".")
        del model.get_submodule(blocks)[int(index)]  # type: ignore[operator]
    return model


def randomize(model: nn.Module) -> nn.Module:
    """Give all weights and statistics random values, because zeros and ones hide what is not used or not folded."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name.endswith("edge_masks"):
            continue
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.ndim <= 1:
            offset = 1.0 if name.endswith("weight") else 0.0
            value.copy_(offset + 0.2 * torch.randn(value.shape, generator=generator))
        else:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * min(0.2, fan_in**-0.5))
    return model


def images(family: str, batch: int = 2, channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """Return a random input of a family's tiny model."""
    side = TINY.get(family, Tiny()).size or get_pretrained_cfg(smallest(family)).input_size[-1]
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, *(size or (side, side)), generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
