"""Runs, steps and branches of a denoiser that is called by hand, against a plain reference with one state a branch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from zoo import TaylorSeerConfig
from zoo.caching import BlockList, ModelBlocks, register_blocks
from zoo.caching.taylorseer import is_full_step

WIDTH = 3


class _Block(nn.Module):
    """Add a feed-forward that looks at the condition and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.ff(hidden_states)


class BranchedDenoiser(nn.Module):
    """Two blocks, whose input is made of image, text and time."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([_Block(), _Block()])

    def enter(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return torch.sin(hidden_states + encoder_hidden_states + timestep[:, None] / 300)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        hidden_states = self.enter(hidden_states, timestep, encoder_hidden_states)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


register_blocks(
    BranchedDenoiser, ModelBlocks(lists=(BlockList(name="transformer_blocks", units={"ff": "feed_forward"}),))
)
SCHEDULE = dict(interval=3, warmup_steps=2)


@dataclass
class State:
    """What the reference stores for a branch: the outputs of each unit at the last two full steps."""

    batch: int
    began: int
    last_called: int
    full: list[int] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)


class Reference:
    """TaylorSeer of order 1, written out, for one run."""

    def __init__(self, model: BranchedDenoiser) -> None:
        self.model, self.states = model, dict[str, State]()

    def __call__(self, branch: str, step: int, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        state = self.states.get(branch)
        if state is None or state.batch != len(sample):
            state = self.states[branch] = State(len(sample), step, step)
        since = range(state.last_called + 1, step + 1) if state.full else range(step, step + 1)
        full = any(is_full_step(each, **SCHEDULE) for each in since) or not state.full
        full = full or (state.began > 0 and len(state.full) < 2)
        state.last_called = step
        hidden, outputs = self.model.enter(sample, timestep, text), []
        for index, block in enumerate(self.model.transformer_blocks):
            output = block.ff(hidden) if full else self._forecast(state, index, step)
            outputs.append(output)
            hidden = hidden + output
        if full:
            state.full.append(step)
            state.outputs.append(outputs)
        return hidden

    def _forecast(self, state: State, unit: int, step: int) -> Tensor:
        last = state.outputs[-1][unit]
        if len(state.full) < 2:
            return last
        slope = (last - state.outputs[-2][unit]) / (state.full[-1] - state.full[-2])
        return last + slope * (step - state.full[-1])


@dataclass
class Plan:
    """One run: the branches of each step in order, where it stops, its timesteps and batches."""

    steps: list[list[str]]
    repeated: bool
    stop: tuple[int, int] | None
    batches: tuple[int, int]
    change: int
    same_objects: bool


@st.composite
def plans(draw: st.DrawFn, contexts: bool) -> Plan:
    count = draw(st.integers(1, 9))
    repeated = draw(st.booleans())
    steps = []
    for _ in range(count):
        if contexts and not repeated:
            chosen = draw(st.sets(st.sampled_from(["cond", "uncond", "skip"]), min_size=1))
        else:
            chosen = {"cond"} | draw(st.sets(st.sampled_from(["uncond"])))
        steps.append(draw(st.permutations(sorted(chosen))))
    stop = None
    if draw(st.booleans()):
        at = draw(st.integers(0, count - 1))
        stop = at, draw(st.integers(1, len(steps[at])))
    batches = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    return Plan(steps, repeated, stop, batches, draw(st.integers(0, count)), draw(st.booleans()))


def play(model: BranchedDenoiser, original: BranchedDenoiser, plan: Plan, contexts: bool, seed: int) -> None:
    """Make the run with the cache, and compare each call with the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = Reference(original)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    texts = {name: noise(1, WIDTH) for name in ("cond", "uncond", "skip")}
    given: dict[tuple[str, int], Tensor] = {}
    for step, branches in enumerate(plan.steps):
        batch = plan.batches[step >= plan.change]
        sample = noise(batch, WIDTH)
        # of second order: 900, 800, 800, 700, 700, ...
        time = 900.0 - 100 * ((step + 1) // 2 if plan.repeated else step)
        for number, name in enumerate(branches):
            if plan.stop is not None and (step, number) >= plan.stop:
                return
            if not plan.same_objects or (name, batch) not in given:
                given[name, batch] = texts[name].expand(batch, WIDTH).clone()
            inputs = sample, torch.full((batch,), time, dtype=torch.float64), given[name, batch]
            if contexts:
                _set_cache_context(model, CacheContext(name))
            found = model(inputs[0], timestep=inputs[1], encoder_hidden_states=inputs[2])
            if contexts:
                _set_cache_context(model, None)
            torch.testing.assert_close(found, reference(name, step, *inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("contexts", [True, False])
def test_any_sequence_of_calls(contexts: bool) -> None:
    """Branches in any order and in parts of a run, aborted runs, changing batches, timesteps that come twice."""
    torch.manual_seed(0)
    original = BranchedDenoiser().eval()
    model = copy.deepcopy(original)
    zoo.enable_cache(model, TaylorSeerConfig(**SCHEDULE))

    @settings(max_examples=10, deadline=None, database=None, derandomize=True)
    @given(st.lists(plans(contexts), min_size=1, max_size=3))
    @torch.no_grad()
    def check(runs: list[Plan]) -> None:
        zoo.reset_cache(model)
        for seed, plan in enumerate(runs):
            play(model, original, plan, contexts, seed)

    check()
