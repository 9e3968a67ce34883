"""BAC on models: calibration, exactness, schedules that do not fit."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, UNIT_ONLY, cogview4, denoise, dit, flux, pixel_dit
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hooked import Count, abort_after, assert_clean, class_pipeline, generate
from torch import nn

import zoo
from zoo.caching.bac import BACConfig, uniform_schedule
from zoo.caching.blocks import model_units
from zoo.caching.calibration import calibrate
from zoo.caching.schedules import BACSchedule, anchor_steps, block_error, similarity

STEPS = 6
ALL = {**SKIPPABLE, **UNIT_ONLY}


def uniform(model: nn.Module, updates: int, steps: int = STEPS) -> BACConfig:
    return BACConfig(schedule=uniform_schedule(model, steps, updates))


@pytest.mark.parametrize("family", ALL)
def test_every_model(family: str) -> None:
    """All steps change nothing; one update computes each unit once in a run; afterwards all is as before."""
    model = ALL[family]()
    keys, expected = list(model.state_dict()), denoise(model)
    zoo.enable_cache(model, uniform(model, STEPS))
    assert list(model.state_dict()) == keys
    assert torch.equal(denoise(model), expected)
    zoo.disable_cache(model)
    units = model_units(model, "test")
    counts = [Count(unit.module) for unit in units]
    denoise(model, steps=1)
    in_a_step = [count.calls for count in counts]  # some are called for image and text one after the other
    assert set(in_a_step) <= {1, 2}
    with zoo.cached(model, uniform(model, 1)):
        first = denoise(model)
        assert [count.calls for count in counts] == [2 * calls for calls in in_a_step]
        assert first.isfinite().all()
        assert not torch.equal(first, expected)
        assert torch.equal(denoise(model), first)
    for unit in units:
        del unit.module.forward
    assert_clean(model)
    assert torch.equal(denoise(model), expected)


def test_a_unit_called_twice_keeps_both_outputs() -> None:
    """Image and text of CogView4 go through one feed-forward, one after the other."""
    model = cogview4()
    expected = denoise(model, steps=1)
    counts = [Count(unit.module) for unit in model_units(model, "test")]
    with zoo.cached(model, uniform(model, 1, steps=2)):
        assert torch.equal(denoise(model, steps=1), expected)
    assert {count.calls for count in counts} == {1, 2}


def test_calibration_compares_what_the_units_return() -> None:
    """Matrices and errors are those of the outputs themselves, averaged over samples."""
    model, seen = pixel_dit(), []
    unit = model.transformer_blocks[1].ff
    handle = unit.register_forward_hook(lambda module, args, output: seen.append(output))
    found = calibrate(model, BACConfig(), lambda: denoise(model))
    handle.remove()
    assert_clean(model)
    features = torch.stack(seen, dim=1).flatten(2)  # (B, steps, elements)
    name = "transformer_blocks.1.ff"
    torch.testing.assert_close(found.matrices[name], torch.stack([similarity(each) for each in features]).mean(0))
    assert found.errors[name] == pytest.approx(sum(block_error(each) for each in features) / 2)
    assert (found.num_steps, found.trajectories, found.model) == (STEPS, 2, "PixelDiT")
    assert list(found.kinds) == [unit.path for unit in model_units(model, "test")]


def test_calibration_on_several_runs_and_contexts() -> None:
    """Runs, samples and contexts count alike; a context that was there for a part of the run does not count."""
    model = flux()

    def runs() -> None:
        denoise(model, contexts=("cond", "uncond"))
        denoise(model, seed=5, batch=1)

    found = calibrate(model, BACConfig(max_features=50), runs)
    assert found.trajectories == 2 * 2 + 1
    whole = calibrate(model, BACConfig(), runs)
    for unit, matrix in whole.matrices.items():  # a part of the elements tells about the same
        assert (found.matrices[unit] - matrix).abs().max() < 0.6
        assert torch.equal(matrix.diagonal(), torch.ones(STEPS))


def test_calibrated_pipeline(tmp_path: Path) -> None:
    """The short way: calibrate, enable, save, load."""
    pipe = class_pipeline()
    expected = generate(pipe, steps=12)
    config = zoo.calibrate_cache(pipe, BACConfig(updates=4, union=1), lambda: generate(pipe, steps=12), guidance=3.0)
    schedule = config.schedule
    assert isinstance(schedule, BACSchedule)
    assert (schedule.num_steps, schedule.scheduler, len(schedule.timesteps)) == (12, "DDIMScheduler", 12)
    assert schedule.mean_updates >= 4
    assert all(steps[-1] == 11 for steps in schedule.units.values())
    zoo.enable_cache(pipe, config)
    first = generate(pipe, steps=12)
    summary = zoo.cache_summary(pipe).denoisers[0]
    assert {unit.unit: unit.computed for unit in summary.units} == schedule.units
    assert summary.bytes_held
    abort_after(pipe, 3, steps=12)
    assert torch.equal(generate(pipe, steps=12), first)
    zoo.disable_cache(pipe)
    assert torch.equal(generate(pipe, steps=12), expected)
    file = schedule.save(tmp_path)
    with zoo.cached(pipe, BACConfig(schedule=file)):
        assert torch.equal(generate(pipe, steps=12), first)


def test_settings_of_a_plan() -> None:
    model = pixel_dit()
    found = calibrate(model, BACConfig(), lambda: denoise(model, steps=10))
    exact = found.plan(BACConfig(updates=10))
    assert set(exact.units.values()) == {tuple(range(10))}
    default = found.plan(BACConfig(union=0, always_update_last=False))
    assert {len(steps) for steps in default.units.values()} == {2}
    last = found.plan(BACConfig(union=0))
    assert all(steps[-1] == 9 for steps in last.units.values())
    united = found.plan(BACConfig(updates=3, union=99, always_update_last=False))
    apart = found.plan(BACConfig(updates=3, union=0, always_update_last=False))
    assert united.mean_updates >= apart.mean_updates
    assert united.units["transformer_blocks.2.ff"] == apart.units["transformer_blocks.2.ff"]
    adjacent = found.plan(BACConfig(updates=3, union=0, objective="adjacent", always_update_last=False))
    assert {len(steps) for steps in adjacent.units.values()} == {3}
    shared = found.plan(BACConfig(updates=3, union=3, shared=True))
    mean = torch.stack(list(found.matrices.values())).double().mean(0).tolist()
    assert set(shared.units.values()) == {tuple(sorted({*anchor_steps(mean, 3), 9}))}
    assert (shared.shared, shared.union, apart.shared) == (True, (), False)
    with pytest.warns(UserWarning, match="everything after the first step"):
        found.plan(BACConfig(updates=1))
    distances = calibrate(model, BACConfig(metric="mse"), lambda: denoise(model, steps=10))
    assert distances.plan(BACConfig(updates=10)).units == exact.units


def test_relative_errors() -> None:
    """A module with a large output drifts most in absolute terms, not in relative ones."""
    model = pixel_dit()
    loud = model.transformer_blocks[0].ff.net[2]
    loud.weight.data *= 100
    loud.bias.data *= 100
    found = calibrate(model, BACConfig(), lambda: denoise(model))
    absolute, relative = (found.plan(BACConfig(updates=2, error=error)) for error in ("absolute", "relative"))
    assert absolute.union[0] == "transformer_blocks.0.ff"
    name = "transformer_blocks.1.attn1"
    assert relative.errors[name] == pytest.approx(found.errors[name] / found.sizes[name])
    assert absolute.errors == found.errors
    assert relative.union == tuple(sorted(relative.errors, key=lambda unit: -relative.errors[unit])[:3])


def test_context_that_starts_late() -> None:
    """It computes at its first step although it is not its turn, and from then on follows the schedule."""
    model = pixel_dit()
    labels, images = torch.tensor([0, 1]), torch.randn(2, 3, 8, 8)
    with zoo.cached(model, uniform(model, 2)), torch.no_grad():  # steps 0 and 3
        for step in range(STEPS):
            for name in ("cond", "uncond") if step >= 1 else ("cond",):
                with model.cache_context(name):
                    model(images, timestep=torch.full((2,), 900.0 - step), class_labels=labels)
        steps = {unit.context: unit.computed for unit in zoo.cache_summary(model).denoisers[0].units}
    assert steps == {"cond": (0, 3), "uncond": (1, 3)}


def test_contexts_do_not_mix() -> None:
    model = flux()
    with zoo.cached(model, uniform(model, 1, steps=1)):
        both = denoise(model, steps=1, contexts=("cond", "uncond"))
    assert torch.equal(both, denoise(model, steps=1, contexts=("cond", "uncond")))


def test_changed_batch() -> None:
    pipe = class_pipeline()
    with zoo.cached(pipe, uniform(pipe.transformer, 3)):
        first = generate(pipe)
        assert generate(pipe, labels=(0, 1, 2)).shape[0] == 3
        assert torch.equal(generate(pipe), first)


def test_other_numbers_of_steps() -> None:
    """With a scheduler it is said before anything is computed, without one at the step that is too many."""
    pipe = class_pipeline()
    with zoo.cached(pipe, uniform(pipe.transformer, 3)):
        first = generate(pipe)
        with pytest.raises(ValueError, match=r"for 6 steps, this run has 9: calibrate for it with zoo.calibrate_cache"):
            generate(pipe, steps=9)
        assert torch.equal(generate(pipe), first)
    model = dit()
    with zoo.cached(model, uniform(model, 3)):
        first = denoise(model)
        with pytest.raises(ValueError, match="for 6 steps, this run has 7 or more"):
            denoise(model, steps=9)
        assert torch.equal(denoise(model), first)
    assert_clean(model)


def test_resampled_schedules(tmp_path: Path) -> None:
    """Other steps are served by what was found at the nearest timesteps, with one warning; files keep what it needs."""
    pipe = class_pipeline()
    config = zoo.calibrate_cache(
        pipe, BACConfig(updates=4, union=1, on_mismatch="resample"), lambda: generate(pipe, steps=12)
    )
    schedule = config.schedule
    assert isinstance(schedule, BACSchedule)
    again = BACSchedule.load(schedule.save(tmp_path))
    assert again == schedule
    zoo.enable_cache(pipe, BACConfig(schedule=again, on_mismatch="resample"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = generate(pipe, steps=12)
    with pytest.warns(UserWarning, match="for 12 steps, this run has 6: its steps were chosen anew"):
        generate(pipe, steps=6)
    computed = {unit.unit: unit.computed for unit in zoo.cache_summary(pipe).denoisers[0].units}
    pipe.scheduler.set_timesteps(6)
    assert computed == schedule.resampled(6, pipe.scheduler.timesteps.tolist()).units
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe, steps=6)
        assert torch.equal(generate(pipe, steps=12), first)
    zoo.disable_cache(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with zoo.cached(pipe, config), pytest.warns(UserWarning, match="other timesteps"):
        generate(pipe, steps=12)
    assert_clean(pipe.transformer)


def test_resampled_shared_schedules_stay_shared() -> None:
    model = pixel_dit()
    found = calibrate(model, BACConfig(), lambda: denoise(model, steps=10))
    plan = found.plan(BACConfig(updates=4, shared=True, on_mismatch="resample"))
    again = BACSchedule.from_values(plan.to_values(), "test")
    assert again == plan
    (steps,) = set(again.resampled(5).units.values())
    assert (steps[0], steps[-1]) == (0, 4)


def test_resampling_needs_matrices() -> None:
    pipe = class_pipeline()
    config = zoo.calibrate_cache(pipe, BACConfig(), lambda: generate(pipe))
    assert isinstance(config.schedule, BACSchedule)
    assert not config.schedule.matrices
    with (
        zoo.cached(pipe, dataclasses.replace(config, on_mismatch="resample")),
        pytest.raises(ValueError, match="holds no matrices"),
    ):
        generate(pipe, steps=9)


def test_other_schedulers() -> None:
    """Other timesteps are refused; another scheduler with the same ones is worth a warning."""
    pipe = class_pipeline()
    config = zoo.calibrate_cache(pipe, BACConfig(), lambda: generate(pipe))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with zoo.cached(pipe, config), pytest.raises(ValueError, match=r"other timesteps \(DDIMScheduler\) than those of"):
        generate(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    with zoo.cached(pipe, config), pytest.warns(UserWarning, match="found with DDIMScheduler, not EulerDiscrete"):
        generate(pipe)


def test_start_in_the_middle_of_the_schedule() -> None:
    """The end of the schedule's own timesteps, everything computed at first."""
    pipe = class_pipeline()
    schedule = uniform_schedule(pipe.transformer, 12, 4)  # 0, 3, 6, 9
    images, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    with zoo.cached(pipe, BACConfig(schedule=schedule)), torch.no_grad():
        pipe.scheduler.set_timesteps(12)
        for timestep in pipe.scheduler.timesteps[4:]:
            pipe.transformer(images, timestep=timestep.expand(2), class_labels=labels)
        assert zoo.cache_summary(pipe).denoisers[0].units[0].computed == (0, 2, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BACConfig(), "BACConfig has no schedule: calibrate first, config = zoo.calibrate_cache"),
        (BACConfig(updates=0), "updates must be None or a whole number from 1, got 0"),
        (BACConfig(union=-1), "union must be a whole number from 0"),
        (BACConfig(metric="cos"), "metric must be"),  # type: ignore[arg-type]
        (BACConfig(objective="best"), "objective must be"),  # type: ignore[arg-type]
        (BACConfig(max_features=0), "max_features must be"),
        (BACConfig(error="square"), "error must be 'absolute' or 'relative'"),  # type: ignore[arg-type]
        (BACConfig(on_mismatch="warn"), "on_mismatch must be 'error' or 'resample'"),  # type: ignore[arg-type]
    ],
)
def test_refused_settings(config: BACConfig, message: str) -> None:
    model = pixel_dit()
    with pytest.raises(ValueError, match=message):
        zoo.enable_cache(model, config)
    assert_clean(model)


