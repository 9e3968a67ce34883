"""The named benchmarks of `zoo bench`: what each compares, and the number it has to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

from zoo.bench.caching import caching
from zoo.bench.models import compare_models
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.tiling import tiling
from zoo.bench.timing import Progress, Settings, compare, environment, now, require_close, torch_threads
from zoo.layers.ffn import PlainRePaFFN, RePaFFN, active_channels
from zoo.profiling import count_params
from zoo.restoration.cfsr import CFSR, plain_cfsr_block

__all__ = ["SUITES", "cfsr", "repaffn", "repavit", "run"]

Suite = Callable[[Settings, Progress | None], list[Benchmark]]


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
        Entry(
            name=label,
            time=timed[label][0],
            speedup=timed[label][1],
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
        date=now(),
        reference="mask formulation",
        entries=entries,
        checks=checks,
        goals=(Goal(what="RePaFFN against the mask formulation, times as fast", value=ratio.median, wanted=1.3),),
    )


def _same_gradients(ours: RePaFFN, plain: PlainRePaFFN, start: Tensor) -> tuple:
    """Compare outputs and all gradients of both forms in training mode, in float32."""
    found = []
    for layer in (ours, plain):
        x = start.clone().requires_grad_()
        out = layer(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), x.grad))
    gradients = {key: value.grad for key, value in ours.named_parameters()}
    joined = torch.cat([gradients[f"{branch}_fc1.weight"] for branch in ("active", "idle") if f"{branch}_fc1.weight" in gradients])
    checks = [
        require_close("outputs in training mode", found[0][0], found[1][0]),
        require_close("gradients of the input", found[0][1], found[1][1]),
        require_close("gradients of the first weight", joined, plain.fc1.weight.grad),
    ]
    return tuple(checks)
