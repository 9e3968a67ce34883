"""Image backbones, one family a file; importing this package registers them with timm."""

from zoo.backbones import (
    affnet,
    efficientvit_msra,
    emov2,
    ffnet,
    lsnet,
    repamlpmixer,
    repapoolformer,
    repaswin,
    repavit,
)

__all__ = [
    "affnet",
    "efficientvit_msra",
    "emov2",
    "ffnet",
    "lsnet",
    "repamlpmixer",
    "repapoolformer",
    "repaswin",
    "repavit",
]
