"""Merge what training needs and inference does not: norms, linear branches, residuals, scales; exactly and in place.

A layer takes part by having a method `reparameterize()` that rewrites it in place, is idempotent, and refuses training
mode (`Reparameterizable`). It may return what it folded, in words, and may have `example_input()`, a random input on
which its work and its output can be compared before and after. zoo's own layers and timm's both fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.profiling import count_params
from zoo.record import note_merged
from zoo.text import table_lines

__all__ = ["LayerReport", "ReparamReport", "Reparameterizable", "reparameterize"]


_MOST_ROWS = 30  # RePaViT-Large has 24 layers, a convolutional network a hundred


class Reparameterizable(Protocol):
    """A module that can turn itself into an equal, cheaper one for inference."""

    def reparameterize(self) -> Iterable[str] | None:
        """Rewrite the module in place; once it is done, do nothing.

        Returns:
            What was folded, in words, or None if the module does not say.

        Raises:
            RuntimeError: The module is in training mode.
        """


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What was done to one layer.

    Args:
        name: Where it is in the model; "" is the model itself.
        folded: What was folded, in words.
        params_before: Parameters of the layer before.
        params_after: Parameters of the layer after.
        macs_before: Multiply-accumulates of matrix products and convolutions before, for one input of `input_shape`;
            None if the layer could not be run.
        macs_after: The same after.
        input_shape: Shape of the input that the layer was run on.
        difference: Largest absolute change of the output over the largest absolute output, in the layer's own type;
            None if it could not be measured.
    """

    name: str
    folded: tuple[str, ...]
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    input_shape: tuple[int, ...] | None = None
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReparamReport:
    """What `reparameterize` did; `print` shows it as a table.

    Args:
        layers: The layers that changed, in the model's order.
        unchanged: Names of layers that had nothing to fold (done before, or a norm that cannot be folded).
        params_before: Parameters of the whole model before.
        params_after: Parameters of the whole model after.
    """

    layers: tuple[LayerReport, ...] = ()
    unchanged: tuple[str, ...] = field(default=())
    params_before: int
    params_after: int

    @property
    def macs_before(self) -> int | None:
        """Multiply-accumulates of the changed layers before; None unless every one was run."""
        return _sum(layer.macs_before for layer in self.layers)

    @property
    def macs_after(self) -> int | None:
        """Multiply-accumulates of the changed layers after; None unless every one was run."""
        return _sum(layer.macs_after for layer in self.layers)

    @property
    def difference(self) -> float | None:
        """Largest relative change of a layer's output; None if none was measured."""
        return max((layer.difference for layer in self.layers if layer.difference is not None), default=None)

    def __str__(self) -> str:
        total = f"{_count(self.params_before)} -> {_count(self.params_after)}"
        if not self.layers:
            return f"Nothing to re-parameterise: {len(self.unchanged)} layers unchanged, {total} parameters."
        rows = [("layer", "folded", "parameters", "MACs", "on input", "difference")]
        for group in self._groups():
            shapes = {layer.input_shape for layer in group}
            shape = group[0].input_shape if len(shapes) == 1 else None
            before, after = (sum(layer.params_before for layer in group), sum(layer.params_after for layer in group))
            worst = max((layer.difference for layer in group if layer.difference is not None), default=None)
            first = group[0].name or "(model)"
            rows.append(
                (
                    first if len(group) == 1 else f"{first} and {len(group) - 1} more",
                    ", ".join(group[0].folded) or "-",
                    f"{_count(before)} -> {_count(after)}",
                    _change(_sum(layer.macs_before for layer in group), _sum(layer.macs_after for layer in group)),
                    "x".join(map(str, shape)) if shape else "-",
                    "-" if worst is None else f"{worst:.1e}",
                )
            )
        largest = "-" if self.difference is None else f"{self.difference:.1e}"
        macs = _change(self.macs_before, self.macs_after)
        rows.append(("whole model", f"{len(self.layers)} layers", total, macs, "", largest))
        lines = table_lines(rows)
        rule = "-" * max(map(len, lines))
        text = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.unchanged:
            text.append(f"unchanged: {', '.join(self.unchanged)}")
        return "\n".join(text)

    def _groups(self) -> list[list[LayerReport]]:
        """Return the rows of the table: each layer, or in a long table the layers of which the same was folded."""
        if len(self.layers) <= _MOST_ROWS:
            return [[layer] for layer in self.layers]
        groups: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(layer.folded, []).append(layer)
        return list(groups.values())


def _sum(values: Iterable[int | None]) -> int | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if known and len(known) == len(listed) else None


