"""Feed-forward layers of classes that nobody listed, found by their products and checked by a dry run on a copy.

A module with two products, or three where hidden channels are gated, is one if

- every hidden channel is made of its own rows alone: cutting channels out gives what zeroing their columns gives,
- what the second product gives reaches the output by addition, at most scaled channel by channel (layer scale, a
  BatchNorm at the end), so that leaving it out leaves the rest as it was.

Products are linear layers on tokens, or 1x1 convolutions on maps; BatchNorm and depthwise convolutions may be between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN, has_rows, keep_channels
from zoo.kernels.experts import ACTIVATIONS

__all__ = ["discover"]

_TOLERANCE = 1e-4  # of the largest output, in float32


def discover(model: nn.Module, known: Iterable[str]) -> dict[str, DenseFFN]:
    """Return the feed-forward layers of a model whose classes are not known, by name; the model is only read.

    Args:
        model: Any module.
        known: Names of modules that are read already: nothing around or inside them is looked at.
    """
    modules = dict(model.named_modules())
    closed = set(known)
    products: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        if _is_product(module):
            for outer in _outer(name):
                products.setdefault(outer, []).append(module)
        elif _is_ours(module):
            closed.add(name)
    around = {outer for name in closed for outer in _outer(name)}
    found: dict[str, DenseFFN] = {}
    verdicts: dict[Any, Any] = {}
    for name in reversed(list(modules)):  # from inside out: the innermost module is the layer
        parts = products.get(name, [])
        if len(parts) not in (2, 3) or name in around or any(outer in closed for outer in (name, *_outer(name))):
            continue
        if "emb" in name:  # of timesteps, labels, positions
            continue
        ffn = _checked(modules[name], parts, verdicts)
        if ffn is not None:
            found[name] = ffn
            around |= set(_outer(name))
    return {name: found[name] for name in modules if name in found}


def _outer(name: str) -> list[str]:
    """Return the names of the modules around one, the nearest first."""
    outer = []
    while name:
        name = name.rpartition(".")[0]
        outer.append(name)
    return outer


def _is_product(module: nn.Module) -> bool:
    if module._parameters.get("weight") is None:  # computed from others: weight norm, a parametrization
        return False
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == module.stride == module.dilation == (1, 1)
        return plain and module.groups == 1 and module.padding in (0, (0, 0), "same", "valid")
    return isinstance(module, nn.Linear)


def _is_ours(module: nn.Module) -> bool:
    """Tell whether a technique made a module: its products are no feed-forward layer of the model's."""
    return type(module).__module__.startswith(("zoo.ffn.", "zoo.moe.", "zoo.layers.ffn"))


@dataclass
class _Run:
    """What a dry run saw.

    Attributes:
        inputs: Of each product.
        outputs: Of each product.
        between: Modules that ran after the first product and before the last.
        y: What the module returned.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    between: list[nn.Module] = field(default_factory=list)
    y: Any = None


def _checked(module: nn.Module, parts: list[nn.Module], verdicts: dict[Any, Any]) -> DenseFFN | None:
    """Return the layer of a module with these products; layers that are alike are run once."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    places = {id(part): place for place, part in enumerate(module.modules())}
    inside = list(module.modules())
    for ups, down in _roles(parts):
        key = (type(module), repr(module), tuple(places[id(part)] for part in (*ups, down)))
        if key not in verdicts:
            try:
                verdicts[key] = _dry_run(module, [places[id(part)] for part in ups], places[id(down)])
            except Exception:
                verdicts[key] = None
        if verdicts[key] is not None:
            facts, gate_first, between = verdicts[key]
            up, gate = (ups[1], ups[0]) if gate_first else (ups[0], ups[1] if len(ups) > 1 else None)
            return replace(facts, up=up, gate=gate, down=down, between=tuple(inside[place] for place in between))
    return None


def _sides(product: Any) -> tuple[int, int]:
    if isinstance(product, nn.Conv2d):
        return product.in_channels, product.out_channels
    return product.in_features, product.out_features


def _roles(parts: list[nn.Module]) -> list[tuple[list[nn.Module], nn.Module]]:
    """Return which products can make hidden channels and which the outputs: as many outputs as inputs."""
    if len({isinstance(part, nn.Conv2d) for part in parts}) > 1:
        return []
    roles = []
    for down in parts:
        ups = [part for part in parts if part is not down]
        hidden, dim = _sides(down)
        if len({_sides(up) for up in ups}) > 1 or _sides(ups[0])[0] != dim:
            continue
        if _sides(ups[0])[1] == hidden or (len(ups) == 1 and _sides(ups[0])[1] == 2 * hidden):
            roles.append((ups, down))
    return roles


