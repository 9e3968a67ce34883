"""Feed-forward layers of classes that nobody listed, found by their products and checked by a dry run on a copy.

Two products, or three where hidden channels are gated, are one, in a module of their own or among others in a block, if

- each of them makes hidden channels one by one: a change of one, at one token, reaches the second product's input in
  this channel at this token (around it, where a depthwise convolution is between) and nowhere else,
- cutting hidden channels out gives what zeroing their columns gives,
- as many channels go out as come in, and as many tokens as the module is given.

Products are linear layers on tokens, or 1x1 convolutions; BatchNorm and depthwise convolutions may be between.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import CONVOLUTIONS, DenseFFN, has_rows, keep_channels
from zoo.ffn.dry_run import Call, Run, calls, first_tensor, random_copy, run_copy
from zoo.kernels.experts import ACTIVATIONS
from zoo.text import first_line

__all__ = ["discover"]

_TOLERANCE = 1e-4  # of the largest output, in float32
_MOST_PRODUCTS = 12  # of one module that are tried with each other; a stage of blocks has more


def discover(model: nn.Module, known: Mapping[str, DenseFFN]) -> tuple[dict[str, DenseFFN], dict[str, str]]:
    """Return the feed-forward layers of a model whose classes are not known, by name; the model is only read.

    A layer has the name of the module that holds its products; where that holds several, of its second product.

    Args:
        model: Any module.
        known: Layers that are read already, by the names of their modules.

    Returns:
        The layers, and why modules that look like one are none.
    """
    modules = dict(model.named_modules())
    closed = {id(part) for name in known for part in modules[name].modules() if not known[name].fused}
    closed |= {id(part) for ffn in known.values() for part in ffn.products}
    closed |= {id(part) for module in modules.values() if _is_ours(module) for part in module.modules()}
    names = {id(module): name for name, module in modules.items()}
    inside: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        if _is_product(module) and id(module) not in closed:
            for outer in _outer(name):
                inside.setdefault(outer, []).append(module)
    found: dict[str, DenseFFN] = {}
    reasons: dict[str, str] = {}
    verdicts: dict[Any, _Verdict] = {}
    for name in reversed(list(modules)):  # from inside out: the innermost module holds the layer
        if id(modules[name]) in closed or name not in inside or _embeds(name):
            continue
        parts = [part for part in inside[name] if id(part) not in closed]
        pairs = _pairs(parts)
        used = [part for part in parts if any(part in pair for pair in pairs)]
        if not pairs or len(used) > _MOST_PRODUCTS:
            continue
        verdict = _judge(modules[name], used, len(parts) == len(inside[name]) == len(used), verdicts)
        if verdict.ran:
            closed |= {id(part) for part in used}
        for ffn in verdict.found:
            layer = name if len(verdict.found) == 1 and name not in known else names[id(ffn.down)]
            found[layer] = ffn
            if ffn.whole:
                closed.add(id(modules[name]))
        look = [pair for pair in pairs if _widens(*pair)]
        if look and not verdict.found and not any(not name or other.startswith(f"{name}.") for other in reasons):
            up, down = (names[id(part)].removeprefix(f"{name}.") for part in look[0])
            reasons[name] = f"{up} and {down} look like a feed-forward layer, but {verdict.why}"
    reasons = {**_bare(modules), **reasons}
    gone = [name for name in reasons if any(other == name or other.startswith(f"{name}.") for other in found)]
    return (
        {name: found[name] for name in modules if name in found},
        {name: reasons[name] for name in modules if name in reasons and name not in gone},
    )


def _embeds(name: str) -> bool:
    """Tell whether a module embeds timesteps, labels or positions; blocks inside of an embedder do not."""
    words = name.split(".")
    last = max((place for place, word in enumerate(words) if re.search("embed|(?<![a-z])emb", word)), default=-1)
    return last >= 0 and not any(word.isdigit() for word in words[last + 2 : -1])


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
    if isinstance(module, CONVOLUTIONS):
        ones = (1,) * len(module.kernel_size)
        plain = tuple(module.kernel_size) == tuple(module.stride) == tuple(module.dilation) == ones
        return plain and module.groups == 1 and module.padding in (0, (0,) * len(ones), "same", "valid")
    return isinstance(module, nn.Linear)


def _is_ours(module: nn.Module) -> bool:
    """Tell whether a technique made a module: its products are no feed-forward layer of the model's."""
    return type(module).__module__.startswith(("zoo.ffn.", "zoo.moe.", "zoo.layers.ffn"))


