"""The block lists of diffusion transformers: what their blocks take and return, and which parts of them are units.

One table for all caches of ours. It does not rest on diffusers' own block registry, which leaves out or misstates
several of these models.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from zoo.caching.schedules import Kind

__all__ = [
    "BlockList",
    "ModelBlocks",
    "PlacedBlock",
    "SummedBlock",
    "Unit",
    "block_stack",
    "model_units",
    "register_blocks",
    "summed_blocks",
]

Returns = Literal["image", "image, text", "text, image", "joined"]


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of blocks that a model runs one after the other.

    Args:
        name: Attribute of the model that holds it, an `nn.ModuleList`.
        returns: What a block returns: the image (or the only) stream alone; image and text; text and image; or
            "joined", one sequence with the text before the image. Video counts as image.
        units: Parts of a block whose output can be reused, by attribute, in the order in which they run. Attributes
            that a block lacks, or holds as None, are passed over.
        whole: The change that a block as a whole makes is one unit, a feed-forward: blocks in which attention and
            feed-forward run side by side.
        sums: A block returns its input plus what its units return, without gates, and the model runs the blocks one
            right after the other. What a run of blocks has added can then be added at once.
        image: Argument of the block's forward with the image, or joined, stream.
        text: Argument with the text stream, where the block has one.
    """

    name: str
    returns: Returns = "image"
    units: Mapping[str, Kind]
    whole: bool = False
    sums: bool = False
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"


@dataclass(frozen=True, kw_only=True)
class ModelBlocks:
    """All block lists of a model.

    Args:
        lists: In the order in which they run.
        no_skipping: Why no run of blocks can be left out of this model; None where it can.
    """

    lists: tuple[BlockList, ...]
    no_skipping: str | None = None


def _units(attention: str, feed_forward: str) -> dict[str, Kind]:
    """Return units from two lists of attributes."""
    units: dict[str, Kind] = dict.fromkeys(attention.split(), "attention")
    units.update(dict.fromkeys(feed_forward.split(), "feed_forward"))
    return units


_SELF = _units("attn1", "ff")
_CROSS = _units("attn1 attn2", "ff")
_JOINT = _units("attn attn2", "ff ff_context")


def _double_then_single(returns: Returns, joined: bool = False) -> ModelBlocks:
    single: Returns = "joined" if joined else returns
    return ModelBlocks(
        lists=(
            BlockList(name="transformer_blocks", returns=returns, units=_JOINT),
            BlockList(name="single_transformer_blocks", returns=single, units={}, whole=True),
        )
    )


def _single(units: dict[str, Kind], *, name: str = "transformer_blocks", returns: Returns = "image") -> ModelBlocks:
    return ModelBlocks(lists=(BlockList(name=name, returns=returns, units=units),))


