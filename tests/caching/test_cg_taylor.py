"""CG-Taylor: the golden cases, all models, and everything that can go wrong in a run."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, SKIPPABLE, condition, denoise, flux, flux2, hunyuan_dit, pixel_dit, wan
from diffusers import DDIMScheduler, DiffusionPipeline
from goldens import cases
from hooked import Count, abort_after, assert_clean, class_pipeline, generate
from torch import Tensor, nn

import zoo
from zoo.caching.blocks import block_stack
from zoo.caching.cg_taylor import CGTaylorConfig, Gate, relative_error
from zoo.caching.runs import RunTracker
from zoo.diffusion import PixelDiT, PixelDiTPipeline

STEPS = 6
EVERYTHING = 1e9  # a threshold that no finite error reaches


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def golden_gate(case: dict[str, Any], run: RunTracker) -> Gate:
    names = ("threshold", "first_order", "last_order", "warmup_steps", "force_last", "max_consecutive_skips")
    run.num_steps = case["num_steps"]
    return Gate(CGTaylorConfig(**{name: case[name] for name in names if name in case}), run)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, doubles(expected), rtol=1e-10, atol=1e-10)


def step_of(gate: Gate, last: list[float]) -> tuple[bool, Tensor]:
    """Do what the hook of the last block does."""
    if gate.skips:
        return True, gate.forecast()
    gate.keep(doubles(last))
    return False, doubles(last)


@pytest.mark.filterwarnings("ignore:CGTaylorConfig")
@pytest.mark.parametrize("case", cases("cg_gate"))
def test_golden(case: dict[str, Any]) -> None:
    run = RunTracker(nn.Identity())
    gate = golden_gate(case, run)
    for expected in case["trace"]:
        run.step = expected["step"]
        before = len(run.log.errors)
        gate.decide(doubles(case["first_block"][run.step]))
        skipped, output = step_of(gate, case["last_block"][run.step])
        assert skipped == expected["skip"]
        close(output, expected["output"])
        assert (len(run.log.errors) == before) == expected["forced"]
        if expected["error"] is not None:
            assert run.log.errors[-1].error == pytest.approx(expected["error"], rel=1e-10)


@pytest.mark.parametrize("case", cases("cg_two_contexts"))
def test_golden_with_two_contexts(case: dict[str, Any]) -> None:
    run = RunTracker(nn.Identity())
    gate = golden_gate(case, run)
    for expected in case["trace"]:
        run.step = expected["step"]
        gate.states.set_context("cond")
        assert not gate.follows()
        gate.decide(doubles(case["cond_first_block"][run.step]))
        skipped, output = step_of(gate, case["cond_last_block"][run.step])
        assert skipped == expected["cond_skip"]
        close(output, expected["cond_output"])
        if expected["uncond_skip"] is not None:
            gate.states.set_context("uncond")
            assert gate.follows()
            skipped, output = step_of(gate, case["uncond_last_block"][run.step])
            assert skipped == expected["uncond_skip"]
            close(output, expected["uncond_output"])


def test_error_of_nothing_is_no_number() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)).isnan()
    assert relative_error(torch.ones(3), torch.zeros(3)).isinf()
    assert float(relative_error(torch.full((9,), 6e4).half(), torch.full((9,), 3e4).half())) == 1  # no overflow


def middle_and_last(model: nn.Module) -> list[Count]:
    return [Count(block.module) for block in block_stack(model, "test").blocks]


def uncount(model: nn.Module) -> None:
    for block in block_stack(model, "test").blocks:
        del block.module.forward


@pytest.mark.parametrize("family", SKIPPABLE)
def test_every_model(family: str) -> None:
    """Threshold 0 changes nothing; a huge one computes the warm-up alone; afterwards all is as before."""
    model = SKIPPABLE[family]()
    keys, expected = list(model.state_dict()), denoise(model)
    zoo.enable_cache(model, CGTaylorConfig(threshold=0))
    assert list(model.state_dict()) == keys
    assert torch.equal(denoise(model), expected)
    zoo.disable_cache(model)
    counts = middle_and_last(model)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING, warmup_steps=2)):
        first = denoise(model)
        assert [count.calls for count in counts] == [STEPS, *[2] * (len(counts) - 1)]
        assert first.isfinite().all()
        assert not torch.equal(first, expected)
        assert torch.equal(denoise(model), first)
    uncount(model)
    assert_clean(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(denoise(model), expected)


@pytest.mark.parametrize("kind", ["pixel_dit", "dit"])
def test_pipelines_compute_the_last_step(kind: str) -> None:
    """The scheduler knows how many steps are to come."""
    pipe = class_pipeline(kind)
    expected = generate(pipe)
    with zoo.cached(pipe, CGTaylorConfig(threshold=0)):
        assert torch.equal(generate(pipe), expected)
    counts = middle_and_last(pipe.transformer)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING, warmup_steps=2)):
        first = generate(pipe)
        assert [count.calls for count in counts] == [STEPS, 3, 3]
        summary = zoo.cache_summary(pipe).denoisers[0]
        assert summary.units[1].computed == (0, 1, STEPS - 1)
        assert not any(states._state_cache for states in pipe.transformer._zoo_cache.run.states)
        assert torch.equal(generate(pipe), first)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING, warmup_steps=2, force_last=False)):
        generate(pipe)
        assert zoo.cache_summary(pipe).denoisers[0].units[1].computed == (0, 1)


@pytest.mark.parametrize("kind", ["pixel_dit", "dit"])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_aborted_runs(kind: str, stop_after: int) -> None:
    pipe = class_pipeline(kind)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        expected = generate(pipe)
        abort_after(pipe, stop_after, seed=1)
        assert torch.equal(generate(pipe), expected)


def test_changed_batch_and_steps() -> None:
    pipe = class_pipeline()
    with zoo.cached(pipe, CGTaylorConfig(threshold=0.5)):
        first = generate(pipe)
        assert generate(pipe, labels=(0, 1, 2)).shape[0] == 3
        generate(pipe, steps=9)
        assert zoo.cache_summary(pipe).denoisers[0].calls == {"cond_uncond": 9}
        assert torch.equal(generate(pipe), first)


class Halfway(PixelDiTPipeline):
    """Start in the middle of the schedule, as image-to-image pipelines do."""

    def __call__(self, labels: list[int], steps: int, skip: int) -> Tensor:  # type: ignore[override]
        self.scheduler.set_timesteps(steps)
        images = torch.zeros(len(labels), 3, 8, 8)
        with torch.no_grad():
            for timestep in self.scheduler.timesteps[skip:]:
                output = self.transformer(
                    images, timestep=timestep.expand(len(labels)), class_labels=torch.tensor(labels)
                )
                images = self.scheduler.step(output.sample, timestep, images).prev_sample
        self.maybe_free_model_hooks()
        return images


def test_start_in_the_middle_of_the_schedule() -> None:
    """The last step is the scheduler's last, not the one that a whole run would have."""
    pipe = Halfway(pixel_dit(), DDIMScheduler(prediction_type="v_prediction"))
    expected = pipe([1, 2], 20, 12)
    with zoo.cached(pipe, CGTaylorConfig(threshold=0)):
        assert torch.equal(pipe([1, 2], 20, 12), expected)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        pipe([1, 2], 20, 12)
        assert zoo.cache_summary(pipe).denoisers[0].units[1].computed == (0, 1, 2, 7)


