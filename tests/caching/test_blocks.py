"""The table of blocks: it agrees with the models, and grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, UNIT_ONLY, denoise, hunyuan_video, ltx2, sd3
from hooked import assert_clean
from torch import Tensor, nn

import zoo
from zoo.caching import BlockList, CGTaylorConfig, ModelBlocks, TaylorSeerConfig, register_blocks
from zoo.caching.blocks import _TABLE, PlacedBlock, block_stack, model_units


@pytest.mark.parametrize("family", SKIPPABLE)
def test_blocks_run_in_the_order_of_the_table(family: str) -> None:
    """Blocks and units are called in the order in which they are listed, and none is passed over."""
    model, seen = SKIPPABLE[family](), []
    blocks = [block.module for block in block_stack(model, "test")]
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


@pytest.mark.parametrize("family", SKIPPABLE)
def test_a_block_taken_apart_and_put_together(family: str) -> None:
    """Replacing the image by itself gives the output back; so does adding the change to the inputs."""
    model = SKIPPABLE[family]()
    placed, seen = block_stack(model, "test"), {}

    def look(at: int) -> Any:
        return lambda module, args, kwargs, output: seen.update({at: (args, kwargs, output)})

    for at, block in enumerate(placed):
        block.module.register_forward_hook(look(at), with_kwargs=True)
    denoise(model, steps=1)
    tokens = placed[0].image(seen[0][2]).shape[1]
    for at, block in enumerate(placed):
        args, kwargs, output = seen[at]
        image = block.image(output, tokens)
        rebuilt = block.replaced(image, args, kwargs)
        assert torch.equal(block.image(rebuilt, tokens), image)
        assert type(rebuilt) is type(output)
        passed = block.passed(args, kwargs)
        assert torch.equal(block.image(passed, None), block._inputs(args, kwargs)[0])
        if all(stream is not None for stream in block.streams(output)):
            changed = block.changed(block.change(output, args, kwargs), args, kwargs)
            torch.testing.assert_close(block.image(changed), block.image(output), rtol=1e-5, atol=1e-5)


def test_last_block_that_drops_the_text() -> None:
    model = sd3()
    expected = denoise(model)
    with zoo.cached(model, CGTaylorConfig(threshold=0)):
        assert torch.equal(denoise(model), expected)


def test_positional_arguments() -> None:
    """HunyuanVideo calls its blocks without names."""
    block = block_stack(hunyuan_video(), "test")[0]
    image, text = torch.ones(1, 4, 16), torch.zeros(1, 3, 16)
    assert block.passed((image, text, None), {}) == (image, text)
    assert block.passed((image,), {"encoder_hidden_states": text}) == (image, text)


def test_sound_keeps_its_units() -> None:
    assert {unit.path.rsplit(".", 1)[-1] for unit in model_units(ltx2(), "test")} == {"attn1", "attn2", "ff"}


class Block(nn.Module):
    """A residual block of one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.mlp(z)


class Own(nn.Module):
    """A denoiser that the table does not know."""

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


def test_register_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.caching.blocks._TABLE", dict(_TABLE))
    model = Own().eval()
    with pytest.raises(
        ValueError, match=r"The blocks of Own are unknown\. Known are .* with zoo.caching.register_blocks"
    ):
        zoo.enable_cache(model, CGTaylorConfig())
    blocks = BlockList(name="body", units={"mlp": "feed_forward"}, image="z")
    register_blocks(Own, ModelBlocks(lists=(blocks,)))
    expected = run(model)
    for config in (CGTaylorConfig(threshold=0), TaylorSeerConfig(interval=1)):
        with zoo.cached(model, config):
            assert all(map(torch.equal, run(model), expected))
    with zoo.cached(model, CGTaylorConfig(threshold=9.0)):
        run(model)
        assert zoo.cache_summary(model).denoisers[0].units[1].computed == (0, 1, 2)
    assert_clean(model)


def test_wrong_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.caching.blocks._TABLE", dict(_TABLE))
    model = Own().eval()
    for blocks, message in (
        (BlockList(name="layers", units={}), "Own has no list of blocks called layers"),
        (BlockList(name="body", units={}), "Blocks of class Block take no hidden_states"),
    ):
        register_blocks("Own", ModelBlocks(lists=(blocks,)))
        with pytest.raises(ValueError, match=message):
            zoo.enable_cache(model, CGTaylorConfig())
    with pytest.raises(ValueError, match="TaylorSeerConfig finds no part of Own to work on"):
        zoo.enable_cache(model, TaylorSeerConfig())
    assert_clean(model)


def test_near_names() -> None:
    class FluxTransformer3DModel(nn.Module):
        pass

    with pytest.raises(ValueError, match="Did you mean FluxTransformer2DModel"):
        zoo.enable_cache(FluxTransformer3DModel().eval(), CGTaylorConfig())


def test_placed_block_reads_joined_streams() -> None:
    placed = PlacedBlock("x", Block(), BlockList(name="body", returns="joined", units={}, image="z"))
    whole = torch.arange(10.0).view(1, 5, 2)
    assert torch.equal(placed.image(whole, 2), whole[:, -2:])
    assert torch.equal(placed.replaced(torch.zeros(1, 2, 2), (whole,), {})[:, :3], whole[:, :3])
