"""The named benchmarks of `zoo bench`: what each compares, and the number it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from zoo.bench.backbones import backbones
from zoo.bench.caching import caching
from zoo.bench.engines import engines
from zoo.bench.ffn import ffn
from zoo.bench.kernels import kernels
from zoo.bench.models import compare_models
from zoo.bench.moe import moe
from zoo.bench.plain_backbones import PlainRePaFFN
from zoo.bench.plain_restorers import plain_cfsr_block
from zoo.bench.policy import policy
from zoo.bench.report import Benchmark, Check, Entry, Goal
from zoo.bench.restorers import restorers
from zoo.bench.tiling import tiling
from zoo.bench.timing import Progress, Settings, compare, environment, require_close, torch_threads
from zoo.layers.ffn import RePaFFN, active_channels
from zoo.profiling import count_params
from zoo.restoration.cfsr import CFSR, checkpoint_filter_fn
from zoo.weights import load_strict

__all__ = ["SUITES", "Suite", "cfsr", "repaffn", "repavit", "run"]


def repavit(
    settings: Settings,
    progress: Progress | None = None,
    *,
    model: str = "repavit_large",
    rival: str = "vit_large_patch16_224",
) -> list[Benchmark]:
    """Merged RePaViT-Large (idle ratio 0.75) against timm's ViT-Large; wanted: 1.64 times as fast."""
    return [
        compare_models(
            (model, rival),
            settings,
            memory=True,
            goal=1.64,
            name="repavit",
            title=f"Merged {model} against timm's {rival}, inference",
            progress=progress,
        )
    ]


_FFN_SIZES = {"large": (1024, 0.75), "base": (768, 0.75), "small": (384, 0.5)}
_TOKENS = 197  # 14 x 14 patches and the class token


def repaffn(
    settings: Settings, progress: Progress | None = None, *, sizes: dict[str, tuple[int, float]] | None = None
) -> list[Benchmark]:
    """RePa FFN in training form, forward and backward, against the mask formulation; wanted: 1.3 times as fast."""
    with torch_threads(settings.threads):
        return [_repaffn(name, *size, settings, progress) for name, size in (sizes or _FFN_SIZES).items()]


def _repaffn(name: str, dim: int, idle_ratio: float, settings: Settings, progress: Progress | None) -> Benchmark:
    torch.manual_seed(0)
    hidden = 4 * dim
    ours = RePaFFN(dim, hidden, active_channels(hidden, idle_ratio))
    plain = PlainRePaFFN(ours)
    start = torch.randn(settings.batch, _TOKENS, dim)
    checks = _same_gradients(ours, plain, start)
    layers: dict[str, nn.Module] = {"RePaFFN": ours, "mask formulation": plain}
    leaf = start.to(settings.device, settings.torch_dtype).requires_grad_()
    for layer in layers.values():
        layer.to(settings.device, settings.torch_dtype)
    saved = {label: _saved_bytes(layer, leaf) for label, layer in layers.items()}

    def step(layer: nn.Module) -> Callable[[], None]:
        def forward_and_backward() -> None:
            layer.zero_grad()
            leaf.grad = None
            layer(leaf).sum().backward()

        return forward_and_backward

    timed = compare(
        {label: step(layer) for label, layer in layers.items()},
        settings,
        reference="mask formulation",
        progress=progress,
    )
    entries = tuple(
        Entry.of(
            label,
            timed[label],
            params=count_params(layer),
            values={"kept for backward (MiB)": saved[label] / 2**20},
        )
        for label, layer in layers.items()
    )
    ratio = entries[0].speedup
    assert ratio is not None
    return Benchmark(
        name=f"repaffn_{name}",
        title=f"RePa FFN of RePaViT-{name.capitalize()}, training form, forward and backward",
        conditions=settings.conditions(tokens=_TOKENS, channels=dim, hidden=hidden, idle=idle_ratio),
        environment=environment(settings.device),
        reference="mask formulation",
        entries=entries,
        checks=checks,
        goals=(Goal(what="RePaFFN against the mask formulation, times as fast", value=ratio.median, wanted=1.3),),
    )


def _same_gradients(ours: RePaFFN, plain: PlainRePaFFN, start: Tensor) -> tuple[Check, ...]:
    """Compare outputs and gradients of both forms in training mode, in float32."""
    found = []
    for layer in (ours, plain):
        x = start.clone().requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), x.grad))
    first: list[Any] = [fc1.weight.grad for fc1 in (ours.active_fc1, ours.idle_fc1) if fc1 is not None]
    pairs = {
        "outputs in training mode": (found[0][0], found[1][0]),
        "gradients of the input": (found[0][1], found[1][1]),
        "gradients of the first weight": (torch.cat(first), plain.fc1.weight.grad),
    }
    return tuple(require_close(what, *pair) for what, pair in pairs.items())


