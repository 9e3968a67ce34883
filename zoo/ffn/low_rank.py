"""Low rank: each product of a feed-forward layer becomes two thin ones, by an SVD that knows the data.

The SVD is of W S^(1/2), where S is the second moment of the product's input, so that the error on the data is least
(the idea of ASVD, https://arxiv.org/abs/2312.05821, and of FlashSVD; the whitening is the closed form, derived by us).
Plain SVD is `whiten=False`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN
from zoo.ffn.technique import (
    ERROR_SAMPLES,
    Changes,
    FFNReport,
    Moments,
    evaluating,
    ffn_layers,
    forget_change,
    listed,
    output_error,
    outputs_of,
    replace_kind,
    replace_module,
    require_seen,
    thinned,
    watch_inputs,
)
from zoo.profiling import count_params

__all__ = ["LowRankConfig", "LowRankLinear", "apply", "restructure", "to_dense"]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """How thin the products become.

    Args:
        keep: Share of each product's multiply-accumulates that stays, above 0 and below 1.
        whiten: Weigh directions by the data; otherwise the plain SVD.
        round_to: Ranks are multiples of this.
        pattern: Only layers whose name matches this regular expression.

    Raises:
        ValueError: `keep` or `round_to` is out of range.
    """

    keep: float = 0.5
    whiten: bool = True
    round_to: int = 8
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is the share of the products that stays, above 0 and below 1, got {self.keep}.")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}.")

    def rank(self, inputs: int, outputs: int) -> int:
        """Return the rank of a product (outputs, inputs)."""
        wanted = self.keep * inputs * outputs / (inputs + outputs)
        return min(min(inputs, outputs), max(self.round_to, int(wanted / self.round_to) * self.round_to))


class LowRankLinear(nn.Module):
    """y = outward(inward(x)): a product of rank r.

    Args:
        inputs: Channels of x.
        rank: Channels between.
        outputs: Channels of y.
        bias: Add one.
        device: Of the parameters.
        dtype: Of the parameters.

    Shape:
        (..., inputs) -> (..., outputs).
    """

    def __init__(
        self,
        inputs: int,
        rank: int,
        outputs: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.rank, self.out_features = inputs, rank, outputs
        self.inward = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.outward = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.inward(x))

    @classmethod
    def like(cls, dense: nn.Linear, rank: int) -> LowRankLinear:
        """Return a product of rank r with new weights, in the place of a dense one."""
        kind = dense.weight
        bias = dense.bias is not None
        layer = cls(dense.in_features, rank, dense.out_features, bias, device=kind.device, dtype=kind.dtype)
        layer.inward.weight.requires_grad_(kind.requires_grad)  # what was frozen stays so
        layer.outward.weight.requires_grad_(kind.requires_grad)
        if bias:
            layer.outward.bias.requires_grad_(dense.bias.requires_grad)
        return layer

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense: nn.Linear, rank: int, second_moment: Tensor | None = None) -> LowRankLinear:
        """Return the product of rank r nearest to a dense one.

        Args:
            dense: The product.
            rank: r.
            second_moment: (C, C) of the inputs: nearest on them; None: nearest in the weights.
        """
        weight = dense.weight.detach().double()
        root = inverse = torch.eye(dense.in_features, dtype=weight.dtype, device=weight.device)
        if second_moment is not None:
            values, vectors = torch.linalg.eigh(second_moment.to(weight))
            values = values.clamp_min(1e-8 * float(values.max()))
            root, inverse = vectors * values.sqrt(), (vectors / values.sqrt()).t()
        left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
        split = singular[:rank].sqrt()
        layer = cls.like(dense, rank)
        layer.outward.weight.copy_(left[:, :rank] * split)
        layer.inward.weight.copy_((split[:, None] * right[:rank]) @ inverse)
        if dense.bias is not None:
            layer.outward.bias.copy_(dense.bias)
        return layer

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return one product with the same result."""
        kept = self.outward.weight
        dense = nn.Linear(
            self.in_features, self.out_features, self.outward.bias is not None, device=kept.device, dtype=kept.dtype
        )
        dense.weight.copy_(kept.double() @ self.inward.weight.double()).requires_grad_(kept.requires_grad)
        if self.outward.bias is not None:
            dense.bias.copy_(self.outward.bias).requires_grad_(self.outward.bias.requires_grad)
        return dense

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def apply(model: nn.Module, config: LowRankConfig | None = None, data: Iterable[Any] | None = None) -> FFNReport:
    """Make the products of a model's feed-forward layers thin, in place.

    Args:
        model: Trained, of timm or diffusers.
        config: How.
        data: Batches of inputs, or of (inputs, labels); not needed for the plain SVD.

    Raises:
        ValueError: No layer is known, data is missing, or the model is thin already.
    """
    config = config or LowRankConfig()
    changes = Changes(model, "low_rank")
    ffns = ffn_layers(model, config.pattern, "linear")
    batches = listed(data, "Low rank by activations", needed=config.whiten)
    names = {id(module): name for name, module in model.named_modules()}
    products = {names[id(part)]: part for ffn in ffns.values() for part in _products(ffn)}
    moments = {name: Moments() for name in products}
    outputs: list[Tensor] = []
    if batches:

        def see(name: str, rows: Tensor) -> None:
            moments[name].add(thinned(rows, rows.shape[-1], len(batches)))

        with evaluating(model), watch_inputs(products, see):
            outputs = outputs_of(model, batches)
        if config.whiten:
            require_seen(moments)
    ranks = {}
    for layer, ffn in ffns.items():
        params, macs = ffn.num_parameters, ffn.macs()
        after_params = after_macs = 0
        for part in _products(ffn):
            name = names[id(part)]
            rank = config.rank(part.in_features, part.out_features)
            whitened = config.whiten and moments[name].count > 0
            thin = LowRankLinear.from_dense(part, rank, moments[name].second_moment if whitened else None)
            replace_module(model, name, thin)
            ranks[name] = rank
            after_macs += thin.macs
            after_params += count_params(thin)
        what = "rank " + ", ".join(str(ranks[names[id(part)]]) for part in _products(ffn))
        params += ffn.out_dim if ffn.down.bias is not None else 0
        changes.add(layer, what, (params, after_params), (macs, after_macs))
    return changes.report(ranks, output_error(model, batches, outputs, ERROR_SAMPLES) if batches else None)


def _products(ffn: DenseFFN) -> list[nn.Linear]:
    if ffn.first_column:
        raise ValueError("Flux's single blocks share a product with attention: low rank is for layers of their own.")
    return ffn.products


def restructure(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Give a dense model thin products of these ranks; weights are loaded after."""
    for name, rank in layers.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        replace_module(model, name, LowRankLinear.like(dense, rank))


def to_dense(model: nn.Module) -> list[str]:
    """Turn thin products back into single ones with the same result, in place, and return their names."""
    found = replace_kind(model, LowRankLinear, LowRankLinear.to_dense)
    forget_change(model, "low_rank")
    return found
