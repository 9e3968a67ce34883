"""Denoisers and their pipelines; importing this package makes them, and mixtures of experts, known to diffusers.

`DiffusionPipeline.from_pretrained` looks up the class that a folder's `model_index.json` names as an attribute of the
`diffusers` package, and takes components from modules that are imported; it has no registry for others.
"""

from __future__ import annotations

import importlib
import sys

from zoo.diffusion.diffusion_policy import DiffusionPolicyPipeline, DiffusionPolicyTransformer
from zoo.diffusion.labelled import DiTPipeline
from zoo.diffusion.pipelines import PixelDiTPipeline
from zoo.diffusion.pixel_dit import PixelDiT

__all__ = ["DiTPipeline", "DiffusionPolicyPipeline", "DiffusionPolicyTransformer", "PixelDiT", "PixelDiTPipeline"]

if "zoo.moe" not in sys.modules:  # whose classes build on those here; if it is there, it brings them itself
    importlib.import_module("zoo.moe.transformers")
