"""Conversion of whole models: exact, counted, saved, refused where it does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor, nn

import zoo
from tests.denoisers import condition, denoise, dit, flux, pixart, pixel_dit, sd3, wan
from zoo.diffusion import PixelDiTPipeline
from zoo.moe import (
    BlockGroup,
    MoBConfig,
    MoEConfig,
    activated_parameters,
    convert,
    expert_layers,
    mix_blocks,
    set_top_k,
    share_modulation,
    to_dense,
)
from zoo.weights import CheckpointError

DENOISERS = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "pixel_dit": pixel_dit}
RANDOM = MoEConfig(scores="random")


def converted(name: str, **changes: Any) -> tuple[nn.Module, Any]:
    """Return a tiny dense denoiser and its conversion without calibration, with routers that decide clearly."""
    model = DENOISERS[name]()
    moe, _ = convert(model, MoEConfig(**{"scores": "random", **changes}))
    for layer in expert_layers(moe).values():
        nn.init.normal_(layer.router.weight)
    return model, moe


def call(model: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return what a denoiser predicts for a batch of two."""
    sample, inputs = condition(model, 2)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    timestep = torch.tensor([0.9, 0.3] if "flux" in type(model).__name__.lower() else [900, 300])
    return model(sample.to(dtype), timestep=timestep, **inputs, return_dict=False)[0]


def zero_routers(model: nn.Module) -> None:
    for layer in expert_layers(model).values():
        nn.init.zeros_(layer.router.weight)


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_exact_with_all_experts_on(name: str) -> None:
    model, moe = converted(name, top_k=12)
    zero_routers(moe)
    in_single = call(model.float(), torch.float32), call(moe.float(), torch.float32)
    assert (in_single[0] - in_single[1]).abs().max() <= 1e-4 * in_single[0].abs().max()
    expected, found = call(model.double()), call(moe.double())
    assert (expected - found).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", DENOISERS)
def test_back_to_the_bit(name: str) -> None:
    model, moe = converted(name)
    dense = to_dense(moe)
    assert type(dense) is type(model)
    assert dict(dense.config).keys() == dict(model.config).keys()
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", DENOISERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    _, moe = converted(name)
    moe.set_top_k(3)
    moe.save_pretrained(tmp_path)
    loaded = type(moe).from_pretrained(tmp_path)
    assert loaded.config.moe["top_k"] == 3
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in moe.state_dict().items())
    torch.testing.assert_close(call(loaded, torch.float32), call(moe, torch.float32), rtol=1e-4, atol=1e-5)
    assert torch.equal(to_dense(loaded).state_dict().popitem()[1], to_dense(moe).state_dict().popitem()[1])


def test_missing_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, moe = converted("dit")
    moe.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["transformer_blocks.0.ff.experts_up"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts_(up|down)"):
        type(moe).from_pretrained(tmp_path)


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    import json

    _, moe = converted("dit")
    moe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe"]["experts"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts_(up|down)"):
        type(moe).from_pretrained(tmp_path)


