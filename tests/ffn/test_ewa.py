"""Experts weights averaging: identities of the layer, the average and the collapse; the callback in a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers.models.attention import FeedForward
from lightning import Trainer
from timm.layers import Mlp
from torch import nn
from torch.utils.data import DataLoader

from zoo.ffn.ewa import (
    EWAConfig,
    ExpertsWeightsAveraging,
    apply,
    average,
    collapse,
    collapse_state_dict,
    expert_spread,
)
from zoo.tasks.callbacks import AverageExperts
from zoo.tasks.classification import Classification


def spread_layer(experts: int = 4) -> ExpertsWeightsAveraging:
    return ExpertsWeightsAveraging(Mlp(6, 12), experts, noise=0.5).double()


def weights(layer: ExpertsWeightsAveraging) -> torch.Tensor:
    """Return all weights of each expert (N, P)."""
    return torch.stack([nn.utils.parameters_to_vector(expert.parameters()) for expert in layer.experts]).detach()


@pytest.mark.parametrize("dense", [Mlp(6, 12), FeedForward(6)])
@pytest.mark.parametrize("tokens", [1, 3, 10, 16])
def test_equal_experts_are_the_dense_layer(dense: nn.Module, tokens: int) -> None:
    """For any partition, also where the tokens do not divide evenly."""
    layer = ExpertsWeightsAveraging(dense, 4)
    x = torch.randn(2, tokens, 6)
    torch.testing.assert_close(layer.train()(x), dense(x))
    torch.testing.assert_close(layer.eval()(x), dense(x))


def test_parts_differ_by_one_token_at_most() -> None:
    layer = spread_layer().train()
    sizes: list[int] = []
    for expert in layer.experts:
        expert.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    layer(torch.randn(1, 11, 6, dtype=torch.float64))
    assert sorted(sizes) == [2, 3, 3, 3]


def test_gradients_of_equal_experts_sum_to_the_dense_one() -> None:
    dense = Mlp(6, 12).double()
    layer = ExpertsWeightsAveraging(dense, 4).train()
    x, slope = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64)
    (dense(x) * slope).sum().backward()
    (layer(x) * slope).sum().backward()
    for name, parameter in dense.named_parameters():
        total = torch.stack([expert.get_parameter(name).grad for expert in layer.experts]).sum(0)  # type: ignore[misc]
        torch.testing.assert_close(total, parameter.grad)


@pytest.mark.parametrize(("experts", "rate"), [(4, 0.3), (2, 0.1), (3, 0.0)])
def test_average_keeps_the_mean_and_shrinks_deviations(experts: int, rate: float) -> None:
    layer = spread_layer(experts)
    before = weights(layer)
    layer.average(rate)
    after = weights(layer)
    torch.testing.assert_close(after.mean(0), before.mean(0))
    factor = 1 - rate * experts / (experts - 1)
    torch.testing.assert_close(after - after.mean(0), factor * (before - before.mean(0)))


def test_full_share_makes_experts_equal() -> None:
    layer = spread_layer(4)
    layer.average(3 / 4)
    torch.testing.assert_close(weights(layer), weights(layer)[:1].expand(4, -1))


def test_collapse_is_the_mean() -> None:
    model = nn.Sequential(spread_layer()).eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected, mean, state = model(x), weights(model[0]).mean(0), collapse_state_dict(model.state_dict())
    assert expert_spread(model) > 0.1
    assert collapse(model) == ["0"]
    assert isinstance(model[0], Mlp)
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), mean)
    torch.testing.assert_close(model(x), expected)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_which_layers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=5, num_classes=3, img_size=32)
    assert apply(model, EWAConfig(every=2)) == ["blocks.0.mlp", "blocks.2.mlp", "blocks.4.mlp"]
    with pytest.raises(ValueError, match="already"):
        apply(model)
    plain = timm.create_model("vit_tiny_patch16_224", depth=5, num_classes=3, img_size=32)
    assert apply(plain, EWAConfig(every=1, pattern=r"blocks\.[12]\.")) == ["blocks.1.mlp", "blocks.2.mlp"]
    with pytest.raises(ValueError, match="no feed-forward layer"):
        apply(nn.Linear(2, 2))


@pytest.mark.parametrize("wrong", [{"experts": 1}, {"share_rate": 1.5}, {"every": 0}, {"noise": -1.0}])
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EWAConfig(**wrong)


def test_callback(tmp_path: Path) -> None:
    """Experts drift apart in a training only as far as the average lets them, and its checkpoint becomes dense."""
    task = Classification("vit_tiny_patch16_224", num_classes=3, model_args=dict(depth=2, img_size=32))
    data = DataLoader([(torch.randn(3, 32, 32), index % 3) for index in range(8)], batch_size=4)
    dense = copy.deepcopy(task.model)
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AverageExperts(EWAConfig(every=1, share_rate=0.75))],
    )
    trainer.fit(task, data)
    assert expert_spread(task.model) < 1e-6  # 3/4 of 4 experts: equal after every step
    dense.load_state_dict(collapse_state_dict(task.model.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dense.eval()(x), task.model.eval()(x), rtol=1e-4, atol=1e-5)
    average(task.model, 0.1)


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [0, 3]), (4, [3]), (9, [3])], ids=str
)
def test_every_so_many_layers_are_counted_from_the_last(every: int, expected: list[int]) -> None:
    model = nn.Sequential(*(Mlp(4, 8) for _ in range(4)))
    assert apply(model, EWAConfig(every=every)) == [str(index) for index in expected]
    found = [index for index, layer in enumerate(model) if isinstance(layer, ExpertsWeightsAveraging)]
    assert found == expected


def test_noise_is_relative_to_each_weight() -> None:
    dense = nn.Linear(200, 200)
    with torch.no_grad():
        dense.weight.copy_(5 * torch.randn(200, 200))
    layer = ExpertsWeightsAveraging(dense, 2, noise=0.1)
    difference = layer.experts[0].weight - dense.weight
    assert float(difference.std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(layer.experts[0].weight, layer.experts[1].weight)
    plain = ExpertsWeightsAveraging(dense, 2)
    assert torch.equal(plain.experts[1].weight, dense.weight)
