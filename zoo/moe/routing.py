"""Where tokens go: load and entropy of every router, as a table and as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.figures import new_figure
from zoo.moe.dense2moe import expert_layers
from zoo.text import table_lines

__all__ = ["RouterLoad", "RoutingSummary", "record_routing"]


@dataclass(kw_only=True)
class RouterLoad:
    """What one router did.

    Args:
        counts: (n,) how often each expert was chosen.
        tokens: Tokens seen.
        entropy_sum: Sum over tokens of the entropy of the softmax, nats.
    """

    counts: Tensor
    tokens: int = 0
    entropy_sum: float = 0.0

    @property
    def load(self) -> Tensor:
        """Share of the choices that went to each expert (n,); even is 1 / n."""
        return self.counts / self.counts.sum().clamp_min(1)

    @property
    def balance(self) -> float:
        """Entropy of the load over its largest value: 1 is even, 0 is one expert for all."""
        load = self.load[self.load > 0]
        return float(-(load * load.log()).sum() / math.log(len(self.counts))) if len(self.counts) > 1 else 1.0

    @property
    def uncertainty(self) -> float:
        """Mean entropy of a token's probabilities over its largest value: 1 is undecided, 0 is sure."""
        if not self.tokens or len(self.counts) < 2:
            return 0.0
        return self.entropy_sum / self.tokens / math.log(len(self.counts))


@dataclass(kw_only=True)
class RoutingSummary:
    """What all routers of a model did; `print` shows it as a table. No token is ever dropped.

    Args:
        layers: Loads by name of the layer.
    """

    layers: dict[str, RouterLoad] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "tokens", "least", "most", "balance", "uncertainty")]
        for name, found in self.layers.items():
            if found.tokens:
                least, most = (f"{100 * float(value):.1f} %" for value in (found.load.min(), found.load.max()))
                rows.append(
                    (name, f"{found.tokens:,}", least, most, f"{found.balance:.3f}", f"{found.uncertainty:.3f}")
                )
        if len(rows) == 1:
            return "No router ran: run the model inside the context."
        return "\n".join(table_lines(rows, right=range(1, 6)))

    def plot(self, path: str | Path) -> Path:
        """Draw the load of every expert of every layer as a heat map: png, svg or pdf by the suffix.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: No router ran.
        """
        ran = {name: found for name, found in self.layers.items() if found.tokens}
        if not ran:
            raise ValueError("No router ran: run the model inside the context.")
        width = max(len(found.counts) for found in ran.values())
        loads = torch.full((len(ran), width), math.nan)
        for row, found in zip(loads, ran.values(), strict=True):
            row[: len(found.counts)] = found.load * len(found.counts)
        figure = new_figure(1.8 + 0.45 * width, 1.2 + 0.32 * len(ran))
        axes = figure.add_subplot()
        image = axes.imshow(loads.numpy(), cmap="cividis", vmin=0, vmax=max(2.0, float(loads.nan_to_num().max())))
        axes.set_yticks(range(len(ran)), list(ran), fontsize=8)
        axes.set_xticks(range(width), [str(number) for number in range(1, width + 1)], fontsize=8)
        axes.set_xlabel("expert")
        figure.colorbar(image, ax=axes, label="load, 1 is even")
        path = Path(path)
        figure.savefig(path, dpi=150)
        return path


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingSummary]:
    """Collect what every router does inside the context.

    Args:
        model: With mixtures of experts.

    Raises:
        ValueError: The model has none.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts: zoo.moe.convert makes some.")
    summary = RoutingSummary(
        layers={name: RouterLoad(counts=torch.zeros(layer.outputs)) for name, layer in layers.items()}
    )

    def keep(name: str) -> Any:
        found = summary.layers[name]

        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, index, logits = output
            shares = torch.softmax(logits.detach().float(), dim=-1)
            found.counts += torch.bincount(index.flatten(), minlength=len(found.counts)).cpu()
            found.tokens += len(index)
            found.entropy_sum += float(-(shares * shares.clamp_min(1e-12).log()).sum())

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.router.register_forward_hook(keep(name)).remove)
        yield summary
