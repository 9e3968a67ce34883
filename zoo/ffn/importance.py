"""Which hidden channels matter, and how they are dealt to experts (Dense2MoE, https://arxiv.org/abs/2510.09094)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ffn.dense_ffn import Channels, DenseFFN
from zoo.ffn.technique import evaluating

__all__ = ["Deal", "Loss", "Scores", "deal_channels", "default_loss", "rank_correlation", "score_channels"]

Scores = Literal["taylor", "taylor_sum", "activation", "random"]
Deal = Literal["snake", "contiguous", "random"]
Loss = Callable[[nn.Module, Any], Tensor]
"""A model and a batch -> the loss of the batch, a scalar with a gradient."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the training loss of a batch whose form says what it is.

    Args:
        model: A diffusers transformer or a classifier.
        batch: For a diffusers transformer a dictionary of its arguments, and under "target" what it should return
            (noise, velocity or image; mean squared error). For a classifier a pair of images and class numbers (cross
            entropy), or what models of transformers make a loss of: arguments with "labels".

    Raises:
        ValueError: The batch is neither.
    """
    if isinstance(batch, Mapping) and "target" in batch:
        arguments = {key: value for key, value in batch.items() if key != "target"}
        output, target = model(**arguments, return_dict=False)[0], batch["target"]
        if output.shape != target.shape and output.ndim == target.ndim:
            output = output[:, : target.shape[1]]  # a learned variance comes behind the prediction
        return F.mse_loss(output.float(), target.float())
    if isinstance(batch, Mapping) and "labels" in batch:
        output = model(**batch)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return output["loss"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return F.cross_entropy(model(batch[0]).float(), batch[1])
    raise ValueError(
        "A calibration batch must be a dictionary of the model's arguments with a 'target', or a pair of images and "
        f"class numbers, got {type(batch).__name__}; pass loss=... for any other."
    )


def score_channels(
    model: nn.Module,
    ffns: Mapping[str, DenseFFN],
    calibration: Iterable[Any],
    *,
    method: Scores = "taylor",
    loss: Loss = default_loss,
) -> tuple[dict[str, Tensor], float | None]:
    """Estimate to first order how much the training loss depends on each hidden channel.

    Over the batches the mean is taken of, for channel j with its row of the first product, bias, column of the second:

    - "taylor": sum of |weight * gradient| over the channel's weights;
    - "taylor_sum": |sum of weight * gradient|, the first-order change of the loss when the channel is removed;
    - "activation": mean over tokens of |hidden * gradient of hidden|; needs no gradients of weights.

    The loss must be the training loss, not a distance to the model itself: that is zero, with its gradient.

    Args:
        model: Holds the layers; its gradients and mode are left as they were.
        ffns: Layers by name.
        calibration: Batches.
        method: As above.
        loss: Loss of a batch.

    Returns:
        Scores (H,) of each layer in float32, and the rank correlation of the scores from every other batch with those
        from the rest, the mean over layers; None with a single batch.

    Raises:
        ValueError: There is no batch, a score is not finite, or a layer's weights do not influence the loss.
    """
    halves: list[dict[str, Tensor]] = [{}, {}]
    count = 0
    with _only_gradients_of(model, ffns):
        for count, batch in enumerate(calibration, start=1):
            found = _score_batch(model, ffns, batch, method, loss)
            half = halves[count % 2]
            for name, score in found.items():
                half[name] = score + half[name] if name in half else score
    if count == 0:
        raise ValueError("calibration has no batch: at least one is needed, some hundred samples are advised.")
    scores = {name: torch.stack([half[name] for half in halves if name in half]).sum(0) / count for name in ffns}
    broken = [name for name, score in scores.items() if not torch.isfinite(score).all()]
    if broken:
        raise ValueError(f"The loss has gradients that are not finite in {', '.join(broken[:3])}.")
    if count < 2:
        return scores, None
    return scores, sum(rank_correlation(halves[0][name], halves[1][name]) for name in ffns) / len(ffns)


@contextmanager
def _only_gradients_of(model: nn.Module, ffns: Mapping[str, DenseFFN]) -> Iterator[None]:
    """Let only the layers' weights have gradients, in evaluation mode; afterwards all is as it was."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    wanted = {parameter for ffn in ffns.values() for parameter in ffn.parameters()}
    try:
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _score_batch(
    model: nn.Module, ffns: Mapping[str, DenseFFN], batch: Any, method: Scores, loss: Loss
) -> dict[str, Tensor]:
    if method == "activation":
        return _score_activations(model, ffns, batch, loss)
    loss(model, batch).backward()
    scores = {}
    for name, ffn in ffns.items():
        weights, gradients = ffn.channels(), ffn.channels(gradients=True)
        products = [getattr(weights, part).float() * getattr(gradients, part).float() for part in _parts(weights)]
        if method == "taylor":
            products = [product.abs() for product in products]
        by_channel = [product.sum((0, 2)) if product.ndim == 3 else product.sum(0) for product in products]
        scores[name] = torch.stack(by_channel).sum(0).abs()
        for parameter in ffn.parameters():
            parameter.grad = None
    return scores


