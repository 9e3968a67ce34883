"""Runs of a copy of a module with random weights, and what its products took and gave in them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import CONVOLUTIONS

__all__ = ["Call", "Run", "calls", "first_tensor", "random_copy", "run_copy"]

_HEIGHTS, _WIDTHS = ("h", "height"), ("w", "width")
_SIZES = ("size", "shape", "resolution", "hw", "grid")


@dataclass(frozen=True)
class Call:
    """What a module is called with: a first input x of tokens or maps, and what else its forward asks for."""

    x: Tensor
    others: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        others = {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.others.items()}
        return module(self.x.clone(), **others)


@dataclass
class Run:
    """What a dry run saw; products are numbered, and rows (T, C) are over all their calls.

    Attributes:
        inputs: Rows that each product took.
        outputs: Rows that each product gave.
        counts: Calls of each product.
        log: Modules in the order in which they were done.
        y: What the module returned.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    log: list[nn.Module] = field(default_factory=list)
    y: Any = None

    def between(self, first: Sequence[nn.Module], last: nn.Module) -> list[nn.Module]:
        """Return the modules that were done after the first of some products and before the last call of another."""
        start = min(self.log.index(module) for module in first)
        end = len(self.log) - 1 - self.log[::-1].index(last)
        return list(dict.fromkeys(part for part in self.log[start:end] if part not in first and part is not last))


@torch.no_grad()
def random_copy(module: nn.Module, random: torch.Generator) -> nn.Module:
    """Return a copy in float32 without hooks, with random weights: as built, some layers give zeros."""
    one = copy.deepcopy(module).float()
    one.eval()  # what LeViT's train returns is None
    one.requires_grad_(False)
    for part in one.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        vars(part).pop("forward", None)
        for parameter in part.parameters(recurse=False):
            scale = parameter.shape[1:].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return one


def first_tensor(y: Any) -> Tensor | None:
    """Return the first tensor of what a module gave."""
    if isinstance(y, Tensor):
        return y
    parts = y.values() if isinstance(y, Mapping) else y if isinstance(y, (tuple, list)) else ()
    return next((found for found in map(first_tensor, parts) if found is not None), None)


def run_copy(
    module: nn.Module,
    products: Sequence[nn.Module],
    call: Call,
    *,
    change: int | None = None,
    by: Tensor | None = None,
    scale: slice | None = None,
) -> Run:
    """Run a module and watch its products.

    Args:
        module: A copy.
        products: Of it.
        call: What it is called with.
        change: Number of the product whose output is changed.
        by: Rows (T, C) added to the output of its first call.
        scale: Its channels that are scaled by -2 instead.
    """
    run = Run()
    places = {id(product): place for place, product in enumerate(products)}

    def see(part: nn.Module, args: Any, output: Any) -> Any:
        run.log.append(part)
        place = places.get(id(part))
        if place is None:
            return None
        first = run.counts.get(place, 0) == 0
        maps = isinstance(part, CONVOLUTIONS)
        took, given = ((each.movedim(1, -1) if maps else each) for each in (args[0], output))
        if place == change and scale is not None:
            given = given.clone()
            given[..., scale] *= -2
        elif place == change and first and by is not None:
            given = given + by[: given[..., 0].numel()].view(given.shape)
        output = given.movedim(-1, 1) if maps else given
        took, rows = took.flatten(0, -2), given.flatten(0, -2)
        if first:
            run.inputs[place], run.outputs[place] = took, rows
        else:
            run.inputs[place] = torch.cat([run.inputs[place], took])
            run.outputs[place] = torch.cat([run.outputs[place], rows])
        run.counts[place] = run.counts.get(place, 0) + 1
        return output

    with ExitStack() as stack:
        for part in module.modules():
            stack.callback(part.register_forward_hook(see).remove)
        run.y = call(module)
    return run


def calls(module: nn.Module, product: nn.Module, dim: int, widths: Sequence[int], device: Any) -> Iterator[Call]:
    """Yield what a module may want to be called with, the likeliest first.

    Args:
        module: Of a user.
        product: One of it: maps are for convolutions, tokens for linear layers, or maps that are turned inside.
        dim: Channels of the input.
        widths: Inputs of its products: where tokens are mixed, one is the number of tokens.
        device: Of the weights.
    """
    random = torch.Generator().manual_seed(0)
    resolutions = [
        value[0] * value[1]
        for value in vars(module).values()
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value)
    ]
    tokens = dict.fromkeys([16, 17, *(count for count in (*widths, *resolutions) if 1 < count <= 4096)])
    shapes: list[tuple[int, ...]] = [(2, 5, dim), (2, 5, 4, dim), *((2, count, dim) for count in tokens)]
    shapes.append((2, dim, 5, 4))
    if isinstance(product, nn.Conv1d):
        shapes = [(2, dim, 5), (2, dim, 16), (2, 5, dim)]
    elif isinstance(product, nn.Conv2d):
        shapes = [(2, dim, 5, 4), (2, dim, 8, 8), (2, dim, 7, 7), (2, 5, 4, dim), (2, 16, dim)]
    elif isinstance(product, nn.Conv3d):
        shapes = [(2, dim, 3, 5, 4)]
    for shape in shapes:
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(device)
        for others in _others(module, x, dim):
            yield Call(x, others)


def _others(module: nn.Module, x: Tensor, dim: int) -> Iterator[dict[str, Any]]:
    """Yield values for what a forward asks for after its first input: sizes, masks; what is unknown in several ways."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    asked = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    side = round(x.shape[1] ** 0.5)
    size = x.shape[-2:] if x.shape[1] == dim and x.ndim == 4 else x.shape[1:3] if x.ndim == 4 else (x.shape[1], 1)
    if x.ndim == 3 and side * side == x.shape[1]:
        size = (side, side)
    known: dict[str, Any] = {}
    for name in asked:
        word = name.lower()
        if word in _HEIGHTS or word in _WIDTHS:
            known[name] = int(size[word in _WIDTHS])
        elif any(part in word for part in _SIZES):
            known[name] = tuple(int(each) for each in size)
        elif "mask" in word:
            known[name] = None
    unknown = [name for name in asked if name not in known]
    yield known | dict.fromkeys(unknown, x)
    if unknown:  # a vector for each sample, or nothing
        yield known | dict.fromkeys(unknown, torch.ones(len(x), dim, device=x.device))
        yield known | dict.fromkeys(unknown)
