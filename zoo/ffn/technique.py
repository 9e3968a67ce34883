"""The shape that all techniques share: a frozen config, `apply(model, config, data) -> FFNReport`, and a plain record.

A technique notes what it did in `model.ffn_changes`, a list of plain dictionaries that travels with the weights;
`rebuild` gives a fresh dense model the same structure, so that the changed weights load strictly.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from timm.layers import RelPosMlp
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.ffn.dense_ffn import CONVOLUTIONS, DenseFFN, read_ffn, read_torch
from zoo.ffn.discovery import discover
from zoo.layers.ffn import RePaFFN
from zoo.layers.own import engine_in
from zoo.profiling import count_params
from zoo.text import first_line

__all__ = [
    "ERROR_SAMPLES",
    "MOST_SAMPLES",
    "Changes",
    "FFNReport",
    "LayerChange",
    "Moments",
    "amend_change",
    "amend_mixtures",
    "arguments_of",
    "at_least_float32",
    "block_macs",
    "dense_layers",
    "evaluating",
    "every_layer",
    "ffn_layers",
    "forget_change",
    "listed",
    "model_output",
    "note_change",
    "note_mixture",
    "noted_changes",
    "output_error",
    "outputs_of",
    "rebuild",
    "refuse_twice",
    "replace_kind",
    "replace_layers",
    "replace_module",
    "require_changeable",
    "require_seen",
    "require_types",
    "restructure_layers",
    "technique_module",
    "thinned",
    "vit_blocks",
    "watch_inputs",
    "with_diagonal",
]

Kind = TypeVar("Kind", bound=nn.Module)

ERROR_SAMPLES = 32
"""A report's error is measured on as many samples at least; running all again would take as long as the fit."""

_WHOLE_PRODUCTS = 256
"""Below so many channels, outer products are made whole: parts would cost more than the symmetry saves."""

_MIXTURES = {"moe": "zoo.moe.dense2moe", "sigma_moe": "zoo.moe.sigma_moe"}
"""Modules of techniques that do not stand in this package."""

