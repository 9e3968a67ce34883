"""Modules that several families share, one concept a file; what `timm.layers` has is used from there."""