@torch.no_grad()
def _dry_run(module: nn.Module, ups: list[int], down: int) -> tuple[DenseFFN, bool, list[int]] | None:
    """Run a copy with random weights; return facts of the layer, whether gates come first, and what is between."""
    random = torch.Generator().manual_seed(0)
    one = _copy(module, random)
    products = _at(one, [*ups, down])
    dim, convolutional = _sides(products[-1])[1], isinstance(products[-1], nn.Conv2d)
    device = products[-1].weight.device
    for shape in [(2, dim, 5, 4)] if convolutional else [(2, 5, dim), (2, 5, 4, dim)]:
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(device)
        try:
            run = _run(one, products, x)
        except Exception:
            continue
        break
    else:
        return None
    if not isinstance(run.y, Tensor) or run.y.shape != x.shape or len(run.outputs) != len(products):
        return None
    hidden, packed = _sides(products[-1])[0], _sides(products[0])[1] != _sides(products[-1])[0]
    if not _adds(one, products, x, run):
        return None
    between = [part for part in run.between if has_rows(part, hidden) or (packed and has_rows(part, 2 * hidden))]
    facts = DenseFFN(
        up=products[0],
        gate=products[1] if len(ups) > 1 else None,
        down=products[-1],
        activation=None,
        packed="value first" if packed else None,
        dropout=max((part.p for part in one.modules() if isinstance(part, nn.Dropout)), default=0.0),
        between=tuple(between),
        whole=torch.equal(run.inputs[0], x) and torch.equal(run.y, run.outputs[len(ups)]),
    )
    inside = {id(part): place for place, part in enumerate(one.modules())}
    if not _cuts(one, facts, x, [*ups, down], [inside[id(part)] for part in between]):
        return None
    pre, made = [facts.rows(run.outputs[place]) for place in range(len(ups))], facts.rows(run.inputs[len(ups)])
    if packed:
        pre = list(pre[0].chunk(2, -1))
    if len(pre) == 1 and not between and torch.allclose(pre[0], made):
        return None  # nothing between two products: one of low rank
    gate_first = False
    if len(pre) == 2:
        # a value doubled and turned round turns the hidden channel with it; an activated gate does not
        turned = _run(one, products, x, scale=(0, slice(0, hidden) if packed else slice(None)))
        gate_first = not torch.allclose(facts.rows(turned.inputs[len(ups)]), -2 * made, rtol=1e-3, atol=1e-5)
        if gate_first:
            pre = pre[::-1]
    order: Literal["value first", "gate first"] | None = None
    if packed:
        order = "gate first" if gate_first else "value first"
    activation = None if between else _activation(pre, made)
    return (
        replace(facts, activation=activation, packed=order),
        gate_first and not packed,
        [inside[id(part)] for part in between],
    )


def _copy(module: nn.Module, random: torch.Generator) -> nn.Module:
    """Return a copy in float32 without hooks, with random weights: as built, some layers give zeros."""
    one = copy.deepcopy(module).float().eval().requires_grad_(False)
    for part in one.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        vars(part).pop("forward", None)
        for parameter in part.parameters(recurse=False):
            scale = parameter.shape[1:].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return one


def _at(module: nn.Module, places: list[int]) -> list[Any]:
    inside = list(module.modules())
    return [inside[place] for place in places]


def _run(
    module: nn.Module, products: list[Any], x: Tensor, scale: tuple[int, slice] | None = None, add: Tensor | None = None
) -> _Run:
    """Run a module and watch its products; scale rows of one by -2, or add to the output of the last."""
    run, going = _Run(), [False]
    places = {id(product): place for place, product in enumerate(products)}

    def see(part: nn.Module, args: Any, output: Any) -> Any:
        place = places.get(id(part))
        if place is None:
            if going[0]:
                run.between.append(part)
            return None
        if place in run.outputs:
            raise RuntimeError("A product ran twice.")
        if scale is not None and place == scale[0]:
            output = output.clone()
            channels = output.movedim(1, -1) if isinstance(part, nn.Conv2d) else output
            channels[..., scale[1]] *= -2
        if add is not None and place == len(products) - 1:
            output = output + add.view_as(output)
        run.inputs[place], run.outputs[place] = args[0], output
        going[0] = place != len(products) - 1
        return output

    with ExitStack() as stack:
        for part in module.modules():
            stack.callback(part.register_forward_hook(see).remove)
        run.y = module(x.clone())
    return run


def _adds(module: nn.Module, products: list[Any], x: Tensor, run: _Run) -> bool:
    """Tell whether the second product's output is added to the module's, scaled by channel at most."""
    last = len(products) - 1
    if run.outputs[last].numel() != run.y.numel():
        return False
    added = 1 + torch.rand(run.outputs[last].shape, generator=torch.Generator().manual_seed(1)).to(x)
    change = _run(module, products, x, add=added).y - run.y
    if isinstance(products[-1], nn.Conv2d):
        change, added = change.movedim(1, -1), added.movedim(1, -1)
    factors = (change.reshape(-1, change.shape[-1]) / added.reshape(-1, change.shape[-1])).flatten(0, -2)
    return bool(factors.any()) and torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-3, atol=1e-4)


def _cuts(module: nn.Module, facts: DenseFFN, x: Tensor, places: list[int], between: list[int]) -> bool:
    """Tell whether cutting hidden channels out gives what zeroing their columns gives."""
    hidden = facts.hidden_dim
    kept = torch.randperm(hidden, generator=torch.Generator().manual_seed(2))[: max(1, hidden // 2)]
    gone = torch.ones(hidden, dtype=torch.bool)
    gone[kept] = False
    zeroed, cut = copy.deepcopy(module), copy.deepcopy(module)
    _at(zeroed, places)[-1].weight[:, gone.to(x.device)] = 0
    products = _at(cut, places)
    keep_channels(
        replace(
            facts,
            up=products[0],
            gate=products[1] if len(products) > 2 else None,
            down=products[-1],
            between=tuple(_at(cut, between)),
        ),
        kept,
    )
    wanted = zeroed(x.clone())
    return bool((cut(x.clone()) - wanted).abs().max() <= _TOLERANCE * wanted.abs().max().clamp_min(1e-6))


def _activation(pre: list[Tensor], made: Tensor) -> str | None:
    """Return the activation between pre-activations (value, then gate) and hidden channels; None: not a known one."""
    for name, function in ACTIVATIONS.items():
        wanted = function(pre[0]) if len(pre) == 1 else pre[0] * function(pre[1])
        if torch.allclose(wanted, made, rtol=1e-4, atol=1e-5):
            return name
    return None
