"""Find the lists of blocks of a denoiser, and the attention and feed-forward modules in them, by looking at it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from zoo.caching.schedules import Kind
from zoo.profiling import count_params

__all__ = ["FoundUnits", "find_lists", "find_units", "require_own_blocks"]

_ATTENTION = re.compile(r"(^|_)(attn\d*|attention)(_|$)")
_FEED_FORWARD = re.compile(r"(^|_)(ff|ffn|mlp|moe|feed_?forward)\d*(_|$)")
_LEAF = re.compile(r"((self_|cross_)?(attn|attention)\d*|(img_|txt_)?(ff|ffn|mlp)\d*|feed_?forward)")
_ATTENTION_CLASS = re.compile(r"Attention|Attn")
_FEED_FORWARD_CLASS = re.compile(r"FeedForward|FFN|MLP|Mlp|MoE|SwiGLU|GLUMBConv|GatedUnit")
_NO_UNIT = re.compile(r"norm|ada_?ln|modulat|mod$|embed|rope|processor|gate$", re.IGNORECASE)
_NO_UNIT_CLASS = re.compile(r"Norm|Modulation|Embed|Processor|AdaLayer")
# lists that prepare conditions, or refine what goes into the blocks: they are computed at every step
_BESIDE = re.compile(r"refiner|text|txt|caption|context|vace|control|adapter|perceiver|approximator|project|embed|head")
_COVERED = 0.6  # of the weights of a block: with less in its units, the block is reused as a whole


class FoundUnits(NamedTuple):
    """Units of a block by relative path, in running order; `whole` where they leave out much of its work."""

    kinds: dict[str, Kind]
    whole: bool


def _unit_kind(name: str, module: nn.Module) -> Kind | None:
    """Return what a module of a block is by its name and class; None where it is no unit."""
    cls = type(module).__name__
    if not any(True for _ in module.children()):
        if not _LEAF.fullmatch(name) or _NO_UNIT_CLASS.search(cls) or not count_params(module):
            return None
    elif _NO_UNIT.search(name) or _NO_UNIT_CLASS.search(cls):
        return None
    if _ATTENTION.search(name) or _ATTENTION_CLASS.search(cls):
        return "attention"
    return "feed_forward" if _FEED_FORWARD.search(name) or _FEED_FORWARD_CLASS.search(cls) else None


def _in_order(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of a block in the order in which its forward names them."""
    try:
        source = inspect.getsource(type(block).forward)
    except (OSError, TypeError):
        source = ""
    found = [(name, unwrap_module(child)) for name, child in block.named_children()]

    def first(name: str) -> int:
        match = re.search(rf"self\.{re.escape(name)}\b", source)
        return match.start() if match else len(source)

    return sorted(found, key=lambda pair: first(pair[0]))


def _units(block: nn.Module, prefix: str, depth: int) -> Iterator[tuple[str, nn.Module, Kind]]:
    for name, child in _in_order(block):
        kind = _unit_kind(name, child)
        if kind is not None:
            yield f"{prefix}{name}", child, kind
        elif depth and not _NO_UNIT.search(name) and not _NO_UNIT_CLASS.search(type(child).__name__):
            yield from _units(child, f"{prefix}{name}.", depth - 1)


def _work(block: nn.Module) -> int:
    """Return the weights of a block, those of its norms and modulations left out."""
    own = 0
    for name, child in block.named_children():
        if not _NO_UNIT.search(name) and not _NO_UNIT_CLASS.search(type(child).__name__):
            own += count_params(child)
    return own


def find_units(block: nn.Module) -> FoundUnits:
    """Return the attention and feed-forward modules of a block.

    Args:
        block: An element of a list of blocks, not wrapped.
    """
    found = list(_units(block, "", 3))
    kinds: dict[str, Kind] = {name: kind for name, _, kind in found}
    covered = sum(count_params(module) for _, module, _ in found)
    return FoundUnits(kinds, bool(kinds) and covered < _COVERED * _work(block))


def find_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Return the lists of main blocks by path in the model, in the order in which they are defined.

    A list is an `nn.ModuleList` or `nn.Sequential` all of whose elements have attention or feed-forward modules. Those
    nearest to the model count, and of these not the ones that are named like refiners or parts for text, unless there
    are no others.

    Args:
        model: The denoiser.
    """
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        if any(path.startswith(f"{other}.") for other in found):
            continue
        # a list in a list is no block: nothing calls it
        blocks = [unwrap_module(block) for block in module if not isinstance(block, nn.ModuleList)]
        if len(blocks) == len(module) and all(find_units(block).kinds for block in blocks):
            found[path] = module
    main = {path: blocks for path, blocks in found.items() if not _BESIDE.search(path.lower())} or found
    nearest = min(map(_depth, main), default=0)
    return {path: blocks for path, blocks in main.items() if _depth(path) == nearest}


def _depth(path: str) -> int:
    """Return how deep in the model a list is; places in lists are no depth, or a UNet were its middle block alone."""
    return sum(not part.isdigit() for part in path.split("."))


def require_own_blocks(model: nn.Module) -> None:
    """Refuse a model that runs a block, or an attention or feed-forward module, in more than one place.

    A hook on it would take what it gave in one place for what it gives in the other.

    Args:
        model: The denoiser.

    Raises:
        ValueError: There is such a module; the message names both places.
    """
    places: dict[int, str] = {}
    for path, parent in model.named_modules():
        is_list = isinstance(parent, nn.ModuleList | nn.Sequential)
        for name, child in parent._modules.items():
            if child is None:
                continue
            place, first = f"{path}.{name}" if path else name, places.get(id(child))
            places.setdefault(id(child), place)
            if first is None or not count_params(child):
                continue
            inner = unwrap_module(child)
            if find_units(inner).kinds if is_list else _unit_kind(name, inner):
                raise ValueError(
                    f"{type(model).__name__} has one module in two places, {first} and {place}: a cache cannot tell "
                    f"them apart. Give each its own with copy.deepcopy."
                )