def test_pipelines_that_share_a_model() -> None:
    """Also one that the cache was not enabled with: its scheduler says how many steps there are."""
    pipe = class_pipeline()
    other = PixelDiTPipeline(pipe.transformer, DDIMScheduler(prediction_type="v_prediction"))
    other.set_progress_bar_config(disable=True)
    zoo.enable_cache(pipe, CGTaylorConfig(threshold=EVERYTHING))
    first = generate(pipe)
    second = generate(other, steps=8)
    assert zoo.cache_summary(pipe).denoisers[0].units[1].computed == (0, 1, 2, 7)
    assert torch.equal(generate(pipe), first)
    assert torch.equal(generate(other, steps=8), second)
    abort_after(pipe, 4)
    assert torch.equal(generate(other, steps=8), second)


def contexts_of(model: nn.Module) -> dict[str, Any]:
    return {context: state for states in model._zoo_cache.run.states for context, state in states._state_cache.items()}


@pytest.mark.parametrize("orders", [(1, 1), (3, 0), (0, 2)])
def test_memory(orders: tuple[int, int]) -> None:
    """No more than orders + 2 features a context, whatever the number of steps."""
    model = flux()
    config = CGTaylorConfig(threshold=0, first_order=orders[0], last_order=orders[1])
    with zoo.cached(model, config):
        denoise(model, steps=8, contexts=("cond", "uncond"))
        states = contexts_of(model)
        assert states["cond"].features == sum(orders) + 2
        assert states["uncond"].features == orders[1] + 1  # it follows, and needs no gate of its own
        feature = 2 * 16 * 16 * 4  # batch, image tokens, channels, bytes
        assert states["cond"].nbytes == (sum(orders) + 2) * feature
        assert zoo.cache_summary(model).denoisers[0].bytes_held == (sum(orders) + orders[1] + 3) * feature


