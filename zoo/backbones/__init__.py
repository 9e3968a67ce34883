"""Image backbones, one family a file; importing this package registers them with timm."""

from zoo.backbones import repamlpmixer, repapoolformer, repaswin, repavit

__all__ = ["repamlpmixer", "repapoolformer", "repaswin", "repavit"]
