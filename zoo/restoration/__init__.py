"""Image restorers, one file a family; importing this package registers them with timm."""

from zoo.restoration import cfsr  # noqa: F401
