"""Which feed-forward layer costs most and can lose most: cost, effect and spectra of every layer, with a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.depth import Nothing
from zoo.ffn.spectrum import LayerSpectra, spectrum
from zoo.ffn.technique import (
    Moments,
    evaluating,
    ffn_layers,
    listed,
    output_error,
    outputs_of,
    replace_module,
    watch_inputs,
)
from zoo.figures import new_figure
from zoo.profiling import count_params

__all__ = ["Inspection", "LayerFacts", "inspect_ffns", "plot_inspection"]


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One feed-forward layer.

    Args:
        name: Of the module.
        dim: Channels of the input.
        hidden_dim: Hidden channels.
        macs: Multiply-accumulates for one token.
        share: Of the multiply-accumulates of all layers here.
        error: Norm of the change of the model's output over its norm when the layer is left out.
        channels_90: Share of the channels that holds 90 % of the output's energy, by activation and weight.
        sparsity: Share of hidden activations that are at most 1 % of their layer's root mean square.
        spectra: Before and after the activation; None where it was not asked for.
    """

    name: str
    dim: int
    hidden_dim: int
    macs: int
    share: float
    error: float
    channels_90: float
    sparsity: float
    spectra: LayerSpectra | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All feed-forward layers of a model; `print` shows a table.

    Args:
        layers: In the model's order.
        params: Of the whole model.
    """

    layers: tuple[LayerFacts, ...]
    params: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    def advice(self) -> str:
        """Say which layer can lose most for its cost."""
        best = min(self.layers, key=lambda layer: layer.error / max(layer.share, 1e-12))
        worst = max(self.layers, key=lambda layer: layer.error)
        return (
            f"{best.name} costs {100 * best.share:.0f} % of the feed-forward work and changes the output by "
            f"{100 * best.error:.1f} %: it can lose most. {worst.name} matters most ({100 * worst.error:.1f} %)."
        )


def inspect_ffns(
    model: nn.Module, data: Iterable[Any], *, pattern: str | None = None, spectra: bool = True
) -> Inspection:
    """Measure every feed-forward layer of a model on data.

    Args:
        model: Of timm, diffusers or zoo.
        data: Batches of inputs, or of (inputs, labels); a few dozen samples.
        pattern: Only layers whose name matches this regular expression.
        spectra: Measure the spectra too.

    Raises:
        ValueError: There are no data, or no layer is known.
    """
    ffns = ffn_layers(model, pattern, "any")
    batches = listed(data, "An inspection")
    hidden = {name: Moments(second=False) for name in ffns}
    small: dict[str, list[int]] = {name: [0, 0] for name in ffns}

    def see(name: str, rows: Tensor) -> None:
        values = rows[:, ffns[name].first_column :].float()
        hidden[name].add(values)
        small[name][0] += int((values.abs() <= 0.01 * values.square().mean().sqrt()).sum())
        small[name][1] += values.numel()

    with evaluating(model), watch_inputs({name: ffn.down for name, ffn in ffns.items()}, see):
        outputs = outputs_of(model, batches)
    measured = spectrum(model, batches, pattern=pattern) if spectra else {}
    total = sum(ffn.macs() for ffn in ffns.values())
    layers = []
    for name, ffn in ffns.items():
        energy = (hidden[name].rms * ffn.channels().down.double().norm(dim=0)).square().sort(descending=True).values
        enough = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
        layers.append(
            LayerFacts(
                name=name,
                dim=ffn.dim,
                hidden_dim=ffn.hidden_dim,
                macs=ffn.macs(),
                share=ffn.macs() / total,
                error=_error_without(model, name, ffn, batches, outputs),
                channels_90=enough / ffn.hidden_dim,
                sparsity=small[name][0] / max(small[name][1], 1),
                spectra=measured.get(name),
            )
        )
    return Inspection(layers=tuple(layers), params=count_params(model))


def _error_without(model: nn.Module, name: str, ffn: DenseFFN, batches: list[Any], outputs: list[Tensor]) -> float:
    module = model.get_submodule(name)
    if ffn.first_column:  # attention shares the second product: only the hidden channels are silenced
        undo = ffn.down.register_forward_pre_hook(lambda _, args: (_silenced(args[0], ffn.first_column),)).remove
    elif not ffn.whole or ffn.dim != ffn.out_dim:  # the module does more than this layer
        undo = ffn.down.register_forward_hook(lambda _, args, output: torch.zeros_like(output)).remove
    else:
        replace_module(model, name, Nothing())
        undo = partial(replace_module, model, name, module)
    try:
        return output_error(model, batches, outputs)
    finally:
        undo()


def _silenced(x: Tensor, first_column: int) -> Tensor:
    return torch.cat([x[..., :first_column], torch.zeros_like(x[..., first_column:])], -1)


def plot_inspection(inspection: Inspection, path: str | Path, title: str = "") -> None:
    """Draw cost and effect of every layer, and the effective dimensions before and after the activation.

    Args:
        inspection: What `inspect_ffns` returned.
        path: Picture file; its suffix says the format.
        title: Above the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = inspection.layers
    places = list(range(len(layers)))
    with_spectra = all(layer.spectra is not None for layer in layers)
    figure = new_figure(8, 5.6 if with_spectra else 3.2)
    axes = figure.subplots(2 if with_spectra else 1, 1, squeeze=False)[:, 0]
    first = axes[0]
    first.bar(places, [100 * layer.error for layer in layers], color="#3465a4")
    first.set_ylabel("change of output\nwithout it, %")
    second = first.twinx()
    second.plot(places, [100 * layer.share for layer in layers], color="#e07a1f", marker="o", markersize=3)
    second.set_ylabel("share of FFN work, %", color="#e07a1f")
    second.set_ylim(bottom=0)
    if with_spectra:
        for side, color in (("before", "#888888"), ("after", "#3a7d44")):
            values = [getattr(layer.spectra, side).participation for layer in layers]
            axes[1].plot(places, values, marker="o", markersize=3, color=color, label=f"{side} the activation")
        axes[1].set_ylabel("effective dimensions")
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xticks(places, [str(place) for place in places])
    axes[-1].set_xlabel("feed-forward layer")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
