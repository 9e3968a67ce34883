"""Calls that cannot go well: said in one line, with the model as it was; and models inside wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from small_models import vit
from timm.layers import Mlp
from torch import Tensor, nn

from zoo.ffn import depth, eugens, low_rank, prune, repa, snnk, structured
from zoo.ffn.compressing import METHODS, compress
from zoo.ffn.inspection import inspect_ffns
from zoo.ffn.technique import ffn_layers, rebuild

IMAGES = torch.rand(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(IMAGES, r"data is a tensor \(2, 3, 16, 16\), expected batches: .*\[data\]", id="a tensor"),
        pytest.param({"x": IMAGES}, r"data is a dict, expected batches: .*\[data\]", id="a batch of arguments"),
        pytest.param((IMAGES, torch.zeros(2)), r"tensors \(2, 3, 16, 16\) and \(2,\).*\[data\]", id="images, labels"),
        pytest.param("photos", "data is a str, expected batches", id="a folder"),
        pytest.param(3, "data is a int, expected batches", id="a number"),
        pytest.param([IMAGES[0]], r"cannot run a batch of \(3, 16, 16\) float32 on cpu: ", id="single images"),
        pytest.param([IMAGES.double()], r"\(2, 3, 16, 16\) float64 on cpu: ", id="another type"),
        pytest.param([IMAGES[:, :1]], r"\(2, 1, 16, 16\) float32 on cpu: ", id="other channels"),
        pytest.param([IMAGES.numpy()], "cannot run a batch of a ndarray: ", id="numpy"),
        pytest.param([{"pixels": IMAGES}], "A batch has 'pixels'", id="strange arguments"),
    ],
)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_data_that_the_model_cannot_take_are_described(method: str, data: Any, said: str) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said) as caught:
        compress(model, method, data)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "ffn_changes")


def test_inspection_describes_them_too() -> None:
    with pytest.raises(ValueError, match="cannot run a batch of"):
        inspect_ffns(vit(), [IMAGES[0]])


@pytest.mark.parametrize("config", [None, 3, prune.PruneConfig])
def test_what_is_no_configuration_is_said(config: Any) -> None:
    with pytest.raises(TypeError, match="config is a technique's configuration"):
        compress(vit(), config, [IMAGES])


@pytest.mark.parametrize("model", [lambda x: x, torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))])
def test_what_is_no_module_is_said(model: Any) -> None:
    with pytest.raises(TypeError, match=r"changes a torch\.nn\.Module, got a "):
        compress(model, "prune", [IMAGES])


@pytest.mark.parametrize("technique", [prune, snnk, structured])
def test_inference_mode_is_left_before_a_model_is_changed(technique: Any) -> None:
    """What is made inside can never be trained, and what was made there breaks in the middle of a change."""
    model = vit()
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"inference_mode\(\) is on"):
            technique.apply(model, data=[IMAGES])
        made_inside = vit()
    before = copy.deepcopy(made_inside.state_dict())
    with pytest.raises(ValueError, match=r"made inside torch\.inference_mode"):
        technique.apply(made_inside, data=[IMAGES])
    assert all(torch.equal(value, before[key]) for key, value in made_inside.state_dict().items())


def test_a_model_that_is_the_layer_itself_stays_as_it_was() -> None:
    layer = Mlp(8, 32)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"nn\.Sequential"):
        repa.apply(layer, repa.RePaConfig(), [torch.rand(16, 8)])
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_changes_are_noted_in_the_model_inside_data_parallel() -> None:
    model = vit()
    config = low_rank.LowRankConfig()
    compress(nn.DataParallel(model), config, [IMAGES])
    fresh = vit()
    rebuild(fresh, model.ffn_changes)  # type: ignore[arg-type]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
    with pytest.raises(ValueError, match="already"):
        compress(nn.DataParallel(model), config, [IMAGES])


def test_a_product_that_is_called_linear_and_is_another_one_is_told() -> None:
    class Linear(nn.Module):
        """As adapters call theirs."""

        in_features, out_features = 64, 256

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = vit()
    model.blocks[0].mlp.fc1 = Linear()  # type: ignore[operator,index,union-attr]
    with pytest.raises(ValueError, match=rf"product is a {__name__}\.Linear, expected nn\.Linear"):
        prune.apply(model, data=[IMAGES])


def test_what_swin_v2_cr_makes_its_positions_from_is_no_feed_forward_layer() -> None:
    model = timm.create_model(
        "swinv2_cr_tiny_224", img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2
    )
    assert list(ffn_layers(model)) == [f"stages.{place}.blocks.0.mlp" for place in range(4)]


@pytest.mark.parametrize(("technique", "part"), [(repa, "mlp"), (depth, "mlp"), (low_rank, "mlp.fc1")])
def test_hooks_of_the_user_stay(technique: Any, part: str) -> None:
    """On a layer that is replaced they see the new one's whole output, and a handle still takes them away."""
    model, x = vit(), torch.randn(4, 3, 16, 16)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda *of: seen.append(of[-1]))
        for name, module in model.named_modules()
        if name.endswith(part)
    ]
    with torch.no_grad():
        model(x)
        count = len(seen)
        technique.apply(model, data=[x])
        seen.clear()
        model(x)
        assert len(seen) == count
        module = model.blocks[-1].get_submodule(part)
        last: list[Tensor] = []
        module.register_forward_hook(lambda *of: last.append(of[-1]))
        model(x)
        assert torch.equal(seen[-1], last[0])
        for handle in handles:
            handle.remove()
        seen.clear()
        model(x)
    assert not seen


@pytest.mark.parametrize("technique", [prune, low_rank, repa, eugens, snnk])
def test_frozen_models_stay_frozen(technique: Any) -> None:
    """What stands in for a trained layer learnt on beside a new head, though the layer was frozen."""
    model = vit().requires_grad_(False)
    model.head.requires_grad_(True)
    technique.apply(model, data=[torch.randn(4, 3, 16, 16)])
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["head.weight", "head.bias"]


def test_thin_products_are_frozen_as_their_weight_and_bias() -> None:
    model = vit(depth=1)
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    low_rank.apply(model, data=[torch.randn(4, 3, 16, 16)])
    thin = model.blocks[0].mlp.fc1
    assert [parameter.requires_grad for parameter in thin.parameters()] == [False, False, True]
    assert all(parameter.requires_grad for parameter in model.blocks[0].mlp.fc2.parameters())
    low_rank.to_dense(model)
    dense = model.blocks[0].mlp.fc1
    assert (dense.weight.requires_grad, dense.bias.requires_grad) == (False, True)