def test_pipeline_round_trip(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    _, moe = converted("pixel_dit")
    pipe = PixelDiTPipeline(moe, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer).__name__ == "MoEPixelDiT"
    images = [p([1, 2], num_inference_steps=2, seed=0, output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("method", ["cg-taylor", "taylorseer"])
def test_cached(name: str, method: str) -> None:
    """Our caches take converted models as they take dense ones: with nothing skipped nothing changes."""
    _, moe = converted(name)
    exact = zoo.CGTaylorConfig(threshold=0) if method == "cg-taylor" else zoo.TaylorSeerConfig(interval=1)
    expected = denoise(moe)
    with zoo.cached(moe, exact):
        assert torch.equal(denoise(moe), expected)


@pytest.mark.parametrize("name", DENOISERS)
def test_counts(name: str) -> None:
    """1S12E2A activates 62.5 % less of the feed-forward weights, counted in the module tree."""
    model = DENOISERS[name]()
    moe, report = convert(model, RANDOM)
    layers = expert_layers(moe).values()
    routers = sum(layer.router.weight.numel() for layer in layers)
    weights = {True: 0, False: 0}
    for layer in layers:
        shared = layer.shared_up.weight.numel() + layer.shared_down.weight.numel()
        experts = layer.experts_up.numel() + layer.experts_down.numel()
        weights[False] += shared + experts
        weights[True] += shared + experts * 2 // 12
    assert weights[True] / weights[False] == 0.375
    assert report.params_after == report.params_before + routers
    biases = sum(layer.experts_up_bias.numel() * 10 // 12 for layer in layers if layer.experts_up_bias is not None)
    assert report.params_activated == report.params_after - (weights[False] - weights[True]) - biases
    assert "1S12E2A" in str(report)


def test_flux_arithmetic() -> None:
    """The published sizes of FLUX.1-MoE, from modules on the meta device."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    moe, report = convert(model, RANDOM)
    routers = sum(layer.router.weight.numel() for layer in expert_layers(moe).values())
    assert routers == 2_801_664
    assert report.params_activated - routers == 8_314_694_720  # 8.32 B
    moe.share_modulation()
    assert activated_parameters(moe) == pytest.approx(5.147e9, abs=1e6)  # L: 5.15 B
    assert sum(p.numel() for p in moe.parameters()) == pytest.approx(8.733e9, abs=1e6)
    for size, wanted in (("M", 3.96e9), ("S", 3.23e9), ("XS", 2.64e9)):
        mixed = copy.deepcopy(moe)
        mixed.mix_blocks(MoBConfig.flux(size))
        assert activated_parameters(mixed) == pytest.approx(wanted, abs=6e6)


@pytest.mark.parametrize("k", [0, 1, 12])
def test_top_k_changes_without_retraining(k: int) -> None:
    _, moe = converted("dit")
    set_top_k(moe, k)
    assert torch.isfinite(call(moe.double())).all()
    with pytest.raises(ValueError, match=r"0 \.\.\. 12"):
        set_top_k(moe, 13)
    assert {layer.top_k for layer in expert_layers(moe).values()} == {k}


def test_gradients_reach_experts_and_routers_with_checkpointing() -> None:
    _, moe = converted("sd3")
    moe.train().enable_gradient_checkpointing()
    call(moe, torch.float32).square().mean().backward()
    layers = expert_layers(moe)
    assert all(layer.router.weight.grad is not None and layer.router.weight.grad.any() for layer in layers.values())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "repavit_tiny"])
def test_vision_transformers(name: str) -> None:
    model = timm.create_model(name, depth=2, num_classes=5, img_size=32).eval()
    if name.startswith("repavit"):
        zoo.reparameterize(model, measure=False)
    model = model.double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    config = MoEConfig(shared=0.5 if name.startswith("repavit") else 1, experts=4, top_k=4)
    batches = [(images, torch.tensor([1, 2]))]
    moe, report = convert(model, config, calibration=batches)
    zero_routers(moe)
    torch.testing.assert_close(moe(images), model(images), rtol=1e-10, atol=1e-12)
    dense = to_dense(moe)
    assert torch.equal(dense(images), model(images))
    assert report.layers == 2


def test_lora_on_attention() -> None:
    peft = pytest.importorskip("peft")
    _, moe = converted("flux")
    moe.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert torch.isfinite(call(moe, torch.float32)).all()


@pytest.mark.parametrize("target", ["net.2", "proj_mlp"])
def test_lora_on_feed_forward_is_refused(target: str) -> None:
    """Its weights would not be among the experts."""
    peft = pytest.importorskip("peft")
    model = flux()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(ValueError, match=r"has an adapter \(LoRA\) on .* merge it first") as info:
        convert(model, MoEConfig(experts=2, top_k=1, scores="random"))
    assert "\n" not in str(info.value)


def test_compile_has_no_data_dependent_break() -> None:
    _, moe = converted("dit", top_k=2)
    compiled = torch.compile(moe, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = call(moe, torch.float32)
        torch.testing.assert_close(call(compiled, torch.float32), expected, rtol=1e-4, atol=1e-5)


class TestErrors:
    def test_layouts_that_fit_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"Layout 1S7E2A does not divide 64 .* 1S8E2A"):
            convert(dit(), "1S7E2A")

    def test_text_of_a_layout(self) -> None:
        assert MoEConfig.from_layout("1s12e2a").layout == "1S12E2A"
        with pytest.raises(ValueError, match="1S12E2A"):
            MoEConfig.from_layout("twelve experts")

    @pytest.mark.parametrize("wrong", [{"top_k": 13}, {"experts": 0}, {"shared": -1}, {"gate": "tanh"}])
    def test_wrong_numbers(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MoEConfig(**wrong)

    def test_calibration_is_needed(self) -> None:
        with pytest.raises(ValueError, match="needs calibration"):
            convert(dit())

    def test_unknown_models(self) -> None:
        with pytest.raises(ValueError, match=r"WanTransformer3DModel cannot be converted: known are DiT"):
            convert(wan(), RANDOM)
        with pytest.raises(ValueError, match="no feed-forward layer that is known"):
            convert(nn.Linear(2, 2), RANDOM)

    def test_twice(self) -> None:
        _, moe = converted("dit")
        with pytest.raises(ValueError, match="experts already"):
            convert(moe, RANDOM)

    def test_repavit_in_training_form(self) -> None:
        with pytest.raises(ValueError, match=r"zoo\.reparameterize"):
            convert(timm.create_model("repavit_tiny", depth=1), RANDOM)

    def test_nothing_to_turn_back(self) -> None:
        with pytest.raises(ValueError, match="no experts"):
            to_dense(dit())


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "pixel_dit"])
def test_shared_modulation(name: str, tmp_path: Path) -> None:
    _, moe = converted(name)
    before = sum(p.numel() for p in moe.parameters())
    saved = moe.share_modulation()
    assert saved == before - sum(p.numel() for p in moe.parameters()) > 0
    expected = call(moe, torch.float32)
    moe.save_pretrained(tmp_path)
    loaded = type(moe).from_pretrained(tmp_path)
    torch.testing.assert_close(call(loaded, torch.float32), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no modulation of its own"):
        share_modulation(moe)
    with pytest.raises(ValueError, match="no dense form"):
        to_dense(moe)


def test_shared_modulation_of_equal_blocks_is_exact() -> None:
    """Where all blocks have the same modulation, sharing it changes nothing."""
    model = sd3()
    source = model.transformer_blocks[0].norm1.linear.state_dict()
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            if norm.linear.weight.shape == source["weight"].shape:
                norm.linear.load_state_dict(source)
    model.double()
    expected = call(model)
    share_modulation(model)
    torch.testing.assert_close(call(model), expected, rtol=1e-6, atol=1e-7)  # the mean is taken in float32


def groups(name: str, active: int) -> MoBConfig:
    """Return one group of the first two blocks, and in Flux another of the single ones."""
    found = [BlockGroup(first=0, count=2, active=active)]
    if name == "flux":
        found.append(BlockGroup(blocks="single_transformer_blocks", first=0, count=2, active=active))
    return MoBConfig(groups=tuple(found))


@pytest.mark.parametrize("name", DENOISERS)
def test_all_blocks_active_is_the_dense_model(name: str) -> None:
    model = DENOISERS[name]()
    expected = call(model, torch.float32)
    mix_blocks(model, groups(name, 2))
    assert torch.equal(call(model, torch.float32), expected)  # with the gradient's gate
    with torch.no_grad():
        assert torch.equal(call(model, torch.float32), expected)


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_routing_a_batch_is_routing_its_samples(name: str) -> None:
    model = DENOISERS[name]().double()
    mix_blocks(model, groups(name, 1))
    for module in model.modules():
        if type(module).__name__ == "MixtureOfBlocks":
            module.tokens.weight.normal_(std=10)
            module.condition.weight.normal_(std=10)
    sample, inputs = condition(model, 4)
    inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    timestep = torch.tensor([0.9, 0.3, 0.5, 0.1] if name == "flux" else [900, 300, 500, 100])
    whole = model(sample.double(), timestep=timestep, **inputs, return_dict=False)[0]
    one = {k: (v if k.endswith("_ids") else v[:1]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    single = model(sample[:1].double(), timestep=timestep[:1], **one, return_dict=False)[0]
    torch.testing.assert_close(whole[:1], single, rtol=1e-10, atol=1e-12)


def test_no_block_active_is_the_identity() -> None:
    model, without = pixart(), pixart()
    without.load_state_dict(model.state_dict())
    mix_blocks(model, groups("pixart", 0))
    without.transformer_blocks = nn.ModuleList(without.transformer_blocks[2:])
    assert torch.equal(call(model, torch.float32), call(without, torch.float32))


def test_router_of_blocks_learns() -> None:
    model = dit().train()
    mix_blocks(model, groups("dit", 1))
    call(model, torch.float32).square().mean().backward()
    router = model.transformer_blocks[0]
    assert router.tokens.weight.grad.any()
    assert router.condition.weight.grad.any()


def test_mixed_model_is_saved(tmp_path: Path) -> None:
    _, moe = converted("flux")
    moe.mix_blocks(groups("flux", 1))
    expected = call(moe, torch.float32)
    moe.save_pretrained(tmp_path)
    loaded = type(moe).from_pretrained(tmp_path)
    torch.testing.assert_close(call(loaded, torch.float32), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="mixed already"):
        moe.mix_blocks(groups("flux", 1))


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="known: transformer_blocks"):
        mix_blocks(dit(), MoBConfig(groups=(BlockGroup(blocks="layers", first=0, count=2, active=1),)))
    with pytest.raises(ValueError, match="beyond the 3 blocks"):
        mix_blocks(dit(), MoBConfig(groups=(BlockGroup(first=2, count=2, active=1),)))
    with pytest.raises(ValueError, match="drops the text"):
        mix_blocks(sd3(), MoBConfig(groups=(BlockGroup(first=1, count=2, active=1),)))
    with pytest.raises(ValueError, match="2 or more blocks"):
        MoBConfig(groups=(BlockGroup(first=0, count=1, active=1),))
