"""EUGens, SNNK, MoFME, FreqNet, VersatileFFN, Macaron, HybridNorm, FDConv, skipping: identities and records."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import timm
import torch
from small_models import batches, vit
from torch import nn

from zoo.ffn import eugens, fdconv, freqnet, hybrid_norm, macaron, mofme, skip, snnk, versatile
from zoo.ffn.eugens import EUGen, EUGensConfig
from zoo.ffn.fdconv import FDConv2d, FDConvConfig
from zoo.ffn.freqnet import FrequencyLayer
from zoo.ffn.hybrid_norm import HybridNormBlock
from zoo.ffn.macaron import MacaronConfig
from zoo.ffn.mofme import MoFMEConfig, MoFMEFFN
from zoo.ffn.regression import RidgeSums
from zoo.ffn.skip import SkipConfig
from zoo.ffn.snnk import SNNK, SNNKAdapter, SNNKConfig
from zoo.ffn.technique import rebuild
from zoo.ffn.versatile import VersatileConfig, VersatileFFN

DATA = batches("timm")
IMAGES = DATA[0][0]


def convolutional(**_: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3).eval()


TECHNIQUES: dict[str, tuple[Any, Any]] = {
    "eugens": (vit, lambda model: eugens.apply(model, EUGensConfig(features=16), DATA)),
    "snnk": (vit, lambda model: snnk.apply(model, SNNKConfig(features=32), DATA)),
    "mofme": (vit, lambda model: mofme.apply(model)),
    "freqnet": (vit, lambda model: freqnet.apply(model)),
    "versatile": (vit, lambda model: versatile.apply(model, VersatileConfig(windows=4, window=0.25))),
    "macaron": (vit, lambda model: macaron.apply(model)),
    "hybrid_norm": (vit, lambda model: hybrid_norm.apply(model)),
    "fdconv": (convolutional, lambda model: fdconv.apply(model, FDConvConfig(pattern=r"layer1"))),
    "skip static": (lambda: vit(depth=5), lambda model: skip.apply(model, SkipConfig(threshold=-1), DATA)),
    "skip token": (
        lambda: vit(depth=5),
        lambda model: skip.apply(model, SkipConfig(mode="token", threshold=0.3), DATA),
    ),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_layers_run_train_and_are_rebuilt_from_plain_facts(technique: str) -> None:
    build, change = TECHNIQUES[technique]
    model = build()
    report = change(model)
    images = IMAGES if technique != "fdconv" else torch.randn(2, 3, 32, 32)
    assert report.layers
    fresh = build()
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), model.eval()(images))
        assert copy.deepcopy(model).bfloat16()(images.bfloat16()).isfinite().all()
    model.train()
    model(images).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="already"):
        change(model)


def test_regression_recovers_an_eugen() -> None:
    torch.manual_seed(0)
    truth, fitted = (EUGen(6, 4, 8, 2, seed=3).double() for _ in range(2))
    x = torch.randn(500, 6, dtype=torch.float64)
    sums = RidgeSums()
    for part in x.split(100):
        sums.add(fitted.phi(part), truth(part))
    weight, bias = sums.solve(1e-14)
    fitted.output.weight.data, fitted.output.bias.data = weight, bias
    assert torch.allclose(fitted(x), truth(x), atol=1e-8)


def test_a_regression_stays_on_the_device_of_its_data() -> None:
    sums = RidgeSums()
    sums.add(torch.empty(8, 4, device="meta"), torch.empty(8, 3, device="meta"))
    assert [part.device.type for part in sums.solve(1e-3)] == ["meta", "meta"]


def test_order_zero_is_a_constant() -> None:
    layer = EUGen(6, 4, 8, 0)
    assert torch.equal(layer(torch.randn(3, 6)), layer.output.bias.expand(3, 4))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_snnk_estimates_the_arc_cosine_kernel(orthogonal: bool) -> None:
    """E[relu(g . w) relu(g . x)] = |w| |x| / (2 pi) (sin t + (pi - t) cos t), t the angle."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 8, generator=generator)
    estimates = []
    for seed in range(400):
        g = snnk.orthogonal_projections(32, 8, torch.Generator().manual_seed(seed), orthogonal)
        estimates.append((torch.relu(g @ w) * torch.relu(g @ x)).mean())
    found = torch.stack(estimates)
    lengths = w.norm() * x.norm()
    angle = torch.arccos(w @ x / lengths)
    kernel = lengths / (2 * math.pi) * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle))
    assert abs(float(found.mean() - kernel)) < 4 * float(found.std()) / 20