def _parts(channels: Channels) -> tuple[str, ...]:
    return ("up", "down") if channels.up_bias is None else ("up", "up_bias", "down")


def _score_activations(model: nn.Module, ffns: Mapping[str, DenseFFN], batch: Any, loss: Loss) -> dict[str, Tensor]:
    hidden: dict[str, Tensor] = {}

    def keep(name: str, ffn: DenseFFN) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            hidden[name] = args[0]

        return ffn.down.register_forward_pre_hook(hook)

    with ExitStack() as hooks:
        for name, ffn in ffns.items():
            hooks.callback(keep(name, ffn).remove)
        loss(model, batch).backward()
    scores = {}
    for name, ffn in ffns.items():
        if name not in hidden or hidden[name].grad is None:
            raise ValueError(f"{name} did not take part in the loss: it got no gradient.")
        gradient = hidden[name].grad
        assert gradient is not None
        product = ffn.rows((hidden[name].detach().float() * gradient.float()).abs()).mean(0)
        scores[name] = product[ffn.first_column :]
    for ffn in ffns.values():
        for parameter in ffn.parameters():
            parameter.grad = None
    return scores


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors; ties are ranked in order."""
    ranks = [values.argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def deal_channels(
    scores: Tensor, shared_dim: int, experts: int, deal: Deal = "snake", generator: torch.Generator | None = None
) -> Tensor:
    """Give the most important channels to the shared expert and deal the rest evenly.

    Args:
        scores: (H,), larger is more important.
        shared_dim: Channels of the shared expert.
        experts: Normal experts.
        deal: "snake": ranks go to experts 1 ... n, then n ... 1, so that all are nearly equally important;
            "contiguous": the next best channels go to expert 1, and so on; "random".
        generator: Randomness, on the CPU.

    Returns:
        (H,) int64, the channels of the shared expert, expert 1, expert 2, ...; a permutation.

    Raises:
        ValueError: The rest cannot be dealt evenly, or `deal` is unknown.
    """
    rest = len(scores) - shared_dim
    if not 0 <= shared_dim <= len(scores) or rest % experts:
        raise ValueError(f"{rest} hidden channels cannot be dealt evenly to {experts} experts.")
    order = scores.argsort(descending=True, stable=True)
    first, ranked = order[:shared_dim], order[shared_dim:]
    if deal == "random":
        ranked = ranked[torch.randperm(rest, generator=generator).to(ranked.device)]
    elif deal == "snake":
        rounds = ranked.view(-1, experts).clone()  # one row a round, one column an expert
        rounds[1::2] = rounds[1::2].flip(1)
        ranked = rounds.t().reshape(-1)
    elif deal != "contiguous":
        raise ValueError(f"deal must be one of {', '.join(get_args(Deal))}, got {deal!r}.")
    return torch.cat([first, ranked])
