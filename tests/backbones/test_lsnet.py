"""LSNet: the authors' outputs, the paper's sizes, every way to load and to change a model."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from parity import protocol
from registered import randomize
from torch import Tensor, nn

import zoo
from zoo.backbones.lsnet import ConvAttention, LSNet, checkpoint_filter_fn, detect
from zoo.bench.plain_backbones import PLAIN
from zoo.weights import CheckpointError, load_strict, save_checkpoint

RECORDS = Path(__file__).parents[1] / "parity" / "lsnet"
VARIANTS: dict[str, dict[str, Any]] = {"lsnet_t": {}, "lsnet_t_distill": dict(distillation=True)}
TINY = dict(dims=(16, 24, 32, 48), depths=(1, 2, 2, 2), num_classes=5)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def authors_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol; index tables and counters hold nonsense."""
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(record["state_dict"]).items()}
    for key, (shape, _) in record["state_dict"].items():
        state.setdefault(key, torch.full(shape, 7, dtype=torch.int64))
    return state


def tiny(**kwargs: Any) -> nn.Module:
    return randomize(timm.create_model("lsnet_t", **{**TINY, **kwargs})).eval()


def part(values: Tensor, index: str) -> Tensor:
    """Return what an index in words, "[:1, :, ::2]", stands for."""
    pieces = index.strip("[]").split(",")
    return values[tuple(slice(*(int(n) if n.strip() else None for n in piece.split(":"))) for piece in pieces)]


def check_record(model: nn.Module, record: dict[str, Any], outputs: dict[str, Any], x: Tensor) -> None:
    """Compare every quantity of a record that the model has in both forms."""
    final, stages = model.forward_intermediates(x)
    found = {f"stage{index}": stage for index, stage in enumerate(stages, 1)}
    found["stem"] = found["stage1"]  # stage 1 of T has no blocks
    found["logits"] = found["logits_fused"] = model.forward_head(final)
    for run in record["submodule_runs"]:
        given = torch.from_numpy(protocol.make_input(**run["input"])).double()
        stage = model.stages[3]
        assert isinstance(stage.blocks[1].mixer, ConvAttention)
        module = {"blocks4": stage, "blocks4.3.mixer.m": stage.blocks[1].mixer.attend}[run["module"]]
        found[run["output"]] = module(given)
    checked = set()
    for key, values in outputs.items():
        place = record["sampled"].get(key)
        name = key if place is None else place["of"]
        if name in found:
            ours = found[name] if place is None else part(found[name], place["index"])
            assert protocol.rel_error(ours.numpy(), values) < 1e-10, key
            checked.add(key)
    assert set(outputs) - checked <= {"logits_head", "logits_head_dist"}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_parity_with_the_authors(name: str) -> None:
    """All recorded outputs in float64 within 1e-10, before and after merging; the authors' own keys load."""
    record, outputs = protocol.load(RECORDS / name)
    model = timm.create_model("lsnet_t", **VARIANTS[name])
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(record), checkpoint_filter_fn)
    model.double().eval()
    x = torch.from_numpy(protocol.make_input(**record["input"])).double()
    check_record(model, record, outputs, x)
    if "logits_head" in outputs:
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert protocol.rel_error(model.head(pooled).numpy(), outputs["logits_head"]) < 1e-10
        assert protocol.rel_error(model.head_dist(pooled).numpy(), outputs["logits_head_dist"]) < 1e-10
    report = zoo.reparameterize(model, measure=False)
    assert report.params_after == 11370488  # theirs: 11755488 with distillation, as they keep both classifiers
    assert report.layers[0].folded[-1] == "channels-last layout"
    check_record(model, record, outputs, x)


COUNTS = {  # parameters; with distillation; merged (as the authors count, with one classifier)
    "lsnet_t": (11409832, 11795600, 11370488),
    "lsnet_s": (16146304, 16596200, 16098232),
    "lsnet_b": (23313608, 23827632, 23249320),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    plain, distilled, merged = COUNTS[name]
    assert count(timm.create_model(name, device="meta")) == plain
    assert count(timm.create_model(f"{name}.dist_in1k", device="meta")) == distilled
    for kwargs in ({}, dict(distillation=True)):
        model = timm.create_model(name, device="meta", **kwargs).eval()
        zoo.reparameterize(model, measure=False)
        assert count(model) == merged
    assert count(timm.create_model(name, device="meta", merged=True)) == merged


@pytest.mark.parametrize(("batch", "size"), [(1, (256, 256)), (3, (96, 160))])
@torch.no_grad()
def test_fast_forms_equal_plain_ones(batch: int, size: tuple[int, int]) -> None:
    """Merged or not, with every hot block in its plain form: the same outputs in float64."""
    model, x = tiny().double(), torch.randn(batch, 3, *size, dtype=torch.double)
    expected = model(x)
    for merge in (False, True):
        if merge:
            zoo.reparameterize(model, measure=False)
        rival = copy.deepcopy(model)
        for module in rival.modules():
            if type(module) in PLAIN["lsnet"]:
                module.forward = MethodType(PLAIN["lsnet"][type(module)], module)
        assert torch.allclose(model(x), expected, rtol=1e-9, atol=1e-9)
        assert torch.allclose(rival(x), expected, rtol=1e-9, atol=1e-9)


def test_a_merged_network_holds_one_map_of_a_step() -> None:
    """Activations overwrite their input, and the channels-last copy of the image goes with the first convolution."""
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    image, seen = x.clone(), []
    zoo.reparameterize(model, measure=False)
    for layer in model.stem:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].data_ptr(), output.data_ptr())))
    copies: list[weakref.ref[Tensor]] = []
    model.stem[0].register_forward_hook(lambda module, args, output: copies.append(weakref.ref(args[0])))
    model.stem[1].register_forward_hook(lambda module, args, output: copies.append(copies[0]()))
    with torch.no_grad():
        model(x)
    assert copies[1] is None
    assert [given == made for given, made in seen] == [False, True, False, True, False]
    assert torch.equal(x, image)