MOST_SAMPLES = 4096
"""No more calibration data are held in memory, whatever is given: a loader of a training set, or one without end."""


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """What became of one layer.

    Args:
        name: Of the module in the model.
        what: In words: "1536 -> 768 channels".
        params: Parameters before and after.
        macs: Multiply-accumulates for one token before and after; where tokens differ, their mean.
    """

    name: str
    what: str
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class FFNReport:
    """What a technique did to a model; `print` shows it as a table.

    Args:
        technique: Name of the module in `zoo.ffn`.
        layers: The layers that changed, in the model's order.
        params: Parameters of the whole model before and after.
        error: Norm of the change of the model's output over the norm of the output, on the data (of much, on part).
            None without data.
    """

    technique: str
    layers: tuple[LayerChange, ...]
    params: tuple[int, int]
    error: float | None = None

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of the changed layers for one token, before and after."""
        return sum(layer.macs[0] for layer in self.layers), sum(layer.macs[1] for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self) | {"macs": list(self.macs)}

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("layer", "change", "parameters", "MACs a token"):
            table.add_column(column, justify="left" if column in ("layer", "change") else "right")
        for layer in self.layers:
            table.add_row(layer.name, layer.what, _pair(layer.params), _pair(layer.macs))
        before, after = self.macs
        share = f" ({100 * after / before:.1f} %)" if before else ""
        table.add_row("all changed layers", "", "", f"{_pair((before, after))}{share}")
        table.add_row("model", "", _pair(self.params), "")
        console = Console(width=10_000, no_color=True, record=True, file=io.StringIO())
        console.print(table)
        text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
        if self.error is not None:
            text += f"\nchange of the output on the data: {100 * self.error:.2f} %"
        return text


def _pair(values: tuple[int, int]) -> str:
    return " -> ".join(f"{value / 1e6:,.3f} M" for value in values)


Takes = Literal["any", "linear", "plain"]
"""What a technique works on: any hidden channels; those between linear layers; those of a layer that it can replace."""

_TAKES = {
    "any": "",
    "linear": "techniques of its kind are for linear layers without a norm or convolution between them",
    "plain": "techniques of its kind replace whole modules of two or three linear layers around a known activation",
}


def ffn_layers(model: nn.Module, pattern: str | None = None, takes: Takes = "plain") -> dict[str, DenseFFN]:
    """Return the dense feed-forward layers of a model by the names of the modules that hold them.

    Args:
        model: Of timm, diffusers, zoo, PyTorch, or your own: see `zoo.ffn.discovery`.
        pattern: Only layers whose name matches this regular expression.
        takes: Layers of other kinds are left out.

    Raises:
        ValueError: There is none, one cannot be split, one of its products is wrapped (by LoRA, quantisation, ...), or
            its weights are computed from others or serve another layer too.
    """
    every, others = every_layer(model, pattern)
    found: dict[str, DenseFFN] = {}
    reasons: dict[str, str] = {}
    for name, ffn in every.items():
        for part, product in (("first", ffn.up), ("gate's", ffn.gate), ("second", ffn.down)):
            if product is not None and not isinstance(product, (nn.Linear, *CONVOLUTIONS)):
                kind = f"{type(product).__module__}.{type(product).__name__}"  # others have a Linear too
                raise ValueError(
                    f"{name}: its {part} product is a {kind}, expected nn.Linear: merge or unload adapters and "
                    "quantisation, or undo another technique, first."
                )
        if takes != "any" and (ffn.convolutional or ffn.between):
            reasons[name] = "its products are convolutions, or have a norm or a convolution between them"
        elif takes != "any" and ffn.fused:
            reasons[name] = f"{type(model.get_submodule(name)).__name__} reads the weights of its products itself"
        elif takes == "plain" and ffn.activation is None:
            reasons[name] = "its activation is unknown"
        elif takes == "plain" and not (ffn.whole or ffn.first_column):
            reasons[name] = "its module does more than this layer: move the layer into a module of its own"
        else:
            found[name] = ffn
    _require_own_weights(model, found)
    if not found:
        if reasons := reasons or others:
            name, why = next(iter(reasons.items()))
            need = f"; {_TAKES[takes]}" if name in every else ""
            name = name or f"This {type(model).__name__}"
            raise ValueError(f"{name}: {why.rstrip('.')}{need}. No other layer of this {type(model).__name__} will do.")
        wanted = f" whose name matches {pattern!r}" if pattern else ""
        done = ", ".join(change["technique"] for change in noted_changes(model))
        if done and not pattern:
            raise ValueError(
                f"{type(model).__name__} has no dense feed-forward layer left after {done}: start from the one before."
            )
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layer{wanted} that is known: FeedForward and Flux's single "
            "blocks of diffusers, Mlp, GluMlp and SwiGLU of timm, or a module of two linear layers, three where they "
            "are gated, that gives as many channels as it takes."
        )
    return found


def every_layer(model: nn.Module, pattern: str | None = None) -> tuple[dict[str, DenseFFN], dict[str, str]]:
    """Return the feed-forward layers of all kinds by name, in the model's order, and why modules are none.

    Raises:
        ValueError: A layer is a `RePaFFN`.
    """
    for name, module in model.named_modules():
        if isinstance(module, RePaFFN) and (pattern is None or re.search(pattern, name)):
            raise ValueError(
                f"{name} is a RePaFFN, whose idle channels zoo.reparameterize merges: techniques are for dense layers."
            )
    return dense_layers(model, pattern)


def dense_layers(model: nn.Module, pattern: str | None = None) -> tuple[dict[str, DenseFFN], dict[str, str]]:
    """Return what `every_layer` does, of a model that may have `RePaFFN` beside it."""
    known: dict[str, DenseFFN] = {}
    reasons: dict[str, str] = {}
    names = [name for name, _ in model.named_modules() if pattern is None or re.search(pattern, name)]
    biases = {module.mlp for module in model.modules() if isinstance(module, RelPosMlp)}  # of positions, not of tokens
    biases |= {module.meta_mlp for module in model.modules() if isinstance(module, WindowMultiHeadAttention)}
    for name, module in model.named_modules():
        if module in biases:
            continue
        if isinstance(module, RePaFFN):
            continue
        ffn = read_torch(module)
        if ffn is None or ffn.plain:
            try:
                ffn = read_ffn(module) or ffn
            except ValueError as error:
                reasons[name] = str(error)
        if ffn is not None:
            known[name] = ffn
    others, not_found = discover(model, known)
    every, reasons = {**known, **others}, reasons | {n: why for n, why in not_found.items() if n not in reasons}
    return {name: every[name] for name in names if name in every}, {n: why for n, why in reasons.items() if n in names}


def _require_own_weights(model: nn.Module, ffns: Mapping[str, DenseFFN]) -> None:
    """Say which layer's weights are not its own, so that it cannot be changed alone.

    Raises:
        ValueError: There is one.
    """
    owners: dict[int, str] = {}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(f"{name}.{key}")
    for layer, ffn in ffns.items():
        for product in ffn.products:
            if product._parameters.get("weight") is None:
                raise ValueError(
                    f"{layer}: a weight is computed from others (weight norm, a parametrization, a mask): make it "
                    "plain first, as torch.nn.utils.parametrize.remove_parametrizations does."
                )
            weight = product.weight
            if type(weight) is not nn.Parameter:
                raise ValueError(
                    f"{layer}: a weight is a {type(weight).__name__}: techniques change plain weights, and quantise "
                    "or shard afterwards."
                )
            if owners.setdefault(id(weight), layer) != layer or len(users.get(id(weight), ())) > 1:
                others = [user for user in users.get(id(weight), ()) if not user.startswith(f"{layer}.")]
                raise ValueError(
                    f"{layer} shares a weight with {(others or [owners[id(weight)]])[0]}: one cannot change without "
                    "the other. Let both places hold one module, or give each a weight of its own, first."
                )


def listed(data: Iterable[Any] | None, technique: str, *, needed: bool = True) -> list[Any]:
    """Return the batches of calibration data, for several passes; of a whole training set the first ones.

    Args:
        data: Batches.
        technique: What needs them, for the message.
        needed: False: none will do too.

    Raises:
        ValueError: There is no data, or no batch in it, or what is given is one batch or a name.
    """
    what = f"a tensor {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
    if isinstance(data, (Tensor, Mapping)):
        raise ValueError(f"data is {what}, expected batches: put it into a list, [data], if it is one.")
    if data is not None and (isinstance(data, (str, bytes)) or not hasattr(data, "__iter__")):
        raise ValueError(f"data is {what}, expected batches of inputs, or of (inputs, labels): a list or a DataLoader.")
    if isinstance(data, (list, tuple)) and len({part.ndim for part in data if isinstance(part, Tensor)}) > 1:
        shapes = " and ".join(str(tuple(part.shape)) for part in data if isinstance(part, Tensor))
        raise ValueError(
            f"data are tensors {shapes}, and batches have as many dimensions each: is it one batch? Then [data]."
        )
    batches, seen = [], 0
    for batch in () if data is None else data:
        batches.append(batch)
        seen += _samples(batch)
        if seen >= MOST_SAMPLES:
            break
    if needed and not batches:
        raise ValueError(f"{technique} needs data: batches of inputs, or of (inputs, labels); 32 to 256 samples do.")
    return batches


def _samples(batch: Any) -> int:
    """Return the number of samples in a batch."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return max((_samples(part) for part in parts if isinstance(part, Tensor)), default=1)


