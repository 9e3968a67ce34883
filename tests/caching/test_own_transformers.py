"""Transformers that nobody has seen before, odd ones among them: cached exactly, or refused in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from hooked import assert_clean
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.caching.bac import BACConfig
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.taylorseer import TaylorSeerConfig

WIDTH, STEPS = 8, 6


class Attention(nn.Module):
    """Mix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


class Block(nn.Module):
    """Attention and feed-forward, modulated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def change(self, x: Tensor, temb: Tensor) -> Tensor:
        x = x + self.attn(x * (1 + temb))
        return x + self.mlp(x)

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        return self.change(x, temb)


class Model(nn.Module):
    """Blocks one after the other."""

    block: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.head = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList([self.block() for _ in range(4)])

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Any:
        temb = self.time(timestep.view(-1, 1, 1) / 1000)
        return self.head(self.run(self.embed(sample), temb, cond))

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, temb)
        return x


class Keywords(Model):
    """Calls by name."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(temb=temb, x=x)
        return x


class Twice(Model):
    """Runs through all blocks twice."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in [*self.layers, *self.layers]:
            x = layer(x, temb)
        return x


class TakingTurns(Model):
    """Two lists, a block of each in turn, between which tokens and channels change places."""

    def __init__(self) -> None:
        super().__init__()
        self.other_blocks = nn.ModuleList([Block() for _ in range(4)])

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer, other in zip(self.layers, self.other_blocks, strict=True):
            x = layer(x, temb)
            x = other(x.flip(1), temb).flip(1)
        return x


class DefinedInReverse(TakingTurns):
    """Runs the list that was defined last before the first."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in [*self.other_blocks, *self.layers]:
            x = layer(x, temb)
        return x


class Checkpointed(Model):
    """The path of gradient checkpointing."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, temb, use_reentrant=False)
        return x


class DictBlock(Block):
    """Takes and returns a dictionary, with something else in it."""

    def forward(self, streams: dict[str, Any], temb: Tensor) -> Any:
        return {**streams, "x": self.change(streams["x"], temb), "note": None}


class Dicts(Model):
    """Streams in a dictionary."""

    block = DictBlock

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        streams = {"x": x, "note": None}
        for layer in self.layers:
            streams = layer(streams, temb)
        return streams["x"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `DataclassBlock` returns."""

    hidden: Tensor
    weights: Tensor | None = None


class DataclassBlock(Block):
    """Returns a dataclass, a part of which is None."""

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        return Result(self.change(x, temb))


class Dataclasses(Model):
    """Blocks that return a dataclass."""

    block = DataclassBlock

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, temb).hidden
        return x


@dataclasses.dataclass
class Output(BaseOutput):
    """diffusers' kind of output."""

    sample: Tensor


class InPlaceBlock(Block):
    """Adds to its input in place."""

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        x += self.attn(x * (1 + temb))
        x += self.mlp(x)
        return x


class InPlace(Model):
    """Blocks that change their input in place."""

    block = InPlaceBlock


class HeadInPlace(Model):
    """Changes what the blocks return in place, and the outputs of units as well."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        x = super().run(x, temb, cond)
        x *= 2
        return x


class UnitInPlaceBlock(Block):
    """Changes what its units return in place."""

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        hidden = self.attn(x * (1 + temb))
        hidden += x
        after = self.mlp(hidden)
        after += hidden
        return after


class UnitsInPlace(Model):
    """Blocks that change outputs of their units in place."""

    block = UnitInPlaceBlock


class SoundBlock(Block):
    """Two streams of which each sees the other."""

    def forward(self, x: Tensor, audio: Tensor, temb: Tensor) -> Any:
        return self.change(x, temb) + audio.mean(1, keepdim=True), audio + x.mean(1, keepdim=True)


class Sound(Model):
    """Two streams, both of which are the output."""

    block = SoundBlock

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor | None = None) -> Any:
        temb = self.time(timestep.view(-1, 1, 1) / 1000)
        x, audio = self.embed(sample), self.embed(sample[:, :3])
        for layer in self.layers:
            x, audio = layer(x, audio, temb)
        return self.head(x), self.head(audio)


class TextFirst(Model):
    """Encodes its text by blocks of its own, in a list larger than that of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.prior_blocks = nn.ModuleList([Block() for _ in range(6)])

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        text = x.new_ones(x.shape[0], 3, WIDTH)
        for layer in self.prior_blocks:
            text = layer(text, temb)
        x = torch.cat([x, text], dim=1)
        return super().run(x, temb, cond)[:, :-3]


