"""Networks are their modules: what users wrap, hook, quantise, trace or replace takes part in the result.

For the tiny smallest variant of every family, in training form (before merging) and merged.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import cache
from typing import Any

import pytest
import timm
import torch
from registered import BACKBONES, FAMILIES, RESTORERS, TINY, build, images, relative, smallest
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import zoo

FORMS = ("training", "merged")
EVERY = [(family, form) for family in FAMILIES for form in FORMS]


@cache
def _built(family: str, form: str) -> nn.Module:
    model = build(family)
    if form == "merged":
        zoo.reparameterize(model, measure=False)
    return model


def _model(family: str, form: str) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(_built(family, form)), images(family, 1)


class Adapter(nn.Module):
    """What adapters of users do: keep the layer, show its weights as their own, add to its output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out + 3 * torch.arange(out.numel()).sin().view(out.shape)


def _replaced(model: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Put another module in the place of a part, and return the part."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, part)
    return before


def _kinds(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the linear layers and convolutions, one of each kind: place in its block, even or odd block, shape."""
    found: dict[Any, tuple[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            odd = [int(index) % 2 for index in re.findall(r"(?<=blocks\.)\d+", name)]
            found.setdefault((re.sub(r"\b\d+\.", "", name), *odd, layer.weight.shape), (name, layer))
    return list(found.values())


@pytest.mark.parametrize(("family", "form"), EVERY)
@torch.no_grad()
def test_every_wrapped_layer_takes_part(family: str, form: str) -> None:
    model, x = _model(family, form)
    plain = model(x)
    idle = []
    for name, layer in _kinds(model):
        _replaced(model, name, Adapter(layer))
        if relative(model(x), plain) < 1e-6:
            idle.append(name)
        _replaced(model, name, layer)
    assert not idle
    assert torch.equal(model(x), plain)


SILENT = {  # modules that are not called in evaluation, and why
    "attn_drop": "timm hands its rate to the fused attention",
    "softmax": "timm's window attention keeps one beside the fused attention",
    "head": "timm's MetaFormer calls the parts of its head",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["evaluation", "no gradients", "training"])
def test_every_module_is_called_and_its_output_stays(family: str, mode: str) -> None:
    """In training form a hook on any module sees its output, once for each call, and nothing writes over it later."""
    model, x = _model(family, "training")
    model.train(mode == "training")
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).append(
            (out, out.clone()) if isinstance(out, Tensor) else (torch.zeros(0), torch.zeros(0))
        )

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    with torch.set_grad_enabled(mode != "no gradients"):
        model(x if mode != "training" else images(family, 2))
    silent = {
        name
        for name, module in model.named_modules()
        if name not in seen and not isinstance(module, nn.ModuleList) and name.rpartition(".")[2] not in SILENT
    }
    assert not silent
    changed = [name for name, outs in seen.items() if any(not torch.equal(out, copied) for out, copied in outs)]
    assert not changed
    if mode == "no gradients":
        assert not [name for name, outs in seen.items() if len(outs) > 4], "a module was called piece by piece"


@pytest.mark.parametrize(("family", "form"), EVERY)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization(family: str, form: str) -> None:
    model, x = _model(family, form)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert relative(quantized(x), _built(family, form)(x)) < 0.1


def _traced(model: nn.Module, tracer_kwargs: dict[str, Any]) -> nn.Module:
    """Extract the last node's output, as timm's own tests do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision compares the nodes of training and evaluation
        train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer_kwargs)
        return create_feature_extractor(
            model,
            train_return_nodes={train_nodes[-1]: "out"},
            eval_return_nodes={eval_nodes[-1]: "out"},
            tracer_kwargs=tracer_kwargs,
        )


TIMM_TRACER = dict(
    leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
)


@pytest.mark.parametrize(("family", "form"), [(family, form) for family in BACKBONES for form in FORMS])
@torch.no_grad()
def test_tracing_with_timms_leaves(family: str, form: str) -> None:
    """The first half of timm's test_model_forward_fx; its extractor, too, gives the same numbers to a bit."""
    model, x = _model(family, form)
    tolerance = 0.0 if form == "training" else 1e-6  # merged networks may run in parts, which a graph does not
    assert relative(_traced(model, TIMM_TRACER)(x)["out"], model(x)) <= tolerance


@pytest.mark.parametrize("family", BACKBONES)
def test_tracing_in_training(family: str) -> None:
    """timm's test_model_backward_fx: every parameter gets a gradient through the traced network."""
    model = build(family).train()
    traced = _traced(model, TIMM_TRACER).train()
    traced(images(family, 2))["out"].mean().backward()
    assert not [name for name, parameter in traced.named_parameters() if parameter.grad is None]
    assert sum(p.numel() for p in traced.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "form"), EVERY)