def test_snnk_bundles_and_adapters_start_as_the_identity() -> None:
    layer, following = SNNK(8, 6, 16).double(), nn.Linear(6, 3).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(layer.bundle(following)(x), following(layer(x)), atol=1e-10)
    y = torch.randn(5, 8)
    assert torch.equal(SNNKAdapter(8)(y), y)


def test_modulations_merge() -> None:
    """The joint modulation equals the loop over experts; equal experts make routing irrelevant."""
    torch.manual_seed(0)
    layer = MoFMEFFN(8, 16, 3, 2).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    w = layer.weights(x)
    assert torch.allclose(w.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert bool(((w > 0).sum(-1) == 2).all())
    u = nn.functional.gelu(layer.gate(x)) * layer.value(x)
    total = torch.zeros_like(u)
    for i in range(3):
        scale, shift = u @ layer.gamma[i].t() + layer.gamma_bias[i], u @ layer.beta[i].t() + layer.beta_bias[i]
        total = total + w[..., i : i + 1] * (scale * u + shift)
    assert torch.allclose(layer(x), layer.adaptor(total), atol=1e-12)
    with torch.no_grad():
        for part in (layer.gamma, layer.beta, layer.gamma_bias, layer.beta_bias):
            part.copy_(part[:1].expand_as(part).clone())
    before = layer(x)
    nn.init.normal_(layer.router.weight)
    assert torch.allclose(layer(x), before, atol=1e-12)
    nn.init.zeros_(layer.gamma)
    nn.init.zeros_(layer.beta)
    nn.init.ones_(layer.gamma_bias)
    nn.init.zeros_(layer.beta_bias)
    assert torch.allclose(layer(x), layer.adaptor(u), atol=1e-12)
    with pytest.raises(ValueError, match=r"top_k must lie in 1 \.\.\. 4"):
        MoFMEConfig(top_k=5)


def test_frequency_layer_of_identities_is_the_identity() -> None:
    layer = FrequencyLayer(4, activation=False)
    for conv in (layer.amplitude, layer.phase):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    x = torch.randn(2, 4, 6, 8)
    assert torch.allclose(layer(x), x, atol=1e-4)


def test_one_loop_of_a_versatile_layer_is_the_dense_layer() -> None:
    model = vit().double()
    dense = copy.deepcopy(model)
    versatile.apply(model, VersatileConfig(windows=4, window=0.25, loops=1))
    with torch.no_grad():
        assert torch.allclose(model.eval()(IMAGES.double()), dense(IMAGES.double()), atol=1e-10)


def test_disjoint_windows_add_up_to_the_dense_layer() -> None:
    layer = VersatileFFN(8, 32, VersatileConfig(windows=4, window=0.25, top_k=4)).double().eval()
    nn.init.zeros_(layer.router.weight)  # equal gates: each window counts a quarter
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    bias = layer.down.bias
    assert torch.allclose(4 * (layer.width(x) - bias) + bias, layer.dense(x), atol=1e-12)


def test_loops_are_repeated_application_for_each_token() -> None:
    layer = VersatileFFN(8, 32, VersatileConfig(windows=1, window=1, top_k=1, loops=3)).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    deep, expected = layer.depth(x)
    states, after = x, []
    for loop in range(3):
        states = states + layer.dense(states if loop == 0 else layer.norm(states))
        after.append(states)
    loops = layer.loop_router(x).argmax(-1)
    assert torch.equal(expected.squeeze(-1), (loops + 1).double())
    chosen = torch.stack(after)[loops, torch.arange(2)[:, None], torch.arange(6)]
    assert torch.allclose(deep, chosen - x, atol=1e-12)
    assert torch.allclose(layer.width(x), layer.dense(x), atol=1e-12)


def test_macaron_from_a_trained_model_is_exact_or_keeps_its_parameters() -> None:
    model = vit().double()
    dense = copy.deepcopy(model)
    macaron.apply(model, MacaronConfig(start="exact"))
    with torch.no_grad():
        assert torch.allclose(model(IMAGES.double()), dense(IMAGES.double()), atol=1e-10)
    new = vit()
    report = macaron.apply(new)
    assert report.params[1] - report.params[0] == 3 * (2 * 16 + 16)  # one more norm and output bias a block
    assert report.macs[0] == report.macs[1]


def test_hybrid_norm_does_not_see_the_scale_of_its_projections() -> None:
    torch.manual_seed(0)
    block = HybridNormBlock(16, 2, nn.Identity()).double()
    for norm in (block.q_norm, block.k_norm, block.v_norm):
        norm.eps = 1e-12
    nn.init.zeros_(block.qkv.bias)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    before = block(x)
    block.qkv.weight.data.mul_(3)
    assert torch.allclose(block(x), before, atol=1e-8)
    first = HybridNormBlock(16, 2, nn.Identity(), first=True).double()
    r = x + first._attention(first.norm1(x))
    assert torch.allclose(first(x), first.norm2(r) + r)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(9, 12), (16, 16)])
