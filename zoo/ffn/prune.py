"""Structured pruning: hidden channels of feed-forward layers go, the rest makes up for them.

Scores and widths after 2SSP (https://arxiv.org/abs/2501.17771) and CFSP (https://arxiv.org/abs/2409.13199), Taylor
scores after Dense2MoE, magnitudes and random ones as baselines. Both papers are on language models; that images give
the calibration, that CFSP's weight term is normalised over the whole matrix (its released normalisation cancels) and
that its block importances are standardised are readings of ours. The least-squares update of the second product is the
closed form on the kept channels; ZipLM (https://arxiv.org/abs/2302.04089) prunes by it too, and "obs" is its choice of
channels, in groups and without its search over layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN, keep_channels, set_hidden_dim
from zoo.ffn.importance import Loss, default_loss, score_channels
from zoo.ffn.technique import (
    ERROR_SAMPLES,
    Changes,
    FFNReport,
    Moments,
    at_least_float32,
    evaluating,
    ffn_layers,
    listed,
    output_error,
    outputs_of,
    require_seen,
    require_types,
    thinned,
    watch_inputs,
    with_diagonal,
)

__all__ = [
    "PruneConfig",
    "PruneScores",
    "apply",
    "channel_scores",
    "choose_widths",
    "keep_channels",
    "obs_scores",
    "restructure",
    "set_hidden_dim",
]

PruneScores = Literal["activation", "cfsp", "obs", "taylor", "magnitude", "random"]
Allocation = Literal["uniform", "global", "cfsp"]
Compensation = Literal["none", "bias", "least_squares"]


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How many channels stay, which, and what makes up for the others.

    Args:
        keep: Share of all hidden channels that stay, 0 ... 1; in layers of one shape also the share of their MACs.
        scores: "activation": 2SSP's, the norm of a channel's activation over the data; "cfsp": that norm times CFSP's
            weight term; "obs": what the layer's output loses once the others make up for the channel, one group after
            another (optimal brain surgeon; ZipLM's structured form); "taylor": first-order change of the loss (needs
            labels or targets); "magnitude": norms of the channel's weights; "random".
        allocation: Widths of the layers: "uniform", all the same share (2SSP); "global", one threshold for all scores,
            each layer's divided by its mean; "cfsp", by the angle by which a block turns its input.
        round_to: Widths are multiples of this, for fast kernels; 1 keeps every width.
        compensation: "bias": the mean of what went is added to the output bias; "least_squares": the second product
            and its bias are fitted anew to give the dense layer's output on the data.
        damping: Added to the normal equations, relative to their mean diagonal.
        pattern: Only layers whose name matches this regular expression.
        seed: Of random scores.

    Raises:
        ValueError: `keep`, `round_to` or `damping` is out of range, or a word is unknown.
    """

    keep: float = 0.5
    scores: PruneScores = "activation"
    allocation: Allocation = "uniform"
    round_to: int = 8
    compensation: Compensation = "least_squares"
    damping: float = 1e-3
    pattern: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of channels that stay, above 0 and at most 1, got {self.keep}.")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}.")
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, got {self.damping}.")

    @property
    def needs_data(self) -> bool:
        """Something is measured on data."""
        return self.keep < 1 and (
            self.scores not in ("magnitude", "random") or self.compensation != "none" or self.allocation == "cfsp"
        )


