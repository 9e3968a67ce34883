"""A cache beside LoRA, offloading and modular pipelines: in every order what it is when enabled last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caching.tiny_pipelines import Subject, flux_text_to_image, flux_transformer
from diffusers import FluxPipeline
from diffusers.modular_pipelines import FluxAutoBlocks
from hooked import assert_clean
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipeline_folders import flux_parts
from torch import Tensor

import zoo
from zoo import CGTaylorConfig
from zoo.caching.hooks import placed_hooks

STEPS = 5
EVERYTHING = 1e6  # a threshold that no error reaches
CHANGED = 6  # step from which on a callback's change holds
CPU = torch.device("cpu")
Step = Callable[[Any], object]


def adapter(seed: int) -> dict[str, Tensor]:
    """Return the weights of a LoRA that changes what a Flux computes."""
    model = flux_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False), "x")
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{key}": 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in get_peft_model_state_dict(model, adapter_name="x").items()
    }


def computed_of(pipe: Any) -> list[set[int]]:
    """Return the steps in which each block was computed, but the first, which decides."""
    (denoiser,) = zoo.cache_summary(pipe).denoisers
    return [set(unit.computed) for unit in denoiser.units if unit.unit != "first block"]


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    first, second = adapter(0), adapter(1)
    return {
        "load": lambda pipe: pipe.load_lora_weights(dict(first), adapter_name="a"),
        "load another": lambda pipe: pipe.load_lora_weights(dict(second), adapter_name="b"),
        "set": lambda pipe: pipe.set_adapters(["a", "b"], [0.5, 0.7]),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
        "offload models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        "offload groups": lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level"),
        "offload blocks": lambda pipe: pipe.transformer.enable_group_offload(
            CPU, offload_type="block_level", num_blocks_per_group=1
        ),
    }


def made(config: Any, order: tuple[str, ...], steps: dict[str, Step], *, first: bool) -> tuple[Tensor, Tensor]:
    """Enable the cache before or after the steps, and return a run with it, and one after it is gone."""
    subject = flux_text_to_image()
    if first:
        zoo.enable_cache(subject.pipe, config)
    for name in order:
        steps[name](subject.pipe)
        if first:
            run(subject, 1)  # what is stored must not outlive the next change
    if not first:
        zoo.enable_cache(subject.pipe, config)
    cached = run(subject)
    zoo.disable_cache(subject.pipe)
    assert not [placed for placed in placed_hooks(subject.pipe.transformer) if placed.name.startswith("zoo_")]
    return cached, run(subject)


def run(subject: Subject, count: int = STEPS) -> Tensor:
    return subject.run(count, true_cfg_scale=1.0)


ORDERS = (
    ("load", "fuse", "unfuse"),
    ("load", "load another", "set"),
    ("load", "fuse", "unload"),
    ("load", "offload models"),
    ("offload groups", "load"),
    ("load", "fuse", "offload blocks"),
)


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_every_order(order: tuple[str, ...], steps: dict[str, Step]) -> None:
    """Enabled first or last it does the same; threshold 0 is exact; and it goes away without a trace."""
    plain = flux_text_to_image()
    for name in order:
        steps[name](plain.pipe)
    expected = run(plain)
    config = zoo.TaylorSeerConfig(interval=2)
    (first, without_first), (last, without_last) = (made(config, order, steps, first=first) for first in (True, False))
    assert torch.equal(first, last)
    assert not torch.equal(last, expected)
    assert torch.equal(without_first, expected)
    assert torch.equal(without_last, expected)
    assert torch.equal(made(zoo.CGTaylorConfig(threshold=0.0), order, steps, first=True)[0], expected)


def test_modular_pipelines() -> None:
    """Their denoiser is found, and the steps of a run are those of its scheduler."""
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**flux_parts())
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        size = dict(height=16, width=16, num_inference_steps=5)
        return pipe(prompt="a cat", generator=torch.manual_seed(0), output="images", output_type="pt", **size)

    expected = run()
    with zoo.cached(pipe, zoo.TaylorSeerConfig(interval=2)):
        first = run()
        assert not torch.equal(first, expected)
        assert torch.equal(run(), first)
        assert "5 steps, 1 with something left out" in str(zoo.cache_summary(pipe))
    assert_clean(pipe.transformer)
    assert torch.equal(run(), expected)
    assert zoo.accelerate(pipe).zoo_report.steps


@pytest.mark.parametrize("arguments", [{}, {"device_map": "cpu"}, {"device_map": "balanced"}], ids=str)
def test_sharded_weights_and_device_maps(arguments: dict[str, str], sharded: Path) -> None:
    """What is loaded in parts, and placed by a map, is cached exactly and made a mixture of experts."""
    pipe = zoo.create_pipeline(str(sharded), **arguments)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        size = dict(height=16, width=16, num_inference_steps=STEPS)
        return pipe("a cat", generator=torch.manual_seed(0), output_type="pt", **size).images

    expected = run()
    with zoo.cached(pipe, zoo.CGTaylorConfig(threshold=0.0)):
        assert torch.equal(run(), expected)
    with zoo.cached(pipe, zoo.TaylorSeerConfig(interval=2)):
        first = run()
        assert not torch.equal(first, expected)
        assert torch.equal(run(), first)
    assert torch.equal(run(), expected)
    config = zoo.MoEConfig(experts=2, top_k=2, scores="random")
    pipe.transformer, _ = zoo.moe.convert(pipe.transformer, config)
    torch.testing.assert_close(run(), expected, atol=1e-3, rtol=0)  # all experts on


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux whose transformer lies in several files."""
    folder = tmp_path_factory.mktemp("flux")
    FluxPipeline(**flux_parts()).save_pretrained(folder, max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.set_adapters(["a"], [0.4]),
        lambda pipe: pipe.set_adapters(["b"], [0.9]),
        lambda pipe: pipe.disable_lora(),
        None,
    ],
    ids=["scale", "another", "off", "none"],
)
def test_a_lora_that_changes_in_a_run_is_seen(change: Step | None, steps: dict[str, Step]) -> None:
    """Where a callback turns an adapter, two full steps follow, as at a ControlNet's; a scale of all steps is none."""
    pipe, run = flux_text_to_image()
    steps["load"](pipe)
    steps["load another"](pipe)

    def turn(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == CHANGED - 1 and change is not None:
            change(pipe)
        return {}

    pipe.enable_lora()
    pipe.set_adapters(["a"], [0.9])
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING, force_last=False)):
        run(12, callback_on_step_end=turn, joint_attention_kwargs={"scale": 0.7})
        computed = computed_of(pipe)
    expected = {0, 1, 2} if change is None else {0, 1, 2, CHANGED, CHANGED + 1}
    assert all(steps == expected for steps in computed), computed


def test_an_ip_adapter_that_changes_in_a_run_is_seen() -> None:
    pipe, run = flux_text_to_image()
    for name, block in pipe.transformer.named_modules():
        if name.endswith(".attn"):
            block.processor.scale = [0.5]  # as those of an IP-Adapter

    def turn(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == CHANGED - 1:
            pipe.transformer.transformer_blocks[0].attn.processor.scale = [0.0]
        return {}

    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING, force_last=False)):
        run(12, callback_on_step_end=turn)
        computed = computed_of(pipe)
    assert all(steps == {0, 1, 2, CHANGED, CHANGED + 1} for steps in computed), computed