def arguments_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is called with of a batch: all but the "target" and "labels" of a loss."""
    return {key: value for key, value in batch.items() if key not in ("target", "labels")}


def model_output(model: nn.Module, batch: Any) -> Tensor:
    """Run a batch and return the output tensor.

    Args:
        model: Classifier or denoiser.
        batch: Images, a pair that begins with images, or a dictionary of arguments (a "target" in it, and "labels",
            are left out).

    Raises:
        ValueError: The model has no arguments of these names, or returns no tensor.
    """
    if isinstance(batch, Mapping):
        arguments = arguments_of(batch)
        try:
            inspect.signature(model.forward).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"A batch has {', '.join(map(repr, batch))}, and {type(model).__name__} takes "
                f"{inspect.signature(model.forward)}: give batches of its arguments, of images, or of (images, labels)."
            ) from error
        output = model(**arguments)
    else:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = output["logits"] if "logits" in output else next(iter(output.values()), None)
        elif isinstance(output, list) and len(output) > 1 and all(isinstance(part, Tensor) for part in output):
            output = torch.cat([part.flatten(1) for part in output], 1)[..., None]  # the maps of features_only
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            raise ValueError(f"{type(model).__name__} returns a {type(output).__name__}, in which no tensor is found.")
    return output


def outputs_of(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Run batches, and return the output of each.

    Raises:
        ValueError: One is not what the model takes.
    """
    outputs = []
    for batch in batches:
        try:
            outputs.append(model_output(model, batch))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot run a batch of {_described(batch)}: {first_line(error)}"
            ) from error
    return outputs


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_described(part)}" for key, part in batch.items())
    if isinstance(batch, (tuple, list)):  # what follows the inputs is not run
        return _described(batch[0]) if batch else "nothing"
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')} on {batch.device}"
    return f"a {type(batch).__name__}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode without gradients; afterwards its modules' modes are as they were.

    It runs in eager mode: neither a compiled program nor another runtime tells what its layers see.
    """
    modes = {module: module.training for module in model.modules()}
    engines = {module: call for module in modes if (call := engine_in(module)) is not None}
    model.eval()
    for module in engines:
        del module.forward
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, call in engines.items():
            module.forward = call  # type: ignore[method-assign,assignment]


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the first input of every product, as rows (T, C), to `see(name, rows)` whenever it runs."""

    def hook(name: str) -> Callable[..., None]:
        def show(module: nn.Module, args: Any) -> None:
            x = args[0].detach()
            see(name, (x.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else x).flatten(0, -2))

        return show

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield


def output_error(
    model: nn.Module, batches: Sequence[Any], before: Sequence[Tensor], samples: int | None = None
) -> float:
    """Return the norm of the change of the model's outputs over the norm of the outputs before.

    Args:
        model: Changed.
        batches: Data.
        before: Outputs of each batch.
        samples: Enough: no batch is run after as many; None is all.
    """
    changed, kept, seen = 0.0, 0.0, 0
    with evaluating(model):
        for batch, old in zip(batches, before, strict=True):
            if samples is not None and seen >= samples:
                break
            seen += len(old)
            new = model_output(model, batch)
            changed += float((new.double() - old.double()).square().sum())
            kept += float(old.double().square().sum())
    return (changed / max(kept, 1e-30)) ** 0.5


def thinned(rows: Tensor, channels: int, parts: int) -> Tensor:
    """Return rows (T, C), or as many drawn from them as second moments need: 8 a channel over all batches.

    Args:
        rows: Of one batch; equal numbers of rows are thinned alike.
        channels: Of the widest side that is measured.
        parts: Batches in all.
    """
    most = max(1, 8 * channels // parts)
    if len(rows) <= most:
        return rows
    # drawn, not every k-th: these would be the same few places of every image
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most].to(rows.device)]


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are."""
    return x if x.dtype == torch.float64 else x.float()


def with_diagonal(matrix: Tensor, amount: Tensor | float) -> Tensor:
    """Return a matrix (C, C) with as much more on its diagonal."""
    result = matrix.clone()
    result.diagonal().add_(amount)
    return result


class Moments:
    """Sums over rows (T, C) from which means and second moments are made; no row is kept.

    Args:
        second: Sum outer products too.
    """

    def __init__(self, second: bool = True) -> None:
        self.second = second
        self.count = 0
        self.total: Tensor | None = None
        self.squares: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows (T, C)."""
        values = at_least_float32(rows)
        total, squares = values.sum(0).double(), values.square().sum(0).double()
        self.count += len(rows)
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        if self.second:
            self._add_products(values)

    def _add_products(self, values: Tensor) -> None:
        """Add outer products in place, of float32 in float32; the lower triangle is left out but for its blocks."""
        channels = values.shape[1]
        if self.products is None:
            self.products = values.new_zeros(channels, channels)
        step = channels if channels < _WHOLE_PRODUCTS else -(-channels // 4)
        for start in range(0, channels, step):
            self.products[start : start + step, start:].addmm_(values[:, start : start + step].t(), values[:, start:])

    @property
    def mean(self) -> Tensor:
        """(C,), float64."""
        assert self.total is not None
        return self.total / self.count

    @property
    def rms(self) -> Tensor:
        """Root mean square of each channel (C,), float64."""
        assert self.squares is not None
        return (self.squares / self.count).sqrt()

    @property
    def second_moment(self) -> Tensor:
        """Mean outer product (C, C), float64."""
        assert self.products is not None
        upper = self.products.double().triu()
        return (upper + upper.triu(1).t()) / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C), float64."""
        return self.second_moment - torch.outer(self.mean, self.mean)


def require_seen(moments: Mapping[str, Moments]) -> None:
    """Say which layer the data do not reach, or fill with what is no number.

    Raises:
        ValueError: There is one.
    """
    for name, sums in moments.items():
        if not sums.count or sums.squares is None:
            raise ValueError(f"{name} does not run on the data: leave it out with pattern, or give other data.")
        if not torch.isfinite(sums.squares).all():
            raise ValueError(f"{name} gives values on the data that are not finite: look at the data and the weights.")


_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, wherever the model holds that one; it takes over its mode and its hooks.

    Raises:
        ValueError: The model itself is the layer.
    """
    if not name:
        raise ValueError(f"This {type(model).__name__} is the layer itself: put it into nn.Sequential first.")
    old = model.get_submodule(name)
    module.train(old.training)
    for hooks in _HOOKS:  # the mappings themselves, which handles refer to; the old module may be part of the new one
        one, other = getattr(module, hooks), getattr(old, hooks)
        setattr(module, hooks, other)
        setattr(old, hooks, one)
    places = [(outer, key) for outer in model.modules() for key, inner in outer._modules.items() if inner is old]
    for outer, key in places:
        setattr(outer, key, module)


