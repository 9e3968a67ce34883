"""EfficientViT (MSRA): the authors' outputs, timm's keys both ways, every fold, every size, biases never stale."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from parity import protocol
from registered import randomize, relative
from timm.models import get_pretrained_cfg
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import zoo
from zoo.backbones.efficientvit_msra import checkpoint_filter_fn, detect
from zoo.bench.plain_backbones import PLAIN, plain_cascaded_attention, plain_residual
from zoo.layers.cascaded_attention import CascadedGroupAttention, WindowAttention
from zoo.layers.residual import ResidualConv
from zoo.weights import CheckpointError, load_strict

RECORDS = Path(__file__).parents[1] / "parity" / "efficientvit_m"
COUNTS = {  # (parameters, merged), computed with the authors' code; the detection form differs in its query kernels
    "m0": (2349436, 2334916),
    "m0_det": (2348668, 2334148),
    "m1": (2980560, 2964256),
    "m2": (4187554, 4168338),
    "m3": (6900722, 6875890),
    "m4": (8804228, 8776340),
    "m5": (12473772, 12436260),
}
VARIANTS = [f"efficientvit_msra_{size}" for size in COUNTS]
SMALL: dict[str, Any] = dict(embed_dim=(32, 48, 64), depth=(1, 1, 2), num_heads=(2, 3, 4), kernels=(7, 5, 3, 3))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small(**kwargs: Any) -> nn.Module:
    """Return a small model in evaluation mode, every number random, in float64."""
    model = timm.create_model("efficientvit_msra_m0", **{"num_classes": 5, **SMALL, **kwargs})
    return randomize(model.double()).eval()


def authors_state(size: str) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol; index tables hold nonsense."""
    entries = protocol.load(RECORDS / f"efficientvit_{size}")[0]["state_dict"]
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(entries).items()}
    for key, (shape, _) in entries.items():
        state.setdefault(key, torch.full(shape, 7))
    return state


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("size", ["m0", "m4"])
@torch.no_grad()
def test_parity_with_the_authors(size: str) -> None:
    """Logits, stem, stages and merged logits in float64 within 1e-10 of the authors' code; their own keys load."""
    record, outputs = protocol.load(RECORDS / f"efficientvit_{size}")
    model = timm.create_model(f"efficientvit_msra_{size}")
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(size), checkpoint_filter_fn)
    model.double().eval()
    x = torch.from_numpy(protocol.make_input(**record["input"])).double()
    assert protocol.rel_error(model(x), outputs["logits"]) < 1e-10
    found = {"stem": model.patch_embed(x)}
    found |= {f"stage{i}": stage for i, stage in enumerate(model.forward_intermediates(x)[1], 1)}
    for name, place in record["sampled"].items():
        step = int(place["index"].removeprefix("[:1, :, ::")[0])
        assert protocol.rel_error(found[place["of"]][:1, :, ::step, ::step], outputs[name]) < 1e-10, name
    assert zoo.reparameterize(model, measure=False).params_after == COUNTS[size][1]
    merged = model(x)
    for name in ("logits", "logits_fused"):
        assert protocol.rel_error(merged, outputs[name]) < 1e-10


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size: str) -> None:
    model = timm.create_model(f"efficientvit_msra_{size}", device="meta").eval()
    assert count(model) == COUNTS[size][0]
    report = zoo.reparameterize(model, measure=False)
    assert count(model) == COUNTS[size][1]
    assert count(timm.create_model(f"efficientvit_msra_{size}", device="meta", merged=True)) == COUNTS[size][1]
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    words = {word for layer in report.layers for word in layer.folded}
    assert words == {"norm", "residual", "query scale"}


@pytest.mark.parametrize("size", ["m0", "m4"])
@pytest.mark.parametrize("side", [224, 192])
@torch.no_grad()
def test_weights_move_to_timm_and_back(size: str, side: int) -> None:
    """The same keys, shapes and outputs, in both directions, without a conversion."""
    ours = randomize(timm.create_model(f"efficientvit_msra_{size}", img_size=side)).double().eval()
    theirs = timm.create_model(f"efficientvit_{size}", img_size=side).double()
    assert list(shapes(ours.state_dict()).items()) == list(shapes(theirs.state_dict()).items())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    assert relative(theirs.eval()(x), ours(x)) < 1e-10
    theirs = small_changes(theirs).eval()  # eval: timm keeps the biases of before the change otherwise
    expected = theirs(x)
    assert relative(ours(x), expected) > 1e-3
    load_strict(ours, theirs.state_dict(), checkpoint_filter_fn)
    assert relative(ours(x), expected) < 1e-10


