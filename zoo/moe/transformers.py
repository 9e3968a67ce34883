"""diffusers transformers with experts: their configuration says so, and folders are saved and loaded as any other."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from diffusers import (
    CacheMixin,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

from zoo.diffusion.pixel_dit import PixelDiT
from zoo.diffusion.strict_loading import StrictModelMixin
from zoo.ffn.importance import Loss, default_loss
from zoo.moe.blocks import MoBConfig, mix_blocks
from zoo.moe.dense2moe import (
    MoEConfig,
    MoEFluxSingleTransformerBlock,
    MoEReport,
    build_experts,
    expert_layers,
    set_top_k,
    to_dense_layers,
    to_experts,
)
from zoo.moe.modulation import share_modulation
from zoo.weights import require_known

# `DiffusionPipeline.from_pretrained` looks for the name ModelMixin here to learn how the classes are loaded.
__all__ = [
    "MoEDiTTransformer2DModel",
    "MoEFluxTransformer2DModel",
    "MoEPixArtTransformer2DModel",
    "MoEPixelDiT",
    "MoESD3Transformer2DModel",
    "ModelMixin",
    "convert",
    "load_transformer",
    "to_dense",
]


class MoETransformerMixin(StrictModelMixin):
    """A transformer of diffusers whose feed-forward layers are mixtures of experts.

    Its configuration is the dense model's, and under "moe" the fields of `MoEConfig`. All else is the dense class:
    pipelines, caches, LoRA on attention, `compile_repeated_blocks`, gradient checkpointing.
    """

    dense_class: ClassVar[type[ModelMixin]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class a constructor with the dense one's arguments and `moe`; diffusers reads its signature."""
        super().__init_subclass__(**kwargs)
        dense: Any = cls.__bases__[1]
        cls.dense_class = dense
        parameters = list(inspect.signature(dense.__init__).parameters.values())
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in (("moe", None), ("mob", None), ("shared_modulation", False))
        ]

        def __init__(  # noqa: N807  the class gets it
            self: Any,
            *args: Any,
            moe: dict[str, Any] | None = None,
            mob: dict[str, Any] | None = None,
            shared_modulation: bool = False,
            **kwargs: Any,
        ) -> None:
            dense.__init__(self, *args, **kwargs)
            require_known("The configuration under 'moe'", MoEConfig, moe or {})
            require_known("The configuration under 'mob'", MoBConfig, mob or {})
            config = MoEConfig(**(moe or {}))
            build_experts(self, config)
            self.register_to_config(moe=asdict(config), mob=None, shared_modulation=False)
            if shared_modulation:
                self.share_modulation()
            if mob is not None:
                self.mix_blocks(MoBConfig(**mob))

        __init__.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]

    def set_top_k(self, k: int) -> None:
        """Let every token take k normal experts from now on; saved with the model.

        Raises:
            ValueError: k is negative or above the number of experts.
        """
        set_top_k(self, k)

    def share_modulation(self) -> int:
        """Replace the modulations of all blocks by one, see `zoo.moe.share_modulation`; returns the parameters saved.

        Raises:
            ValueError: The blocks have none, or share one already.
        """
        model: Any = self
        saved = share_modulation(model)
        model.register_to_config(shared_modulation=True)
        return saved

    def mix_blocks(self, config: MoBConfig) -> None:
        """Put groups of blocks in the place of single ones; saved with the model.

        Raises:
            ValueError: A group does not fit, or the blocks are mixed already.
        """
        model: Any = self
        if model.config.mob is not None:
            raise ValueError(f"The blocks of this {type(self).__name__} are mixed already.")
        mix_blocks(model, config)
        model.register_to_config(mob=asdict(config))


class MoEDiTTransformer2DModel(MoETransformerMixin, DiTTransformer2DModel, CacheMixin):
    """DiT with experts."""


class MoEPixArtTransformer2DModel(MoETransformerMixin, PixArtTransformer2DModel, CacheMixin):
    """PixArt with experts."""


class MoESD3Transformer2DModel(MoETransformerMixin, SD3Transformer2DModel):
    """Stable Diffusion 3 with experts in both streams."""