def apply(
    model: nn.Module,
    config: PruneConfig | None = None,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss = default_loss,
) -> FFNReport:
    """Prune a model's feed-forward layers in place.

    Args:
        model: Trained, of timm, diffusers or zoo.
        config: How.
        data: Batches of images, of (images, labels), or of a denoiser's arguments with a "target"; not needed for
            random scores or magnitudes without compensation.
        loss: Loss of a batch for "taylor".

    Raises:
        ValueError: No layer is known, data is missing, the model was pruned before, or a layer is too narrow.
    """
    config = config or PruneConfig()
    changes = Changes(model, "prune")
    ffns = ffn_layers(model, config.pattern, "any")
    batches = listed(data, "Pruning by these scores", needed=config.needs_data)
    macs = {name: ffn.macs() for name, ffn in ffns.items()}
    params = {name: ffn.num_parameters for name, ffn in ffns.items()}
    before = {name: ffn.hidden_dim for name, ffn in ffns.items()}

    outputs: list[Tensor] = []
    second = config.compensation == "least_squares" or config.scores == "obs"
    moments = {name: Moments(second=second) for name in ffns}
    angles = {name: [0.0, 0] for name in ffns}
    responses = {name: Moments(second=False) for name in ffns}
    if batches:
        with (
            evaluating(model),
            _watch(model, ffns, moments, angles if config.allocation == "cfsp" else None, len(batches)),
            _watch_responses(ffns, responses),
        ):
            outputs = outputs_of(model, batches)
        if config.needs_data:
            require_seen(moments)
    scores = _scores(model, ffns, moments, config, batches, loss)
    importance = {name: total / max(count, 1) for name, (total, count) in angles.items()}
    widths = choose_widths(before, scores, config, importance)
    kept = {name: scores[name].argsort(descending=True, stable=True)[: widths[name]].sort().values for name in ffns}
    fits = {name: _compensated(ffn, moments[name], kept[name], config) for name, ffn in ffns.items()}
    for name, ffn in ffns.items():
        weight, bias = fits[name]
        keep_channels(ffn, kept[name])
        for part in ffn.between:
            if isinstance(part, GlobalResponseNorm):
                _hold_response(part, responses[name], kept[name])
        with torch.no_grad():
            if weight is not None:
                ffn.write_down(weight)
            if bias is not None:
                ffn.down.bias.copy_(bias)
        set_hidden_dim(model.get_submodule(name), widths[name])
        what = f"{before[name]} -> {widths[name]} channels"
        changes.add(name, what, (params[name], ffn.num_parameters), (macs[name], ffn.macs()))
    return changes.report(widths, output_error(model, batches, outputs, ERROR_SAMPLES) if batches else None)


def _watch_responses(ffns: Mapping[str, DenseFFN], responses: Mapping[str, Moments]) -> ExitStack:
    """Add up what a `GlobalResponseNorm` divides by its mean over the channels: norms over each map."""
    stack = ExitStack()
    for name, ffn in ffns.items():
        for part in ffn.between:
            if isinstance(part, GlobalResponseNorm):

                def see(module: Any, args: Any, name: str = name) -> None:
                    norms = at_least_float32(args[0].detach()).norm(dim=module.spatial_dim)
                    responses[name].add(norms.flatten(0, -2))

                stack.callback(part.register_forward_pre_hook(see).remove)
    return stack


@torch.no_grad()
def _hold_response(norm: Any, responses: Moments, kept: Tensor) -> None:
    """Scale the weight of a `GlobalResponseNorm` as the mean over its channels has changed with those that went."""
    if responses.count:
        mean = responses.mean
        norm.weight *= float(mean[kept.to(mean.device)].mean() / mean.mean().clamp_min(1e-30))


def restructure(model: nn.Module, layers: Mapping[str, int]) -> None:
    """Give a dense model the widths of a pruned one: the first channels stay, and weights are loaded after."""
    ffns = ffn_layers(model, takes="any")
    for name, width in layers.items():
        keep_channels(ffns[name], torch.arange(width))
        set_hidden_dim(model.get_submodule(name), width)


