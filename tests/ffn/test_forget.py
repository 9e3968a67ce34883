"""Continual forgetting: LoRA identities, sparsity by groups, and a classifier that loses two of five classes."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from small_models import vit
from torch import Tensor

from zoo.ffn import forget
from zoo.ffn.forget import ForgetConfig


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images whose colour and brightness pattern tell five classes apart."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 5, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 3, 16, 16, generator=generator), labels


def test_lora_starts_as_the_model_and_merges_into_it() -> None:
    model = vit().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    groups = forget.apply(model)
    assert list(groups) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert torch.equal(model(images), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * 2 * 8 * (16 + 64)
    for group in groups.values():
        for lora in group:
            torch.nn.init.normal_(lora.up.weight)
    changed = model(images)
    keys = list(vit().state_dict())
    assert len(forget.merge(model)) == 6
    assert torch.allclose(model(images), changed, atol=1e-10)
    assert list(model.state_dict()) == keys


def test_groups_shrink_to_exact_zero() -> None:
    model = vit()
    groups = forget.apply(model)
    norms = forget.group_norms(groups)
    expected = math.sqrt(sum(float(lora.down.weight.detach().square().sum()) for lora in groups["blocks.0.mlp"]))
    assert float(norms["blocks.0.mlp"]) == pytest.approx(expected, rel=1e-5)
    assert forget.zero_group_ratio(groups) == 0
    forget.soft_threshold(groups, 1e3)
    assert forget.zero_group_ratio(groups) == 1
    sum(forget.group_norms(groups).values()).backward()
    assert all(lora.down.weight.grad.isfinite().all() for group in groups.values() for lora in group)


def test_no_gradient_beyond_the_bound() -> None:
    logits = torch.zeros(4, 5, requires_grad=True)
    forget.forget_loss(logits, torch.zeros(4, dtype=torch.long), bound=1.0).backward()
    assert not logits.grad.any()


def test_harmonic_mean() -> None:
    assert forget.harmonic_mean(0.9, 0.1, 0.8) == pytest.approx(0.8)
    assert forget.harmonic_mean(0.9, 0.9, 0.8) == 0


@pytest.mark.slow
@pytest.mark.parametrize("prototypes", [None, (0.01, 0.01, 50.0)])
def test_two_of_five_classes_are_forgotten(prototypes: tuple[float, float, float] | None) -> None:
    """Accuracy on forgotten classes falls to chance or below, the others stay within five points."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=5
    )
    images, labels = _images(200, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    test, truth = _images(200, 1)
    lost = truth < 2

    def accuracy(which: Tensor) -> float:
        with torch.no_grad():
            return float((model(test[which]).argmax(1) == truth[which]).float().mean())

    before = accuracy(lost), accuracy(~lost)
    assert min(before) > 0.9
    untouched = copy.deepcopy(model.blocks[0].attn.qkv.weight)
    old, rest = labels < 2, labels >= 2
    config = ForgetConfig(epochs=40, beta=1.0, alpha=1e-3, prototypes=prototypes)
    facts = forget.forget(model, [(images[old], labels[old])], [(images[rest], labels[rest])], config)
    after = accuracy(lost), accuracy(~lost)
    assert after[0] <= 0.2
    assert after[1] >= before[1] - 0.05
    assert forget.harmonic_mean(before[0], after[0], after[1]) > 0.85
    assert 0 <= facts["zero_group_ratio"] <= 1
    assert torch.equal(model.blocks[0].attn.qkv.weight, untouched)