@pytest.mark.parametrize("build", [flux, flux2, wan])
def test_contexts(build: Any) -> None:
    """The first context decides, the second follows without its first block; states do not mix."""
    model = build()
    expected = denoise(model, contexts=("cond", "uncond"))
    with zoo.cached(model, CGTaylorConfig(threshold=0)):
        assert torch.equal(denoise(model, contexts=("cond", "uncond")), expected)
    counts = middle_and_last(model)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)):
        denoise(model, contexts=("cond", "uncond"))
        assert [counts[0].calls, counts[-1].calls] == [STEPS + 3, 6]
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING, cfg_gate="own")):
        denoise(model, contexts=("cond", "uncond"))
        assert [counts[0].calls - STEPS - 3, counts[-1].calls - 6] == [2 * STEPS, 6]
    with zoo.cached(model, CGTaylorConfig(threshold=0.2, cfg_gate="own")):  # each as if it were alone
        own = []
        for names in (["cond"], ["uncond"], ["cond", "uncond"]):
            zoo.caching.reset_cache(model)
            own.append(run_context(model, names))
        both = own.pop()
    assert torch.equal(both[0], own[0][0])
    assert torch.equal(both[1], own[1][0])


def run_context(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Return the last output in each context, for given inputs that do not depend on earlier outputs."""
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            outputs = []
            for name in names:
                sample, inputs = condition(model, 2, seed=len(name))
                timestep = torch.full((2,), 900.0 - 130 * step)
                with model.cache_context(name):
                    outputs.append(model(sample * (1 + step / 10), timestep=timestep, **inputs, return_dict=False)[0])
    return outputs


def test_context_that_starts_late() -> None:
    """Guidance from step 4 on: the second context is computed until it can forecast, although the first one skips."""
    model = pixel_dit()
    labels, images = torch.tensor([0, 1]), torch.randn(2, 3, 8, 8)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)), torch.no_grad():
        for step in range(7):
            for name in ("cond", "uncond") if step >= 4 else ("cond",):
                with model.cache_context(name):
                    model(images, timestep=torch.full((2,), 900.0 - step), class_labels=labels)
        units = {unit.context: unit for unit in zoo.cache_summary(model).denoisers[0].units if "other" in unit.unit}
    assert (units["cond"].computed, units["uncond"].computed) == ((0, 1, 2), (4, 5))
    assert units["uncond"].skipped == (6,)


def test_step_index_of_the_context() -> None:
    """What the pipeline says about steps goes before our own count; the last step is known without a scheduler."""
    model = pixel_dit()
    labels, images = torch.tensor([0, 1]), torch.randn(2, 3, 8, 8)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)), torch.no_grad():
        for step in range(8):
            with model.cache_context("cond", step_index=step, num_inference_steps=8):
                model(images, timestep=torch.full((2,), 900.0 - step), class_labels=labels)
        assert zoo.cache_summary(model).denoisers[0].units[1].computed == (0, 1, 2, 7)


def test_not_a_number_fails_open() -> None:
    """Where the first block's output is not finite, nothing is skipped."""
    model = pixel_dit()
    images = torch.full((2, 3, 8, 8), float("nan"))
    counts = middle_and_last(model)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)), torch.no_grad():
        for step in range(STEPS):
            model(images, timestep=torch.full((2,), 900.0 - step), class_labels=torch.tensor([0, 1]))
    assert counts[-1].calls == STEPS


def test_reset_within_a_run() -> None:
    model = pixel_dit()
    counts = middle_and_last(model)
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)), torch.no_grad():
        for step in range(8):
            if step == 4:
                zoo.caching.reset_cache(model)
            model(torch.ones(2, 3, 8, 8), timestep=torch.full((2,), 900.0 - step), class_labels=torch.tensor([0, 1]))
    assert counts[-1].calls == 6


def test_cap_and_samples() -> None:
    pipe = class_pipeline()
    config = CGTaylorConfig(threshold=EVERYTHING, max_consecutive_skips=2, track_per_sample=True)
    with zoo.cached(pipe, config):
        generate(pipe, steps=12)
        summary = zoo.cache_summary(pipe).denoisers[0]
    assert summary.units[1].computed == (0, 1, 2, 5, 8, 11)
    assert all(error.samples.shape == (4,) for error in summary.errors)


def test_two_blocks_and_half_precision() -> None:
    model = pixel_dit(num_layers=2).bfloat16()
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING, factors_dtype=torch.float32)), torch.no_grad():
        for step in range(5):
            output = model(
                torch.ones(2, 3, 8, 8).bfloat16(),
                timestep=torch.full((2,), 900.0 - step),
                class_labels=torch.tensor([0, 1]),
            ).sample
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": -0.1}, "CGTaylorConfig: threshold must be a number from 0, got -0.1"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"first_order": -1}, "first_order must be a whole number from 0"),
        ({"last_order": 0.5}, "last_order must be"),
        ({"warmup_steps": 0}, "warmup_steps must be a whole number from 1, got 0"),
        ({"max_consecutive_skips": -1}, "max_consecutive_skips must be"),
        ({"cfg_gate": "both"}, "cfg_gate must be 'first' or 'own'"),
        ({"factors_dtype": torch.int32}, "factors_dtype must be"),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    model = pixel_dit()
    with pytest.raises(ValueError, match=message):
        zoo.enable_cache(model, CGTaylorConfig(**changes))
    assert_clean(model)