def test_refused_schedules(tmp_path: Path) -> None:
    model, config = pixel_dit(), uniform(pixel_dit(num_layers=2), 2)
    broken = dataclasses.replace(uniform_schedule(model, 6, 2), num_steps=2)
    for given, error, message in (
        (config, ValueError, "for a PixelDiT with 4 units, this is a PixelDiT with 6"),
        (uniform(dit(), 2), ValueError, "for a DiTTransformer2DModel"),
        (BACConfig(schedule=broken), ValueError, "stay below 2"),
        (BACConfig(schedule=tmp_path / "none.json"), FileNotFoundError, "none.json"),
    ):
        with pytest.raises(error, match=message):
            zoo.enable_cache(model, given)
        assert_clean(model)
    zoo.enable_cache(model, uniform(model, 2))
    with pytest.raises(ValueError, match="a cache already"):
        zoo.enable_cache(model, uniform(model, 2))


def test_refused_calibrations() -> None:
    model = pixel_dit()

    def two_lengths() -> None:
        denoise(model)
        denoise(model, steps=4)

    for run, message in (
        (lambda: None, "did not call the denoiser"),
        (two_lengths, r"need the same number of steps, got \[4, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.calibrate_cache(model, BACConfig(), run)
        assert_clean(model)
    with pytest.raises(KeyboardInterrupt):
        zoo.calibrate_cache(model, BACConfig(), lambda: denoise(model, stop_after=2))
    assert_clean(model)
    with pytest.raises(ValueError, match=r"is for sampling: call PixelDiT.eval\(\) first"):
        zoo.calibrate_cache(pixel_dit().train(), BACConfig(), lambda: None)


@pytest.mark.slow
def test_compiled_blocks_do_not_recompile_for_ever() -> None:
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model = pixel_dit(num_layers=1)
    with zoo.cached(model, uniform(model, 3, steps=6)):
        expected = denoise(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counting)
    with zoo.cached(model, uniform(model, 3, steps=6)):
        torch.testing.assert_close(denoise(model), expected, rtol=1e-4, atol=1e-5)
        count = len(graphs)
        denoise(model)
    assert 0 < count <= 12
    assert len(graphs) == count


def test_nothing_is_said_of_a_schedule_that_fits() -> None:
    pipe = class_pipeline()
    config = zoo.calibrate_cache(pipe, BACConfig(), lambda: generate(pipe))
    with zoo.cached(pipe, config), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe)
