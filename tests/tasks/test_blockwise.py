"""Learning rates by kind of block."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import zoo
from zoo.ffn import product_key
from zoo.ffn.product_key import ProductKeyConfig
from zoo.ffn.technique import ffn_layers, technique_module
from zoo.moe import sigma_moe
from zoo.moe.sigma_moe import SigmaMoEConfig
from zoo.tasks.blockwise import block_groups, kinds_of
from zoo.tasks.optim import OptimConfig


def vit(dim: int = 8) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=dim, num_heads=2, depth=2)


def test_every_parameter_has_one_kind() -> None:
    model = vit()
    kinds = kinds_of(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    wanted = {
        "pos_embed": "embedding",
        "cls_token": "other",
        "patch_embed.proj.weight": "embedding",
        "blocks.0.norm1.weight": "norm",
        "blocks.1.attn.qkv.weight": "attention",
        "blocks.1.mlp.fc2.bias": "ffn",
        "norm.bias": "norm",
        "head.weight": "other",
    }
    assert {name: kinds[name] for name in wanted} == wanted


def test_mixtures_and_memories_are_feed_forward_layers() -> None:
    model = vit()
    sigma_moe.apply(model, SigmaMoEConfig(experts=4, top_k=1, pattern=r"blocks\.0"))
    product_key.apply(model, ProductKeyConfig(top_k=2, heads=1, batch_norm=True, pattern=r"blocks\.1"))
    kinds = {name: kind for name, kind in kinds_of(model).items() if ".mlp." in name}
    assert {name for name, kind in kinds.items() if kind != "ffn"} == {
        "blocks.1.mlp.norm.weight",
        "blocks.1.mlp.norm.bias",
    }
    assert {"blocks.0.mlp.router.weight", "blocks.0.mlp.experts_up", "blocks.1.mlp.keys"} < kinds.keys()


TECHNIQUES = ["structured", "low_rank", "block_ffn", "hourglass", "versatile", "mofme", "freqnet", "s2ft", "matformer"]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_a_technique_puts_in_its_place_is_a_feed_forward_layer(technique: str) -> None:
    model = vit(16)
    technique_module(technique).apply(model, data=[torch.randn(2, 3, 16, 16)])
    kinds = {name: kind for name, kind in kinds_of(model).items() if ".mlp." in name}
    assert set(kinds.values()) <= {"ffn", "norm"}
    assert "ffn" in kinds.values()


def test_a_network_with_idle_channels_has_kinds() -> None:
    kinds = kinds_of(zoo.create_model("repavit_tiny", img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1))
    assert {kind for name, kind in kinds.items() if ".mlp." in name} == {"ffn", "norm"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.sa = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(x + self.sa(self.n(x), x, x)[0])


def test_the_nearest_name_counts_and_attention_has_its_class() -> None:
    """An own model, whose blocks stand inside of what is called an embedder."""
    model = nn.Sequential()
    model.embedder = nn.Sequential()
    model.embedder.patch, model.embedder.members = nn.Linear(12, 8), nn.ModuleList([Block(), Block()])
    model.t_embedder = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
    kinds = kinds_of(model)
    for number in range(2):
        block = f"embedder.members.{number}"
        assert {kinds[f"{block}.ff.0.weight"], kinds[f"{block}.ff.2.bias"]} == {"ffn"}
        assert {kinds[f"{block}.sa.in_proj_weight"], kinds[f"{block}.sa.out_proj.weight"]} == {"attention"}
        assert kinds[f"{block}.n.weight"] == "norm"
    assert {kinds["embedder.patch.weight"], kinds["t_embedder.0.weight"], kinds["t_embedder.2.weight"]} == {"embedding"}
    assert list(ffn_layers(model)) == ["embedder.members.0.ff", "embedder.members.1.ff"]


def test_one_step_is_scaled_by_kind() -> None:
    """Steps of plain gradient descent are the gradient times the factor, with a schedule and without."""
    model = vit()
    torch.manual_seed(0)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    factors = {"ffn": 3.0, "norm": 0.0, "attention": 2.0}
    kinds = kinds_of(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for lr in (None, 0.5):
        optimizer = torch.optim.SGD(block_groups(model, factors, 0.0, lr), lr=0.5)
        if lr is None:
            CosineLRScheduler(optimizer, 10).step(0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            step = 0.5 * factors.get(kinds[name], 1.0) * parameter.grad
            assert torch.allclose(parameter, before[name] - step, atol=1e-6)
            parameter.data.copy_(before[name])


def test_decay_spares_biases_norms_and_what_the_model_names() -> None:
    model = vit()
    groups = block_groups(model, {"ffn": 2.0}, 0.1)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name in model.no_weight_decay()
        assert (id(parameter) in decayed) != spared
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_wrong_factors_are_named() -> None:
    with pytest.raises(ValueError, match=r"no kind of block is called 'fnn'\. Did you mean ffn\?"):
        OptimConfig(block_lr={"fnn": 2.0})
    with pytest.raises(ValueError, match="must not be negative"):
        OptimConfig(block_lr={"ffn": -1.0})
    for wrong in (math.nan, math.inf, True, "2"):
        with pytest.raises(ValueError, match="the factor of ffn must be a number"):
            OptimConfig(block_lr={"ffn": wrong})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="block_lr and layer_decay both"):
        OptimConfig(block_lr={"ffn": 2.0}, layer_decay=0.7)
    with pytest.raises(ValueError, match="Sequential has no ffn parameters"):
        block_groups(nn.Sequential(nn.Linear(3, 3)), {"ffn": 2.0}, 0.0)