def test_refused_models() -> None:
    for model, message in (
        (pixel_dit(num_layers=1), "at least 2 transformer blocks to skip any, PixelDiT has 1"),
        (hunyuan_dit(), "its later blocks also take the output of its earlier ones. TaylorSeerConfig and BACConfig"),
        (pixel_dit().train(), r"is for sampling: call PixelDiT.eval\(\) first"),
        (nn.Linear(2, 2).eval(), "Linear has no list of blocks with attention or feed-forward modules"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.enable_cache(model, CGTaylorConfig())
        assert_clean(model)


def test_few_steps_are_worth_a_warning() -> None:
    pipe = class_pipeline()
    with zoo.cached(pipe, CGTaylorConfig()), pytest.warns(UserWarning, match="4 steps, of which 3 for warm-up"):
        generate(pipe, steps=4)
    with zoo.cached(pipe, CGTaylorConfig()), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe)


def test_copies_are_refused_and_saving_is_not(tmp_path: Path) -> None:
    """A copy's hooks would run the original's weights in silence."""
    model = pixel_dit()
    expected = denoise(model)
    with zoo.cached(model, CGTaylorConfig()):
        for attempt in (lambda: copy.deepcopy(model), lambda: pickle.dumps(model)):
            with pytest.raises(RuntimeError, match=r"cannot be copied or pickled: call zoo\.disable_cache first"):
                attempt()
        model.save_pretrained(tmp_path)
    assert torch.equal(denoise(PixelDiT.from_pretrained(tmp_path)), expected)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(denoise(twin), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    """LoRA layers sit below the hooks, whether they come before or after the cache."""
    peft = pytest.importorskip("peft")
    model = wan()
    lora = peft.LoraConfig(target_modules=["to_q", "to_v"], r=2, init_lora_weights=False)
    if when == "before":
        model.add_adapter(lora)
    zoo.enable_cache(model, CGTaylorConfig(threshold=0))
    if when == "after":
        model.add_adapter(lora)
    found = denoise(model)
    zoo.disable_cache(model)
    assert torch.equal(denoise(model), found)
    model.disable_adapters()
    assert not torch.equal(denoise(model), found)


def test_offloaded() -> None:
    """accelerate exchanges the forward of the whole model after each call."""
    from accelerate.hooks import ModelHook as OffloadHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model = pixel_dit()
    add_hook_to_module(model, OffloadHook())
    with zoo.cached(model, CGTaylorConfig(threshold=EVERYTHING)):
        first = denoise(model)
        remove_hook_from_module(model)
        add_hook_to_module(model, OffloadHook())
        assert torch.equal(denoise(model), first)


def test_offloaded_modules() -> None:
    """Sequential offloading hooks the modules below; enable it first, the cache second."""
    from accelerate import cpu_offload

    model = pixel_dit()
    expected = denoise(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with zoo.cached(model, CGTaylorConfig(threshold=0)):
        assert torch.equal(denoise(model), expected)
    assert torch.equal(denoise(model), expected)


class TwoStages(DiffusionPipeline):
    """Two denoisers, as Wan 2.2 has."""

    def __init__(self, transformer: PixelDiT, transformer_2: PixelDiT) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)


def test_two_denoisers() -> None:
    """Each has a state and a warm-up of its own."""
    pipe = TwoStages(pixel_dit(), pixel_dit())
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        denoise(pipe.transformer)
        denoise(pipe.transformer_2)
        for summary in zoo.cache_summary(pipe).denoisers:
            assert summary.units[1].computed == (0, 1, 2)


@pytest.mark.slow
def test_compiled_blocks_do_not_recompile_for_ever() -> None:
    """Steps and decisions are no constants of the compiled code; the graphs of the first steps serve all others."""
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    eager, compiled = pixel_dit(), pixel_dit()
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled.compile_repeated_blocks(backend=counting)
    config = CGTaylorConfig(threshold=0.02, max_consecutive_skips=2)
    with zoo.cached(eager, config), zoo.cached(compiled, config):
        expected = denoise(eager, 8)
        first = denoise(compiled, 8)
        count = len(graphs)
        second = denoise(compiled, 8)
        assert 0 < zoo.cache_summary(compiled).denoisers[0].skipping_calls["default"] < 8
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)
    assert 0 < count <= 12
    assert len(graphs) == count


def test_families_cover_the_tests() -> None:
    assert set(DENOISERS) <= set(SKIPPABLE)