@torch.no_grad()
def test_plain_tracing_works_or_says_what_to_use(family: str, form: str) -> None:
    model, x = _model(family, form)
    try:
        traced = _traced(model, {})
    except TypeError as error:
        said = str(error)
        assert re.fullmatch("torch.fx cannot .*: use .*", said), said
    else:
        assert relative(traced(x)["out"], model(x)) < 1e-6


@pytest.mark.parametrize(("family", "form"), [(family, form) for family in BACKBONES for form in FORMS])
@pytest.mark.parametrize("training", [False, True])
def test_new_classifiers_keep_mode_device_and_type(family: str, form: str, training: bool) -> None:
    model = _model(family, form)[0].to(torch.float64).train(training)
    model.reset_classifier(7)
    assert all(module.training == training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    meta = _model(family, form)[0].to("meta")
    meta.reset_classifier(7)
    assert all(parameter.is_meta for parameter in meta.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_stays_on_meta(family: str) -> None:
    """A model built without memory computes as any other once weights are assigned to it, by itself or in another."""
    tiny, classes = TINY[family], {"num_classes": 10} if family in BACKBONES else {}
    expected, x = _model(family, "training")
    empty = timm.create_model(smallest(family), **{**classes, **tiny.kwargs}, device="meta").eval()
    outer = nn.Sequential(empty)
    outer.load_state_dict({f"0.{key}": value for key, value in expected.state_dict().items()}, assign=True)
    rest = [name for name, value in (*outer.named_parameters(), *outer.named_buffers()) if value.is_meta]
    assert not rest
    assert torch.equal(outer(x), expected(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_contiguous(family: str) -> None:
    model, _ = _model(family, "merged")
    assert not [key for key, value in model.state_dict().items() if not value.is_contiguous()]


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_in_inference_mode(family: str) -> None:
    """What is made there can be trained later, as if it had been made outside."""
    model, x = _model(family, "training")
    with torch.inference_mode():
        zoo.reparameterize(model)
    assert relative(model(x), _built(family, "merged")(x)) < 1e-6
    assert not [name for name, value in model.state_dict().items() if value.is_inference()]
    model(x).sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging_what_was_built_in_inference_mode(family: str) -> None:
    with torch.inference_mode():
        model, x = build(family), images(family, 1)
        zoo.reparameterize(model, measure=False)
        assert relative(model(x), _built(family, "merged")(x)) < 1e-6


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_default_cfgs_as_timm_reads_them(family: str) -> None:
    """timm's test_model_default_cfgs: sizes of features, classifiers and first convolutions are those of the cfg."""
    model = timm.create_model(smallest(family)).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["pool_size"] is not None
    features = model.forward_features(torch.rand(1, *cfg["input_size"]))
    if features.ndim == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        assert tuple(features.shape[1:3] if last else features.shape[2:]) == tuple(cfg["pool_size"])
    else:
        tokens = features.shape[1] - getattr(model, "num_prefix_tokens", 0)
        assert tokens == cfg["pool_size"][0] * cfg["pool_size"][1]
    for key in ("classifier", "first_conv"):
        names = cfg[key] if isinstance(cfg[key], (tuple, list)) else (cfg[key],)
        assert all(f"{name}.weight" in state for name in names)


@pytest.mark.parametrize("family", RESTORERS)
@torch.no_grad()
def test_streams_refuse_or_use_other_layers(family: str) -> None:
    """The strip engines compute with the weights of the network's own layers; they say so where one was replaced."""
    model, x = _model(family, "merged")
    if not hasattr(model, "stream"):
        pytest.skip("it has no strip engine")
    plain = model.stream(x)
    for name, layer in _kinds(model):
        _replaced(model, name, Adapter(layer))
        try:
            assert relative(model.stream(x), plain) > 1e-6, name
        except RuntimeError as error:
            said = str(error)
            assert re.search(rf"{re.escape(name)} \(Adapter\)", said), said
        _replaced(model, name, layer)
    assert relative(model.stream(x), plain) < 1e-6