def replace_kind(model: nn.Module, kind: type[Kind], make: Callable[[Kind], nn.Module]) -> list[str]:
    """Put what `make` returns in the place of every module of a class, in place, and return their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    for name, module in found.items():
        replace_module(model, name, make(module))
    return list(found)


class Changes:
    """What a technique does to a model, written down on the way.

    Args:
        model: Not yet changed.
        technique: Its module in `zoo.ffn`.

    Raises:
        ValueError: The technique has been applied.
    """

    def __init__(self, model: nn.Module, technique: str) -> None:
        refuse_twice(model, technique)
        self.model, self.technique, self.params = model, technique, count_params(model)
        self.layers: list[LayerChange] = []

    def add(self, name: str, what: str, params: tuple[int, int], macs: tuple[int, int]) -> None:
        """Write down what became of a layer, see `LayerChange`."""
        self.layers.append(LayerChange(name=name, what=what, params=params, macs=macs))

    def replace(self, name: str, new: nn.Module, what: str, macs: tuple[int, int]) -> None:
        """Put a module in the place of another, and write it down."""
        self.add(name, what, (count_params(self.model.get_submodule(name)), count_params(new)), macs)
        replace_module(self.model, name, new)

    def report(self, facts: Mapping[str, Any], error: float | None = None) -> FFNReport:
        """Note in the model what `restructure` needs of each layer, and return the report.

        Args:
            facts: Plain values by the name of a layer.
            error: See `FFNReport`.
        """
        note_change(self.model, self.technique, facts)
        params = (self.params, count_params(self.model))
        return FFNReport(technique=self.technique, layers=tuple(self.layers), params=params, error=error)


def replace_layers(
    model: nn.Module,
    technique: str,
    pattern: str | None,
    build: Callable[[DenseFFN, int], nn.Module],
    facts: Mapping[str, Any],
    what: str,
) -> FFNReport:
    """Put a module of a technique in the place of every feed-forward layer; nothing changes if one cannot be built.

    Args:
        model: Changed in place.
        technique: Its module in `zoo.ffn`.
        pattern: Only layers whose name matches this regular expression.
        build: Makes the new layer from the dense one and the number of layers; it has `macs`, multiply-accumulates for
            one token.
        facts: Plain arguments that `restructure` needs.
        what: Was done, in words.

    Raises:
        ValueError: No layer is known, one cannot be replaced (the message names it), or it was done before.
    """
    changes = Changes(model, technique)
    ffns = ffn_layers(model, pattern)
    built: dict[str, nn.Module] = {}
    for name, ffn in ffns.items():
        try:
            if ffn.first_column:
                raise ValueError("it shares a product with attention, and layers of their own are needed")
            built[name] = build(ffn, len(ffns)).to(ffn.up.weight)
        except ValueError as error:
            raise ValueError(f"{name} cannot be replaced: {error}") from error
    for name, ffn in ffns.items():
        changes.replace(name, built[name], what, (ffn.macs(), int(built[name].macs)))  # type: ignore[arg-type]
    return changes.report({name: dict(facts) for name in ffns})


def restructure_layers(
    model: nn.Module, layers: Mapping[str, Any], build: Callable[[DenseFFN, Mapping[str, Any]], nn.Module]
) -> None:
    """Put the modules of a technique in the places where `replace_layers` put them; weights are loaded after.

    Args:
        model: Dense; changed in place.
        layers: Facts of each layer, as `replace_layers` noted them.
        build: Makes the new layer from the dense one and its facts.
    """
    ffns = ffn_layers(model)
    for name, facts in layers.items():
        replace_module(model, name, build(ffns[name], facts).to(ffns[name].up.weight))


def block_macs(block: nn.Module, tokens: int = 0) -> int:
    """Return the multiply-accumulates of a block for one token: products, and attention among so many tokens.

    Layers that say what they take (mixtures, memories) are believed. Norms are left out: what modulates them is made
    once a sample.
    """
    own: Any = getattr(block, "macs", None)
    if isinstance(own, int):
        return own
    qkv = getattr(block, "qkv", None)
    mixing = 2 * tokens * qkv.in_features if isinstance(qkv, nn.Linear) else 0
    products = sum(parameter.numel() for parameter in block.parameters(recurse=False) if parameter.ndim == 2)
    inside = [part for part in block.children() if "norm" not in type(part).__name__.lower()]
    return int(mixing + products + sum(block_macs(part, tokens) for part in inside))


def require_types(kind: type, fields: Mapping[str, Any]) -> None:
    """Say which field of a configuration is not of its type or none of its words.

    A whole number is a number too, a list a tuple.

    Args:
        kind: The configuration's class.
        fields: Values by name.

    Raises:
        ValueError: There is one, or a pattern is no regular expression.
    """
    numbers = {int: Integral, float: Real, tuple: (tuple, list)}
    for name, hint in get_type_hints(kind).items():
        if name not in fields:
            continue
        value = fields[name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}.")
            continue
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = [get_origin(part) or part for part in parts]
        if not all(isinstance(each, type) for each in kinds):
            continue
        right = any(isinstance(value, numbers.get(each, each)) for each in kinds)  # type: ignore[arg-type,call-overload]
        if not right or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("nothing" if each is type(None) else each.__name__ for each in kinds)
            raise ValueError(f"{name} must be {wanted}, got {value!r}.")
        if name == "pattern" and value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {value!r} ({error}).") from error


def vit_blocks(model: nn.Module) -> dict[str, Any]:
    """Return the ViT blocks of timm in a model, by name; there may be none."""
    return {name: module for name, module in model.named_modules() if type(module) is Block}


def note_change(model: nn.Module, technique: str, layers: Mapping[str, Any]) -> None:
    """Remember plain facts from which `rebuild` gives a fresh model the same structure.

    They are of the model inside the wrappers of the compiler, of PEFT and of several devices, gone when it is saved.
    """
    _set_changes(model, [*noted_changes(model), {"technique": technique, "layers": _plain(model, layers)}])


def amend_change(model: nn.Module, technique: str, layers: Mapping[str, Any]) -> None:
    """Remember other facts of the layers of a technique that was noted, in its place among the others."""
    changes = noted_changes(model)
    for change in changes:
        if change["technique"] == technique:
            change["layers"] = _plain(model, layers)
    _set_changes(model, changes)


def _plain(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _inner(model)[1]
    plain = {name.replace("_orig_mod.", "").removeprefix(prefix): facts for name, facts in layers.items()}
    return copy.deepcopy(plain)


def note_mixture(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Remember a mixture of experts: one configuration for all layers of the model, instead of facts of each."""
    _set_changes(model, [*noted_changes(model), {"technique": "moe", **config}])


