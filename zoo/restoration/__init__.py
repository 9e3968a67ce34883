"""Image restorers, one file a family; importing this package registers them with timm."""

from zoo.restoration import cfsr, dat, ffnetsr, restormer

FAMILIES = (cfsr, dat, ffnetsr, restormer)  # in the order in which a checkpoint is tried
