"""A mixture of experts against the masked loop over its experts and against the dense layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor

from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.timing import Progress, Settings, compare, environment, require_close, torch_threads
from zoo.ffn.dense_ffn import read_ffn
from zoo.moe.experts import MoEFFN, sorted_experts

__all__ = ["masked_loop", "moe"]

_DENSE, _WHOLE = "dense layer", "1S12E2A, whole layer"
_SORTED, _LOOP = "its routed experts, sorted", "its routed experts, masked loop"


def masked_loop(layer: MoEFFN, x: Tensor) -> Tensor:
    """Compute the routed experts as they are first written down: each for every token, times its weight or zero.

    Args:
        layer: Its weights are used.
        x: (T, D).

    Returns:
        (T, O).
    """
    weights, index, _ = layer.router(x, layer.top_k)
    out = x.new_zeros(len(x), layer.out_dim)
    for number in range(layer.experts):
        weight = torch.where(index == number, weights, 0).sum(1, keepdim=True)
        out = out + weight.to(out.dtype) * F.linear(layer.expert(number, x), layer.experts_down[number])
    return out


def _sorted(layer: MoEFFN, x: Tensor) -> Tensor:
    weights, index, _ = layer.router(x, layer.top_k)
    return sorted_experts(layer, x, weights.to(x.dtype), index, x.new_zeros(len(x), layer.out_dim))


def moe(settings: Settings, progress: Progress | None = None, *, tokens: int = 4096, dim: int = 384) -> list[Benchmark]:
    """1S12E2A at 4096 tokens of width 384.

    Wanted: routed experts 3 times as fast as the masked loop over all 12, and the whole layer 0.8 of the ideal, the
    dense layer's time x the activated share.
    """
    torch.manual_seed(0)
    dense = Mlp(dim, 4 * dim, act_layer=GELUTanh).eval().requires_grad_(False)
    ffn = read_ffn(dense)
    assert ffn is not None
    layer = MoEFFN.from_dense(ffn, shared_dim=dim, experts=12, top_k=2).eval().requires_grad_(False)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(tokens * settings.batch, dim)
    with torch_threads(settings.threads), torch.inference_mode():
        check = require_close("sorted experts and masked loop", _sorted(layer, x), masked_loop(layer, x), 1e-4)
        dense.to(settings.device, settings.torch_dtype)
        layer.to(settings.device, settings.torch_dtype)
        x = x.to(settings.device, settings.torch_dtype)
        calls = {
            _WHOLE: lambda: layer(x),
            _DENSE: lambda: dense(x),
            _SORTED: lambda: _sorted(layer, x),
            _LOOP: lambda: masked_loop(layer, x),
        }
        timed = compare(calls, settings, reference=_DENSE, progress=progress)
    medians = {key: time.median for key, (time, _) in timed.items()}
    share = (layer.shared_dim + layer.top_k * layer.expert_dim) / ffn.hidden_dim
    ideal = share * medians[_DENSE] / medians[_WHOLE]
    return [
        Benchmark(
            name="moe",
            title="A feed-forward layer as a mixture of experts, inference",
            conditions=settings.conditions(tokens=len(x), channels=dim, hidden=ffn.hidden_dim),
            environment=environment(settings.device),
            reference=_DENSE,
            entries=tuple(Entry.of(name, times) for name, times in timed.items()),
            checks=(check,),
            goals=(
                Goal(
                    what="routed experts, sorted against the masked loop, times as fast",
                    value=medians[_LOOP] / medians[_SORTED],
                    wanted=3.0,
                ),
                Goal(
                    what=f"share of the ideal, {100 * share:.1f} % of the dense layer's time", value=ideal, wanted=0.8
                ),
            ),
            notes=("Random weights and routes: tokens spread over the experts nearly evenly.",),
        )
    ]
