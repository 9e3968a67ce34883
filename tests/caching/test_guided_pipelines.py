"""Steps, branches of guidance and times are told right in diffusers' own pipelines, however they call the denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_pipelines as pipelines
import torch
from diffusers import (
    DDIMScheduler,
    FasterCacheConfig,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hooked import Count, abort_after, assert_clean, class_pipeline, generate
from tiny_pipelines import Subject
from torch import Tensor, nn

import zoo
from zoo import BACConfig, CGTaylorConfig, StepForecastConfig, TaylorSeerConfig
from zoo.diffusion.blocks import attention_modules

EVERYTHING = 1e6
STEPS = 8
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "auraflow": pipelines.auraflow_text_to_image,
    "chroma": pipelines.chroma_text_to_image,
    "flux": pipelines.flux_text_to_image,
    "flux_image": pipelines.flux_image_to_image,
    "flux_kontext": pipelines.flux_kontext,
    "hunyuan_video": pipelines.hunyuan_video_text_to_video,
    "ltx_image": pipelines.ltx_image_to_video,
    "lumina2": pipelines.lumina2_text_to_image,
    "qwen": pipelines.qwen_text_to_image,
    "sd3": pipelines.sd3_text_to_image,
    "wan": pipelines.wan_text_to_video,
}
TWO_BRANCHES = {
    "chroma": ("default", "default 2"),
    "flux": ("cond", "uncond"),
    "flux_image": ("default", "default 2"),
    "flux_kontext": ("default", "default 2"),
    "lumina2": ("default", "default 2"),
    "qwen": ("cond", "uncond"),
    "wan": ("cond", "uncond"),
}


@contextmanager
def told_contexts(model: nn.Module) -> Iterator[None]:
    """Enter contexts of two names in turns, as a pipeline with two calls a step should."""
    calls: list[None] = []

    def enter(module: nn.Module, args: Any) -> None:
        calls.append(None)
        _set_cache_context(model, CacheContext(f"branch {len(calls) % 2}"))

    handle = model.register_forward_pre_hook(enter, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        _set_cache_context(model, None)


def units_of(pipe: Any, index: int = 0) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(unit.context, unit.unit): unit.computed for unit in zoo.cache_summary(pipe).denoisers[index].units}


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_pipeline(name: str) -> None:
    """Threshold 0 and interval 1 change nothing; each branch is counted on its own; again gives the same."""
    pipe, run = SUBJECTS[name]()
    steps = 6 if name == "flux_image" else STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = run(STEPS)
        for exact in (CGTaylorConfig(threshold=0), TaylorSeerConfig(interval=1)):
            with zoo.cached(pipe, exact):
                assert torch.equal(run(STEPS), expected)
        zoo.enable_cache(pipe, CGTaylorConfig(threshold=EVERYTHING))
        first = run(STEPS)
        assert torch.equal(run(STEPS), first)
    assert not torch.equal(first, expected)
    branches = TWO_BRANCHES.get(name) or tuple({context for context, _ in units_of(pipe)})
    assert zoo.cache_summary(pipe).denoisers[0].calls == dict.fromkeys(branches, steps)
    assert {units_of(pipe)[branch, "other blocks"] for branch in branches} == {(0, 1, 2, steps - 1)}
    zoo.disable_cache(pipe)
    assert_clean(pipe.transformer)
    assert torch.equal(run(STEPS), expected)


@pytest.mark.parametrize("name", ["chroma", "flux_image", "flux_kontext", "lumina2"])
def test_branches_without_contexts_do_not_mix(name: str) -> None:
    """A pipeline that enters no contexts gets what it would get with them."""
    pipe, run = SUBJECTS[name]()
    for config in (TaylorSeerConfig(interval=3), CGTaylorConfig(threshold=0.2)):
        with told_contexts(pipe.transformer), zoo.cached(pipe, config):
            expected = run(STEPS)
        with zoo.cached(pipe, config):
            assert torch.equal(run(STEPS), expected)
            assert zoo.cache_summary(pipe).denoisers[0].skipping_calls["default 2"] > 0


@pytest.mark.parametrize("name", ["auraflow", "flux_image", "lumina2", "wan"])
def test_calibration(name: str) -> None:
    """The schedule has a step for each step, and the run that it is for gets along with it."""
    pipe, run = SUBJECTS[name]()
    steps = 6 if name == "flux_image" else STEPS
    config = zoo.calibrate_cache(pipe, BACConfig(updates=3), lambda: run(STEPS))
    assert (config.schedule.num_steps, len(config.schedule.timesteps)) == (steps, steps)
    with zoo.cached(pipe, config):
        run(STEPS)
        calls = zoo.cache_summary(pipe).denoisers[0]
        assert calls.calls == dict.fromkeys(TWO_BRANCHES.get(name, ("default",)), steps)
        assert 0 < calls.computed_share < 1


def test_one_prompt_for_several_images() -> None:
    """Flux broadcasts a prompt to the images of a batch in its first block; other batches come before and after."""
    pipe, run = SUBJECTS["flux"]()
    expected = {count: run(STEPS, num_images_per_prompt=count) for count in (1, 2)}
    with zoo.cached(pipe, CGTaylorConfig(threshold=0)):
        for count in (2, 1):
            assert torch.equal(run(STEPS, num_images_per_prompt=count), expected[count])
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        first = run(STEPS, num_images_per_prompt=2)
        assert zoo.cache_summary(pipe).denoisers[0].skipping_calls["cond"] == STEPS - 4
        run(STEPS)
        assert torch.equal(run(STEPS, num_images_per_prompt=2), first)


def test_guidance_of_skipped_layers() -> None:
    """Stable Diffusion 3 calls its transformer again, with half of the batch, at some of the steps."""
    pipe, run = SUBJECTS["sd3"]()
    arguments = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.9)
    expected = run(12, **arguments)
    with zoo.cached(pipe, TaylorSeerConfig(interval=1)):
        assert torch.equal(run(12, **arguments), expected)
    with zoo.cached(pipe, TaylorSeerConfig(interval=3)):
        run(12, **arguments)
        calls = zoo.cache_summary(pipe).denoisers[0].calls
        assert calls["default"] == 12
        assert 0 < calls["default 2"] < 12
        units = units_of(pipe)
    late = [steps for (context, unit), steps in units.items() if context == "default 2"]
    assert all(steps[1] == steps[0] + 1 for steps in late)  # as many full steps as a line needs


@pytest.mark.parametrize("name", ["flux", "qwen", "ltx_image", "flux_image"])
def test_pyramid_attention_broadcast(name: str) -> None:
    """The time of a step is the scheduler's, also where the model is given t / 1000, or 0 for its first frame."""
    pipe, run = SUBJECTS[name]()
    count = Count(pipe.transformer.get_submodule(attention_modules(pipe.transformer)[0]))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
    )
    run(12)
    uncached, count.calls = count.calls, 0
    zoo.enable_cache(pipe, config)
    first = run(12)
    skipping = uncached - count.calls
    in_range = sum(100 < timestep < 800 for timestep in pipe.scheduler.timesteps.tolist())
    branches = 2 if name in TWO_BRANCHES else 1
    assert branches * (in_range // 2 - 1) <= skipping <= branches * (in_range // 2 + 1)
    assert torch.equal(run(12), first)
    if branches == 2:
        with told_contexts(pipe.transformer):
            assert torch.equal(run(12), first)


@pytest.mark.parametrize("name", ["flux", "flux_image"])
def test_faster_cache(name: str) -> None:
    """It computes the first step of a run, whatever its time."""
    pipe, run = SUBJECTS[name]()
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, attention_weight_callback=lambda module: 0.5, tensor_format="BFCHW",
        is_guidance_distilled=True,
    )  # fmt: skip
    expected = run(12)
    with zoo.cached(pipe, config):
        first = run(12)
        assert first.isfinite().all()
        assert not torch.equal(first, expected)
        assert torch.equal(run(12), first)


