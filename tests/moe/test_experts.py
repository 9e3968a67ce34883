"""Experts: exact regrouping, execution paths, gates, experts without computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from zoo.ffn.dense_ffn import read_ffn
from zoo.moe import experts as experts_module
from zoo.moe.experts import MoEFFN, masked_experts, sorted_experts

DIM, HIDDEN = 8, 32


def dense_layers() -> dict[str, nn.Module]:
    """Return feed-forward layers of every kind, in float64, the same in every call."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        name: FeedForward(DIM, activation_fn=name, inner_dim=HIDDEN)
        for name in ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
    }
    layers |= {
        "diffusers, no bias": FeedForward(DIM, activation_fn="swiglu", inner_dim=HIDDEN, bias=False),
        "Mlp": Mlp(DIM, HIDDEN),
        "Mlp, other width": Mlp(DIM, HIDDEN, out_features=6, act_layer=nn.ReLU, bias=(False, True)),
        "GluMlp": GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU),
        "GluMlp, gate first": GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
        "SwiGLU": SwiGLU(DIM, HIDDEN),
    }
    return {name: layer.double().eval() for name, layer in layers.items()}


def mixture(layer: nn.Module, *, top_k: int = 2, seed: int = 0, **kwargs: Any) -> MoEFFN:
    """Return a layer as 8 shared channels and 6 experts of 4, in a random order, with a router that decides."""
    ffn = read_ffn(layer)
    assert ffn is not None
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(seed))
    moe = MoEFFN.from_dense(ffn, shared_dim=8, experts=6, top_k=top_k, order=order, **kwargs).eval()
    moe.remember(layer)
    with torch.no_grad():
        moe.router.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return moe


