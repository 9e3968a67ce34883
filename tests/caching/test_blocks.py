"""The blocks of a model and their units are found; what cannot be found can be registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, UNIT_ONLY, denoise, flux2, hunyuan_video, ltx2, sd3
from hooked import assert_clean
from torch import Tensor, nn

import zoo
from zoo.caching import BlockList, CGTaylorConfig, ModelBlocks, TaylorSeerConfig, register_blocks
from zoo.caching.blocks import _TABLE, PlacedBlock, block_stack, model_units
from zoo.caching.streams import Slot, View


@pytest.mark.parametrize("family", SKIPPABLE)
def test_blocks_run_in_the_order_in_which_they_are_found(family: str) -> None:
    """And none is passed over."""
    model, seen = SKIPPABLE[family](), []
    blocks = [block.module for block in block_stack(model, "test").blocks]
    handles = [
        block.register_forward_hook(lambda module, args, output, at=at: seen.append(at))
        for at, block in enumerate(blocks)
    ]
    denoise(model, steps=1)
    assert seen == list(range(len(blocks)))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", [*SKIPPABLE, *UNIT_ONLY])
def test_every_block_has_units(family: str) -> None:
    model, called = {**SKIPPABLE, **UNIT_ONLY}[family](), set()
    units = model_units(model, "test")
    for unit in units:
        unit.module.register_forward_hook(lambda module, args, output, path=unit.path: called.add(path))
    denoise(model, steps=1)
    assert called == {unit.path for unit in units}
    stacks = {unit.path.split(".")[0] for unit in units}
    assert len({".".join(unit.path.split(".")[:2]) for unit in units}) == sum(
        len(getattr(model, name)) for name in stacks
    )
    assert {unit.kind for unit in units} == {"attention", "feed_forward"}


@pytest.mark.parametrize("family", ["dit", "sd3", "flux", "flux2", "cogvideox", "z_image"])
def test_a_block_taken_apart_and_put_together(family: str) -> None:
    """Replacing the image by itself gives the output back; so does adding the change to the inputs."""
    model = SKIPPABLE[family]()
    placed, seen = block_stack(model, "test").blocks, {}

    def look(at: int) -> Any:
        return lambda module, args, kwargs, output: seen.update({at: (args, kwargs, output)})

    for at, block in enumerate(placed):
        block.module.register_forward_hook(look(at), with_kwargs=True)
    denoise(model, steps=1)
    for at, block in enumerate(placed):
        args, kwargs, output = seen[at]
        block.learn(args, kwargs, output)
        assert block.unmapped is None
        view = View((block.order()[0],))
        image = block.feature(output, view)
        rebuilt = block.replaced(image, view, args, kwargs)
        assert torch.equal(block.feature(rebuilt, view), image)
        assert type(rebuilt) is type(output)
        passed = block.passed(args, kwargs)
        assert torch.equal(block.feature(passed, view), block.inputs(args, kwargs)[view.slots[0]])
        changed = block.changed(block.change(output, block.inputs(args, kwargs)), args, kwargs)
        torch.testing.assert_close(block.feature(changed, view), image, rtol=1e-5, atol=1e-5)


def test_last_block_that_drops_the_text() -> None:
    model = sd3()
    expected = denoise(model)
    with zoo.cached(model, CGTaylorConfig(threshold=0)):
        assert torch.equal(denoise(model), expected)


def test_positional_arguments() -> None:
    """HunyuanVideo calls its blocks without names; what is learned from one kind of call holds for the other."""
    block = block_stack(hunyuan_video(), "test").blocks[0]
    image, text = torch.ones(1, 4, 16), torch.zeros(1, 3, 16)
    block.learn((image, text, None), {}, (image + 1, text + 1))
    assert block.slots == [Slot((0,), ("hidden_states",)), Slot((1,), ("encoder_hidden_states",))]
    assert block.passed((image, text, None), {}) == (image, text)
    assert block.passed((image,), {"encoder_hidden_states": text}) == (image, text)


def test_sound_has_units_too() -> None:
    names = {unit.path.rsplit(".", 1)[-1] for unit in model_units(ltx2(), "test")}
    assert {"attn1", "attn2", "ff", "audio_attn1", "audio_ff", "audio_to_video_attn"} <= names


def test_parallel_attention_counts_as_feed_forward() -> None:
    """It is both: one module of a single block of Flux 2."""
    kinds = {unit.path: unit.kind for unit in model_units(flux2(), "test")}
    assert kinds["single_transformer_blocks.0.attn"] == "feed_forward"


class Block(nn.Module):
    """A residual block of one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.mlp(z)