def test_two_transformers_share_a_schedule() -> None:
    """Wan 2.2: each transformer has warm-up, last step and calibration of its own steps."""
    pipe, run = pipelines.wan_text_to_video(two=True)
    expected = run(12)
    with zoo.cached(pipe, CGTaylorConfig(threshold=0)):
        assert torch.equal(run(12), expected)
    with warnings.catch_warnings(), zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING, warmup_steps=1)):
        warnings.simplefilter("error", UserWarning)
        run(12)
        first, second = zoo.cache_summary(pipe).denoisers
        steps = first.calls["cond"], second.calls["cond"]
        assert sum(steps) == 12
        for index, count in enumerate(steps):
            assert units_of(pipe, index)["uncond", "other blocks"] == (0, count - 1)
    configs = [
        zoo.calibrate_cache(model, BACConfig(updates=3), lambda: run(12))
        for model in (pipe.transformer, pipe.transformer_2)
    ]
    assert tuple(config.schedule.num_steps for config in configs) == steps
    zoo.enable_cache(pipe.transformer, configs[0])
    zoo.enable_cache(pipe.transformer_2, configs[1])
    run(12)
    with pytest.raises(ValueError, match=f"is for {steps[0]} steps, this run has"):
        run(9)
    zoo.disable_cache(pipe)


