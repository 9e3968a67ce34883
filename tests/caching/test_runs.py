"""Runs, steps and branches of a denoiser that is called by hand, against a plain reference with one state a branch."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from denoisers import condition, denoise, dit, pixel_dit
from diffusers import DDIMScheduler, DiffusionPipeline, FirstBlockCacheConfig
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hooked import assert_clean, class_pipeline, generate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from zoo import CGTaylorConfig, TaylorSeerConfig
from zoo.caching import BlockList, ModelBlocks, register_blocks, reset_cache
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
    for step in range(count):
        # a run that begins with another branch than an aborted one, or a timestep that comes twice with another branch
        # than the first time, cannot be told from a further branch of one step
        free = contexts and not repeated and step > 0
        names = {"cond", "uncond", "skip"} if contexts and not repeated else {"cond", "uncond"}
        chosen = draw(st.sets(st.sampled_from(sorted(names)), min_size=1)) | (set() if free else {"cond"})
        steps.append(draw(st.permutations(sorted(chosen))) if free or not contexts else sorted(chosen))
    stop = None
    if draw(st.booleans()):
        at = draw(st.integers(0, count - 1))
        stop = at, draw(st.integers(1, len(steps[at])))
    batches = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    change = draw(st.integers(0, count))
    return Plan(steps, repeated, stop, batches, change | repeated, draw(st.booleans()))


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

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(st.lists(plans(contexts), min_size=1, max_size=3))
    @torch.no_grad()
    def check(runs: list[Plan]) -> None:
        reset_cache(model)
        for seed, plan in enumerate(runs):
            play(model, original, plan, contexts, seed)

    check()


def images(batch: int = 2, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return noisy images of a step, and the other arguments."""
    noise = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return noise, {"timestep": torch.full((batch,), 900.0 - 50 * step), "class_labels": torch.arange(batch)}


@pytest.mark.parametrize(
    "config", [CGTaylorConfig(threshold=1e6, warmup_steps=1), FirstBlockCacheConfig(threshold=1e6)]
)
def test_training_computes_in_full(config: Any) -> None:
    """With a cache on, in training mode, also under gradient checkpointing: every call, and every gradient."""
    model = pixel_dit()
    plain = copy.deepcopy(model)
    plain.train()
    zoo.enable_cache(model, config)
    with torch.no_grad():
        for step in range(3):
            sample, inputs = images(step=step)
            model(sample, **inputs)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
            plain.enable_gradient_checkpointing()
        for step in range(3):
            sample, inputs = images(step=step)
            torch.manual_seed(0)  # labels are dropped at random
            found = model(sample, **inputs).sample
            torch.manual_seed(0)
            expected = plain(sample, **inputs).sample
            assert torch.equal(found, expected)
            model.zero_grad()
            plain.zero_grad()
            found.square().sum().backward()
            expected.square().sum().backward()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)
    model.eval()
    with torch.no_grad():
        sample, inputs = images()
        assert torch.equal(model(sample, **inputs).sample, plain.eval()(sample, **inputs).sample)


@pytest.mark.parametrize("build", [pixel_dit, dit])
@pytest.mark.parametrize("config", [CGTaylorConfig(), FirstBlockCacheConfig()])
def test_the_models_own_disable_cache(build: Any, config: Any) -> None:
    model = build()
    zoo.enable_cache(model, config)
    model.disable_cache()
    assert_clean(model)
    assert "disable_cache" not in model.__dict__
    zoo.enable_cache(model, config)
    zoo.disable_cache(model)
    assert_clean(model)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("config", [CGTaylorConfig(), TaylorSeerConfig(), FirstBlockCacheConfig()])