class Own(nn.Module):
    """A denoiser that nobody has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([Block(), Block()])

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        for block in self.body:
            z = block(z)
        return z * t


@torch.no_grad()
def run(model: nn.Module) -> list[Tensor]:
    return [model(torch.ones(1, 2, 4), torch.tensor(9.0 - step)) for step in range(6)]


def test_unknown_models_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering says what looking does not tell: here, which of the blocks to leave alone."""
    monkeypatch.setattr("zoo.caching.blocks._TABLE", dict(_TABLE))
    model = Own().eval()
    blocks = BlockList(name="body", returns="image", units={"mlp": "feed_forward"}, image="z")
    expected = run(model)
    for known in (None, blocks):
        if known is not None:
            register_blocks(Own, ModelBlocks(lists=(known,)))
        for config in (CGTaylorConfig(threshold=0), TaylorSeerConfig(interval=1)):
            with zoo.cached(model, config):
                assert all(map(torch.equal, run(model), expected))
        with zoo.cached(model, CGTaylorConfig(threshold=9.0)):
            run(model)
            assert zoo.cache_summary(model).denoisers[0].units[1].computed == (0, 1, 2)
        assert_clean(model)
    register_blocks(Own, ModelBlocks(no_skipping="they are too few"))
    with pytest.raises(ValueError, match=r"cannot skip blocks of Own: they are too few\. TaylorSeerConfig and BAC"):
        zoo.enable_cache(model, CGTaylorConfig())


def test_wrong_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.caching.blocks._TABLE", dict(_TABLE))
    model = Own().eval()
    for blocks, message in (
        (BlockList(name="layers", units={}), "Own has no list of blocks called layers"),
        (BlockList(name="body", returns="image", units={}), "Blocks of class Block take no hidden_states"),
    ):
        register_blocks("Own", ModelBlocks(lists=(blocks,)))
        with pytest.raises(ValueError, match=message):
            zoo.enable_cache(model, CGTaylorConfig())
    with pytest.raises(ValueError, match="TaylorSeerConfig finds no part of Own to work on"):
        zoo.enable_cache(model, TaylorSeerConfig())
    assert_clean(model)


def test_models_without_blocks() -> None:
    for config in (CGTaylorConfig(), TaylorSeerConfig()):
        with pytest.raises(ValueError, match="Linear has no list of blocks with attention or feed-forward modules"):
            zoo.enable_cache(nn.Linear(2, 2).eval(), config)


@pytest.mark.parametrize(("part", "rest"), [("last", slice(0, 3)), ("first", slice(2, 5))])
def test_image_in_one_sequence_with_text(part: str, rest: slice) -> None:
    placed = PlacedBlock("x", Block())
    whole, view = torch.arange(10.0).view(1, 5, 2), View((0,), part)
    placed.learn((whole,), {}, whole + 1)
    feature = placed.feature(whole, view, 2)
    assert torch.equal(feature, whole[:, -2:] if part == "last" else whole[:, :2])
    replaced = placed.replaced(torch.zeros(1, 2, 2), view, (whole,), {})
    assert torch.equal(replaced[:, rest], whole[:, rest])
    assert replaced.count_nonzero() == whole[:, rest].count_nonzero()
