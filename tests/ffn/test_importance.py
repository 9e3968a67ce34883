"""Scores of hidden channels and how they are dealt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from tests.denoisers import condition, dit, flux
from zoo.ffn.dense_ffn import read_ffn
from zoo.ffn.importance import deal_channels, default_loss, rank_correlation, score_channels
from zoo.moe.dense2moe import ffn_layers


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 5, 8, generator=generator) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("layer", [Mlp(8, 16), SwiGLU(8, 16)])
def test_sum_over_a_column_is_the_gradient_of_a_mask(layer: nn.Module) -> None:
    """sum_o W2[o, j] dL/dW2[o, j] = dL/dm_j, where m_j multiplies channel j."""
    ffn = read_ffn(layer)
    assert ffn is not None
    mask = torch.ones(16, requires_grad=True)
    hook = ffn.down.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    regression(layer, batches()[0]).backward()
    hook.remove()
    channels, gradients = ffn.channels(), ffn.channels(gradients=True)
    torch.testing.assert_close((channels.down * gradients.down).sum(0), mask.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["taylor", "taylor_sum", "activation"])
def test_order_does_not_depend_on_the_size_of_the_loss(method: Any) -> None:
    layer = nn.Sequential(Mlp(8, 16))
    ffns = ffn_layers(layer)
    scores, stability = score_channels(layer, ffns, batches(), method=method, loss=regression)
    scaled, _ = score_channels(
        layer, ffns, batches(), method=method, loss=lambda model, batch: 100 * regression(model, batch)
    )
    assert torch.equal(scores["0"].argsort(), scaled["0"].argsort())
    assert stability is not None
    assert -1 <= stability <= 1


@pytest.mark.parametrize("method", ["taylor", "taylor_sum", "activation"])
def test_important_channels_are_found(method: Any) -> None:
    """Channels that reach the output strongly are ranked before those that do not reach it."""
    layer = nn.Sequential(Mlp(8, 16))
    with torch.no_grad():
        layer[0].fc2.weight[:, :12] = 0
        layer[0].fc2.weight[:, 12:] *= 10
    scores, _ = score_channels(layer, ffn_layers(layer), batches(), method=method, loss=regression)
    assert set(scores["0"].topk(4).indices.tolist()) == {12, 13, 14, 15}


def test_nothing_is_left_behind() -> None:
    layer = nn.Sequential(Mlp(8, 16), nn.Linear(8, 8)).train()
    layer[1].weight.requires_grad_(False)
    layer[0].fc1.bias.grad = torch.ones(16)
    score_channels(layer, ffn_layers(layer), batches(1), loss=regression)
    assert layer.training
    assert layer[0].training
    assert not layer[1].weight.requires_grad
    assert torch.equal(layer[0].fc1.bias.grad, torch.ones(16))
    assert layer[0].fc1.weight.grad is None
    assert not layer[0].fc2._forward_pre_hooks


@pytest.mark.parametrize("make", [dit, flux])
@pytest.mark.parametrize("method", ["taylor", "activation"])
def test_denoisers(make: Any, method: Any) -> None:
    model = make()
    sample, inputs = condition(model, 2)
    batch = {"hidden_states": sample, "timestep": torch.tensor([100.0, 500.0]), **inputs, "target": sample}
    ffns = ffn_layers(model)
    scores, stability = score_channels(model, ffns, [batch], method=method, loss=default_loss)
    assert stability is None
    assert scores.keys() == ffns.keys()
    assert all(score.shape == (ffns[name].hidden_dim,) and score.min() >= 0 for name, score in scores.items())
    assert all(score.max() > 0 for score in scores.values())


def test_bad_calibration() -> None:
    layer = nn.Sequential(Mlp(8, 16))
    with pytest.raises(ValueError, match="no batch"):
        score_channels(layer, ffn_layers(layer), [])
    with pytest.raises(ValueError, match="dictionary of the model's arguments"):
        score_channels(layer, ffn_layers(layer), [3])
    with pytest.raises(ValueError, match="not finite"):
        score_channels(layer, ffn_layers(layer), [batches(1)[0]], loss=lambda m, b: regression(m, b) * float("inf"))


@pytest.mark.parametrize("deal", ["snake", "contiguous", "random"])
@pytest.mark.parametrize(("shared", "experts"), [(0, 4), (8, 6), (20, 3)])
def test_deal_is_a_permutation(deal: Any, shared: int, experts: int) -> None:
    scores = torch.rand(32)
    order = deal_channels(scores, shared, experts, deal, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(32))
    if shared:
        assert scores[order[:shared]].min() >= scores[order[shared:]].max()


def test_snake_deals_evenly() -> None:
    scores = torch.arange(32, 0, -1).float()
    order = deal_channels(scores, 8, 6)
    sums = scores[order[8:]].view(6, 4).sum(1)
    assert torch.equal(sums, sums[:1].expand(6))  # an even number of rounds of evenly spaced scores
    contiguous = deal_channels(scores, 8, 6, "contiguous")
    assert torch.equal(contiguous, torch.arange(32))


def test_deal_refuses_a_remainder() -> None:
    with pytest.raises(ValueError, match="24 hidden channels cannot be dealt evenly to 5"):
        deal_channels(torch.rand(32), 8, 5)


def test_rank_correlation() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