def small_changes(model: nn.Module) -> nn.Module:
    """Return a copy with other parameters."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize(("height", "width"), [(224, 320), (97, 33), (16, 16)])
@torch.no_grad()
def test_any_size_equals_timm(height: int, width: int) -> None:
    """Maps that windows do not divide are padded, at the built size and at others."""
    for img_size in (224, (height, width)):
        ours = randomize(timm.create_model("efficientvit_msra_m0", img_size=img_size)).double().eval()
        theirs = timm.create_model("efficientvit_m0", img_size=img_size).double().eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        assert relative(ours(x), theirs(x)) < 1e-10
        zoo.reparameterize(ours, measure=False)
        assert relative(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("side", [192, 128, 64])
@torch.no_grad()
def test_windows_follow_the_input_size(side: int) -> None:
    """Tables are resized on load and by `set_input_size`, to the same numbers; and back up on load."""
    built, changed = small(img_size=side), small()
    state = {key: value.clone() for key, value in changed.state_dict().items()}
    load_strict(built, state, checkpoint_filter_fn)
    changed.set_input_size(side)
    sides = [module.attn.resolution for module in changed.modules() if isinstance(module, WindowAttention)]
    tokens = side // 16
    assert sides == [min(7, tokens), min(7, -(-tokens // 2)), *[min(7, -(-tokens // 4))] * 2]
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert torch.equal(changed(x), built(x))
    assert detect(built.state_dict()) is None  # no published size
    load_strict(small(), built.state_dict(), checkpoint_filter_fn)


@torch.no_grad()
def test_windows_of_eight_fit_256() -> None:
    model = small(img_size=256, window_size=8)
    load_strict(model, small().state_dict(), checkpoint_filter_fn)
    assert [stage.blocks[0].mixer.m.attn.resolution for stage in model.stages] == [8, 8, 4]
    assert model(torch.randn(1, 3, 256, 256, dtype=torch.float64)).shape == (1, 5)


def attention(resolution: int, heads: int, merged: bool) -> CascadedGroupAttention:
    attn = CascadedGroupAttention(24 * heads, 16, heads, resolution, (7, 5, 3, 3), dtype=torch.float64)
    randomize(attn)
    attn.attention_biases.data.normal_()
    if merged:
        zoo.reparameterize(attn.eval())
    return attn


@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
@pytest.mark.parametrize(("batch", "resolution", "heads"), [(1, 7, 4), (3, 4, 2), (2, 5, 3), (3, 1, 1)])
def test_attention_equals_the_plain_formulation(merged: bool, batch: int, resolution: int, heads: int) -> None:
    """Values and gradients, also in channels-last memory."""
    attn = attention(resolution, heads, merged)
    x = torch.randn(batch, 24 * heads, resolution, resolution, dtype=torch.float64)
    weights = torch.randn_like(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for run in (attn, MethodType(plain_cascaded_attention, attn)):
            given = x.to(memory_format=memory_format).requires_grad_()
            out = run(given)
            results.append((out, *torch.autograd.grad((out * weights).sum(), (given, *attn.parameters()))))
        for found, expected in zip(*results, strict=True):
            assert relative(found, expected) < 1e-10
    with torch.inference_mode():
        assert relative(attn.eval()(x), plain_cascaded_attention(attn, x)) < 1e-10


@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
@torch.no_grad()
def test_residual_convolution(merged: bool) -> None:
    layer = randomize(ResidualConv(6, dtype=torch.float64)).eval()
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    expected = x + layer.m(x)
    if merged:
        assert layer.reparameterize() == ("norm", "residual")
        assert layer.reparameterize() == ()
    assert relative(layer(x), expected) < 1e-12
    assert relative(plain_residual(layer, x), expected) < 1e-12


@torch.no_grad()
def test_plain_blocks_give_the_same_network() -> None:
    model = small()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    expected = model(x)
    zoo.reparameterize(model, measure=False)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module) in PLAIN["efficientvit_msra"]:
            module.forward = MethodType(PLAIN["efficientvit_msra"][type(module)], module)
    for found in (model(x), plain(x), plain(x)):
        assert relative(found, expected) < 1e-10
    assert model._embed(x).is_contiguous(memory_format=torch.channels_last)
    assert plain.patch_embed(x).is_contiguous()


def test_merged_model_can_be_fine_tuned() -> None:
    model = small()
    zoo.reparameterize(model, measure=False)
    for _ in range(2):
        model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("size", ["m0", "m4"])
def test_authors_files_are_recognised(size: str) -> None:
    """From keys and shapes alone; tables of indices are dropped."""
    state = {key: value.to("meta") for key, value in authors_state(size).items()}
    name, kwargs = detect(state)
    assert name == f"efficientvit_msra_{size}"
    assert kwargs == dict(in_chans=3, num_classes=1000, distillation=False, merged=False)
    model = timm.create_model(name, device="meta", **kwargs)
    assert shapes(checkpoint_filter_fn(state, model)) == shapes(model.state_dict())


ARGUMENTS: list[dict[str, Any]] = [
    dict(merged=True, num_classes=7),
    dict(img_size=192, in_chans=1),
    dict(img_size=256, window_size=8, num_classes=0),
    dict(img_size=96, window_size=(3, 3, 1)),
    dict(distillation=True),
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, ARGUMENTS[0]) for name in VARIANTS] + [("efficientvit_msra_m1", arguments) for arguments in ARGUMENTS[1:]],
)
def test_our_files_are_recognised(name: str, arguments: dict[str, Any]) -> None:
    state = timm.create_model(name, device="meta", **arguments).state_dict()
    found, kwargs = detect(state)
    assert found == name
    assert shapes(timm.create_model(found, device="meta", **kwargs).state_dict()) == shapes(state)


def test_other_networks_are_not_recognised() -> None:
    for name in ("repavit_tiny", "resnet18", "efficientvit_b0"):
        assert detect(timm.create_model(name, device="meta").state_dict()) is None
    assert detect({}) is None


@torch.no_grad()
def test_matrices_become_convolutions() -> None:
    """Some published files store 1x1 convolutions as matrices."""
    model, target = small(), small()
    small_state = {key: value.clone() for key, value in model.state_dict().items()}
    flat = {key: value[:, :, 0, 0] if value.shape[2:] == (1, 1) else value for key, value in small_state.items()}
    assert sum(value.ndim == 2 for value in flat.values()) > 20
    for parameter in target.parameters():
        parameter.zero_()
    load_strict(target, flat, checkpoint_filter_fn)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in small_state.items())


@torch.no_grad()
def test_a_detector_gives_its_backbone() -> None:
    authors = {key: value for key, value in authors_state("m4").items() if not key.startswith("head.")}
    state = {f"backbone.{key}": value for key, value in authors.items()} | {"neck.weight": torch.zeros(3)}
    model = timm.create_model("efficientvit_msra_m4", num_classes=0)
    load_strict(model, state, checkpoint_filter_fn)
    assert torch.equal(model.patch_embed.conv1.conv.weight, authors["patch_embed.0.c.weight"])


def test_classifier_is_left_out_without_classes() -> None:
    state = small().state_dict()
    model = small(num_classes=0)
    load_strict(model, state, checkpoint_filter_fn)
    assert not [key for key in model.state_dict() if key.startswith("head")]


def test_merged_weights_need_a_merged_model() -> None:
    state = small(merged=True).state_dict()
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(small(), state, checkpoint_filter_fn)
    load_strict(small(merged=True), state, checkpoint_filter_fn)


@pytest.mark.parametrize(("given", "wanted"), [("m0", "m0_det"), ("m0", "m1"), ("m4", "m3")])
def test_another_variant_is_refused(given: str, wanted: str) -> None:
    """The two kinds of M0 differ in query kernels only, and weights must not move between them."""
    state = timm.create_model(f"efficientvit_msra_{given}", device="meta").state_dict()
    model = timm.create_model(f"efficientvit_msra_{wanted}", device="meta")
    with pytest.raises(CheckpointError, match=r"wrong shape: .* for "):
        load_strict(model, state, checkpoint_filter_fn)


def test_distillation() -> None:
    """Two heads: a pair in training, the mean in evaluation, one averaged head after merging."""
    model = small(distillation=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    labels, teacher = model.train()(x)
    assert labels.shape == teacher.shape == (2, 5)
    (labels.sum() + teacher.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        expected = (model.head(features) + model.head_dist(features)) / 2
        assert torch.equal(model(x), expected)
        report = zoo.reparameterize(model, measure=False)
        assert report.layers[0].folded == ("second head",)
        assert relative(model(x), expected) < 1e-10
    assert count(model) == count(small(merged=True)) == count(small(merged=True, distillation=True))
    model.reset_classifier(3)
    assert model.head_dist.linear.out_features == 3
    model.reset_classifier(0)
    assert model.head_dist is None


@torch.no_grad()
def test_second_head_starts_as_the_first() -> None:
    """Published weights have one head; a file with two keeps both."""
    one, two = small(), small(distillation=True)
    load_strict(two, one.state_dict(), checkpoint_filter_fn)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative(two(x), one(x)) < 1e-12
    two.head_dist.linear.weight.mul_(2)
    again = small(distillation=True)
    load_strict(again, two.state_dict(), checkpoint_filter_fn)
    assert torch.equal(again(x), two(x))
    with pytest.raises(CheckpointError, match="head_dist"):
        load_strict(one, two.state_dict(), checkpoint_filter_fn)


@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
def test_biases_are_never_stale(merged: bool) -> None:
    """The hazards of the authors' and timm's kept biases: load after a forward, copies, types, second backward."""
    model, other = small(), small_changes(small())
    if merged:
        zoo.reparameterize(model, measure=False)
        zoo.reparameterize(other, measure=False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        before, expected = model(x), other(x)
        assert relative(before, expected) > 1e-3
    with torch.no_grad():
        for key, value in other.state_dict().items():  # only the tables, so that nothing else changes the output
            if key.endswith("attention_biases"):
                value.copy_(3 * model.state_dict()[key])
    for _ in range(2):  # evaluation with gradients, twice, and after inference mode
        model(x).sum().backward()
    assert not torch.allclose(copy.deepcopy(model)(x), other(x))
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        assert relative(model.float()(x.float()), other(x)) < 1e-3
        assert model.double()(x).dtype == torch.float64
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(gradient.square().sum(), x)[0]).all()
    assert model.train() is model


def test_features_at_all_stages() -> None:
    model = timm.create_model("efficientvit_msra_m0_det", features_only=True, out_indices=(0, 2))
    features = model(torch.randn(1, 3, 160, 224))
    assert [tuple(feature.shape) for feature in features] == [(1, 64, 10, 14), (1, 192, 3, 4)]
    assert model.feature_info.reduction() == [16, 64]


def test_pruned_to_the_stages_asked_for() -> None:
    model = small()
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.stages) == 2
    assert model.num_features == 48
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 48, 2, 2)


def test_layer_decay_and_weight_decay() -> None:
    """Rates fall towards the stem; tables of biases are not decayed."""
    model = timm.create_model("efficientvit_msra_m0")
    groups = param_groups_layer_decay(model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert scale["head.linear.weight"] == 1.0
    assert scale["patch_embed.conv1.conv.weight"] == min(scale.values())
    last, first = (f"stages.{i}.blocks.0.ffn0.m.pw1.conv.weight" for i in (2, 0))
    assert scale[last] > scale[first]
    assert {value for name, value in decay.items() if name.endswith("attention_biases")} == {0.0}


def test_drop_path() -> None:
    model = timm.create_model("efficientvit_msra_m5", device="meta", drop_path_rate=0.7)
    rates = [getattr(block.mixer.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize("size", ["m0", "m1", "m2", "m3", "m4", "m5"])
def test_published_weights(size: str) -> None:
    authors = get_pretrained_cfg(f"efficientvit_msra_{size}")
    assert authors.url.endswith(f"EfficientViT_Model_Zoo/releases/download/v1.0/efficientvit_{size}.pth")
    assert (authors.license, authors.crop_pct, authors.interpolation) == ("mit", 0.875, "bicubic")
    assert get_pretrained_cfg(f"efficientvit_msra_{size}.timm_in1k").hf_hub_id == f"timm/efficientvit_{size}.r224_in1k"


def test_unpublished_weights_say_so() -> None:
    with pytest.raises(CheckpointError, match="published no weights with the query kernels"):
        timm.create_model("efficientvit_msra_m0_det", pretrained=True, device="meta")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(embed_dim=(64, 128)), "one entry a stage"),
        (dict(window_size=(7, 7)), "one entry a stage"),
        (dict(num_heads=(4, 4, 5)), "multiples of 8 and of num_heads"),
        (dict(embed_dim=(60, 128, 192)), "multiples of 8"),
        (dict(kernels=(5, 5, 5)), "one for each of 4 heads"),
        (dict(kernels=(5, 5, 4, 5)), "kernels must be odd"),
        (dict(window_size=0), "window_size must be at least 1"),
        (dict(img_size=8), "img_size must be at least 16 pixels, got 8"),
        (dict(global_pool=""), "num_classes=0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("efficientvit_msra_m0", device="meta", **kwargs)


def test_bad_calls() -> None:
    model = small()
    with pytest.raises(ValueError, match="num_classes=0"):
        model.reset_classifier(5, "")
    with pytest.raises(RuntimeError, match="eval"):
        zoo.reparameterize(model.train())
    with pytest.raises(RuntimeError, match="eval"):
        model.reparameterize()
