"""Both ways between spandrel and us: its architectures run as our restorers, and ours are some of its architectures.

`zoo restore --weights FILE` and `zoo.create_model(FILE)` take every restorer that spandrel knows (`foreign`), and
programs built on spandrel load our weights:

import spandrel, zoo.spandrel

zoo.spandrel.install()
upscaler = spandrel.ModelLoader().load_from_file("cfsr_x2.safetensors")
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.ffn.reparam import reparameterize
from zoo.restoration import FAMILIES
from zoo.text import counted
from zoo.weights import CheckpointError, load_strict

try:
    from spandrel import (
        MAIN_REGISTRY,
        ArchId,
        Architecture,
        ArchRegistry,
        ArchSupport,
        ImageModelDescriptor,
        SizeRequirements,
        UnsupportedModelError,
    )
except ImportError as error:
    raise ImportError("zoo.spandrel needs spandrel, which is missing: pip install 'ffn-zoo[spandrel]'.") from error

__all__ = ["Foreign", "Restorer", "foreign", "install"]

_HALF = ("CFSR",)  # in float16 72 dB to float32 with the authors' weights; sums of the others may overflow
# named as the modules' first words; spandrel has a "DAT" too, and a "Restormer" in another package
_FAMILIES = {str(family.__doc__).split(maxsplit=1)[0].rstrip(":,"): family for family in FAMILIES}


class Foreign(nn.Module):
    """A network of spandrel as a restorer of ours, with its size requirements, tiling hints and precisions.

    Args:
        descriptor: What spandrel says of the network.

    Shape:
        (B, in_chans, H, W) in [0, 1] -> (B, out_chans, scale * H, scale * W) in [0, 1]; any H and W.
    """

    def __init__(self, descriptor: ImageModelDescriptor[nn.Module]) -> None:
        super().__init__()
        self.network, self._descriptor = descriptor.model, descriptor.eval()
        self.name = descriptor.architecture.name
        self.scale, self.in_chans, self.out_chans = (
            descriptor.scale,
            descriptor.input_channels,
            descriptor.output_channels,
        )
        self.multiple_of, self.tiling = descriptor.size_requirements.multiple_of, descriptor.tiling.name.lower()
        self.pretrained_cfg = {"architecture": self.name, "task": "sr" if self.scale > 1 else "restore"}
        self._bytes: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # a graph takes any batch, and has no inference mode
            found: Tensor = inspect.unwrap(type(self._descriptor).__call__)(self._descriptor, x)
            return found
        # one picture at a time, as spandrel promises; it pads and cuts; copies leave its inference mode
        try:
            return torch.cat([self._descriptor(part).clone() for part in x.split(1)])
        except RuntimeError as error:
            if x.dtype != torch.float32 and "dtype" in str(error):  # not all that is said to run in half precision does
                raise ValueError(f"{self._no_dtype(x.dtype)} ({' '.join(str(error).split())})") from error
            raise

    def reparameterize(self) -> tuple[str, ...]:
        """Fold the branches of SPAN's convolutions: its own code does so in every call, which no graph can hold."""
        if self.training:
            raise RuntimeError(f"{self.name} is in training mode: call model.eval() first.")
        branched: list[tuple[str, Any]] = [
            (name, part) for name, part in self.network.named_modules() if hasattr(part, "update_params")
        ]
        for name, part in branched:
            part.update_params()
            slope = [nn.LeakyReLU(0.05)] if part.has_relu else []
            self.network.set_submodule(name, nn.Sequential(part.eval_conv, *slope))
        return (f"branches of {counted(len(branched), 'convolution')}",) if branched else ()

    def require_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise a ValueError where the authors' code does not run in a precision."""
        wrong = (dtype == torch.float16 and not self._descriptor.supports_half) or (
            dtype == torch.bfloat16 and not self._descriptor.supports_bfloat16
        )
        if wrong:
            raise ValueError(self._no_dtype(dtype))

    def _no_dtype(self, dtype: torch.dtype | None) -> str:
        return f"{self.name} does not run in {str(dtype).removeprefix('torch.')}; take float32."

    @property
    def bytes_per_pixel(self) -> int:
        """Working memory in bytes per input pixel in float32: three times what its largest layer reads and writes."""
        if self._bytes is None:
            needs, most = self._descriptor.size_requirements, 0

            def look(module: nn.Module, given: Any, output: Any) -> None:
                nonlocal most
                tensors = [value for value in (*given, output) if isinstance(value, Tensor)]
                most = max(most, sum(tensor.numel() for tensor in tensors))

            leaves = [module for module in self.network.modules() if not any(module.children())]
            hooks = [module.register_forward_hook(look) for module in leaves]
            parameter = next(self.parameters())
            side = math.ceil(max(32, needs.minimum) / needs.multiple_of) * needs.multiple_of
            try:
                self(torch.zeros(1, self.in_chans, side, side, device=parameter.device, dtype=parameter.dtype))
            finally:
                for hook in hooks:
                    hook.remove()
            self._bytes = max(1024, 3 * 4 * most // side**2)
        return self._bytes


def foreign(state_dict: dict[str, Tensor], source: str | Path = "The state dict") -> Foreign | None:
    """Return a restorer of spandrel's architectures with these weights, or None where spandrel knows none.

    Args:
        state_dict: From `zoo.weights.read_checkpoint`.
        source: Name for messages.

    Raises:
        CheckpointError: An architecture is recognised but does not load, or fills in masked parts of pictures.
    """
    for prefix in ("", "model."):  # a prefix that all keys have may belong to the architecture
        weights = {prefix + key: value for key, value in state_dict.items()}
        try:
            descriptor = MAIN_REGISTRY.load(weights)
        except UnsupportedModelError:
            continue
        except Exception as error:  # whatever the authors' code raises on tensors that do not fit
            known = [
                each.architecture.name for each in MAIN_REGISTRY.architectures("detection") if each.detect(weights)
            ]
            reason = (str(error).strip() or type(error).__name__).splitlines()
            said = " ".join(line.strip() for line in reason[:2])
            raise CheckpointError(f"{source} looks like {known[0]} and does not load as that: {said}") from error
        if not isinstance(descriptor, ImageModelDescriptor):
            raise CheckpointError(f"{source} holds {descriptor.architecture.name}, which fills in masked parts.")
        return Foreign(descriptor)
    return None


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
