"""sigma-MoE and product-key memories: identities, records, what training does to them."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from small_models import batches, build, vit
from timm.layers import Mlp, SwiGLU
from torch import Tensor

from zoo.ffn import product_key
from zoo.ffn.layout import LayoutConfig
from zoo.ffn.parallel import ParallelConfig
from zoo.ffn.product_key import ProductKeyConfig, ProductKeyMemory
from zoo.ffn.s2ft import S2FTConfig
from zoo.ffn.technique import ffn_layers, rebuild, technique_module
from zoo.moe import (
    ExpertPruneConfig,
    entropy_loss,
    prune_experts,
    record_entropy,
    record_routing,
    set_top_k,
    sigma_moe,
)
from zoo.moe.experts import MoEFFN
from zoo.moe.router import Router
from zoo.moe.sigma_moe import SigmaMoEConfig, SigmaRouter

IMAGES = batches("timm", 1)[0][0]


def images(kind: str) -> Tensor:
    return batches(kind, 1)[0][0].double()


@pytest.mark.parametrize("kind", ["timm", "glu", "swiglu"])
def test_all_experts_at_gates_of_one_are_the_dense_layer(kind: str) -> None:
    """Gates of 1/2 with a second product twice as large, and gates of one with the layer's own channels."""
    model = build(kind).double()
    dense, x = copy.deepcopy(model), images(kind)
    names = list(ffn_layers(model))
    sigma_moe.apply(model, SigmaMoEConfig(experts=8, top_k=8, start="channels"))
    layers = [model.get_submodule(name) for name in names]
    assert all(isinstance(layer, MoEFFN) for layer in layers)
    for layer in layers:
        torch.nn.init.zeros_(layer.router.weight)
    expected = dense(x)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)
    for layer in layers:
        layer.experts_down.data.div_(2)
        layer.router = Router(layer.dim, 8, gate="unit", dtype=torch.float64)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)
    set_top_k(model, 7)
    assert not torch.allclose(model(x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 7, 197])
def test_experts_of_every_kind_of_layer_are_the_layer(tokens: int) -> None:
    torch.manual_seed(0)
    layers = {
        "no bias": Mlp(8, 32, bias=False),
        "relu, other width": Mlp(8, 32, out_features=6, act_layer=torch.nn.ReLU),
        "gated": SwiGLU(8, 32),
        "packed": FeedForward(8, activation_fn="geglu", inner_dim=32, bias=False),
    }
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    for name, layer in layers.items():
        expected = layer.double()(x)
        model = torch.nn.Sequential(layer).eval()
        sigma_moe.apply(model, SigmaMoEConfig(experts=8, top_k=8, start="channels"))
        torch.nn.init.zeros_(model[0].router.weight)
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-10), name


def test_a_token_takes_the_sum_of_its_experts_by_their_sigmoids() -> None:
    model = vit().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = sigma_moe.apply(model, SigmaMoEConfig(experts=4, top_k=2))
    layer: Any = model.get_submodule(report.layers[0].name)
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    gates = torch.sigmoid(x @ layer.router.weight.T)
    expected = torch.zeros_like(x) + layer.shared_down.bias
    for number in range(4):
        taken = (gates >= gates.topk(2).values[..., 1:])[..., number, None] * gates[..., number, None]
        up = F.linear(x, layer.experts_up[number], layer.experts_up_bias[number])
        expected = expected + taken * F.linear(F.gelu(up), layer.experts_down[number])
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    # 2 of 4 experts, and the router
    assert report.layers[0].macs == (2 * 16 * 64, 16 * 64 + 16 * 4)
    with record_routing(model) as summary:
        model(images("timm"))
    assert all(int(found.counts.sum()) == 2 * found.tokens for found in summary.layers.values())


def test_new_layers_start_as_a_dense_layer_of_as_many_channels() -> None:
    torch.manual_seed(0)
    model = vit(embed_dim=64, depth=2)
    sigma_moe.apply(model, SigmaMoEConfig(experts=8))
    layer: Any = model.blocks[0].mlp
    scale = math.sqrt(2 / 2)
    assert float(layer.experts_up.detach().std()) == pytest.approx(scale * 64**-0.5, rel=0.05)
    assert float(layer.experts_down.detach().std()) == pytest.approx(scale * 256**-0.5, rel=0.05)
    torch.testing.assert_close(layer.router.weight.norm(dim=1), torch.full((8,), scale))
    assert not layer.experts_up_bias.any()
    assert not layer.shared_down.bias.any()


