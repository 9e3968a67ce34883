"""Losses of the distillation of experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.moe.losses import balance_loss, feature_loss, feature_weights, record_balance
from zoo.moe.router import Router


def test_balance_is_one_when_even_and_n_when_one_takes_all() -> None:
    even = torch.arange(6).repeat(4).unsqueeze(1)
    assert balance_loss(torch.zeros(24, 6), even).item() == pytest.approx(1)
    logits = torch.zeros(24, 6)
    logits[:, 2] = 1e4
    assert balance_loss(logits, torch.full((24, 1), 2)).item() == pytest.approx(6)


def test_balance_of_experts_without_computation() -> None:
    """MoE++: uniform routing gives the mean weight of the experts."""
    scale = torch.tensor([1.0, 1.0, 1.0, 0.75])
    even = torch.arange(4).repeat(5).unsqueeze(1)
    assert balance_loss(torch.zeros(20, 4), even, scale).item() == pytest.approx(scale.mean().item())


def test_gradient_lowers_the_share_of_crowded_experts() -> None:
    logits = torch.zeros(8, 4, requires_grad=True)
    balance_loss(logits, torch.zeros(8, 1, dtype=torch.long)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_record() -> None:
    routers = nn.ModuleList([Router(4, 3), Router(4, 3)])
    x = torch.randn(10, 4)
    with record_balance(routers) as losses:
        results = [router(x, 2) for router in routers]
    assert [loss.item() for loss in losses] == [balance_loss(logits, index).item() for _, index, logits in results]
    routers[0](x, 2)
    assert len(losses) == 2  # and no hook is left


@pytest.mark.parametrize("inside", [True, False])
def test_record_under_gradient_checkpointing(inside: bool) -> None:
    """What the backward pass runs again, inside the context or after it, is not recorded again."""
    torch.manual_seed(0)
    router, tokens = Router(6, 4), torch.randn(20, 6)
    gradients = []
    for checkpointing in (False, True):
        router.zero_grad()
        with record_balance(router) as losses:
            if checkpointing:
                _, _, logits = checkpoint(router, tokens, 1, use_reentrant=False)
            else:
                _, _, logits = router(tokens, 1)
            total = losses[0] + logits.square().sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        assert len(losses) == 1
        gradients.append([parameter.grad.clone() for parameter in router.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_feature_weights_give_every_layer_the_size_of_the_output_loss() -> None:
    teacher = {"a": torch.randn(2, 3, 4), "b": 100 * torch.randn(2, 5, 4)}
    student = {name: value + 0.1 * torch.randn_like(value) for name, value in teacher.items()}
    distance = torch.tensor(0.3)
    total, errors = feature_loss(distance, student, teacher)
    norms = torch.stack([value.norm() for value in teacher.values()])
    assert total.item() == pytest.approx((0.3 * norms.mean() / norms).sum().item(), rel=1e-5)
    assert errors["a"].item() == pytest.approx((student["a"] - teacher["a"]).square().mean().item())
    scaled, _ = feature_loss(distance, {k: 7 * v for k, v in student.items()}, {k: 7 * v for k, v in teacher.items()})
    assert scaled.item() == pytest.approx(total.item(), rel=1e-5)


def test_equal_features_are_finite() -> None:
    teacher = {"a": torch.randn(2, 3, 4), "zero": torch.zeros(2, 3, 4)}
    student = {name: value.clone().requires_grad_() for name, value in teacher.items()}
    total, errors = feature_loss(torch.tensor(0.0), student, teacher)
    total.backward()
    assert torch.isfinite(total)
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in student.values())
    assert all(torch.isfinite(weight) for weight in feature_weights(torch.tensor(0.0), errors, teacher).values())