class MoEFluxTransformer2DModel(MoETransformerMixin, FluxTransformer2DModel):
    """Flux with experts in both streams of its double blocks and in its single blocks."""

    _no_split_modules: ClassVar[list[str]] = ["FluxTransformerBlock", "MoEFluxSingleTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["FluxTransformerBlock", "MoEFluxSingleTransformerBlock"]


class MoEPixelDiT(MoETransformerMixin, PixelDiT):
    """A class-conditional diffusion transformer on pixels, with experts."""


TransformerBlockRegistry.register(
    MoEFluxSingleTransformerBlock, TransformerBlockRegistry.get(FluxSingleTransformerBlock)
)
_OWN = ("moe", "mob", "shared_modulation")
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    cls.dense_class: cls
    for cls in (
        MoEDiTTransformer2DModel,
        MoEPixArtTransformer2DModel,
        MoESD3Transformer2DModel,
        MoEFluxTransformer2DModel,
        MoEPixelDiT,
    )
}


def convert(
    model: nn.Module,
    config: MoEConfig | str | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss = default_loss,
) -> tuple[Any, MoEReport]:
    """Return a copy of a model whose feed-forward layers are mixtures of experts, and what that brings.

    With all experts on the copy computes what the model does. A diffusers transformer becomes the class with "MoE" in
    front, which is saved, loaded and put into pipelines as any other; of other models the layers are replaced. Adapters
    (LoRA) on attention are kept.

    Args:
        model: DiT, PixArt, SD3 or Flux transformer of diffusers, `PixelDiT`, or a network with feed-forward layers of
            timm (vision transformers) or a merged RePaViT.
        config: The layout; a text such as "1S12E2A"; None is the paper's.
        calibration: Batches by which channels are ranked; not needed with `scores="random"`. For a diffusers
            transformer a batch is a dictionary of its arguments and the training "target"; for a classifier a pair of
            images and class numbers.
        loss: Training loss of (model, batch), where the batches have another form.

    Raises:
        ValueError: A layer does not divide, the model has no known layer or has experts already, its class cannot be
            saved with experts, calibration is missing, or an adapter changes a feed-forward layer.
    """
    config = MoEConfig.from_layout(config) if isinstance(config, str) else config or MoEConfig()
    if isinstance(model, ModelMixin) and type(model) not in _CLASSES and not expert_layers(model):
        known = ", ".join(sorted(cls.__name__ for cls in _CLASSES))
        raise ValueError(f"{type(model).__name__} cannot be converted: known are {known}.")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer") and "attn" not in name]
    if adapted:
        raise ValueError(
            f"{type(model).__name__} has an adapter (LoRA) on {adapted[0]} and {len(adapted) - 1} more modules whose "
            f"weights become experts: merge it first, pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
    converted = copy.deepcopy(model)
    report = to_experts(converted, config, calibration, loss)
    if isinstance(converted, ModelMixin):
        converted.__class__ = _CLASSES[type(model)]
        moe: Any = converted
        moe.register_to_config(moe=asdict(config), mob=None, shared_modulation=False)
    return converted, report


def to_dense(model: nn.Module) -> Any:
    """Return a dense copy of a converted model: all experts' channels, each with weight 1.

    Where experts were not trained it is bit for bit the model that was converted.

    Raises:
        ValueError: The model has no experts, or its blocks or modulations are not the dense model's.
    """
    if isinstance(model, MoETransformerMixin):
        config: Any = model.config  # type: ignore[attr-defined]
        if config.mob is not None or config.shared_modulation:
            raise ValueError("A model with mixed blocks or a shared modulation has no dense form of its class.")
    if not expert_layers(model):
        raise ValueError(f"{type(model).__name__} has no experts: there is nothing to turn back.")
    dense = copy.deepcopy(model)
    to_dense_layers(dense)
    if isinstance(dense, MoETransformerMixin):
        found: Any = dense
        found.__class__ = type(model).dense_class  # type: ignore[attr-defined]
        found._internal_dict = FrozenDict({key: value for key, value in found.config.items() if key not in _OWN})
    return dense


def load_transformer(folder: str | PathLike[str], **kwargs: Any) -> Any:
    """Load a transformer, dense or with experts, from a folder that `save_pretrained` wrote, by its configuration.

    Args:
        folder: Has config.json.
        **kwargs: As of `from_pretrained`.

    Raises:
        ValueError: The configuration names a class that cannot have experts.
    """
    name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_class_name")
    classes = {cls.__name__: cls for pair in _CLASSES.items() for cls in pair}
    if name not in classes:
        raise ValueError(f"{folder} holds a {name}; known are {', '.join(sorted(classes))}.")
    model: Any = classes[name]
    return model.from_pretrained(folder, **kwargs)