def amend_mixtures(model: nn.Module, amend: Callable[[dict[str, Any]], None]) -> None:
    """Keep what is remembered of a model's mixtures of experts true.

    Args:
        model: Its layers have just changed.
        amend: Changes the facts of one layer, or of all, in place.
    """
    changes = noted_changes(model)
    for change in changes:
        if change["technique"] in _MIXTURES:
            for facts in change["layers"].values() if "layers" in change else [change]:
                amend(facts)
    if changes:
        _set_changes(model, changes)


def forget_change(model: nn.Module, technique: str) -> None:
    """Remember nothing of a technique any more, since its layers are gone."""
    changes = noted_changes(model)
    if changes:
        _set_changes(model, [change for change in changes if change["technique"] != technique])


def noted_changes(model: nn.Module) -> list[dict[str, Any]]:
    """Return a copy of what techniques noted, in their order."""
    return copy.deepcopy(getattr(_inner(model)[0], "ffn_changes", []))


def _inner(model: nn.Module) -> tuple[Any, str]:
    """Return the model inside all wrappers, and what its names begin with in them, but for the compiler's."""
    inner: Any = model
    prefix = ""
    while True:
        inner = getattr(inner, "_orig_mod", inner)
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner, prefix = inner.module, f"{prefix}module."
        elif hasattr(inner, "get_base_model"):
            inner, prefix = inner.get_base_model(), f"{prefix}base_model.model."
        else:
            return inner, prefix