# By class name of the model; subclasses are found too.
_TABLE: dict[str, ModelBlocks] = {
    "AllegroTransformer3DModel": _single(_CROSS),
    "AuraFlowTransformer2DModel": ModelBlocks(
        lists=(
            BlockList(name="joint_transformer_blocks", returns="text, image", units=_JOINT),
            BlockList(name="single_transformer_blocks", returns="joined", units=_units("attn", "ff")),
        )
    ),
    "ChromaTransformer2DModel": _double_then_single("text, image", joined=True),
    "CogVideoXTransformer3DModel": _single(_SELF, returns="image, text"),
    "CogView4Transformer2DModel": _single(_SELF, returns="image, text"),
    "DiTTransformer2DModel": _single(_SELF),
    "DiffusionPolicyTransformer": ModelBlocks(
        lists=(BlockList(name="transformer_blocks", units=_CROSS, sums=True),),
    ),
    "Flux2Transformer2DModel": ModelBlocks(
        lists=(
            BlockList(name="transformer_blocks", returns="text, image", units=_JOINT),
            # attention and feed-forward of a single block are one module called attn
            BlockList(name="single_transformer_blocks", returns="joined", units=_units("", "attn")),
        )
    ),
    "FluxTransformer2DModel": _double_then_single("text, image"),
    "HunyuanDiT2DModel": ModelBlocks(
        lists=(BlockList(name="blocks", units=_CROSS),),
        no_skipping="its later blocks also take the output of its earlier ones",
    ),
    "HunyuanImageTransformer2DModel": _double_then_single("image, text"),
    "HunyuanVideoTransformer3DModel": _double_then_single("image, text"),
    "LTX2VideoTransformer3DModel": ModelBlocks(
        lists=(BlockList(name="transformer_blocks", units=_CROSS),),
        no_skipping="its blocks carry a stream of sound beside the video",
    ),
    "LTXVideoTransformer3DModel": _single(_CROSS),
    "LatteTransformer3DModel": ModelBlocks(
        lists=(
            BlockList(name="transformer_blocks", units=_CROSS),
            BlockList(name="temporal_transformer_blocks", units=_SELF),
        ),
        no_skipping="its spatial and temporal blocks take turns",
    ),
    "Lumina2Transformer2DModel": _single(_units("attn", "feed_forward"), name="layers"),
    "MochiTransformer3DModel": _single(_units("attn1", "ff ff_context"), returns="image, text"),
    "PixArtTransformer2DModel": _single(_CROSS),
    "QwenImageTransformer2DModel": _single(_units("attn", "img_mlp txt_mlp"), returns="text, image"),
    "SD3Transformer2DModel": _single(_JOINT, returns="text, image"),
    "SanaTransformer2DModel": _single(_CROSS),
    "StableAudioDiTModel": _single(_CROSS),
    "WanTransformer3DModel": _single(_units("attn1 attn2", "ffn"), name="blocks"),
    "WanVACETransformer3DModel": _single(_units("attn1 attn2", "ffn"), name="blocks"),
    "ZImageTransformer2DModel": ModelBlocks(
        lists=(BlockList(name="layers", units=_units("attention", "feed_forward"), image="x"),)
    ),
}


def register_blocks(model_class: type[nn.Module] | str, blocks: ModelBlocks) -> None:
    """Make a model known to the caches, or replace what is known of it.

    Args:
        model_class: Class of the denoiser, or its name; its subclasses are then known too.
        blocks: Its lists of blocks.

    Example:
        >>> register_blocks(MyDiT, ModelBlocks(lists=(BlockList(name="layers", units={"mlp": "feed_forward"}),)))
    """
    _TABLE[model_class if isinstance(model_class, str) else model_class.__name__] = blocks


def _lookup(model: nn.Module) -> ModelBlocks:
    for cls in type(model).__mro__:
        if cls.__name__ in _TABLE:
            return _TABLE[cls.__name__]
    name = type(model).__name__
    near = difflib.get_close_matches(name, _TABLE, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"The blocks of {name} are unknown.{hint} Known are {', '.join(sorted(_TABLE))}; make others known with "
        f"zoo.caching.register_blocks."
    )


