"""Layers that are linear in their output matrix, fitted to trained ones by ridge regression over streamed data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import (
    FFNReport,
    at_least_float32,
    evaluating,
    ffn_layers,
    listed,
    output_error,
    outputs_of,
    refuse_twice,
    replace_layers,
    with_diagonal,
)

__all__ = ["RidgeSums", "fit_layers"]


class RidgeSums:
    """Sums over rows from which y = W f + b is fitted: features f (F), targets y (O)."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows (T, F) and (T, O)."""
        f, y = at_least_float32(features), at_least_float32(targets)
        self.count += len(f)
        for name, value in (("f", f.sum(0)), ("y", y.sum(0)), ("ff", f.t() @ f), ("fy", f.t() @ y)):
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return W (O, F) and b (O,) in float64; `ridge` is relative to the mean diagonal of the covariance."""
        f, y = self.sums["f"] / self.count, self.sums["y"] / self.count
        normal = self.sums["ff"] / self.count - torch.outer(f, f)
        mixed = self.sums["fy"] / self.count - torch.outer(f, y)
        if not len(normal):
            return mixed.t(), y
        amount = ridge * normal.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(with_diagonal(normal, amount), mixed).t()
        return weight, y - weight @ f


def fit_layers(
    model: nn.Module,
    technique: str,
    pattern: str | None,
    build: Callable[[DenseFFN], Any],
    features: Callable[[Any, Tensor], Tensor],
    data: Iterable[Any] | None,
    ridge: float,
    facts: Mapping[str, Any],
    *,
    what: str,
) -> FFNReport:
    """Replace feed-forward layers by layers with an `output` product that is fitted to what the dense ones give.

    Args:
        model: Changed in place.
        technique: Its module in `zoo.ffn`.
        pattern: Only layers whose name matches this regular expression.
        build: Makes the new layer; it has `output`, an `nn.Linear`, and `macs`.
        features: Returns the input of `output` for rows (T, C).
        data: Batches.
        ridge: See `RidgeSums.solve`.
        facts: Plain arguments that `restructure` needs.
        what: Was done, in words.

    Raises:
        ValueError: A layer cannot be replaced, data is missing, or it was done before.
    """
    refuse_twice(model, technique)
    batches = listed(data, "Fitting layers")
    ffns = ffn_layers(model, pattern)
    layers = {name: build(ffn).to(ffn.up.weight) for name, ffn in ffns.items() if not ffn.first_column}
    sums = {name: RidgeSums() for name in layers}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():

            def see(module: nn.Module, args: Any, output: Tensor, name: str = name, layer: Any = layer) -> None:
                rows = args[0].detach().flatten(0, -2)
                sums[name].add(features(layer, rows), output.detach().flatten(0, -2))

            stack.callback(model.get_submodule(name).register_forward_hook(see).remove)
        outputs = outputs_of(model, batches)
    for name, layer in layers.items():
        if not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters()):
            layer.requires_grad_(False)  # what was frozen stays so
        weight, bias = sums[name].solve(ridge)
        with torch.no_grad():
            layer.output.weight.copy_(weight)
            layer.output.bias.copy_(bias)
    made = iter(layers.values())
    report = replace_layers(model, technique, pattern, lambda ffn, _: next(made), facts, what)
    return FFNReport(
        technique=technique,
        layers=report.layers,
        params=report.params,
        error=output_error(model, batches, outputs),
    )