class Random(Model):
    """Draws numbers in its head."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        x = super().run(x, temb, cond)
        return x + 1e-3 * torch.randn_like(x)


class Wrapped(nn.Module):
    """Blocks two levels down, in an `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Module()
        inner.stages = nn.Sequential(*[PlainBlock() for _ in range(4)])
        self.backbone, self.embed, self.head = inner, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Output:
        return Output(sample=self.head(self.backbone.stages(self.embed(sample) + timestep.view(-1, 1, 1) / 1000)))


class PlainBlock(Block):
    """Takes nothing but the image."""

    def forward(self, x: Tensor) -> Any:
        return self.change(x, torch.zeros(()))


class LongSkips(Model):
    """Later blocks also take what earlier ones gave."""

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        first = self.layers[0](x, temb)
        second = self.layers[1](first, temb)
        return self.layers[3](self.layers[2](second, temb), temb) + first * 2


class Widening(Model):
    """A block gives more than it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = WideBlock()

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, temb)[..., :WIDTH]
        return x


class WideBlock(Block):
    """Returns its input beside its output."""

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        return torch.cat([self.change(x, temb), x], dim=-1)


class SilentBlock(Block):
    """Changes its input in place and returns nothing."""

    def forward(self, x: Tensor, temb: Tensor) -> Any:
        x += self.attn(x * (1 + temb))
        x += self.mlp(x)


class Silent(Model):
    """Blocks that return nothing."""

    block = SilentBlock

    def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
        for layer in self.layers:
            layer(x, temb)
        return x


SKIPS: list[Callable[[], nn.Module]] = [
    Model, Keywords, Twice, TakingTurns, DefinedInReverse, Checkpointed, Dicts, Dataclasses, InPlace, HeadInPlace,
    UnitsInPlace, Sound, TextFirst, Random, Wrapped,
]  # fmt: skip
REFUSED: dict[Callable[[], nn.Module], str] = {
    LongSkips: "what comes after its blocks also takes what they give on the way",
    Widening: r"WideBlock returns a \(2, 5, 16\) that is none of its inputs",
    Silent: "SilentBlock returns no tensor",
}


def tensors(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([part.flatten() for part in parts])


def run(model: nn.Module, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    first, other = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    return [
        tensors(model(sample=first + 0.02 * step * other, timestep=torch.full((2,), 900.0 - 20 * step), **kwargs))
        for step in range(STEPS)
    ]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("make", SKIPS)
def test_cached(make: Callable[[], nn.Module], mode: Any) -> None:
    """Exact where nothing may be left out, close where everything may, and as before afterwards."""
    model = make().eval()
    with mode():
        expected = run(model)
        for config in (CGTaylorConfig(threshold=0), TaylorSeerConfig(interval=1)):
            with zoo.cached(model, config):
                assert all(map(torch.equal, run(model), expected))
        for config in (
            CGTaylorConfig(threshold=1e9, force_last=False),
            CGTaylorConfig(threshold=1e9, force_last=False, last_order=0),
            TaylorSeerConfig(interval=4),
            TaylorSeerConfig(interval=4, max_order=0),
        ):
            with zoo.cached(model, config):
                assert difference(found := run(model), expected) < 0.12
                assert sum(zoo.cache_summary(model).denoisers[0].skipping_calls.values()) >= 2
                if make is not UnitsInPlace:  # the first run finds out, and computes a step more
                    assert all(map(torch.equal, run(model), found))
        schedule = zoo.calibrate_cache(model, BACConfig(updates=2), lambda: run(model))
        with zoo.cached(model, schedule):
            assert difference(run(model), expected) < 0.12
            assert sum(zoo.cache_summary(model).denoisers[0].skipping_calls.values()) >= 2
        assert all(map(torch.equal, run(model), expected))
    assert_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("make", REFUSED)
def test_refused(make: Callable[[], nn.Module]) -> None:
    """At the first call, in one line; what works on single modules still does."""
    model = make().eval()
    expected = run(model)
    with zoo.cached(model, CGTaylorConfig()), pytest.raises(ValueError, match=REFUSED[make]) as error:
        run(model)
    assert "\n" not in str(error.value)
    assert f"cannot skip blocks of {make.__name__}" in str(error.value)
    with zoo.cached(model, TaylorSeerConfig(interval=4)):
        assert difference(run(model), expected) < 0.12
        assert sum(zoo.cache_summary(model).denoisers[0].skipping_calls.values()) >= 2
    assert all(map(torch.equal, run(model), expected))
    assert_clean(model)


@torch.no_grad()
def test_gate_sees_the_image() -> None:
    """Blocks of the text come first and are more, but do not change from step to step."""
    model = TextFirst().eval()
    with zoo.cached(model, CGTaylorConfig(threshold=1e9)):
        run(model)
        errors = [error.error for error in zoo.cache_summary(model).denoisers[0].errors]
    assert min(errors) > 0


@torch.no_grad()
def test_blocks_that_a_kind_of_call_leaves_out() -> None:
    """A call with other arguments takes another way through the model: it is watched anew."""

    class Shorter(Model):
        def run(self, x: Tensor, temb: Tensor, cond: Tensor | None) -> Tensor:
            for layer in self.layers if cond is None else self.layers[:2]:
                x = layer(x, temb)
            return x

    model = Shorter().eval()
    for inputs in ({}, {"cond": torch.ones(2)}):
        expected = run(model, **inputs)
        with zoo.cached(model, CGTaylorConfig(threshold=1e9)):
            run(model)
            assert difference(run(model, **inputs), expected) < 0.12


def test_gradients_of_a_checkpointed_model() -> None:
    """What is computed again on the way back is computed in full."""
    model = Checkpointed().eval()
    with zoo.cached(model, CGTaylorConfig(threshold=0)):
        sum(output.sum() for output in run(model)).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sum(output.sum() for output in run(model)).backward()
    for found, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)