def _change(before: int | None, after: int | None) -> str:
    return "-" if before is None or after is None else f"{_count(before)} -> {_count(after)}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def reparameterize(model: nn.Module, *, sample: Any = None, measure: bool = True) -> ReparamReport:
    """Re-parameterise every layer of a model that knows how, in place and exactly.

    The model may be a network, a part of one, or anything that holds one (a feature extractor, a LightningModule).
    Inner layers come before the modules around them. Calling it again changes nothing. Parameters are replaced, so an
    optimizer that holds the old ones must be built anew.

    Args:
        model: In evaluation mode.
        sample: An input of `model`: it is run once, and each layer is measured on what it receives there. Without it,
            layers are measured on random inputs of their own, as far as they have `example_input()`.
        measure: Run each layer before and after to count its work and to compare its outputs. Layers on the meta
            device are counted, but have no outputs to compare.

    Returns:
        What was folded, parameters and multiply-accumulates before and after, and the largest output difference.

    Raises:
        RuntimeError: The model is in training mode, where merged and unmerged layers are not equal.
    """
    made_there = any(parameter.is_inference() for parameter in model.parameters())
    with torch.inference_mode(made_there):  # an inference tensor could not be trained later
        return _reparameterize(model, sample, measure)


def _reparameterize(model: nn.Module, sample: Any, measure: bool) -> ReparamReport:
    names = {module: name for name, module in model.named_modules()}
    targets = [module for module in names if callable(getattr(module, "reparameterize", None))]
    if model.training or any(module.training for module in targets):
        raise RuntimeError(
            f"{type(model).__name__} is in training mode, where its norms depend on the batch: call model.eval() first."
        )
    params_before = count_params(model)
    inputs = _record_inputs(model, targets, sample) if measure and sample is not None else {}
    reports: dict[nn.Module, LayerReport] = {}
    unchanged: list[nn.Module] = []
    for module in sorted(targets, key=lambda target: -names[target].count(".") if names[target] else 1):
        x = inputs.get(module)
        if x is None and measure:
            x = _example_input(module)
        report = _reparameterize_layer(module, names[module], x)
        if report is not None:
            reports[module] = report
        elif not any(other is not module and other in reports for other in module.modules()):
            unchanged.append(module)
    if reports:
        for module in names:
            note_merged(module)
    return ReparamReport(
        layers=tuple(reports[module] for module in names if module in reports),
        unchanged=tuple(names[module] or "(model)" for module in names if module in unchanged),
        params_before=params_before,
        params_after=count_params(model),
    )


def _example_input(module: nn.Module) -> Tensor | None:
    """Return a layer's own random input, if it has one, and leave the state of the random generators as it is."""
    make = getattr(module, "example_input", None)
    if not callable(make):
        return None
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        return cast(Tensor, make())


def _reparameterize_layer(module: nn.Module, name: str, x: Tensor | None) -> LayerReport | None:
    """Call one layer's method and compare before with after; None if nothing changed."""
    params, before = count_params(module), {key: value.shape for key, value in module.state_dict().items()}
    out, macs = _run(module, x)
    said = cast(Reparameterizable, module).reparameterize()
    after = {key: value.shape for key, value in module.state_dict().items()}
    if not (before != after if said is None else said):
        return None
    if said is None:  # name what is gone
        said = sorted({key.rpartition(".")[0] or key for key in before.keys() - after.keys()})
    new_out, new_macs = _run(module, x)
    return LayerReport(
        name=name,
        folded=tuple(said),
        params_before=params,
        params_after=count_params(module),
        macs_before=macs,
        macs_after=new_macs,
        input_shape=None if x is None else tuple(x.shape),
        difference=_difference(out, new_out),
    )


@torch.no_grad()
def _record_inputs(model: nn.Module, layers: list[nn.Module], sample: Any) -> dict[nn.Module, Tensor]:
    """Run the model once and keep the first tensor that each layer receives."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.setdefault(module, args[0].clone())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(keep).remove)
        model(sample)
    return inputs


@torch.no_grad()
def _run(module: nn.Module, x: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Return a layer's output, if it is one tensor, and its multiply-accumulates."""
    if x is None:
        return None, None
    with FlopCounterMode(display=False) as counter:
        out = module(x)
    return (out if isinstance(out, Tensor) else None), counter.get_total_flops() // 2


def _difference(before: Tensor | None, after: Tensor | None) -> float | None:
    if before is None or after is None or before.is_meta:
        return None
    scale = before.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
    return float((after.double() - before.double()).abs().max() / scale)