def test_distilled_training() -> None:
    """Both classifiers' outputs in training on request, their mean otherwise; merging makes one of them."""
    model, x = tiny(distillation=True), torch.randn(2, 3, 128, 128)
    mean = model(x)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(mean, (model.head(pooled) + model.head_dist(pooled)) / 2)
    assert [head.out_features for head in model.get_classifier()] == [5, 5]
    model.set_distilled_training()
    assert torch.equal(model(x), mean)
    logits, distilled = model.train()(x)
    assert logits.shape == distilled.shape == (2, 5)
    model.set_distilled_training(False)
    assert model(x).shape == (2, 5)
    mean = model.eval()(x)  # training mode moved the statistics
    assert "two classifiers" in zoo.reparameterize(model).layers[0].folded
    assert not [key for key in model.state_dict() if key.startswith("head_dist")]
    assert (model(x) - mean).abs().max() < 1e-4 * mean.abs().max()
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


@torch.no_grad()
def test_other_sizes_interpolate_the_biases() -> None:
    """At another size than `img_size` forward does what loading into a model of that size does."""
    model = tiny(depths=(1, 1, 1, 2), img_size=256)
    for size in (128, 320):
        other = tiny(depths=(1, 1, 1, 2), img_size=size)
        load_strict(other, model.state_dict(), checkpoint_filter_fn)
        assert other.stages[3].blocks[1].mixer.resolution == size // 64
        x = torch.randn(1, 3, size, size)
        expected = other(x)
        assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.isfinite(model(torch.randn(1, 3, 100, 230))).all()
    stages = timm.create_model("lsnet_t", features_only=True, **TINY).eval()(torch.randn(1, 3, 256, 320))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(16, 32, 40), (24, 16, 20), (32, 8, 10), (48, 4, 5)]


@pytest.mark.parametrize("name", VARIANTS)
def test_authors_files_are_recognised(name: str, tmp_path: Path) -> None:
    record, _ = protocol.load(RECORDS / name)
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in record["state_dict"].items()}
    found, kwargs = detect(state) or ("", {})
    assert found == "lsnet_t"
    assert kwargs == dict(in_chans=3, num_classes=1000, distillation="distill" in name, merged=False)
    model = timm.create_model(found, device="meta", **kwargs)
    converted = checkpoint_filter_fn(state, model)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert detect({key: value for key, value in state.items() if not key.startswith("blocks3.2")}) is None


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_files_are_recognised(name: str, merged: bool) -> None:
    arguments = dict(num_classes=7, in_chans=1, img_size=320, merged=merged)
    model = timm.create_model(name, device="meta", **arguments)
    assert detect(model.state_dict()) == (name, {**arguments, "distillation": False})


def test_a_file_in_the_authors_naming_becomes_a_model(tmp_path: Path) -> None:
    record, _ = protocol.load(RECORDS / "lsnet_t")
    save_checkpoint(authors_state(record), tmp_path / "authors.safetensors")
    model = zoo.create_model(str(tmp_path / "authors.safetensors"))
    assert isinstance(model, LSNet)
    assert model.stages[1].blocks[1].mixer.lkp.cv4.bias is not None


def test_weights_of_another_form_are_refused() -> None:
    trained, merged = tiny(), tiny(merged=True)
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(trained, merged.state_dict(), checkpoint_filter_fn)
    with pytest.raises(ValueError, match="merged=False"):
        load_strict(merged, trained.state_dict(), checkpoint_filter_fn)
    with pytest.raises(CheckpointError, match=r"unexpected: head_dist\.bn\.weight"):
        load_strict(trained, tiny(distillation=True).state_dict(), checkpoint_filter_fn)


def test_published_files() -> None:
    """One repository has all; new classes replace both distilled classifiers."""
    cfg = timm.models.get_pretrained_cfg("lsnet_s.dist_in1k")
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == ("jameslahm/lsnet", "lsnet_s_distill.pth")
    assert cfg.classifier == ("head.linear", "head_dist.linear")
    state = tiny(distillation=True).state_dict()
    overlay = dict(state_dict=state, num_classes=5)
    model = timm.create_model(
        "lsnet_t.dist_in1k", pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, "num_classes": 3}
    )
    assert torch.equal(model.head.bn.weight, state["head.bn.weight"])
    assert model.head_dist.linear.out_features == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dims=(16, 24)), "one entry a stage"),
        (dict(dims=(16, 24, 32, 44), depths=(1, 1, 1, 1)), "multiples of 8"),
        (dict(num_heads=7), r"num_heads \(7\)"),
        (dict(img_size=(224, 256)), "must be square, got \\(224, 256\\)"),
        (dict(global_pool="max"), "'avg' or '', got 'max'"),
        (dict(global_pool=""), "needs num_classes=0, got 1000"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("lsnet_t", device="meta", **kwargs)


def test_drop_path_rates() -> None:
    """None in the paper; otherwise linear in depth over all branches with a residual of their own."""
    model = timm.create_model("lsnet_t", device="meta", drop_path_rate=0.19)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.ffn.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.19, 20).tolist())
    assert blocks[-1].mixer.drop_path.drop_prob == pytest.approx(0.19)
    assert not [m for m in timm.create_model("lsnet_t", device="meta").modules() if type(m).__name__ == "DropPath"]