def stop_at(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise KeyboardInterrupt
        return {}

    return callback


def test_pipelines_that_share_a_transformer() -> None:
    """With schedulers of their own: nothing of an aborted run of one reaches the other, whichever the cache knows."""
    model = pipelines.flux_transformer()
    (text, from_text), (image, from_image) = (
        pipelines.flux_text_to_image(model),
        pipelines.flux_image_to_image(model),
    )
    runs = (from_text, from_image)
    config = CGTaylorConfig(threshold=0.2)
    expected: list[Tensor] = []
    for pipe, run in ((text, from_text), (image, from_image)):
        with zoo.cached(pipe, config):
            expected.append(run(STEPS))
    for holder in (text, model):
        with zoo.cached(holder, config):
            for aborted in runs:
                for run, right in zip(runs, expected, strict=True):
                    with pytest.raises(KeyboardInterrupt):
                        aborted(STEPS, callback_on_step_end=stop_at(3))
                    assert torch.equal(run(STEPS), right)


def test_interrupted_run() -> None:
    pipe, run = SUBJECTS["flux"]()

    def interrupt(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 3
        return {}

    with zoo.cached(pipe, CGTaylorConfig(threshold=0.2)):
        expected = run(STEPS)
        run(STEPS, callback_on_step_end=interrupt)
        assert torch.equal(run(STEPS), expected)


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, UniPCMultistepScheduler, PNDMScheduler])
def test_schedulers_of_second_order(cls: type) -> None:
    """A timestep that comes twice is two steps, of which the last is known."""
    pipe = class_pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    expected = generate(pipe)
    with zoo.cached(pipe, TaylorSeerConfig(interval=1)):
        assert torch.equal(generate(pipe), expected)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        first = generate(pipe)
        calls = len(pipe.scheduler.timesteps)
        assert zoo.cache_summary(pipe).denoisers[0].calls == {"cond_uncond": calls}
        assert units_of(pipe)["cond_uncond", "other blocks"] == (0, 1, 2, calls - 1)
        abort_after(pipe, 4)
        assert torch.equal(generate(pipe), first)


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_another_prompt_in_mid_run(name: str) -> None:
    """What was stored for the one is not taken for the other, with contexts and without."""
    pipe, run = SUBJECTS[name]()

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": -tensors["prompt_embeds"]} if index == 6 else {}

    arguments = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with zoo.cached(pipe, TaylorSeerConfig(interval=100)):
        first = run(12, **arguments)
        steps = sorted({step for computed in units_of(pipe).values() for step in computed})
        assert steps == [0, 1, 2, 7, 8]  # as many as a line needs
        assert torch.equal(run(12, **arguments), first)


def test_guidance_switched_off_in_mid_run() -> None:
    """A batch that shrinks to half: what is stored is dropped, the steps are counted on."""
    pipe = class_pipeline("dit")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    model = pipe.transformer
    sample, labels = torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 1000, 1000])
    with zoo.cached(model, TaylorSeerConfig(interval=4)), torch.no_grad():
        for step in range(12):
            batch = 4 if step < 6 else 2
            times = torch.full((batch,), 900 - 50 * step)
            model(sample[:batch] + step, timestep=times, class_labels=labels[:batch])
        summary = zoo.cache_summary(model).denoisers[0]
        assert summary.calls == {"default": 12}
        assert set(units_of(model).values()) == {(0, 1, 2, 6, 7, 10)}
    assert generate(pipe).isfinite().all()


