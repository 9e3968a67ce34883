"""The repeated blocks of diffusers transformers: where they are, and what they take and return.

The only file that imports diffusers' private block registry.
"""

from __future__ import annotations

import inspect
import re

from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

__all__ = [
    "as_patterns",
    "attention_modules",
    "block_metadata",
    "feed_forward_modules",
    "register_block",
    "transformer_blocks",
]

_FEED_FORWARD_NAMES = ("ff", "ffn", "feed_forward", "ff_context", "img_mlp", "txt_mlp")

# Blocks that diffusers 0.42 does not register, by class name: position of the image and of the text stream in what
# they return, None where they return the image stream alone.
_UNREGISTERED = {
    "AllegroTransformerBlock": (0, None),
    "DiffusionPolicyBlock": (0, None),
    "Lumina2TransformerBlock": (0, None),
    "SanaTransformerBlock": (0, None),
    "StableAudioDiTBlock": (0, None),
}


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks by name, in the order in which diffusers' block caches take them."""
    return {
        f"{name}.{index}": block
        for name, child in model.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        for index, block in enumerate(child)
    }


def block_metadata(block: nn.Module) -> TransformerBlockMetadata:
    """Return what a block takes and returns, registering it with diffusers where only we know it.

    Raises:
        ValueError: Neither diffusers nor we know this class of block.
    """
    cls = type(unwrap_module(block))
    try:
        return TransformerBlockRegistry.get(cls)
    except ValueError as error:
        if cls.__name__ not in _UNREGISTERED or not cls.__module__.startswith(("diffusers.", "zoo.")):
            raise ValueError(
                f"Blocks of class {cls.__name__} are unknown: register them with diffusers' TransformerBlockRegistry, "
                f"or take a cache that works on single modules, such as TaylorSeerCacheConfig with cache_identifiers."
            ) from error
        hidden, encoder = _UNREGISTERED[cls.__name__]
        TransformerBlockRegistry.register(
            cls, TransformerBlockMetadata(return_hidden_states_index=hidden, return_encoder_hidden_states_index=encoder)
        )
        return TransformerBlockRegistry.get(cls)


def register_block(cls: type[nn.Module]) -> None:
    """Tell diffusers that a class of blocks returns the image stream alone.

    Its own `register` would first import all of its transformers.

    Args:
        cls: Class of the blocks.
    """
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    metadata._cls = cls
    TransformerBlockRegistry._registry[cls] = metadata


def takes(block: nn.Module, argument: str) -> bool:
    """Return whether the block's forward has an argument of this name."""
    return argument in inspect.signature(type(unwrap_module(block)).forward).parameters


def _in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules inside the lists of main blocks by name, refiners and text encoders left out."""
    lists = [
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and ("block" in name or name == "layers") and "text" not in name
    ]
    return {name: module for name, module in model.named_modules() if name.split(".")[0] in lists}


def attention_modules(model: nn.Module) -> list[str]:
    """Return the names of the attention modules of the blocks."""
    return [name for name, module in _in_blocks(model).items() if isinstance(module, _ATTENTION_CLASSES)]


def feed_forward_modules(model: nn.Module) -> list[str]:
    """Return the names of the feed-forward modules of the blocks."""
    return [name for name in _in_blocks(model) if name.rsplit(".", 1)[-1] in _FEED_FORWARD_NAMES]


def as_patterns(names: list[str]) -> list[str]:
    """Return the fewest regular expressions for `re.fullmatch` in which the numbers of module names are open."""
    return list(dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names))