def _set_changes(model: nn.Module, changes: list[dict[str, Any]]) -> None:
    inner = _inner(model)[0]
    inner.ffn_changes = changes
    if hasattr(inner, "register_to_config"):  # of diffusers, whose folders hold the configuration alone
        inner.register_to_config(ffn_changes=changes)


def require_changeable(model: nn.Module) -> None:
    """Say what keeps a model from being changed, or from being trained after it.

    Raises:
        TypeError: It is no module, or a compiled one.
        ValueError: It was made inside `torch.inference_mode()`, or would be changed there.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"A technique changes a torch.nn.Module, got a {type(model).__name__}: give the model that it was made of."
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, and weights that are made there never learn: leave it before.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"Weights of this {type(model).__name__} were made inside torch.inference_mode(), and cannot change: build "
            "or load it outside."
        )


def refuse_twice(model: nn.Module, technique: str) -> None:
    """Say that a technique has been applied, or that the model cannot be changed.

    Raises:
        TypeError: See `require_changeable`.
        ValueError: It has, or see there.
    """
    require_changeable(model)
    if any(change["technique"] == technique for change in noted_changes(model)):
        raise ValueError(
            f"{type(model).__name__} has been through zoo.ffn.{technique} already: start from the model before it."
        )


def technique_module(technique: str) -> Any:
    """Return the module of a technique; that of a mixture builds on this package, and is found by its name.

    Raises:
        ValueError: There is no such technique.
    """
    name = _MIXTURES.get(technique, f"zoo.ffn.{technique}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"This version of zoo has no technique {technique!r}; a newer one made the file.") from error


def rebuild(model: nn.Module, changes: Iterable[Mapping[str, Any]]) -> None:
    """Give a fresh dense model the structure that techniques made, in place and in their order; weights come after.

    Args:
        model: As it was before the first change.
        changes: `ffn_changes` of the changed model.

    Raises:
        ValueError: A technique is unknown, or a layer is missing.
    """
    for change in changes:
        technique = str(change["technique"])
        module = technique_module(technique)
        if "layers" not in change:  # a mixture, which notes itself
            module.restructure(model, {key: value for key, value in change.items() if key != "technique"})
            continue
        names = {name for name, _ in model.named_modules()}
        missing = [name for name in change["layers"] if name not in names]
        if missing:
            raise ValueError(f"The changed model has a layer {missing[0]!r} that {type(model).__name__} lacks.")
        module.restructure(model, change["layers"])
        note_change(model, technique, change["layers"])