def tokens(count: int = 13) -> Tensor:
    return torch.randn(2, count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", dense_layers())
@pytest.mark.parametrize("gate", ["softmax_n", "sigmoid", "unit"])
def test_all_experts_are_the_dense_layer(name: str, gate: Any) -> None:
    layer = dense_layers()[name]
    moe = mixture(layer, top_k=6, gate=gate)
    nn.init.zeros_(moe.router.weight)
    torch.testing.assert_close(moe(tokens()), layer(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", dense_layers())
def test_dense_again_to_the_bit(name: str) -> None:
    layer = dense_layers()[name]
    dense = mixture(layer).to_dense()
    assert type(dense) is type(layer)
    assert dense.training == layer.training
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in layer.state_dict().items())
    assert torch.equal(dense(tokens()), layer(tokens()))


@pytest.mark.parametrize("name", ["gelu-approximate", "geglu", "SwiGLU"])
def test_no_experts_is_the_layer_without_their_channels(name: str) -> None:
    layer = dense_layers()[name]
    moe = mixture(layer, top_k=0)
    ffn = read_ffn(layer)
    assert ffn is not None
    with torch.no_grad():
        ffn.down.weight[:, moe.channel_index[8:]] = 0
    torch.testing.assert_close(moe(tokens()), layer(tokens()), rtol=1e-12, atol=1e-12)


def test_unchosen_experts_are_masked_channels() -> None:
    """With weights of 1 and k experts a token gets the dense layer without the channels of the others."""
    layer = dense_layers()["Mlp"]
    moe = mixture(layer, gate="unit")
    rows = tokens().reshape(-1, DIM)
    index = moe.router(rows, 2)[1]
    mask = torch.zeros(len(rows), 6, dtype=torch.float64).scatter_(1, index, 1.0).repeat_interleave(4, dim=1)
    kept = torch.ones(len(rows), HIDDEN, dtype=torch.float64)
    kept[:, moe.channel_index[8:]] = mask
    expected = F.linear(layer.act(layer.fc1(rows)) * kept, layer.fc2.weight, layer.fc2.bias)
    torch.testing.assert_close(moe(rows), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["sorted", "grouped"])
@pytest.mark.parametrize(("count", "everyone"), [(1, None), (13, None), (40, 3), (13, 0)])
@pytest.mark.parametrize("gated", [False, True])
def test_sorted_path_is_the_masked_loop(path: str, count: int, everyone: int | None, gated: bool) -> None:
    """Values and gradients agree, for one token, empty experts, and where all tokens take the same ones."""
    layer = FeedForward(DIM, activation_fn="geglu" if gated else "gelu", inner_dim=HIDDEN)
    moe = mixture(layer)
    rows = torch.randn(count, DIM, requires_grad=True)
    weights, index, _ = moe.router(rows, 2)
    if everyone is not None:
        index = torch.tensor([[everyone, everyone + 1]]).expand(count, 2).contiguous()
    start = torch.zeros(count, DIM)
    if path == "sorted":
        found = sorted_experts(moe, rows, weights, index, start)
    else:
        flat, order = index.flatten().sort(stable=True)
        pair = weights.flatten()[order].unsqueeze(1)
        found = experts_module._grouped(moe, rows, pair, flat, order // 2, order, start)
    expected = masked_experts(moe, rows, weights, index)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = [rows, moe.experts_up, moe.experts_up_bias, moe.experts_down, moe.router.weight]
    slope = torch.randn(count, DIM)
    theirs = torch.autograd.grad((expected * slope).sum(), wanted, retain_graph=True)
    for ours, other in zip(torch.autograd.grad((found * slope).sum(), wanted), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_without_gradient_equals_with() -> None:
    moe = mixture(dense_layers()["Mlp"])
    with torch.no_grad():
        inference = moe(tokens())
    torch.testing.assert_close(inference, moe(tokens()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    moe = mixture(dense_layers()["Mlp"]).to(dtype)
    out = moe(tokens().to(dtype))
    assert out.dtype == dtype
    with torch.no_grad():
        reference = moe.double()
        exact = reference(tokens().to(dtype).double())
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_only_chosen_experts_learn() -> None:
    moe = mixture(dense_layers()["Mlp"])
    rows = torch.randn(1, DIM, dtype=torch.float64)
    _, index, _ = moe.router(rows, 2)
    moe(rows).square().sum().backward()
    touched = {number for number in range(6) if moe.experts_up.grad is not None and moe.experts_up.grad[number].any()}
    assert touched == set(index[0].tolist())


def test_router_gradient() -> None:
    """The gradient of the logits of chosen experts is right, with the choice held fixed."""
    moe = mixture(dense_layers()["Mlp"])
    rows = tokens().reshape(-1, DIM)[:3]
    assert torch.autograd.gradcheck(lambda x: moe(x), (rows.requires_grad_(),), eps=1e-6)


def test_more_experts_without_retraining() -> None:
    layer = dense_layers()["Mlp"]
    moe = mixture(layer)
    errors = []
    for k in range(7):
        moe.set_top_k(k)
        nn.init.zeros_(moe.router.weight)
        errors.append((moe(tokens()) - layer(tokens())).norm().item())
    assert errors[6] < 1e-12 < errors[0]
    with pytest.raises(ValueError, match=r"0 \.\.\. 6"):
        moe.set_top_k(7)


def test_literal_softmax_is_softmax_n_after_scaling() -> None:
    layer = dense_layers()["Mlp"]
    gates: tuple[Any, ...] = ("softmax", "softmax_n")
    a, b = (mixture(layer, gate=gate) for gate in gates)
    with torch.no_grad():
        a.experts_down.mul_(6)
    torch.testing.assert_close(a(tokens()), b(tokens()), rtol=1e-12, atol=1e-12)


def test_renormalised_weights_sum_to_one() -> None:
    moe = mixture(dense_layers()["Mlp"], gate="softmax_renorm")
    weights, _, _ = moe.router(tokens().reshape(-1, DIM), 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(26, dtype=torch.float64))


def forced(moe: MoEFFN, number: int) -> MoEFFN:
    """Send every token to one expert, with weight 1."""
    moe.set_top_k(1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.fill_(-1e4)
        moe.router.bias[number] = 1e4
        for parameter in (moe.shared_up.weight, moe.shared_down.weight, moe.shared_down.bias):
            parameter.zero_()
    return moe


class TestFreeExperts:
    """Experts without computation (MoE++): 6 that compute, then zero, copy, constant."""

    @pytest.fixture
    def moe(self) -> MoEFFN:
        return mixture(dense_layers()["Mlp"], zero=1, copies=1, constants=1)

    def test_zero_gives_nothing(self, moe: MoEFFN) -> None:
        assert not forced(moe, 6)(tokens()).any()

    def test_copy_gives_the_input(self, moe: MoEFFN) -> None:
        assert torch.equal(forced(moe, 7)(tokens()), tokens())

    def test_constant_can_be_a_copy_or_a_vector(self, moe: MoEFFN) -> None:
        forced(moe, 8)
        vector = torch.randn(DIM, dtype=torch.float64)
        rows = tokens().abs()
        with torch.no_grad():
            moe.constant_vector[0] = vector
            moe.constant_mix[0, 0], moe.constant_mix[0, 1] = 1e4, -1e4
            assert torch.equal(moe(rows), rows)
            moe.constant_mix.neg_()
            torch.testing.assert_close(moe(rows), vector.expand_as(rows))

    def test_no_expert_computes_for_them(self, moe: MoEFFN, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        monkeypatch.setattr(MoEFFN, "expert", lambda self, number, rows: calls.append(number))
        forced(moe, 7)(tokens())
        assert calls == []

    def test_none_is_a_plain_mixture(self, moe: MoEFFN) -> None:
        """With logits far below, experts without computation change nothing."""
        plain = mixture(dense_layers()["Mlp"])
        with torch.no_grad():
            moe.router.weight[6:] = 0
            moe.router.weight[:6] = plain.router.weight
            moe.router.bias[6:] = -1e4
        torch.testing.assert_close(moe(tokens()), plain(tokens()), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("path", ["sorted", "grouped"])
    def test_paths_agree(self, moe: MoEFFN, path: str) -> None:
        moe.float().set_top_k(4)
        with torch.no_grad():
            moe.router.bias.zero_()
        rows = tokens().float().reshape(-1, DIM)
        weights, index, _ = moe.router(rows, 4)
        expected = masked_experts(moe, rows, weights, index)
        start = torch.zeros(len(rows), DIM)
        flat, order = index.flatten().sort(stable=True)
        pair = weights.flatten()[order].unsqueeze(1)
        found = (
            sorted_experts(moe, rows, weights, index, start)
            if path == "sorted"
            else experts_module._grouped(moe, rows, pair, flat, order // 4, order, start)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_empty_input() -> None:
    moe = mixture(dense_layers()["Mlp"])
    assert moe(torch.zeros(2, 0, DIM, dtype=torch.float64)).shape == (2, 0, DIM)


@pytest.mark.parametrize("top_k", [0, 2, 6])
def test_compile_in_one_graph(top_k: int) -> None:
    moe = mixture(dense_layers()["Mlp"], top_k=top_k).float()
    compiled = torch.compile(moe, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens().float()), moe(tokens().float()), rtol=1e-4, atol=1e-5)


def test_compile_where_grouped_products_are_of_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 traces them in bfloat16 alone."""
    monkeypatch.setattr(experts_module, "_GROUPED_TYPES", frozenset({torch.bfloat16}))
    monkeypatch.setattr(experts_module, "_grouped", lambda *args: pytest.fail("a grouped product"))
    moe, x = mixture(dense_layers()["Mlp"], top_k=2).float(), tokens().float()
    with torch.no_grad():
        found = torch.compile(moe, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, moe(x), rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    ffn = read_ffn(Mlp(DIM, HIDDEN))
    assert ffn is not None
    with pytest.raises(ValueError, match="24 hidden channels cannot be split evenly among 5"):
        MoEFFN.from_dense(ffn, shared_dim=8, experts=5, top_k=1)
    with pytest.raises(ValueError, match="norm between"):
        read_ffn(Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match="Activation Tanh"):
        read_ffn(Mlp(DIM, HIDDEN, act_layer=nn.Tanh))
    with pytest.raises(ValueError, match="use_conv"):
        read_ffn(Mlp(DIM, HIDDEN, use_conv=True))
    assert read_ffn(nn.Linear(2, 2)) is None