def _saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)  # alive until the end, so that no address is used twice
    del out
    return sum(kept.values())


def cfsr(settings: Settings, progress: Progress | None = None, *, size: int = 256, **arguments: Any) -> list[Benchmark]:
    """Merged CFSR x2 against the plain formulation with the same weights; wanted: 1.15 times as fast.

    The rival is the merged form that the authors publish: channels-first, the norm written out.
    """
    torch.manual_seed(0)
    source = CFSR(scale=2, layer_scale_init=1.0, **arguments).eval()
    for key, value in source.state_dict().items():
        if "edge_" in key and "masks" not in key:  # edge branches that count
            value.normal_(std=0.1)
    plain = CFSR(scale=2, edge_branches=False, **arguments).eval().requires_grad_(False)
    load_strict(plain, source.state_dict(), checkpoint_filter_fn)
    ours = source.requires_grad_(False)
    ours.reparameterize()
    x = torch.rand(settings.batch, 3, size, size)
    with torch_threads(settings.threads), torch.inference_mode():
        check = require_close("upscaled image", ours(x), _plain_cfsr(plain, x))
        for model in (ours, plain):
            model.to(settings.device, settings.torch_dtype)
        x = x.to(settings.device, settings.torch_dtype)
        timed = compare(
            {"CFSR x2 (merged)": lambda: ours(x), "plain formulation": lambda: _plain_cfsr(plain, x)},
            settings,
            reference="plain formulation",
            progress=progress,
        )
    entries = tuple(
        Entry.of(name, timed[name], params=count_params(model))
        for name, model in (("CFSR x2 (merged)", ours), ("plain formulation", plain))
    )
    ratio = entries[0].speedup
    assert ratio is not None
    return [
        Benchmark(
            name="cfsr",
            title="Merged CFSR x2 against the plain formulation (channels first, LayerNorm written out)",
            conditions=settings.conditions(input=f"3x{size}x{size}", output=f"3x{2 * size}x{2 * size}"),
            environment=environment(settings.device),
            reference="plain formulation",
            entries=entries,
            checks=(check,),
            goals=(
                Goal(what="merged CFSR against the plain formulation, times as fast", value=ratio.median, wanted=1.15),
            ),
            notes=("The plain formulation has its edge filters merged too, as the authors publish it.",),
        )
    ]


def _plain_cfsr(model: CFSR, x: Tensor) -> Tensor:
    """Run a CFSR whose blocks are the plain ones."""
    shallow = deep = model.conv_first(x - model.mean)
    stages: Any = model.layers
    for stage in stages:
        for block in stage.blocks:
            deep = plain_cfsr_block(block, deep)
        deep = deep + F.conv2d(deep, stage.conv.weight[:, :, None, None], stage.conv.bias)
    normed = model.norm(deep.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
    return model.shuffle(model.upsample(model.conv_after_body(normed) + shallow)) + model.mean


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named benchmark.

    Args:
        run: Called with settings and a progress report, and the options of its own that are given.
        settings: The conditions under which its number has to be reached.
    """

    run: Callable[..., list[Benchmark]]
    settings: Settings = field(default_factory=Settings)


SUITES = {
    "repavit": Suite(run=repavit),
    "repaffn": Suite(run=repaffn),
    "engines": Suite(run=engines, settings=Settings(batch=1, threads=1, rounds=3, warmup=1)),
    "backbones": Suite(run=backbones),
    "cfsr": Suite(run=cfsr, settings=Settings(batch=1)),
    "tiling": Suite(run=tiling, settings=Settings(batch=1, rounds=1, warmup=0)),
    "restorers": Suite(run=restorers, settings=Settings(batch=1, rounds=3, warmup=0)),
    "caching": Suite(run=caching, settings=Settings(batch=20, rounds=3, warmup=1)),
    "moe": Suite(run=moe, settings=Settings(batch=1)),
    "ffn": Suite(run=ffn, settings=Settings(batch=64, threads=1, rounds=7, warmup=1)),
    "kernels": Suite(run=kernels, settings=Settings(batch=4, rounds=5)),
    "policy": Suite(run=policy, settings=Settings(batch=1, threads=1, rounds=7, warmup=1)),
}
"""The benchmarks that `zoo bench NAME` knows."""


def run(
    names: Sequence[str],
    progress: Progress | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **overrides: Any,
) -> list[Benchmark]:
    """Run named benchmarks, each under its own conditions.

    Args:
        names: Keys of `SUITES`.
        progress: Told after each step.
        options: Arguments of a benchmark's own function, by its name.
        **overrides: Fields of `Settings` that replace a benchmark's own.
    """
    found = []
    for name in names:
        suite = SUITES[name]
        found += suite.run(replace(suite.settings, **overrides), progress, **(options or {}).get(name, {}))
    return found