def _lists(model: nn.Module) -> list[tuple[BlockList, nn.ModuleList]]:
    """Return the block lists that this instance has, the empty ones left out."""
    found = []
    for each in _lookup(model).lists:
        blocks = getattr(model, each.name, None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{type(model).__name__} has no list of blocks called {each.name}.")
        if len(blocks):
            found.append((each, blocks))
    return found


class PlacedBlock:
    """A block of a model, and how its arguments and results are read.

    Args:
        path: Where it is in the model.
        module: The block.
        blocks: The list that it is of.
    """

    def __init__(self, path: str, module: nn.Module, blocks: BlockList) -> None:
        self.path = path
        self.module = module
        self.returns = blocks.returns
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        wanted = [blocks.image, blocks.text] if "," in blocks.returns else [blocks.image]
        for name in wanted:
            if name not in names:
                raise ValueError(
                    f"Blocks of class {type(module).__name__} take no {name}, as those of its model should."
                )
        self._arguments = {name: names.index(name) for name in wanted}

    def _inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the image stream and, where it is apart, the text stream."""
        return [kwargs[name] if name in kwargs else args[at] for name, at in self._arguments.items()]

    def streams(self, output: Any) -> list[Tensor]:
        """Return the image stream and, where it is apart, the text stream of what the block returned."""
        if "," not in self.returns:
            return [output]
        return list(output) if self.returns == "image, text" else [output[1], output[0]]

    def pack(self, streams: Sequence[Tensor]) -> Any:
        """Turn `streams` back into what the block returns."""
        if "," not in self.returns:
            return streams[0]
        return tuple(streams) if self.returns == "image, text" else (streams[1], streams[0])

    def passed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a block that changes nothing would return."""
        return self.pack(self._inputs(args, kwargs))

    def image(self, output: Any, tokens: int | None = None) -> Tensor:
        """Return the image stream of what the block returned.

        Args:
            output: What it returned.
            tokens: Length of the image stream; None takes the whole of a joined sequence for it.
        """
        stream = self.streams(output)[0]
        return stream if self.returns != "joined" or tokens is None else stream[:, -tokens:]

    def replaced(self, image: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the inputs in the form of the outputs, the image stream replaced."""
        inputs = self._inputs(args, kwargs)
        if self.returns == "joined":
            text = inputs[0][:, : inputs[0].shape[1] - image.shape[1]]
            return torch.cat([text, image], dim=1)
        return self.pack([image, *inputs[1:]])

    def change(self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return what the block has added to each stream."""
        pairs = zip(self.streams(output), self._inputs(args, kwargs), strict=True)
        return tuple(after - before for after, before in pairs)

    def changed(self, change: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the inputs in the form of the outputs, a stored `change` added."""
        pairs = zip(self._inputs(args, kwargs), change, strict=True)
        return self.pack([before + added for before, added in pairs])


def block_stack(model: nn.Module, method: str) -> list[PlacedBlock]:
    """Return the blocks of a model in running order if all but the first can be left out.

    Args:
        model: The denoiser.
        method: What wants to leave them out, for messages.

    Raises:
        ValueError: The model is unknown, has a single block, or cannot lose blocks.
    """
    name, known = type(model).__name__, _lookup(model)
    if known.no_skipping is not None:
        raise ValueError(f"{method} cannot skip blocks of {name}: {known.no_skipping}. BACConfig works on it.")
    found = [
        PlacedBlock(f"{each.name}.{index}", unwrap_module(block), each)
        for each, blocks in _lists(model)
        for index, block in enumerate(blocks)
    ]
    if len(found) < 2:
        raise ValueError(f"{method} needs at least 2 transformer blocks to skip any, {name} has {len(found)}.")
    return found


class Unit(NamedTuple):
    """A part of a model whose output can be reused.

    `block` is given where the unit is a whole block, whose change is reused rather than its output.
    """

    path: str
    module: nn.Module
    kind: Kind
    block: PlacedBlock | None


def _units_of(each: BlockList, blocks: nn.ModuleList) -> list[Unit]:
    """Return the units of a list of blocks in running order."""
    found = []
    for index, wrapped in enumerate(blocks):
        block, path = unwrap_module(wrapped), f"{each.name}.{index}"
        if each.whole:
            found.append(Unit(path, block, "feed_forward", PlacedBlock(path, block, each)))
        for name, kind in each.units.items():
            if isinstance(module := getattr(block, name, None), nn.Module):
                found.append(Unit(f"{path}.{name}", unwrap_module(module), kind, None))
    return found


def model_units(model: nn.Module, method: str) -> list[Unit]:
    """Return the units of a model in running order.

    Args:
        model: The denoiser.
        method: What wants to reuse them, for messages.

    Raises:
        ValueError: The model is unknown, or has none.
    """
    found = [unit for each, blocks in _lists(model) for unit in _units_of(each, blocks)]
    if not found:
        raise ValueError(f"{method} finds no part of {type(model).__name__} to work on.")
    return found


class SummedBlock(NamedTuple):
    """A block that returns its input plus the outputs of its units.

    `units` are their paths; `is_last` says that the model does something else after the block.
    """

    placed: PlacedBlock
    units: tuple[str, ...]
    is_last: bool


def summed_blocks(model: nn.Module, units: Sequence[Unit]) -> list[SummedBlock]:
    """Return the blocks that can be replaced by the sum of their units' outputs, in running order.

    Args:
        model: The denoiser.
        units: Those whose outputs are stored; a list of blocks with others is left out.
    """
    found = []
    stored = [unit.path for unit in units]
    for each, blocks in _lists(model):
        if not each.sums:
            continue
        own = [unit.path for unit in _units_of(each, blocks)]
        if not set(own) <= set(stored):
            continue
        for index, block in enumerate(blocks):
            path = f"{each.name}.{index}"
            paths = tuple(unit for unit in own if unit.startswith(f"{path}."))
            found.append(SummedBlock(PlacedBlock(path, unwrap_module(block), each), paths, index + 1 == len(blocks)))
    return found
