"""Our restorers as spandrel architectures, so that programs built on spandrel load their weights.

import spandrel, zoo.spandrel

zoo.spandrel.install()
upscaler = spandrel.ModelLoader().load_from_file("cfsr_x2.safetensors")
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import timm
from torch import Tensor, nn

from zoo.ffn.reparam import reparameterize
from zoo.restoration import FAMILIES
from zoo.weights import load_strict

try:
    from spandrel import (
        MAIN_REGISTRY,
        ArchId,
        Architecture,
        ArchRegistry,
        ArchSupport,
        ImageModelDescriptor,
        SizeRequirements,
    )
except ImportError as error:
    raise ImportError("zoo.spandrel needs spandrel, which is missing: pip install 'ffn-zoo[spandrel]'.") from error

__all__ = ["Restorer", "install"]

_HALF = ("CFSR",)  # in float16 72 dB to float32 with the authors' weights; sums of the others may overflow
# named as the modules' first words; spandrel has a "DAT" too, and a "Restormer" in another package
_FAMILIES = {str(family.__doc__).split(maxsplit=1)[0].rstrip(":,"): family for family in FAMILIES}


class Restorer(Architecture[nn.Module]):
    """A family of ours: recognised by its `detect`, loaded strictly through its filter, folded for inference.

    Args:
        name: Of the family, as its authors write it.
        family: Module in `zoo.restoration`.
        registry: Where it is added; spandrel's own architecture of that name may be there.
        replace: Take also what spandrel's own architecture loads.
    """

    def __init__(self, name: str, family: ModuleType, registry: ArchRegistry, replace: bool) -> None:
        super().__init__(id=f"zoo.{name}", name=name, detect=self._recognises)
        self.family, self.registry, self.replace = family, registry, replace

    def _recognises(self, state_dict: dict[str, Any]) -> bool:
        own = self.registry.get(self.name)
        if own is not None and not self.replace and own.detect(state_dict):
            return False
        return self.family.detect(_tensors(state_dict)) is not None

    def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor[nn.Module]:
        """Build the network that the weights are of, and describe it.

        Raises:
            CheckpointError: A tensor is missing, unexpected, or has another shape.
        """
        weights = _tensors(state_dict)
        name, arguments = self.family.detect(weights)
        model: Any = timm.create_model(name, **arguments).eval()
        load_strict(model, weights, self.family.checkpoint_filter_fn)
        reparameterize(model, measure=False)
        scale, channels = int(model.scale), int(model.in_chans)
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="Restoration" if scale == 1 else "SR",
            tags=[name],
            supports_half=self.name in _HALF,
            supports_bfloat16=True,
            scale=scale,
            input_channels=channels,
            output_channels=int(getattr(model, "out_chans", channels)),
            size_requirements=SizeRequirements(multiple_of=model.multiple_of),
        )


def _tensors(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}


def install(registry: ArchRegistry = MAIN_REGISTRY, *, replace: bool = False) -> None:
    """Add CFSR, DAT, FFNetSR and Restormer to a registry of spandrel; calling it again only sets `replace`.

    Args:
        registry: Of architectures; spandrel's main one serves every `ModelLoader` that is given none.
        replace: Load also the DAT and Restormer files that spandrel's own architectures know: the same results by
            networks that take less time and memory. False leaves these files to spandrel.
    """
    for name, family in _FAMILIES.items():
        support = registry.get(f"zoo.{name}")
        if support is None:
            architecture = Restorer(name, family, registry, replace)
            registry.add(ArchSupport.from_architecture(architecture, before=(ArchId(name),)))
        elif isinstance(support.architecture, Restorer):
            support.architecture.replace = replace