def test_copies_are_refused(config: Any, tmp_path: Any) -> None:
    """A copy's hooks would run the weights of the original: one line says so, however the copy is made."""
    model = pixel_dit()
    zoo.enable_cache(model, config)
    for copied in (
        lambda: copy.deepcopy(model),
        lambda: copy.deepcopy(model.transformer_blocks),
        lambda: pickle.dumps(model),
        lambda: torch.save(model, tmp_path / "model.pt"),
        lambda: copy.copy(model)(images()[0], **images()[1]),  # as DataParallel makes its replicas
        lambda: torch.optim.swa_utils.AveragedModel(model),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be copied or pickled: call zoo.disable_cache first\.$"):
            copied()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    alone = torch.nn.DataParallel(model, device_ids=None)
    assert torch.isfinite(alone(images()[0], **images()[1]).sample).all()


def test_a_thread_whose_run_another_has_ended_is_told() -> None:
    """In the middle of its run, however far the other came; a run from its beginning is its own again."""
    model = class_pipeline().transformer
    zoo.enable_cache(model, TaylorSeerConfig(interval=3))
    expected = denoise(model, contexts=("cond",))

    def elsewhere(steps: int | None) -> None:
        def work() -> None:
            with contextlib.suppress(KeyboardInterrupt):
                denoise(model, contexts=("cond",), stop_after=steps)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    sample, inputs = condition(model, 2, 0)
    for own in (1, 2, 4):
        for other in (1, 3, 5, None):
            reset_cache(model)
            with pytest.raises(KeyboardInterrupt):
                denoise(model, contexts=("cond",), stop_after=own)
            elsewhere(other)
            with pytest.raises(RuntimeError, match="Two threads run one PixelDiT"), model.cache_context("cond"):
                model(sample, timestep=torch.full((2,), 900.0 - 800.0 * own / 6), **inputs)
            elsewhere(other)
            assert torch.equal(denoise(model, contexts=("cond",)), expected)


def test_two_threads_are_refused() -> None:
    """At the same time or in turns within runs: either a thread's result is right, or it is told."""
    pipe = class_pipeline()
    with zoo.cached(pipe, TaylorSeerConfig(interval=3)):
        expected = generate(pipe)
    model = pipe.transformer
    zoo.enable_cache(model, TaylorSeerConfig(interval=3))
    found: dict[int, Tensor | str] = {}
    turns = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            turns.wait()
            found[number] = denoise(model, contexts=("cond",))
        except RuntimeError as error:
            found[number] = str(error)

    expected_alone = denoise(model, contexts=("cond",))
    for _ in range(5):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in found.values():
            if isinstance(result, str):
                assert result.startswith("Two threads run one PixelDiT with a cache at the same time: give each")
            else:
                assert torch.equal(result, expected_alone)
        reset_cache(model)
    assert torch.equal(generate(pipe), expected)  # one after the other is no fault
    thread = threading.Thread(target=lambda: found.update({2: generate(pipe)}))
    thread.start()
    thread.join()
    assert torch.equal(found[2], expected)  # type: ignore[arg-type]


def test_frames_of_threads_are_read_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where another thread was there before, and without the collector, which may wait there for ever."""
    pipe, looks = class_pipeline(), []
    frames = sys._current_frames

    def watched() -> dict[int, Any]:
        looks.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "_current_frames", watched)
    with zoo.cached(pipe, zoo.TaylorSeerConfig(interval=2)):
        generate(pipe)
        assert looks == []
        thread = threading.Thread(target=generate, args=(pipe,))
        thread.start()
        thread.join()
    assert looks
    assert not any(looks)
    assert gc.isenabled()


def test_threads_in_turns() -> None:
    """A thread whose run another one has taken over is told at its next step, and may begin anew."""
    model = pixel_dit()
    zoo.enable_cache(model, TaylorSeerConfig(interval=3))
    first, second = threading.Event(), threading.Event()
    said: list[str] = []

    def other() -> None:
        with torch.no_grad():
            first.wait(30)
            sample, inputs = images(step=0)
            model(sample + 1, **inputs)
            second.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad():
        for step in range(3):
            sample, inputs = images(step=step)
            if step == 2:
                first.set()
                second.wait(30)
                with pytest.raises(RuntimeError, match="Two threads") as info:
                    model(sample, **inputs)
                said.append(str(info.value))
            else:
                model(sample, **inputs)
    thread.join()
    assert said
    reset_cache(model)
    assert denoise(model).isfinite().all()


def test_lone_call_of_another_branch_is_computed() -> None:
    """No contexts, guidance at some steps: a lone call is never taken for a call of the other branch."""
    model = pixel_dit()
    plain = copy.deepcopy(model)
    zoo.enable_cache(model, TaylorSeerConfig(interval=100, warmup_steps=2))
    labels = {"cond": torch.tensor([0, 1]), "uncond": torch.tensor([4, 4])}
    with torch.no_grad():
        for step, branches in enumerate([["cond"], ["cond"], ["uncond"], ["uncond", "cond"], ["cond"], ["uncond"]]):
            for name in branches:
                sample, inputs = images(step=step)
                found = model(sample, **{**inputs, "class_labels": labels[name].clone()}).sample
                right = plain(sample, **{**inputs, "class_labels": labels[name]}).sample
                assert torch.equal(found, right) == (step < 2 or (name == "uncond" and step in (2, 3)))
    assert zoo.cache_summary(model).denoisers[0].calls == {"default": 4, "default 2": 3}


@pytest.mark.parametrize(
    "turns",
    [
        [(image, "cond") for image in range(3)],
        [(image, name) for image in range(3) for name in ("cond", "uncond")],
        [(image, name) for name in ("cond", "uncond") for image in range(3)],
    ],
)
def test_images_in_turns(turns: list[tuple[int, str]]) -> None:
    """A program that denoises several images of one prompt, each by a step: none is forecast from another one."""
    torch.manual_seed(0)
    original = BranchedDenoiser().eval()
    model = copy.deepcopy(original)
    zoo.enable_cache(model, TaylorSeerConfig(**SCHEDULE))
    texts = {name: torch.randn(1, WIDTH, dtype=torch.float64) for name in ("cond", "uncond")}
    samples = torch.randn(10, 3, 1, WIDTH, dtype=torch.float64)

    @torch.no_grad()
    def outputs(model: nn.Module, samples: Tensor, chosen: int) -> Tensor:
        found = []
        for step, images in enumerate(samples):
            time = torch.full((1,), 900.0 - 50 * step, dtype=torch.float64)
            found += [model(images[image], time, texts[name]) for image, name in turns]
        return torch.stack(found).view(len(samples), len(turns), WIDTH)[:, [image == chosen for image, _ in turns]]

    for chosen in range(3):
        others = samples.flip(0)
        others[:, chosen] = samples[:, chosen]
        found = outputs(model, samples, chosen)
        assert torch.equal(found, outputs(model, others, chosen))
        assert not torch.equal(found, outputs(original, samples, chosen))
        assert len(zoo.cache_summary(model).denoisers[0].calls) == len(turns)


def test_conditioning_that_always_changes() -> None:
    """Nothing can be reused, which is said once."""
    model = pixel_dit()
    zoo.enable_cache(model, TaylorSeerConfig(interval=100, warmup_steps=1))

    @torch.no_grad()
    def run() -> None:
        for step in range(12):
            sample, inputs = images(step=step)
            model(sample, **{**inputs, "class_labels": torch.full((2,), step % 5)})
            assert len(model._zoo_cache.run.states[0]._state_cache) <= 3

    with pytest.warns(UserWarning, match="changes from step to step"):
        run()


def test_time_is_that_of_the_noisiest_token() -> None:
    """Also as a share of the training timesteps, and of a frame that has none."""
    model = pixel_dit()
    zoo.enable_cache(model, CGTaylorConfig())
    run = model._zoo_cache.run
    sample, inputs = images()
    with torch.no_grad():
        model(sample, **{**inputs, "timestep": torch.tensor([0.0, 640.0])})
        assert run.current_timestep() == 640
        reset_cache(model)
        model(sample, **{**inputs, "timestep": torch.tensor([0.64, 0.64])})
        assert run.current_timestep() == pytest.approx(640)


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_index_of_the_last_step_in_two_contexts(order: tuple[str, str]) -> None:
    """The second context of the last step is of the same run, and no third one."""
    model = pixel_dit()
    zoo.enable_cache(model, CGTaylorConfig(threshold=1e6))
    with torch.no_grad():
        for _ in range(2):
            for step in range(6):
                sample, inputs = images(step=step)
                for name in order:
                    with model.cache_context(name, step_index=step, num_inference_steps=6):
                        model(sample, **inputs)
            found = zoo.cache_summary(model).denoisers[0]
            assert found.calls == {"cond": 6, "uncond": 6}
            assert {unit.computed for unit in found.units if "other" in unit.unit} == {(0, 1, 2, 5)}


class Components:
    """What a modular pipeline gives its blocks."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, DDIMScheduler()


class DenoisingBlock:
    """A block of a modular pipeline, which is given the components and owns none."""

    @torch.no_grad()
    def __call__(self, components: Components, steps: int) -> None:
        components.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(components.scheduler.timesteps):
            sample, inputs = images(step=step)
            components.transformer(sample, **{**inputs, "timestep": timestep.expand(2)})


def test_modular_pipelines() -> None:
    """The scheduler is found among the components, although the cache knows the denoiser alone."""
    components, block = Components(pixel_dit()), DenoisingBlock()
    zoo.enable_cache(components.transformer, CGTaylorConfig(threshold=1e6))
    for steps in (6, 8):
        block(components, steps)
        found = zoo.cache_summary(components.transformer).denoisers[0]
        assert found.calls == {"default": steps}
        assert found.units[1].computed == (0, 1, 2, steps - 1)


class OwnLoop(DiffusionPipeline):
    """A pipeline that never gives its scheduler new timesteps, or has none."""

    def __init__(self, transformer: nn.Module, scheduler: DDIMScheduler | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, seed: int, steps: int, stop: int | None = None) -> Tensor:
        sample, inputs = images(step=seed)
        times = torch.linspace(900, 100, steps) if self.scheduler is None else self.scheduler.timesteps
        for step, time in enumerate(times):
            if step == stop:
                return sample
            sample = sample - 0.1 * self.transformer(sample, **{**inputs, "timestep": time.expand(2)}).sample
        return sample


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("scheduled", [False, True])
def test_pipelines_that_set_no_timesteps(steps: int, scheduled: bool) -> None:
    """Each run is a run, also after one of a single step, and after one that was given up anywhere."""
    scheduler = DDIMScheduler() if scheduled else None
    if scheduler is not None:
        scheduler.set_timesteps(steps)
    pipe = OwnLoop(pixel_dit(), scheduler)
    with zoo.cached(pipe, TaylorSeerConfig(interval=100, warmup_steps=1)):
        expected = pipe(0, steps)
    with zoo.cached(pipe, TaylorSeerConfig(interval=100, warmup_steps=1)):
        for stop in (None, *range(2, steps)):  # after one call alone it is not known whether it goes on
            pipe(1, steps, stop)
            assert torch.equal(pipe(0, steps), expected), stop
