"""Compress a trained model: choose the size by a budget, apply a technique, let it recover from the dense model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.catalog import did_you_mean
from zoo.ffn.depth import DepthConfig, removable
from zoo.ffn.low_rank import LowRankConfig
from zoo.ffn.prune import PruneConfig
from zoo.ffn.repa import RePaConfig
from zoo.ffn.technique import FFNReport, evaluating, ffn_layers, listed, model_output, require_changeable
from zoo.profiling import count_macs_of_copy

__all__ = [
    "METHODS",
    "batch_macs",
    "compress",
    "config_for_budget",
    "config_of",
    "read_budget",
    "recover",
    "resized",
    "stand_in",
]


Config = Any  # a technique's frozen configuration

METHODS: dict[str, Config] = {
    "prune": PruneConfig(),
    "low-rank": LowRankConfig(),
    "repa": RePaConfig(),
    "depth": DepthConfig(),
}
_BUDGET = re.compile(r"\s*(macs|latency)\s*<=\s*(0?\.\d+|1(?:\.0*)?|\d+(?:\.\d+)?)\s*")


def compress(model: nn.Module, config: Config | str = "prune", data: Iterable[Any] | None = None) -> FFNReport:
    """Make the feed-forward layers of a trained model smaller, in place.

    Args:
        model: Of timm, diffusers or zoo.
        config: Configuration of a technique of `zoo.ffn`, or the name of one with its defaults: "prune", "low-rank",
            "repa", "depth".
        data: Batches of inputs, or of (inputs, labels); for a denoiser dictionaries of arguments.

    Raises:
        TypeError: The configuration is none of a technique, or the model is no module.
        ValueError: The technique is unknown, or cannot be applied to the model.
    """
    require_changeable(model)
    chosen = config_of(config) if isinstance(config, str) else config
    if not dataclasses.is_dataclass(chosen) or isinstance(chosen, type):
        raise TypeError(
            f"config is a technique's configuration, as zoo.ffn.prune.PruneConfig(keep=0.5), or one of "
            f"{', '.join(METHODS)}; got {chosen!r}."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"Weights of this {type(model).__name__} are on the meta device: load them first.")
    technique = importlib.import_module(type(chosen).__module__)
    report: FFNReport = technique.apply(model, chosen, data)
    return report


def config_of(method: str) -> Config:
    """Return the default configuration of a method.

    Raises:
        ValueError: There is none of this name; the message has the nearest.
    """
    if method not in METHODS:
        raise ValueError(
            f"No method is called {method!r}.{did_you_mean(method, METHODS)} Methods: {', '.join(METHODS)}."
        )
    return METHODS[method]


def resized(config: Config, keep: float, model: nn.Module) -> Config:
    """Return a configuration that keeps about this share of the feed-forward layers' multiply-accumulates.

    Raises:
        ValueError: The technique cannot keep so much or so little.
    """
    if isinstance(config, (PruneConfig, LowRankConfig)):
        return dataclasses.replace(config, keep=keep)
    if isinstance(config, RePaConfig):
        ffns = ffn_layers(model, config.pattern)
        # C C + 2 k C of 2 H C stay
        ffn = next(iter(ffns.values()))
        idle = 1 - keep + ffn.dim / (2 * ffn.hidden_dim)
        if not 0 < idle < 1:
            least = ffn.dim / (2 * ffn.hidden_dim)
            raise ValueError(f"RePa cannot keep {keep:.2f} of the work: the merged matrices alone are {least:.2f}.")
        return dataclasses.replace(config, idle=idle)
    assert isinstance(config, DepthConfig)
    count = len(removable(model, "ffn", config.pattern))
    return dataclasses.replace(config, remove=max(1, math.ceil((1 - keep) * count - 1e-9)))


def read_budget(budget: str) -> tuple[str, float]:
    """Return "macs" or "latency" and the share that "macs<=0.6" or "latency<=0.7" asks for.

    Raises:
        ValueError: It is no such text, or no share below 1.
    """
    found = _BUDGET.fullmatch(budget)
    if found is None or not 0 < float(found[2]) < 1:
        raise ValueError(f'budget must look like "macs<=0.6" or "latency<=0.7", a share below 1, got {budget!r}.')
    return found[1], float(found[2])


def config_for_budget(
    model: nn.Module, config: Config, budget: str, example: Any, *, rounds: int = 5
) -> tuple[Config, float]:
    """Choose the size of a technique so that the whole model meets a budget.

    Args:
        model: Dense.
        config: Everything but the size.
        budget: "macs<=0.6" or "latency<=0.7": share of the dense model's.
        example: A batch, for counting and timing.
        rounds: Timings of each candidate, in turns with the dense model.

    Returns:
        The configuration, and the share that it reaches.

    Raises:
        ValueError: The budget is no such text, or cannot be met; the message says the nearest that can.
    """
    kind, wanted = read_budget(budget)
    measure = _share_of_macs if kind == "macs" else _share_of_time
    best: tuple[Config, float] | None = None
    least = math.inf
    why: ValueError | None = None
    for keep in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1):
        try:
            candidate = resized(config, keep, model)
            share = measure(model, candidate, example, rounds)
        except ValueError as error:
            why = error
            continue
        least = min(least, share)
        if share <= wanted:
            best = candidate, share
            break
    if why is not None and least == math.inf:  # no size at all can be had
        raise why
    if best is None:
        nearest = f"the nearest that can is {kind}<={least:.2f}"
        raise ValueError(f"The budget {budget} cannot be met by feed-forward layers alone: {nearest}.")
    return best


def stand_in(model: nn.Module, config: Config, example: Any) -> nn.Module:
    """Return a copy of the model in its smaller structure; its values are arbitrary.

    Args:
        model: It stays as it is.
        config: Of a technique in `METHODS`.
        example: A batch, of which one sample is run.

    Raises:
        ValueError: The technique cannot be applied to the model.
    """
    smaller = copy.deepcopy(model).eval()
    if isinstance(config, PruneConfig):
        config = dataclasses.replace(config, scores="random", compensation="none", allocation="uniform")
    elif isinstance(config, LowRankConfig):
        config = dataclasses.replace(config, whiten=False)
    compress(smaller, config, [_first(example)])
    return smaller


def _first(batch: Any) -> Any:
    """Return the first sample of a batch, as a batch."""
    if isinstance(batch, dict):
        return {key: value[:1] if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_first(part) for part in batch)
    return batch[:1]


def batch_macs(model: nn.Module, batch: Any) -> int:
    """Return the multiply-accumulates of a model for the first sample of a batch, attention too (`count_macs`).

    Args:
        model: Run in evaluation mode; it stays as it is.
        batch: See `zoo.ffn.technique.model_output`.
    """

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return model_output(self.model, batch)

    with evaluating(model):
        return count_macs_of_copy(Whole(), _first(batch))


def _share_of_macs(model: nn.Module, config: Config, example: Any, rounds: int) -> float:
    return batch_macs(stand_in(model, config, example), example) / batch_macs(model, example)


def _share_of_time(model: nn.Module, config: Config, example: Any, rounds: int) -> float:
    smaller = stand_in(model, config, example)  # before inference mode, in which no layer may change
    times: dict[int, list[float]] = {0: [], 1: []}
    with evaluating(model), torch.inference_mode():
        for turn in range(rounds + 1):
            for place, candidate in enumerate((model, smaller)):
                start = time.process_time()
                model_output(candidate, example)
                if turn:
                    times[place].append(time.process_time() - start)
    return min(times[1]) / min(times[0])


def recover(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 2e-4,
    features: float = 1.0,
    steps: int | None = None,
    progress: Callable[[int, int, float], object] | None = None,
) -> list[float]:
    """Let a compressed model learn from the dense one: its output, and what each feed-forward layer gives.

    The loss is Dense2MoE's: mean squared error of the outputs (for classifiers the divergence of their probabilities)
    plus that of every layer's features, each relative to the dense features' size.

    Args:
        model: Compressed; trained in place, left in evaluation mode.
        dense: As it was before; frozen while this runs.
        data: Batches; labels are not used.
        epochs: Passes over the data.
        lr: Peak learning rate of AdamW on one cosine with a short warm-up.
        features: Weight of the layers' part.
        steps: Batches to learn from, over as many passes as they take; instead of `epochs`.
        progress: Called with (steps done, steps in all, loss).

    Returns:
        The loss of every step.

    Raises:
        ValueError: `epochs` or `steps` is below 1, or there are no data.
    """
    for what, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}.")
    batches = data if isinstance(data, Sequence) or hasattr(data, "__len__") else listed(data, "Recovery")
    if not len(batches):  # type: ignore[arg-type]
        raise ValueError("Recovery needs data: there is no batch.")
    total = steps or epochs * len(batches)  # type: ignore[arg-type]
    names = [name for name in ffn_layers(dense, takes="any") if name in dict(model.named_modules())]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learned:
        raise ValueError(f"All of this {type(model).__name__} is frozen: nothing can recover. requires_grad_(True)?")
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    warmup = max(1, total // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))) + 1e-3,
    )
    dense.eval()
    model.train()
    losses: list[float] = []
    eager = torch.compiler.set_stance("force_eager")  # hooks are not seen by compiled programs
    with eager, _Features(model, names) as ours, _Features(dense, names) as theirs:
        while len(losses) < total:
            for batch in itertools.islice(batches, total - len(losses)):
                with torch.no_grad():
                    target = model_output(dense, batch)
                output = model_output(model, batch)
                loss = _output_loss(output, target)
                for name in names:
                    wanted = theirs.seen[name].float()
                    loss = loss + features / len(names) * F.mse_loss(ours.seen[name].float(), wanted) / (
                        wanted.square().mean() + 1e-12
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if progress is not None:
                    progress(len(losses), total, losses[-1])
    model.eval()
    return losses


def _output_loss(output: Tensor, target: Tensor) -> Tensor:
    if output.ndim == 2:
        return F.kl_div(
            output.float().log_softmax(1), target.float().log_softmax(1), log_target=True, reduction="batchmean"
        )
    return F.mse_loss(output.float(), target.float()) / (target.float().square().mean() + 1e-12)


class _Features:
    """Keeps what modules returned last."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        self.seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Features:
        for name in self.names:

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                self.seen[name] = output if isinstance(output, Tensor) else output[-1]

            self._handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
