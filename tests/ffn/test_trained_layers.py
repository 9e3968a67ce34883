"""Layers that are trained: structured products, hourglass, ReLU-chosen experts; their identities and their records."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from small_models import batches, build, vit
from torch import nn

from zoo.ffn import block_ffn, hourglass, structured
from zoo.ffn.block_ffn import BlockFFNConfig
from zoo.ffn.hourglass import HourglassConfig, HourglassFFN
from zoo.ffn.structured import BlockDense, BlockShuffle, SelfGuided, StructuredConfig
from zoo.ffn.technique import model_output, rebuild

TECHNIQUES = {
    "low rank": lambda model: structured.apply(model, StructuredConfig()),
    "block shuffle": lambda model: structured.apply(model, StructuredConfig(structure="block_shuffle")),
    "block dense": lambda model: structured.apply(model, StructuredConfig(structure="block_dense")),
    "hourglass": lambda model: hourglass.apply(model, HourglassConfig()),
    "block_ffn": lambda model: block_ffn.apply(model, BlockFFNConfig(expert_dim=16)),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", ["timm", "dit"])
def test_layers_train_and_are_rebuilt_from_plain_facts(technique: str, kind: str) -> None:
    model = build(kind)
    report = TECHNIQUES[technique](model)
    assert report.layers
    assert all(layer.macs[1] > 0 for layer in report.layers)
    batch = batches(kind, 1)[0]
    model_output(model, batch).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if any(layer.name in name for layer in report.layers)}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    fresh = build(kind)
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model_output(fresh, batch), model_output(model, batch))
    with pytest.raises(ValueError, match="already"):
        TECHNIQUES[technique](model)


@pytest.mark.parametrize("tokens", [1, 7, 197])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: BlockShuffle(16, 64, 4, **k),
        lambda **k: BlockShuffle(64, 16, 4, **k),
        lambda **k: BlockShuffle(16, 16, 2, **k),
        lambda **k: BlockDense(16, 8, 64, 4, **k),
    ],
)
def test_a_structured_product_is_its_matrix(make: Any, bias: bool, tokens: int) -> None:
    product = make(bias=bias, dtype=torch.float64)
    x = torch.randn(2, tokens, product.in_features, dtype=torch.float64)
    expected = x @ product.matrix().t()
    if bias:
        held = product.bias if isinstance(product, BlockShuffle) else product.outward.bias
        expected = expected + held
    assert torch.allclose(product(x), expected, atol=1e-12)
    assert int((product.matrix() != 0).sum()) == product.matrix().numel()  # every output sees every input


@pytest.mark.parametrize(("blocks", "share"), [(2, 0.63), (4, 0.31)])
def test_block_shuffle_has_the_papers_share_of_parameters(blocks: int, share: float) -> None:
    up, down = BlockShuffle(192, 768, blocks), BlockShuffle(768, 192, blocks)
    assert (up.macs + down.macs) / (2 * 192 * 768) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("structure", ["low_rank", "block_shuffle", "block_dense"])
def test_guides_start_neutral_and_are_dropped(structure: str) -> None:
    """At the start the output does not depend on the share of the guides; at share 0 only the structure is left."""
    model = vit(depth=1).double()
    structured.apply(model, StructuredConfig(structure=structure, guided=True))
    images = batches("timm")[0][0].double()
    model.train()
    outputs = []
    for share in (1.0, 0.4):
        structured.set_guide(model, share)
        outputs.append(model(images))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-10)
    guided = next(module for module in model.modules() if isinstance(module, SelfGuided))
    guided.guide.weight.data.add_(torch.randn_like(guided.guide.weight))
    structured.set_guide(model, 1.0)
    assert not torch.allclose(model(images), outputs[0], atol=1e-3)
    structured.set_guide(model, 0.0)
    assert torch.allclose(model(images), outputs[0], atol=1e-10)
    assert not any(isinstance(module, SelfGuided) for module in model.modules())
    with pytest.raises(ValueError, match="no guided products"):
        structured.set_guide(model, 0.5)


def test_guide_share_is_a_cosine_over_half_the_steps() -> None:
    assert structured.guide_share(0, 100) == 1
    assert structured.guide_share(25, 100) == pytest.approx(0.5)
    assert structured.guide_share(50, 100) == structured.guide_share(90, 100) == pytest.approx(0)


def test_hourglass_of_one_wide_layer_is_the_dense_layer() -> None:
    layer = HourglassFFN(16, 64, 1).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    dense = layer.downs[0](nn.functional.gelu(layer.ups[0](x)))
    assert torch.allclose(layer(x), dense, atol=1e-12)


def test_hourglass_equals_feed_forward_blocks_in_a_row() -> None:
    layer = HourglassFFN(16, 6, 3).double()
    x = u = torch.randn(3, 7, 16, dtype=torch.float64)
    for norm, up, down in zip(layer.norms, layer.ups, layer.downs, strict=True):
        u = u + down(nn.functional.gelu(up(norm(u))))
    assert torch.allclose(layer(x), u - x, atol=1e-12)
    for down in layer.downs:
        nn.init.zeros_(down.weight)
        nn.init.zeros_(down.bias)
    assert not layer(x).any()
    assert HourglassFFN(100, 40, 4).macs / (8 * 100 * 100) == pytest.approx(0.4)


@pytest.mark.parametrize("kind", ["timm", "dit"])
def test_relu_experts_start_as_the_dense_layer(kind: str) -> None:
    model = build(kind).double()
    batch = batches(kind, 1)[0]
    if isinstance(batch, dict):
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    else:
        batch = (batch[0].double(), batch[1])
    with torch.no_grad():
        before = model_output(model, batch)
        block_ffn.apply(model, BlockFFNConfig(expert_dim=16))
        assert torch.allclose(model_output(model, batch), before, atol=1e-5 * float(before.abs().max()))


def test_limits_of_the_experts_losses() -> None:
    """All tokens on one expert: 1/N; all on different ones: L/N. Scale of the logits does not matter to the layer."""
    same = torch.full((1, 8, 16), -1.0)
    same[:, :, 3] = 2.0
    assert float(block_ffn.chunk_sparsification(same)) == pytest.approx(1 / 16)
    each = torch.where(torch.eye(8, 16, dtype=torch.bool), 2.0, -1.0)[None]
    assert float(block_ffn.chunk_sparsification(each)) == pytest.approx(8 / 16)
    assert block_ffn.token_level_sparsity(same) == block_ffn.token_level_sparsity(each) == pytest.approx(15 / 16)
    assert block_ffn.chunk_level_sparsity(same) == pytest.approx(15 / 16)
    assert block_ffn.chunk_level_sparsity(each) == pytest.approx(0.5)
    assert float(block_ffn.locality(10 * same)) < 1e-4 < float(block_ffn.locality(10 * each))
    assert float(block_ffn.locality(10 * same, grid=(2, 4))) < 1e-4
    layer = block_ffn.BlockFFN(8, 32, 8, 4)
    x = torch.randn(2, 5, 8)
    before = layer(x)
    layer.router.weight.data.mul_(7)
    layer.router.bias.data.mul_(7)
    assert torch.allclose(layer(x), before, atol=1e-4)
    layer.router.bias.data.fill_(-100)
    off = layer(x.requires_grad_())
    assert torch.allclose(off, layer.down.bias.expand_as(off))
    off.sum().backward()
    assert x.grad.isfinite().all()


def test_router_values_are_recorded() -> None:
    model = vit()
    block_ffn.apply(model, BlockFFNConfig(expert_dim=16))
    with block_ffn.record_logits(model) as seen:
        model(batches("timm")[0][0])
    assert [tuple(each.shape) for each in seen] == [(16, 5, 4)] * 3
    assert math.isfinite(sum(float(block_ffn.chunk_sparsification(each, 2).detach()) for each in seen))


def test_bad_input_names_the_layer_and_what_fits() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp cannot be replaced: 64 channels are no whole experts of 24"):
        block_ffn.apply(vit(), BlockFFNConfig(expert_dim=24))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: 16 inputs are not divisible into 5 blocks; 4 blocks are"):
        structured.apply(vit(), StructuredConfig(structure="block_shuffle", blocks=5))
    with pytest.raises(ValueError, match="gated"):
        block_ffn.apply(build("glu"), BlockFFNConfig(expert_dim=16))
