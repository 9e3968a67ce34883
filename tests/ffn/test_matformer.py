"""Nested widths: slices of the dense layers, one state dict, budgets, export to stock timm models."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import batches, build, vit

from zoo.ffn import matformer, prune
from zoo.ffn.matformer import MatFormerConfig
from zoo.ffn.technique import ffn_layers, model_output, note_change, rebuild

WIDTHS = (0.25, 0.5, 1.0)


@pytest.mark.parametrize("kind", ["timm", "glu", "swiglu", "dit"])
def test_a_width_is_the_dense_slice(kind: str) -> None:
    """Full width is the dense model, half width the model cut to its first channels; keys do not change."""
    dense = build(kind)
    nested, half = copy.deepcopy(dense), copy.deepcopy(dense)
    matformer.apply(nested, MatFormerConfig(widths=WIDTHS))
    assert list(nested.state_dict()) == list(dense.state_dict())
    for ffn in ffn_layers(half).values():
        prune.keep_channels(ffn, torch.arange(ffn.hidden_dim // 2))
    batch = batches(kind, 1)[0]
    with torch.no_grad():
        assert torch.equal(model_output(nested, batch), model_output(dense, batch))
        matformer.set_width(nested, 0.5)
        assert torch.allclose(model_output(nested, batch), model_output(half, batch), atol=1e-6)


def test_channels_beyond_the_width_get_no_gradient() -> None:
    model = vit(depth=1)
    matformer.apply(model, MatFormerConfig(widths=WIDTHS))
    matformer.set_width(model, 0.5)
    model(batches("timm")[0][0]).square().mean().backward()
    (ffn,) = ffn_layers(model).values()
    half = ffn.hidden_dim // 2
    assert not ffn.up.weight.grad[half:].any()
    assert not ffn.down.weight.grad[:, half:].any()
    assert ffn.up.weight.grad[:half].any()


def test_sorting_channels_changes_no_output() -> None:
    dense = vit().double()
    nested = copy.deepcopy(dense)
    data = [(images.double(), labels) for images, labels in batches("timm")]
    matformer.apply(nested, MatFormerConfig(widths=WIDTHS, scores="taylor"), data)
    with torch.no_grad():
        assert torch.allclose(nested(data[0][0]), dense(data[0][0]), atol=1e-10)
    assert not torch.equal(nested.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc1.weight)


def test_exported_width_loads_into_a_stock_model() -> None:
    nested = vit()
    matformer.apply(nested, MatFormerConfig(widths=WIDTHS))
    matformer.export_width(nested, 0.5)
    stock = vit(mlp_ratio=2)
    stock.load_state_dict(nested.state_dict(), strict=True)
    images = batches("timm")[0][0]
    with torch.no_grad():
        assert torch.equal(stock(images), nested(images))
    fresh = vit()
    rebuild(fresh, nested.ffn_changes)
    fresh.load_state_dict(nested.state_dict(), strict=True)


def test_the_width_in_use_is_saved_with_the_model() -> None:
    """What was chosen last comes back, in the place among techniques; files of before are at full width."""
    nested, images = vit(), batches("timm")[0][0]
    matformer.apply(nested, MatFormerConfig(widths=WIDTHS))
    note_change(nested, "skip", {})
    matformer.set_width(nested, 1.0)
    matformer.set_width(nested, 0.25)
    assert [change["technique"] for change in nested.ffn_changes] == ["matformer", "skip"]
    fresh, old = vit(), vit()
    rebuild(fresh, nested.ffn_changes[:1])
    rebuild(old, [{"technique": "matformer", "layers": {name: WIDTHS for name in nested.ffn_changes[0]["layers"]}}])
    with torch.no_grad():
        for model, width in ((fresh, 0.25), (old, 1.0)):
            model.load_state_dict(nested.state_dict(), strict=True)
            matformer.set_width(nested, width)
            assert torch.equal(model(images), nested(images))


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.5, 0.75, 1.0])
def test_mix_n_match_keeps_its_budget_and_never_falls(budget: float) -> None:
    model = vit(depth=6)
    matformer.apply(model, MatFormerConfig(widths=WIDTHS))
    widths = matformer.mix_n_match(model, budget, WIDTHS)
    assert widths == sorted(widths)
    assert sum(widths) / len(widths) <= budget + 1e-9
    assert sum(widths) / len(widths) > budget - 0.5 / 6 - 1e-9
    matformer.set_width(model, widths)


@pytest.mark.parametrize("sampling", ["uniform", "sandwich", "all"])
def test_training_takes_trained_widths(sampling: str) -> None:
    config = MatFormerConfig(widths=WIDTHS, sampling=sampling)
    drawn = [list(matformer.training_widths(config)) for _ in range(40)]
    assert {width for step in drawn for width in step} == set(WIDTHS)
    if sampling == "all":
        assert drawn[0] == list(WIDTHS)
    if sampling == "sandwich":
        assert all({0.25, 1.0} <= set(step) for step in drawn)
    if sampling == "uniform":
        assert all(len(step) == 1 for step in drawn)


def test_bad_input_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="shares that rise to 1"):
        MatFormerConfig(widths=(0.5, 0.25, 1.0))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp has 64 hidden channels, of which 0\.3 is no whole"):
        matformer.apply(vit(), MatFormerConfig(widths=(0.3, 1.0)))
    model = vit()
    with pytest.raises(ValueError, match="no nested widths"):
        matformer.set_width(model, 0.5)
    matformer.apply(model, MatFormerConfig(widths=WIDTHS))
    with pytest.raises(ValueError, match=r"the nearest that can is 0\.25"):
        matformer.mix_n_match(model, 0.1, WIDTHS)
    with pytest.raises(ValueError, match="3 are needed, got 2"):
        matformer.set_width(model, [0.5, 1.0])
    with pytest.raises(ValueError, match="already"):
        matformer.apply(model, MatFormerConfig(widths=WIDTHS))
