"""Eigenvalue spectra of hidden activations before and after the activation function: NerVE.

NerVE (ICLR 2026), https://arxiv.org/abs/2603.06922. Spectra are those of the unbiased covariance over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import Moments, evaluating, ffn_layers, listed, outputs_of

__all__ = ["LayerSpectra", "Spectrum", "eigenvalues", "jensen_shannon", "spectrum", "statistics"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Spectral statistics of one side of an activation.

    Args:
        entropy: Spectral entropy, 0 (one direction) ... ln D (all alike).
        participation: Participation ratio, 1 ... D: the effective number of dimensions.
        early_enrichment: Eigenvalue early enrichment, 0 (flat) to below 1 (top-heavy).
        dims: D, or the number of tokens less one where that is smaller.
    """

    entropy: float
    participation: float
    early_enrichment: float
    dims: int


@dataclass(frozen=True, kw_only=True)
class LayerSpectra:
    """Spectra of one layer.

    Args:
        before: The activation function.
        after: The activation function.
        divergence: Jensen-Shannon divergence of the two spectra, 0 ... ln 2.
    """

    before: Spectrum
    after: Spectrum
    divergence: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)


def eigenvalues(covariance: Tensor) -> Tensor:
    """Return a covariance's eigenvalues (D,), the largest first, none below 1e-12."""
    return torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(1e-12)


def statistics(values: Tensor, dims: int | None = None) -> Spectrum:
    """Return the statistics of eigenvalues (D,), the largest first.

    Args:
        values: Eigenvalues.
        dims: Of the space they could fill; None is their number.
    """
    dims = len(values) if dims is None else dims
    values = values[:dims]
    shares = values / values.sum()
    cumulative = shares.cumsum(0) - torch.arange(1, dims + 1, dtype=values.dtype, device=values.device) / dims
    return Spectrum(
        entropy=float(-(shares * shares.log()).sum()),
        participation=float(values.sum().square() / values.square().sum()),
        early_enrichment=float(2 / dims * cumulative.sum()),
        dims=dims,
    )


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Return the divergence of two spectra (D,), each scaled to a sum of 1; in nats."""
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def divergence(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / middle).log(), torch.zeros_like(a)).sum()

    return float(divergence(p) / 2 + divergence(q) / 2)


def spectrum(
    model: nn.Module, data: Iterable[Any], *, pattern: str | None = None, at_once: int = 4
) -> dict[str, LayerSpectra]:
    """Measure the spectra of a model's feed-forward layers.

    Args:
        model: Of timm, diffusers or zoo.
        data: Batches of inputs, or of (inputs, labels); best more tokens than hidden channels.
        pattern: Only layers whose name matches this regular expression.
        at_once: Layers whose moments, two D x D matrices each, are held at a time; the data are run once for each.

    Returns:
        Spectra by layer. In a gated layer "before" is the gate.

    Raises:
        ValueError: There are no data, or no layer is known.
    """
    ffns = ffn_layers(model, pattern, "any")
    batches = listed(data, "A spectrum")
    found: dict[str, LayerSpectra] = {}
    names = list(ffns)
    for start in range(0, len(names), at_once):
        part = {name: ffns[name] for name in names[start : start + at_once]}
        before, after = ({name: Moments() for name in part} for _ in range(2))
        with evaluating(model), _watch(part, before, after):
            for batch in batches:
                outputs_of(model, [batch])
        for name in part:
            sides = [_spectrum(moments) for moments in (before[name], after[name])]
            dims = min(dims for _, dims in sides)
            found[name] = LayerSpectra(
                before=statistics(*sides[0]),
                after=statistics(*sides[1]),
                divergence=jensen_shannon(sides[0][0][:dims], sides[1][0][:dims]),
            )
    return found


def _spectrum(moments: Moments) -> tuple[Tensor, int]:
    unbiased = moments.covariance * (moments.count / max(moments.count - 1, 1))
    values = eigenvalues(unbiased)
    return values, min(len(values), max(moments.count - 1, 1))


def _watch(ffns: Mapping[str, DenseFFN], before: Mapping[str, Moments], after: Mapping[str, Moments]) -> ExitStack:
    stack = ExitStack()
    for name, ffn in ffns.items():

        def see_up(module: nn.Module, args: Any, output: Tensor, name: str = name, ffn: DenseFFN = ffn) -> None:
            rows = ffn.rows(output.detach())
            if ffn.packed is not None:
                rows = rows.chunk(2, -1)[1 if ffn.packed == "value first" else 0]
            before[name].add(rows)

        def see_down(module: nn.Module, args: Any, name: str = name, ffn: DenseFFN = ffn) -> None:
            after[name].add(ffn.rows(args[0].detach())[:, ffn.first_column :])

        product = ffn.up if ffn.gate is None else ffn.gate
        stack.callback(product.register_forward_hook(see_up).remove)
        stack.callback(ffn.down.register_forward_pre_hook(see_down).remove)
    return stack