def test_frames_at_times_of_their_own() -> None:
    """More calls than the scheduler has timesteps: schedules are for as many, and the last is known."""
    pipe, run = pipelines.skyreels_frames_in_turns(ar_step=2, causal_block_size=1)
    calls = run(STEPS) is not None and pipe.num_timesteps
    assert calls > STEPS
    for config in (BACConfig(updates=3), StepForecastConfig(updates=4)):
        found = zoo.calibrate_cache(pipe, config, lambda: run(STEPS))
        assert (found.schedule.num_steps, len(found.schedule.timesteps)) == (calls, STEPS)
        with zoo.cached(pipe, found):
            first = run(STEPS)
            summary = zoo.cache_summary(pipe).denoisers[0]
            assert summary.calls == {"cond": calls, "uncond": calls}
            assert summary.skipping_calls["cond"] > 0
            assert torch.equal(run(STEPS), first)
            with pytest.raises(ValueError, match=f"is for {calls} steps, this run has"):
                run(STEPS, ar_step=1)
    with zoo.cached(pipe, CGTaylorConfig(threshold=EVERYTHING)):
        run(STEPS)
        assert units_of(pipe)["cond", "other blocks"][-1] == calls - 1


def test_fewer_calls_than_the_pipeline_says() -> None:
    """LTX's long videos leave out the last timestep and say that they do not; a schedule of as many fits again."""
    pipe = class_pipeline()
    model, times = pipe.transformer, torch.tensor([900.0, 700.0, 500.0, 300.0])
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.timesteps = times

    class Short(type(pipe)):  # type: ignore[misc]
        def __call__(self) -> None:
            self._num_timesteps = len(times)
            self.scheduler.timesteps = times.clone()
            for time in times[:-1]:
                model(torch.randn(1, 3, 8, 8), timestep=time[None], class_labels=torch.tensor([0]))

    short = Short(model, pipe.scheduler)
    with torch.no_grad():
        config = zoo.calibrate_cache(short, BACConfig(updates=2), short)
        assert config.schedule.num_steps == 3
        with zoo.cached(short, config):
            short()
            assert zoo.cache_summary(short).denoisers[0].skipping_calls == {"default": 1}


def test_a_pipeline_that_leaves_out_a_timestep() -> None:
    """Stable Cascade: a run has one step less than its scheduler has timesteps; its UNet has no list of blocks."""
    pipe, run = pipelines.stable_cascade_prior()
    expected = run(STEPS)
    config = zoo.calibrate_cache(pipe, StepForecastConfig(updates=4), lambda: run(STEPS))
    with zoo.cached(pipe, config):
        assert not torch.equal(run(STEPS), expected)
        summary = zoo.cache_summary(pipe).denoisers[0]
        assert (summary.calls, summary.skipping_calls) == ({"default": STEPS}, {"default": 4})
    for refused in (TaylorSeerConfig(), CGTaylorConfig()):
        with pytest.raises(ValueError, match="StableCascadeUNet"):
            zoo.enable_cache(pipe, refused)


def test_long_videos_are_calibrated() -> None:
    """Each piece of a video goes on from the one before, which an error in the first changes too."""
    pipe, run = pipelines.skyreels_frames_in_turns(num_frames=13, base_num_frames=9, overlap_history=5)
    config = zoo.calibrate_cache(pipe, StepForecastConfig(updates=4), lambda: run(STEPS))
    with zoo.cached(pipe, config):
        first = run(STEPS)
        assert torch.equal(run(STEPS), first)


@pytest.mark.parametrize(
    ("config", "more"), [(CGTaylorConfig(threshold=EVERYTHING, force_last=False), set()), (TaylorSeerConfig(), {7})]
)
def test_a_control_that_is_switched_is_seen(config: Any, more: set[int]) -> None:
    """Where a ControlNet comes in and goes out, as many full steps follow as a line needs."""
    pipe, run = pipelines.sd3_with_control()
    with zoo.cached(pipe, config):
        first = run(16)
        computed = [set(steps) for (_, unit), steps in units_of(pipe).items() if unit != "first block"]
        assert all(steps == {0, 1, 2, 4, 5, 12, 13} | more for steps in computed)
        assert torch.equal(run(16), first)