def test_dynamic_convolution_starts_as_the_plain_one(kernel: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(18, 20, kernel, padding=kernel // 2).double()
    plain = copy.deepcopy(conv)
    dynamic = FDConv2d(conv, groups=4).double()
    assert torch.allclose(dynamic.kernels().sum(0), plain.weight, atol=1e-6)
    x = torch.randn(3, 18, *size, dtype=torch.float64)
    assert torch.allclose(dynamic(x), plain(x), atol=1e-5)
    nn.init.normal_(dynamic.heads["frequency"].weight)
    changed = dynamic(x)
    assert not torch.allclose(changed, plain(x), atol=1e-2)
    assert torch.allclose(dynamic(x[1:2]), changed[1:2], atol=1e-9)  # an image's kernel is its own


def test_groups_of_frequencies_are_a_partition() -> None:
    group = fdconv.frequency_groups(12, 9, 4)
    assert group.shape == (12, 5)
    assert group.unique().tolist() == [0, 1, 2, 3]
    assert int(group[0, 0]) == 0


def test_a_threshold_above_one_skips_nothing() -> None:
    model = vit(depth=5)
    dense = copy.deepcopy(model)
    report = skip.apply(model, SkipConfig(mode="token", threshold=1.01), DATA)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), dense(IMAGES))
    assert skip.executed_share(model) == 1
    assert report.error == 0


def test_tokens_skip_alone_and_static_skips_are_zeros() -> None:
    """A token's decision does not depend on the batch; a skipped layer equals one whose output is zero."""
    model = vit(depth=5)
    dense = copy.deepcopy(model)
    skip.apply(model, SkipConfig(mode="token", threshold=0.3, horizon=1), DATA)
    with torch.no_grad():
        together, alone = model(IMAGES), model(IMAGES[3:4])
    assert torch.allclose(together[3:4], alone, atol=1e-5)
    assert skip.executed_share(model) < 1
    static = copy.deepcopy(dense)
    report = skip.apply(static, SkipConfig(threshold=-1, cold_start=1, cold_end=1), DATA)
    (layer,) = report.layers
    mlp = dense.get_submodule(layer.name)
    nn.init.zeros_(mlp.fc2.weight)
    nn.init.zeros_(mlp.fc2.bias)
    with torch.no_grad():
        assert torch.allclose(static(IMAGES), dense(IMAGES), atol=1e-6)
    with pytest.raises(ValueError, match="leave none of 3 layers"):
        skip.apply(vit(), SkipConfig(), DATA)