def choose_widths(
    hidden: Mapping[str, int],
    scores: Mapping[str, Tensor],
    config: PruneConfig,
    importance: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Return how many channels each layer keeps.

    Args:
        hidden: Channels of each layer.
        scores: (H,) of each layer, for "global".
        config: Share, allocation, rounding.
        importance: Of each layer's block, for "cfsp".

    Raises:
        ValueError: A layer has fewer channels than `round_to`.
    """
    narrow = [name for name, width in hidden.items() if width < config.round_to]
    if narrow:
        raise ValueError(f"{narrow[0]} has {hidden[narrow[0]]} hidden channels: round_to must be at most that.")
    if config.keep == 1:
        return dict(hidden)
    wanted = {name: config.keep * width for name, width in hidden.items()}
    if config.allocation == "global":
        relative = {name: score.double() / score.double().mean().clamp_min(1e-30) for name, score in scores.items()}
        every = torch.cat(list(relative.values()))
        count = max(1, round(config.keep * len(every)))
        threshold = every.topk(count).values[-1]
        wanted = {name: float((score >= threshold).sum()) for name, score in relative.items()}
    elif config.allocation == "cfsp" and importance:
        values = torch.tensor([importance[name] for name in hidden], dtype=torch.float64)
        standard = (values - values.mean()) / values.std().clamp_min(1e-12) if len(values) > 1 else values * 0
        shares = _rescaled(torch.sigmoid(standard), torch.tensor(list(hidden.values())).double(), config.keep)
        wanted = {name: share * width for share, (name, width) in zip(shares, hidden.items(), strict=True)}
    step = config.round_to
    floors = {name: min(width, max(step, math.floor(wanted[name] / step) * step)) for name, width in hidden.items()}
    # hand out what rounding down left over, largest remainders first
    left = round(config.keep * sum(hidden.values())) - sum(floors.values())
    for name in sorted(hidden, key=lambda name: floors[name] - wanted[name]):
        if left >= step and floors[name] + step <= hidden[name]:
            floors[name] += step
            left -= step
    return floors


def _rescaled(shares: Tensor, weights: Tensor, keep: float) -> list[float]:
    """Scale shares so that their weighted mean is `keep` and none is above 1."""
    for _ in range(50):
        mean = float((shares * weights).sum() / weights.sum())
        if abs(mean - keep) < 1e-9:
            break
        shares = (shares * keep / mean).clamp(max=1.0)
    return shares.tolist()


def _watch(
    model: nn.Module,
    ffns: Mapping[str, DenseFFN],
    moments: Mapping[str, Moments],
    angles: dict[str, list[Any]] | None,
    parts: int,
) -> ExitStack:
    """Collect moments of hidden activations and, for CFSP, the angles between a block's input and output."""
    stack = ExitStack()
    stack.enter_context(
        watch_inputs(
            {name: ffn.down for name, ffn in ffns.items()},
            lambda name, rows: moments[name].add(
                thinned(rows, ffns[name].hidden_dim, parts)[:, ffns[name].first_column :]
            ),
        )
    )
    for name in angles or ():
        ffn = ffns[name]
        block = model.get_submodule(name.rpartition(".")[0] if ffn.whole else name)
        channels = 1 if ffn.convolutional else -1

        def hook(
            module: nn.Module, args: Sequence[Any], output: Any, name: str = name, channels: int = channels
        ) -> None:
            assert angles is not None
            result = output if isinstance(output, Tensor) else output[-1]
            source = next((value for value in args if isinstance(value, Tensor) and value.shape == result.shape), None)
            if source is None:
                return
            cosine = nn.functional.cosine_similarity(source.float(), result.float(), dim=channels).clamp(-1, 1)
            angles[name][0] += float((torch.arccos(cosine) / math.pi).sum())
            angles[name][1] += cosine.numel()

        stack.callback(block.register_forward_hook(hook).remove)
    return stack


def channel_scores(
    model: nn.Module, ffns: Mapping[str, DenseFFN], config: PruneConfig, batches: list[Any]
) -> dict[str, Tensor]:
    """Return by layer how much each hidden channel matters (H,), as `apply` would score it."""
    moments = {name: Moments(second=config.scores == "obs") for name in ffns}
    if batches:
        with evaluating(model), _watch(model, ffns, moments, None, len(batches)):
            for batch in batches:
                outputs_of(model, [batch])
        require_seen(moments)
    return _scores(model, ffns, moments, config, batches, default_loss)


def _scores(
    model: nn.Module,
    ffns: Mapping[str, DenseFFN],
    moments: Mapping[str, Moments],
    config: PruneConfig,
    batches: list[Any],
    loss: Loss,
) -> dict[str, Tensor]:
    if config.scores == "taylor" and config.keep < 1:
        return {name: score.cpu() for name, score in score_channels(model, ffns, batches, loss=loss)[0].items()}
    generator = torch.Generator().manual_seed(config.seed)
    scores = {}
    for name, ffn in ffns.items():
        if config.scores == "random" or not (moments[name].count or config.scores == "magnitude"):
            scores[name] = torch.rand(ffn.hidden_dim, generator=generator)
            continue
        channels = ffn.channels()
        up, down = channels.up.double(), channels.down.double()
        if config.scores == "magnitude":
            score = (up.square().sum((0, 2)) + down.square().sum(0)).sqrt()
        elif config.scores == "obs":
            gram = moments[name].covariance if ffn.owns_output_bias else moments[name].second_moment
            score = obs_scores(gram, down, config.damping)
        else:
            score = moments[name].rms
            if config.scores == "cfsp":
                weights = down.abs().mean(0) / down.abs().sum() + sum(u.abs().mean(1) / u.abs().sum() for u in up)
                score = weights * score * score
        scores[name] = score.float().cpu()
    return scores


def obs_scores(gram: Tensor, down: Tensor, damping: float) -> Tensor:
    """Return for each hidden channel what the output loses when it goes, the cheapest having gone before.

    With H the damped second moment and W the second product, channel j costs |W_j|^2 / (H^-1)_jj; the least-squares
    update of W, and H^-1 without the channel, follow in closed form. A sixty-fourth of the channels goes at a time.

    Args:
        gram: (H, H), second moment or covariance of the hidden channels.
        down: (O, H).
        damping: Added to `gram`, relative to its mean diagonal.
    """
    count = len(gram)
    amount = damping * gram.diagonal().mean() + 1e-12
    inverse = torch.linalg.inv(with_diagonal(gram, amount))
    weight, score = down.clone(), torch.zeros(count, dtype=gram.dtype, device=gram.device)
    left, highest = torch.arange(count, device=gram.device), 0.0
    while len(left):
        cost = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-30)
        group = cost.topk(min(len(left), max(1, count // 64)), largest=False)
        for channel, value in zip(left[group.indices].tolist(), group.values.tolist(), strict=True):
            # one that goes later is worth more, since the rest leans on it
            highest = max(value, highest * (1 + 1e-6))
            score[channel] = highest
        stays = torch.ones(len(left), dtype=torch.bool, device=gram.device)
        stays[group.indices] = False
        update = torch.linalg.solve(inverse[group.indices][:, group.indices], inverse[group.indices])[:, stays]
        weight = weight[:, stays] - weight[:, group.indices] @ update
        inverse = inverse[stays][:, stays] - inverse[stays][:, group.indices] @ update
        left = left[stays]
    return score


def _compensated(
    ffn: DenseFFN, moments: Moments, kept: Tensor, config: PruneConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Return the second product's weight (O, K) and bias (O,) that make up for what goes; None leaves one as it is."""
    if config.compensation == "none" or len(kept) == ffn.hidden_dim or not moments.count:
        return None, None
    down = ffn.channels().down.double()
    kept = kept.to(down.device)
    gone = torch.ones(ffn.hidden_dim, dtype=torch.bool, device=down.device)
    gone[kept] = False
    bias = ffn.down.bias.detach().double() if ffn.owns_output_bias else None
    mean = moments.mean
    if config.compensation == "bias":
        return None, None if bias is None else bias + down[:, gone] @ mean[gone]
    # with a bias of its own the fit is around the means, else through the origin
    gram = moments.covariance if bias is not None else moments.second_moment
    normal = gram[kept][:, kept]
    normal = with_diagonal(normal, config.damping * normal.diagonal().mean())
    # the dense weights of kept channels are what damping pulls to
    extra = torch.linalg.solve(normal, gram[kept][:, gone] @ down[:, gone].t()).t()
    weight = down[:, kept] + extra
    if bias is not None:
        bias = bias + down @ mean - weight @ mean[kept]
    return weight, bias
