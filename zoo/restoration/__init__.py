"""Image restorers, one file a family; importing this package registers them with timm."""

from zoo.restoration import cfsr

FAMILIES = (cfsr,)  # in the order in which a checkpoint is tried