def _bare(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return modules whose own parameters look like the products of a layer, and what to do about it."""
    found = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        sides = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None and p.ndim == 2}
        for (one, shape), (other, turned) in zip(sides.items(), list(sides.items())[1:], strict=False):
            if shape == turned[::-1] and shape[0] != shape[1]:
                found[name] = (
                    f"its weights {one} and {other} are parameters of {type(module).__name__} itself: hold them in two "
                    "nn.Linear and call these"
                )
                break
    return found


def _sides(product: Any) -> tuple[int, int]:
    if isinstance(product, CONVOLUTIONS):
        return product.in_channels, product.out_channels
    return product.in_features, product.out_features


def _pairs(parts: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Return which products can make hidden channels, and which the outputs of these: as many as there are inputs."""
    found: list[tuple[nn.Module, nn.Module]] = []
    for down in parts:
        hidden, dim = _sides(down)
        for up in parts:
            kind = next((k for k in (nn.Linear, *CONVOLUTIONS) if isinstance(down, k)), nn.Linear)
            if up is not down and isinstance(up, kind) and _sides(up) in ((dim, hidden), (dim, 2 * hidden)):
                found.append((up, down))
    return found


def _widens(up: nn.Module, down: nn.Module) -> bool:
    return _sides(down)[0] > _sides(down)[1] and _sides(up)[1] > _sides(up)[0]


@dataclass
class _Verdict:
    """What a dry run says of a module.

    Attributes:
        found: Layers.
        ran: It could be run: what was not found is none.
        why: There is none.
    """

    found: list[DenseFFN] = field(default_factory=list)
    ran: bool = False
    why: str = ""


def _judge(module: nn.Module, parts: list[nn.Module], alone: bool, verdicts: dict[Any, _Verdict]) -> _Verdict:
    """Return the layers of a module; modules that are alike are run once.

    Args:
        module: Any.
        parts: Its products that may belong to one.
        alone: It has no others.
        verdicts: Of modules that were run, on the products of those.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return _Verdict(why="its weights are on the meta device: load them first")
    inside = list(module.modules())
    places = {id(part): place for place, part in enumerate(inside)}
    products = [places[id(part)] for part in parts]
    like = re.sub(r"drop_prob=[\d.e-]+|p=[\d.e-]+", "", repr(module))
    key = (type(module), like, tuple(products))
    if key not in verdicts:
        try:
            one = random_copy(module, torch.Generator().manual_seed(0))
            own = {id(part): place for place, part in enumerate(one.modules())}
            verdict = _dry_run(one, products, alone)
            verdicts[key] = replace(verdict, found=[_moved(ffn, lambda part: own[id(part)]) for ffn in verdict.found])
        except Exception as error:
            verdicts[key] = _Verdict(why=f"a dry run stops: {_line(error)}")
    verdict = verdicts[key]
    return replace(verdict, found=[_moved(ffn, lambda place: inside[place]) for ffn in verdict.found])


def _moved(ffn: DenseFFN, where: Any) -> DenseFFN:
    """Return the layer with other modules in the places of its own."""
    return replace(
        ffn,
        up=where(ffn.up),
        gate=None if ffn.gate is None else where(ffn.gate),
        down=where(ffn.down),
        between=tuple(where(part) for part in ffn.between),
        counters=tuple((where(part), name) for part, name in ffn.counters),
    )


def _line(error: BaseException) -> str:
    return first_line(error)[:120].rstrip(".")


@torch.no_grad()
def _dry_run(one: nn.Module, places: list[int], alone: bool) -> _Verdict:
    inside = list(one.modules())
    products = [inside[place] for place in places]
    numbers = {id(product): number for number, product in enumerate(products)}
    pairs = [(numbers[id(up)], numbers[id(down)]) for up, down in _pairs(products)]
    call, run, why = _first_run(one, products, pairs)
    if call is None or run is None:
        return _Verdict(why=why)
    made: dict[int, list[int]] = {}
    for up in dict.fromkeys(up for up, _ in pairs):
        downs = [down for other, down in pairs if other == up and _ran(run, up, down, call.x, products)]
        for down in _elementwise(one, products, call, run, up, downs):
            made.setdefault(down, []).append(up)
    found = []
    for down, ups in made.items():
        if len(ups) <= 2 and len({_sides(products[up]) for up in ups}) == 1:
            ffn = _layer(one, products, call, run, ups, down)
            if ffn is not None:
                used = len(ups) + 1
                plain_call = not call.others or bool(ffn.between)
                found.append(replace(ffn, whole=ffn.whole and alone and used == len(products) and plain_call))
    why = "its hidden channels are not each for itself: a norm, a softmax or a mixing of them is between the products"
    return _Verdict(found=found, ran=True, why=why)


def _ran(run: Run, up: int, down: int, x: Tensor, products: list[Any]) -> bool:
    """Tell whether two products ran one after the other, as often, on no fewer tokens than the module was given."""
    if run.counts.get(up, 0) != run.counts.get(down, 0) or not run.counts.get(up):
        return False
    rows = len(run.outputs[up])
    after = run.log.index(products[up]) < run.log.index(products[down])
    return after and rows == len(run.inputs[down]) and rows * _sides(products[up])[0] >= x.numel()


def _first_run(
    one: nn.Module, products: list[nn.Module], pairs: list[tuple[int, int]]
) -> tuple[Call | None, Run | None, str]:
    """Return a call under which the products of a pair run, or why there is none."""
    why = ""
    widths = list(dict.fromkeys(_sides(product)[0] for product in products))
    for down in dict.fromkeys(down for _, down in pairs):
        device = next(one.parameters()).device
        for call in calls(one, products[down], _sides(products[down])[1], widths, device):
            try:
                run = run_copy(one, products, call)
            except Exception as error:
                why = why or f"{type(one).__name__} does not run by itself on tokens or maps ({_line(error)})"
                continue
            if any(_ran(run, up, other, call.x, products) for up, other in pairs):
                return call, run, ""
            if not any(run.counts.get(up) and run.counts.get(other) for up, other in pairs):
                why = f"the forward of {type(one).__name__} does not call them: call the modules, not their weights"
            else:
                why = "they are not run one after the other on every token"
    return None, None, why or f"{type(one).__name__} has no forward to run"


def _elementwise(one: nn.Module, products: list[Any], call: Call, run: Run, up: int, downs: list[int]) -> Iterator[int]:
    """Yield the second products into whose input each channel of a first one goes by itself, token by token."""
    if not downs:
        return
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(run.outputs[up].shape, generator=random).to(run.outputs[up])
    at_token = torch.zeros_like(rows)
    at_token[0] = rows[0]
    changed = run_copy(one, products, call, change=up, by=at_token)
    for down in downs:
        hidden = _sides(products[down])[0]
        between = run.between([products[up]], products[down])
        if not any(isinstance(part, CONVOLUTIONS) and max(part.kernel_size) > 1 for part in between):
            moved = (changed.inputs[down] - run.inputs[down]).abs().amax(1) > 1e-6
            if not moved[0] or moved[1:].any():
                continue
        some = torch.rand(hidden, generator=random) < 0.5
        alone, reached = True, False
        for chosen in (some, ~some):
            others = run_copy(one, products, call, change=up, by=rows * chosen.repeat(rows.shape[1] // hidden).to(rows))
            moved = ((others.inputs[down] - run.inputs[down]).abs().amax(0) > 1e-6).cpu()
            alone, reached = alone and not moved[~chosen].any(), reached or bool(moved.any())
        if alone and reached:
            yield down


def _layer(one: nn.Module, products: list[Any], call: Call, run: Run, ups: list[int], down: int) -> DenseFFN | None:
    """Return the layer of some products of a copy, if it can be cut."""
    last = products[down]
    hidden, packed = _sides(last)[0], _sides(products[ups[0]])[1] != _sides(last)[0]
    firsts = [products[up] for up in ups]
    between = [
        part for part in run.between(firsts, last) if has_rows(part, hidden) or (packed and has_rows(part, 2 * hidden))
    ]
    y = first_tensor(run.y)
    x = call.x.movedim(1, -1) if isinstance(last, CONVOLUTIONS) else call.x
    out = None if y is None or y.shape != call.x.shape else y.movedim(1, -1) if x is not call.x else y
    facts = DenseFFN(
        up=firsts[0],
        gate=firsts[1] if len(ups) > 1 else None,
        down=last,
        activation=None,
        packed="value first" if packed else None,
        dropout=max((part.p for part in one.modules() if isinstance(part, nn.Dropout)), default=0.0),
        between=tuple(between),
        whole=y is run.y
        and out is not None
        and run.counts[down] == 1
        and torch.equal(run.inputs[ups[0]], x.flatten(0, -2))
        and torch.equal(out.flatten(0, -2), run.outputs[down]),
    )
    if packed and len(ups) > 1:
        return None
    counters = _counters(one, products, hidden)
    if not _cuts(one, facts, call):
        facts = replace(facts, counters=counters)
        if not counters or not _cuts(one, facts, call):
            return None
    pre, made = [run.outputs[up] for up in ups], run.inputs[down]
    if packed:
        pre = list(pre[0].chunk(2, -1))
    if len(pre) == 1 and not between and torch.allclose(pre[0], made):
        return None  # nothing between two products: one of low rank
    gate_first = False
    if len(pre) == 2:
        # a value doubled and turned round turns the hidden channel with it; an activated gate does not
        turn = slice(0, hidden) if packed else slice(None)
        turned = run_copy(one, products, call, change=ups[0], scale=turn)
        gate_first = not torch.allclose(turned.inputs[down], -2 * made, rtol=1e-3, atol=1e-5)
        if gate_first:
            pre = pre[::-1]
    order: Literal["value first", "gate first"] | None = None
    if packed:
        order = "gate first" if gate_first else "value first"
    elif gate_first:
        facts = replace(facts, up=facts.gate, gate=facts.up)
    return replace(facts, activation=None if between else _activation(pre, made), packed=order)


def _counters(one: nn.Module, products: Iterable[nn.Module], hidden: int) -> tuple[tuple[nn.Module, str], ...]:
    """Return the numbers of hidden channels that modules hold beside their weights, and may reshape by."""
    own = {id(product) for product in products}
    return tuple(
        (part, name)
        for part in one.modules()
        if id(part) not in own and not isinstance(part, (nn.Linear, *CONVOLUTIONS))
        for name, value in vars(part).items()
        if isinstance(value, int) and not isinstance(value, bool) and value in (hidden, 2 * hidden)
    )


def _cuts(one: nn.Module, facts: DenseFFN, call: Call) -> bool:
    """Tell whether cutting hidden channels out gives what zeroing their columns gives."""
    hidden = facts.hidden_dim
    halves = {max(1, hidden // 2), max(1, hidden // 2 // 4 * 4)}  # some reshape hidden channels to a few groups
    return any(_cuts_to(one, facts, call, count) for count in halves)


def _cuts_to(one: nn.Module, facts: DenseFFN, call: Call, count: int) -> bool:
    hidden = facts.hidden_dim
    kept = torch.randperm(hidden, generator=torch.Generator().manual_seed(2))[:count]
    gone = torch.ones(hidden, dtype=torch.bool)
    gone[kept] = False
    zeroed, cut = copy.deepcopy(one), copy.deepcopy(one)
    places = {id(part): place for place, part in enumerate(one.modules())}

    def of(other: nn.Module) -> DenseFFN:
        inside = list(other.modules())
        return _moved(facts, lambda part: inside[places[id(part)]])

    of(zeroed).down.weight[:, gone.to(call.x.device)] = 0
    keep_channels(of(cut), kept)
    wanted = first_tensor(call(zeroed))
    try:
        given = first_tensor(call(cut))
    except Exception:
        return False
    if wanted is None or given is None or wanted.shape != given.shape:
        return False
    return bool((given - wanted).abs().max() <= _TOLERANCE * wanted.abs().max().clamp_min(1e-6))


def _activation(pre: list[Tensor], made: Tensor) -> str | None:
    """Return the activation between pre-activations (value, then gate) and hidden channels; None: not a known one."""
    for name, function in ACTIVATIONS.items():
        wanted = function(pre[0]) if len(pre) == 1 else pre[0] * function(pre[1])
        if torch.allclose(wanted, made, rtol=1e-4, atol=1e-5):
            return name
    return None
