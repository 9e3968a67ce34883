"""Experts: bugs of one line that the other tests would let live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.denoisers import condition, flux, pixel_dit
from zoo.ffn.dense_ffn import read_ffn
from zoo.ffn.importance import score_channels
from zoo.moe import MoEConfig, convert
from zoo.moe.distillation import Distiller, StageSteps
from zoo.moe.losses import balance_loss, feature_loss, record_balance
from zoo.moe.router import Router

# --- balance


def test_balance_is_the_product_of_share_and_probability() -> None:
    """n sum_i s_i f_i P_i by hand, for choices that are not even."""
    logits, index = torch.randn(12, 4), torch.randint(0, 4, (12, 2))
    share = torch.tensor([(index == expert).sum() for expert in range(4)]) / 24
    scale = torch.tensor([1.0, 0.5, 2.0, 0.75])
    mean = logits.softmax(-1).mean(0)
    torch.testing.assert_close(balance_loss(logits, index), 4 * (share * mean).sum())
    torch.testing.assert_close(balance_loss(logits, index, scale), 4 * (scale * share * mean).sum())


@pytest.mark.parametrize(("given", "weight"), [({}, 0.75), ({"free_weight": 0.2}, 0.2)])
def test_experts_without_computation_weigh_less(given: dict[str, float], weight: float) -> None:
    """The last outputs of a router are free; those that compute count whole."""
    router = Router(8, 3, outputs=5)
    nn.init.normal_(router.weight)
    with record_balance(router, **given) as losses:
        _, index, logits = router(torch.randn(20, 8), 2)
    scale = torch.tensor([1.0, 1.0, 1.0, weight, weight])
    torch.testing.assert_close(losses[0], balance_loss(logits, index, scale))
    assert (index >= 3).any()
    assert (index < 3).any()


def test_the_distillation_loss_is_the_sum_of_its_parts() -> None:
    teacher = pixel_dit()
    student, _ = convert(teacher, MoEConfig(scores="random"))
    distiller = Distiller(student, teacher, StageSteps(shared=1, experts=1), balance=0.3)
    distiller.enter(1)
    sample, inputs = condition(teacher, 2)

    def call(model: nn.Module) -> torch.Tensor:
        return model(sample, timestep=torch.tensor([900, 300]), **inputs, return_dict=False)[0]

    found = distiller.compare(call)
    assert found.balance is not None
    assert float(found.balance) > 0.5
    norms = {}
    handles = [
        block.register_forward_hook(lambda _, args, out, name=name: norms.update({name: out.norm()}))
        for name, block in enumerate(teacher.transformer_blocks)
    ]
    with torch.no_grad():
        call(teacher)
    for handle in handles:
        handle.remove()
    all_norms = torch.stack(list(norms.values()))
    features = float(found.output * (all_norms.mean() / all_norms).sum())
    assert float(found.total) == pytest.approx(float(found.output) + features + 0.3 * float(found.balance), rel=1e-4)


# --- gradients of the distillation


def test_feature_weights_are_numbers() -> None:
    """The weighted error gives its own gradient alone: none through the distance, none through its weight."""
    teacher = {"a": torch.randn(2, 3), "b": torch.randn(2, 5)}
    student = {name: (value + 0.1).requires_grad_() for name, value in teacher.items()}
    distance = torch.tensor(0.3, requires_grad=True)
    total, errors = feature_loss(distance, student, teacher)
    total.backward()
    assert distance.grad is None
    norms = torch.stack([value.norm() for value in teacher.values()])
    for name, value in student.items():
        weight = 0.3 / errors[name].detach() * norms.mean() / teacher[name].norm()
        expected = weight * 2 * (value - teacher[name]).detach() / value.numel()
        torch.testing.assert_close(value.grad, expected)


# --- routers


def test_jitter_is_noise_of_training_alone() -> None:
    router, x = Router(8, 6, jitter=1.0), torch.randn(50, 8)
    router.eval()
    exact = x @ router.weight.t()
    torch.testing.assert_close(router(x, 2)[2], exact)
    assert torch.equal(router(x, 2)[1], router(x, 2)[1])
    router.train()
    noise = router(x, 2)[2] - exact
    assert float(noise.std()) == pytest.approx(1.0, rel=0.2)
    router.jitter = 0.0
    torch.testing.assert_close(router(x, 2)[2], exact)


@pytest.mark.parametrize("gate", ["softmax_n", "softmax", "softmax_renorm", "sigmoid", "unit"])
def test_gates_by_hand(gate: Any) -> None:
    """n counts the experts that compute; a free one is not multiplied."""
    router = Router(4, 3, outputs=5, gate=gate)
    nn.init.normal_(router.weight)
    x = torch.randn(30, 4)
    weights, index, logits = router(x, 2)
    probability = logits.softmax(-1)
    for row in range(30):
        chosen = logits[row].argsort(descending=True)[:2]
        assert set(index[row].tolist()) == set(chosen.tolist())
        for weight, expert in zip(weights[row], index[row].tolist(), strict=True):
            p = probability[row, expert]
            expected = {
                "softmax_n": p * (3 if expert < 3 else 1),
                "softmax": p,
                "softmax_renorm": p / probability[row, index[row]].sum(),
                "sigmoid": 2 * torch.sigmoid(logits[row, expert]),
                "unit": torch.ones(()),
            }[gate]
            torch.testing.assert_close(weight, expected)


# --- which channels are scored


@pytest.mark.parametrize("method", ["taylor", "taylor_sum", "activation"])
def test_the_mlp_channels_of_flux_are_scored(method: Any) -> None:
    """Attention comes first in the input of `proj_out`: its columns are no hidden channels."""
    model = flux()
    block = model.single_transformer_blocks[1]
    ffn = read_ffn(block)
    assert ffn is not None
    assert ffn.first_column == block.proj_out.in_features - block.proj_mlp.out_features > 0
    with torch.no_grad():
        block.proj_out.weight[:, ffn.first_column :] = 0
        block.proj_out.weight[:, ffn.first_column + 5] = 1
    sample, inputs = condition(model, 2)
    batch = {
        "hidden_states": sample,
        "timestep": torch.tensor([0.1, 0.5]),
        **inputs,
        "target": torch.zeros_like(sample),
    }
    scores, _ = score_channels(model, {"ff": ffn}, [batch], method=method)
    assert scores["ff"].shape == (ffn.hidden_dim,)
    if method == "activation":
        assert scores["ff"].nonzero().flatten().tolist() == [5]
    else:  # a column of zeros has a gradient, and rows without an output none
        assert int(scores["ff"].argmax()) == 5
        assert ffn.channels().down[:, 5].eq(1).all()


@pytest.mark.parametrize("order", ["value first", "gate first"])
def test_gated_channels_are_read_and_written_in_their_order(order: Any) -> None:
    from timm.layers import GluMlp

    layer = GluMlp(4, 12, gate_last=order == "value first")
    ffn = read_ffn(layer)
    assert ffn is not None
    assert ffn.packed == order
    channels = ffn.channels()
    value, gate = layer.fc1.weight.chunk(2) if order == "value first" else layer.fc1.weight.chunk(2)[::-1]
    assert torch.equal(channels.up[0], value)
    assert torch.equal(channels.up[1], gate)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    ffn.write(channels)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_the_mean_of_the_batches_is_scored() -> None:
    """Scores do not grow with their number, and all batches count alike."""
    from timm.layers import Mlp

    torch.manual_seed(0)
    layer = nn.Sequential(Mlp(4, 8))
    ffns = {"0": read_ffn(layer[0])}
    batches = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(3)]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    for method in ("taylor", "activation"):
        single = [score_channels(layer, ffns, [batch], method=method, loss=loss)[0]["0"] for batch in batches]
        together = score_channels(layer, ffns, batches, method=method, loss=loss)[0]["0"]
        torch.testing.assert_close(together, torch.stack(single).mean(0))


def test_agreement_of_halves_is_the_mean_over_layers() -> None:
    """Equal batches agree wholly, however many layers there are."""
    from timm.layers import Mlp

    torch.manual_seed(0)
    layers = nn.Sequential(Mlp(4, 8), Mlp(4, 8), Mlp(4, 8))
    ffns = {name: read_ffn(layer) for name, layer in layers.named_children()}
    batch = (torch.randn(3, 4), torch.randn(3, 4))
    agreement = score_channels(
        layers,
        ffns,
        [batch, batch],
        method="taylor",
        loss=lambda model, each: (model(each[0]) - each[1]).square().mean(),
    )[1]
    assert agreement == pytest.approx(1)


# --- sizes


def test_experts_without_computation_count_among_those_that_a_token_takes() -> None:
    every = dict(experts=4, pruned=1, zero=2, copies=1, constants=1)
    assert MoEConfig(**every, top_k=7).top_k == 7
    with pytest.raises(ValueError, match=r"top_k must lie in 0 \.\.\. 7 \(all experts\), got 8"):
        MoEConfig(**every, top_k=8)


@pytest.mark.parametrize("k", [2, 4])
def test_a_router_lives_on_the_device_that_it_is_given(k: int) -> None:
    router = Router(8, 4, device="meta")
    assert {parameter.device.type for parameter in router.parameters()} == {"meta"}
    assert {part.device.type for part in router(torch.empty(3, 8, device="meta"), k)} == {"meta"}