def test_dropped_experts_are_not_chosen_while_others_are_left() -> None:
    torch.manual_seed(0)
    router = SigmaRouter(8, 6, dropout=0.5).train()
    x = torch.randn(500, 8)
    weights, index, logits = router(x, 1)
    torch.testing.assert_close(logits, x @ router.weight.T)
    best = logits.argmax(1, keepdim=True)
    assert 0.4 < float((index == best).float().mean()) < 0.6
    torch.testing.assert_close(weights, torch.sigmoid(logits.gather(1, index)) * (weights > 0))
    router.dropout = 0.999  # hardly any is left: what is chosen all the same weighs nothing
    weights, _, logits = router(x, 6)
    assert 0 < int((weights > 0).sum()) < 20
    assert logits.isfinite().all()
    assert torch.equal(router.eval()(x, 1)[1], best)


def test_entropy_of_the_batch_not_of_a_token() -> None:
    sure = 50.0 * torch.eye(4, dtype=torch.float64)
    assert float(entropy_loss(sure)) == pytest.approx(-math.log(4))
    assert float(entropy_loss(torch.zeros(9, 4))) == pytest.approx(-math.log(4), abs=1e-6)
    assert float(entropy_loss(sure[:1].expand(5, 4))) == pytest.approx(0, abs=1e-12)
    p = torch.tensor([[0.7, 0.3], [0.1, 0.9]], dtype=torch.float64)
    assert float(entropy_loss(p.log())) == pytest.approx(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    model = vit(depth=2)
    sigma_moe.apply(model)
    with record_entropy(model) as losses:
        model(IMAGES)
    assert len(losses) == 2
    sum(losses).backward()
    assert model.blocks[0].mlp.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scores", ["relu", "softmax"])
@pytest.mark.parametrize(("keys", "top_k"), [(7, 5), (7, 20), (3, 9), (1, 1)])
def test_memories_find_what_a_search_over_all_keys_finds(scores: Any, keys: int, top_k: int) -> None:
    torch.manual_seed(0)
    memory = ProductKeyMemory(8, 6, keys, top_k, heads=2, key_dim=10, scores=scores, batch_norm=scores == "softmax")
    memory = memory.double().eval()
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    query = memory.query(x)
    if memory.norm is not None:
        memory.norm.running_mean.normal_()
        query = memory.norm(query.flatten(0, 1)).view_as(query)
    query = query.unflatten(-1, (2, 10))
    expected = torch.zeros(3, 11, 6, dtype=torch.float64)
    for head in range(2):
        first, second = memory.keys[head]
        whole = torch.cat([first.repeat_interleave(keys, 0), second.repeat(keys, 1)], 1)  # all n * n keys
        best, index = (query[..., head, :] @ whole.T).topk(top_k)
        weights = best.relu() if scores == "relu" else best.softmax(-1)
        expected = expected + (weights.unsqueeze(-1) * memory.values.weight[index]).sum(-2)
    assert torch.allclose(memory(x), expected, rtol=0, atol=1e-10)


def test_all_values_of_a_relu_memory_are_a_dense_layer() -> None:
    memory = ProductKeyMemory(8, 8, 4, 16, heads=1).double()
    first, second = memory.keys[0]
    whole = torch.cat([first.repeat_interleave(4, 0), second.repeat(4, 1)], 1)
    x = torch.randn(5, 8, dtype=torch.float64)
    dense = F.relu(x @ (whole @ memory.query.weight).T) @ memory.values.weight
    assert torch.allclose(memory(x), dense, rtol=0, atol=1e-10)


def test_memories_have_no_more_parameters_than_the_layers_they_replace() -> None:
    model = vit(embed_dim=64, depth=2)
    report = product_key.apply(model)
    for layer in report.layers:
        assert 0.9 * layer.params[0] < layer.params[1] <= layer.params[0]
    memory: Any = model.blocks[0].mlp
    assert report.layers[0].macs[1] == 4 * 64 * 64 + memory.keys.numel() + 4 * 32 * 64


TECHNIQUES: dict[str, Any] = {
    "sigma_moe": SigmaMoEConfig(dropout=0.2),
    "product_key": ProductKeyConfig(keys=6, top_k=4, batch_norm=True, scores="softmax"),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("kind", ["timm", "dit"])
def test_layers_run_train_and_are_rebuilt_from_plain_facts(technique: str, kind: str) -> None:
    module = technique_module(technique)
    model = build(kind)
    fresh = copy.deepcopy(model)
    batch = batches(kind, 1, size=2)[0]
    arguments = {"hidden_states": batch[0]} if kind != "dit" else {k: v for k, v in batch.items() if k != "target"}

    def run(network: Any) -> Tensor:
        return network(batch[0]) if kind == "timm" else network(**arguments).sample

    assert module.apply(model, TECHNIQUES[technique]).layers
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(run(fresh.eval()), run(model.eval()))
        with torch.autocast("cpu", torch.bfloat16):
            assert run(model).isfinite().all()
        if kind == "timm":
            assert copy.deepcopy(model).bfloat16()(batch[0].bfloat16()).isfinite().all()
    model.train()
    run(model).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="already"):
        module.apply(model)


def test_pruned_experts_are_rebuilt_too() -> None:
    fresh, model = vit(), vit()
    sigma_moe.apply(model, SigmaMoEConfig(experts=8, top_k=2))
    prune_experts(model.eval(), ExpertPruneConfig(keep=3), batches("timm", 1))
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SigmaMoEConfig(experts=4.0), r"experts must be int, got 4\.0"),  # type: ignore[arg-type]
        (lambda: SigmaMoEConfig(top_k=True), "top_k must be int, got True"),
        (lambda: ProductKeyConfig(keys="8"), "keys must be int or nothing, got '8'"),  # type: ignore[arg-type]
        (lambda: ProductKeyConfig(batch_norm=1), "batch_norm must be bool, got 1"),  # type: ignore[arg-type]
        (lambda: ProductKeyConfig(pattern="["), r"pattern is no regular expression: '\['"),
        (lambda: S2FTConfig(share="1"), "share must be float, got '1'"),  # type: ignore[arg-type]
        (lambda: LayoutConfig(layout=5), "layout must be str or tuple, got 5"),  # type: ignore[arg-type]
        (lambda: ParallelConfig(pattern=5), "pattern must be str or nothing"),  # type: ignore[arg-type]
        (lambda: ExpertPruneConfig(keep=2.5), r"keep must be int, got 2\.5"),  # type: ignore[arg-type]
    ],
)
def test_values_of_another_type_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    assert S2FTConfig(share=1).share == LayoutConfig(ratio=2).ratio / 2 == 1  # a whole number is one


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"top_k must lie in 1 \.\.\. 16 \(experts\), got 17"):
        SigmaMoEConfig(top_k=17)
    with pytest.raises(ValueError, match="dropout is a rate"):
        SigmaMoEConfig(dropout=1.0)
    with pytest.raises(ValueError, match="start must be one of new, channels"):
        SigmaMoEConfig(start="exact")  # type: ignore[arg-type]
    model = vit()
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp cannot be replaced: 64 channels .* 10 experts; 8 fit"):
        sigma_moe.apply(model, SigmaMoEConfig(experts=10))
    with pytest.raises(ValueError, match="key_dim must be even"):
        ProductKeyConfig(key_dim=3)
    with pytest.raises(ValueError, match="top_k must be at most 16, the values of 4 keys"):
        ProductKeyConfig(keys=4)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp cannot be replaced: .* keys, which .* fewer heads"):
        product_key.apply(model, ProductKeyConfig(heads=8))
    assert not hasattr(model, "ffn_changes")
    with pytest.raises(ValueError, match="no technique 'sigma_mof'"):
        technique_module("sigma_mof")


def test_mixtures_are_exported_for_any_number_of_images() -> None:
    model = vit(depth=1)
    sigma_moe.apply(model, SigmaMoEConfig(experts=4, top_k=2))
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model.eval(), (IMAGES[:2],), dynamic_shapes=dynamic).module()
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES[:3]), model(IMAGES[:3]), rtol=1e-5, atol=1e-5)
