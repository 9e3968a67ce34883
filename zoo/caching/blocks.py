"""The lists of blocks of denoisers, and the units in them: found by looking at the model, or as they were registered.

Nothing of it rests on diffusers' own block registry, which leaves out or misstates many models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from zoo.caching.discovery import find_lists, find_units
from zoo.caching.schedules import Kind
from zoo.caching.stack import BlockStack
from zoo.caching.streams import PlacedBlock

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
    "unused_units",
]

Returns = Literal["image", "image, text", "text, image", "joined"]


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of blocks that a model runs one after the other.

    Args:
        name: Attribute of the model that holds it, an `nn.ModuleList` or `nn.Sequential`.
        returns: What a block returns: the image (or the only) stream alone; image and text; text and image; or
            "joined", one sequence with the text before the image. Video counts as image. None finds it, and the
            arguments, from the first call.
        units: Parts of a block whose output can be reused, by attribute, in the order in which they run. Attributes
            that a block lacks, or holds as None, are passed over. None finds them.
        whole: The change that a block as a whole makes is one unit, a feed-forward: blocks in which attention and
            feed-forward run side by side.
        sums: A block returns its input plus what its units return, without gates, and the model runs the blocks one
            right after the other. What a run of blocks has added can then be added at once.
        image: Argument of the block's forward with the image, or joined, stream.
        text: Argument with the text stream, where the block has one.
    """

    name: str
    returns: Returns | None = None
    units: Mapping[str, Kind] | None = None
    whole: bool = False
    sums: bool = False
    image: str = "hidden_states"
    text: str = "encoder_hidden_states"


@dataclass(frozen=True, kw_only=True)
class ModelBlocks:
    """All block lists of a model.

    Args:
        lists: In the order in which they run; none finds them.
        no_skipping: Why no run of blocks can be left out of this model; None where it can.
    """

    lists: tuple[BlockList, ...] = ()
    no_skipping: str | None = None


# What cannot be seen from outside, by class name of the model; subclasses are found too. Everything else is found.
_TABLE: dict[str, ModelBlocks] = {
    "DiffusionPolicyTransformer": ModelBlocks(
        lists=(
            BlockList(
                name="transformer_blocks",
                returns="image",
                units={"attn1": "attention", "attn2": "attention", "ff": "feed_forward"},
                sums=True,
            ),
        ),
    ),
    "Flux2Transformer2DModel": ModelBlocks(
        lists=(
            BlockList(name="transformer_blocks"),
            # attention and feed-forward of a single block are one module called attn
            BlockList(name="single_transformer_blocks", units={"attn": "feed_forward"}),
        )
    ),
    "HunyuanDiT2DModel": ModelBlocks(no_skipping="its later blocks also take the output of its earlier ones"),
}


def register_blocks(model_class: type[nn.Module] | str, blocks: ModelBlocks) -> None:
    """Say what the caches cannot find out about a model by themselves.

    They look for lists of blocks with attention and feed-forward modules, and watch the first call. This is for models
    whose parts have other names, and to leave some out.

    Args:
        model_class: Class of the denoiser, or its name; its subclasses are then known too.
        blocks: Its lists of blocks.

    Example:
        >>> register_blocks(MyDiT, ModelBlocks(lists=(BlockList(name="layers", units={"mlp": "feed_forward"}),)))
    """
    _TABLE[model_class if isinstance(model_class, str) else model_class.__name__] = blocks


def _lookup(model: nn.Module) -> ModelBlocks:
    return next((_TABLE[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _TABLE), ModelBlocks())


def _lists(model: nn.Module) -> list[tuple[BlockList, nn.ModuleList | nn.Sequential]]:
    """Return the block lists that this instance has, the empty ones left out."""
    name, known = type(model).__name__, _lookup(model)
    if not known.lists:
        found = [(BlockList(name=path), blocks) for path, blocks in find_lists(model).items()]
        if not found:
            raise ValueError(
                f"{name} has no list of blocks with attention or feed-forward modules that can be found: say where "
                f"they are with zoo.caching.register_blocks."
            )
        return found
    found = []
    for each in known.lists:
        blocks = _part(model, each.name)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise ValueError(f"{name} has no list of blocks called {each.name}.")
        if len(blocks):
            found.append((each, blocks))
    return found


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """Return a part by its path, None where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _placed(each: BlockList, index: int, block: nn.Module) -> PlacedBlock:
    return PlacedBlock(f"{each.name}.{index}", block, each.name, each.image, each.text, each.returns)


def block_stack(model: nn.Module, method: str) -> BlockStack:
    """Return the blocks of a model, of which all but the first can be left out; the first call finds out which.

    Args:
        model: The denoiser.
        method: What wants to leave them out, for messages.

    Raises:
        ValueError: No blocks are found, or a single one, or the model is known not to be able to lose blocks.
    """
    name, known = type(model).__name__, _lookup(model)
    if known.no_skipping is not None:
        raise ValueError(
            f"{method} cannot skip blocks of {name}: {known.no_skipping}. TaylorSeerConfig and BACConfig work on it."
        )
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        raise ValueError(
            f"{method} skips transformer blocks that follow one another, and {name} is a UNet, whose blocks also take "
            "outputs of much earlier ones: StepForecastConfig works on it, and TaylorSeerConfig on its attention."
        )
    found = [
        _placed(each, index, unwrap_module(block))
        for each, blocks in _lists(model)
        for index, block in enumerate(blocks)
    ]
    if len(found) < 2:
        raise ValueError(f"{method} needs at least 2 transformer blocks to skip any, {name} has {len(found)}.")
    return BlockStack(model, method, found)


class Unit(NamedTuple):
    """A part of a model whose output can be reused.

    `block` is given where the unit is a whole block, whose change is reused rather than its output.
    """

    path: str
    module: nn.Module
    kind: Kind
    block: PlacedBlock | None


def _units_of(each: BlockList, blocks: nn.ModuleList | nn.Sequential) -> list[Unit]:
    """Return the units of a list of blocks in running order."""
    found = []
    for index, wrapped in enumerate(blocks):
        block, path = unwrap_module(wrapped), f"{each.name}.{index}"
        kinds, whole = each.units, each.whole
        if kinds is None:
            own = find_units(block)
            kinds, whole = ({} if own.whole or whole else own.kinds), own.whole or whole
        if whole:
            found.append(Unit(path, block, "feed_forward", _placed(each, index, block)))
        for name, kind in kinds.items():
            if (module := _part(block, name)) is not None:
                found.append(Unit(f"{path}.{name}", unwrap_module(module), kind, None))
    return found


def model_units(model: nn.Module, method: str) -> list[Unit]:
    """Return the units of a model in running order.

    Args:
        model: The denoiser.
        method: What wants to reuse them, for messages.

    Raises:
        ValueError: It has none that can be found.
    """
    found = [unit for each, blocks in _lists(model) for unit in _units_of(each, blocks)]
    if not found:
        raise ValueError(f"{method} finds no part of {type(model).__name__} to work on.")
    return found


def unused_units(model: nn.Module, units: Sequence[Unit]) -> str:
    """Return what to say of a model that calls none of its units.

    Args:
        model: The denoiser.
        units: Found in it.
    """
    return (
        f"{type(model).__name__} calls none of the {len(units)} parts that were found in it, such as {units[0].path}, "
        f"so that nothing can be left out: name others with zoo.caching.register_blocks, or take StepForecastConfig."
    )


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
            placed = _placed(each, index, unwrap_module(block))
            found.append(SummedBlock(placed, paths, index + 1 == len(blocks)))
    return found
