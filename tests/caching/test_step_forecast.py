"""Step forecasts: the plan, exactness, branches, what does not fit, and where a schedule is kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import SKIPPABLE, denoise, dit
from diffusers import EulerDiscreteScheduler
from hooked import Count, abort_after, assert_clean, class_pipeline, generate
from torch import Tensor, nn

import zoo
from zoo.caching.saved import SavedSetting
from zoo.caching.step_calibration import calibrate_steps
from zoo.caching.step_schedules import StepSchedule, plan_steps

STEPS = 8


def schedule(model: nn.Module, computed: tuple[int, ...], steps: int = STEPS) -> zoo.StepForecastConfig:
    """Forecast by straight lines through the last two computed steps."""
    forecasts = {}
    for step in set(range(steps)) - set(computed):
        used = [other for other in computed if other < step][-2:]
        share = (step - used[-1]) / (used[-1] - used[0]) if len(used) == 2 else 0.0
        forecasts[step] = {used[0]: -share, used[1]: 1 + share} if len(used) == 2 else {used[0]: 1.0}
    planned = StepSchedule(model=type(model).__name__, num_steps=steps, steps=computed, forecasts=forecasts)
    return zoo.StepForecastConfig(schedule=planned)


def cost(products: Tensor, effects: Tensor, computed: tuple[int, ...], weights: dict[int, dict[int, float]]) -> float:
    """Return what a plan leaves wrong, straight from the definition."""
    steps, total = len(products), 0.0
    for start, end in itertools.pairwise((*computed, steps)):
        miss = torch.zeros(steps, dtype=torch.float64)
        for step in range(start + 1, end):
            miss[step] += effects[step]
            for used, weight in weights[step].items():
                miss[used] -= effects[step] * weight
        total += float(miss @ products @ miss)
    return total


def fitted(products: Tensor, computed: tuple[int, ...]) -> dict[int, dict[int, float]]:
    found = {}
    for step in set(range(len(products))) - set(computed):
        used = [other for other in computed if other < step][-2:]
        found[step] = dict(
            zip(used, torch.linalg.lstsq(products[used][:, used], products[used, step]).solution.tolist(), strict=True)
        )
    return found


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_the_plan_is_the_best_of_all(updates: int) -> None:
    generator = torch.Generator().manual_seed(updates)
    features = torch.randn(7, 30, generator=generator, dtype=torch.float64).cumsum(0)
    products, effects = features @ features.T / 30, torch.rand(7, generator=generator, dtype=torch.float64)
    computed, weights = plan_steps(products, effects, updates)
    assert len(computed) == updates
    every = [(0, *chosen) for chosen in itertools.combinations(range(1, 7), updates - 1)]
    least = min(cost(products, effects, chosen, fitted(products, chosen)) for chosen in every)
    assert cost(products, effects, computed, weights) == pytest.approx(least, rel=1e-4)


def test_what_two_outputs_span_is_forecast_exactly() -> None:
    line = torch.stack([torch.tensor([1.0, step, 3 - step]) for step in range(6)]).double()
    computed, weights = plan_steps(line @ line.T, torch.ones(6), 2)
    for step, own in weights.items():
        if len(own) == 2:
            assert torch.allclose(sum(weight * line[used] for used, weight in own.items()), line[step], atol=1e-4)
    assert computed == (0, 1)


@pytest.mark.parametrize("family", ["dit", "flux", "wan"])
def test_every_step_changes_nothing_and_forecasts_call_nothing(family: str) -> None:
    model = SKIPPABLE[family]()
    keys, expected = list(model.state_dict()), denoise(model, steps=STEPS)
    with zoo.cached(model, schedule(model, tuple(range(STEPS)))):
        assert torch.equal(denoise(model, steps=STEPS), expected)
    counts = [Count(part) for _, part in model.named_children()]
    with zoo.cached(model, schedule(model, (0, 1, 4))):
        found = denoise(model, steps=STEPS)
        calls = [count.calls for count in counts]
        assert torch.equal(denoise(model, steps=STEPS), found)
        summary = zoo.cache_summary(model).denoisers[0]
        assert summary.computed_steps == 3
        assert summary.bytes_held > 0
    assert found.isfinite().all()
    assert not torch.equal(found, expected)
    assert [count.calls for count in counts] == [2 * each for each in calls]
    for _, part in model.named_children():
        del part.forward
    assert_clean(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(denoise(model, steps=STEPS), expected)


def test_a_calibrated_schedule_beats_repetition_and_is_saved(tmp_path: Path) -> None:
    pipe = class_pipeline()
    expected = generate(pipe, steps=STEPS)
    config = zoo.calibrate_cache(pipe, zoo.StepForecastConfig(updates=4), lambda: generate(pipe, steps=STEPS))
    assert_clean(pipe.transformer)
    planned: Any = config.schedule
    assert len(planned.steps) == 4
    assert planned.scheduler == type(pipe.scheduler).__name__
    with zoo.cached(pipe, config):
        ours = generate(pipe, steps=STEPS)
    repetition = StepSchedule(
        model="PixelDiT",
        num_steps=STEPS,
        steps=(0, 2, 4, 6),
        forecasts={step: {step - 1: 1.0} for step in (1, 3, 5, 7)},
    )
    with zoo.cached(pipe, zoo.StepForecastConfig(schedule=repetition)):
        repeated = generate(pipe, steps=STEPS)
    assert (ours - expected).norm() < (repeated - expected).norm()
    file = planned.save(tmp_path)
    with zoo.cached(pipe, zoo.StepForecastConfig(schedule=file)):
        assert torch.equal(generate(pipe, steps=STEPS), ours)
    saved = SavedSetting(
        model="PixelDiT", fingerprint="0", scheduler="x", num_steps=STEPS, guidance=None, name="x", config=config
    )
    assert SavedSetting.load(saved.save(tmp_path)).config == config
    every = zoo.calibrate_cache(pipe, zoo.StepForecastConfig(updates=99), lambda: generate(pipe, steps=STEPS))
    with zoo.cached(pipe, every):
        assert torch.equal(generate(pipe, steps=STEPS), expected)


def test_an_aborted_run_leaves_nothing_behind() -> None:
    pipe = class_pipeline()
    with zoo.cached(pipe, schedule(pipe.transformer, (0, 1, 4))):
        expected = generate(pipe, steps=STEPS)
        abort_after(pipe, 3, steps=STEPS)
        assert torch.equal(generate(pipe, steps=STEPS), expected)


def test_branches_keep_their_own_and_one_that_starts_late_is_computed() -> None:
    model = dit()
    label = {name: torch.tensor([number]) for number, name in enumerate(("one", "two"))}
    x = torch.randn(1, *_shape(model), generator=torch.Generator().manual_seed(0))

    def call(step: int, name: str) -> Tensor:
        return model(x + step, timestep=torch.tensor([900 - 100 * step]), class_labels=label[name]).sample

    with torch.no_grad():
        expected = {(step, name): call(step, name) for step in range(STEPS) for name in label}
        with zoo.cached(model, schedule(model, (0, 2, 5))):
            for step in range(STEPS):
                for name in label:
                    if name == "two" and step < 1:
                        continue
                    found = call(step, name)
                    computed = step in (0, 2, 5) or (name == "two" and step < 6)
                    assert torch.equal(found, expected[step, name]) == computed, (step, name)
                    if step == 1 and name == "one":
                        assert torch.equal(found, expected[0, name])


def _shape(model: nn.Module) -> tuple[int, int, int]:
    config: Any = model.config
    return config.in_channels, config.sample_size, config.sample_size


def test_bad_input_is_said() -> None:
    pipe = class_pipeline()
    model = pipe.transformer
    with pytest.raises(ValueError, match="no schedule: calibrate first"):
        zoo.enable_cache(pipe, zoo.StepForecastConfig())
    with pytest.raises(ValueError, match="updates must be None or a whole number from 1, got 0"):
        zoo.enable_cache(pipe, zoo.StepForecastConfig(updates=0))
    with pytest.raises(ValueError, match="is for a PixelDiT, this is a"):
        zoo.enable_cache(dit(), schedule(model, (0, 1)))
    broken = StepSchedule(model="PixelDiT", num_steps=8, steps=(0,), forecasts={})
    with pytest.raises(ValueError, match="each of the 8 steps"):
        zoo.enable_cache(pipe, zoo.StepForecastConfig(schedule=broken))
    assert_clean(model)
    with (
        zoo.cached(pipe, schedule(model, (0, 1, 4))),
        pytest.raises(ValueError, match="is for 8 steps, this run has 5: calibrate"),
    ):
        generate(pipe, steps=5)
    with pytest.raises(ValueError, match="same noise"):
        calibrate_steps(pipe, zoo.StepForecastConfig(), lambda: _other_noise(pipe, next(seeds)))
    with pytest.raises(ValueError, match="did not call the denoiser"):
        calibrate_steps(pipe, zoo.StepForecastConfig(), lambda: None)
    with pytest.raises(TypeError, match="are calibrated, not CGTaylorConfig"):
        zoo.calibrate_cache(pipe, zoo.CGTaylorConfig(), lambda: None)  # type: ignore[type-var]
    planned = zoo.calibrate_cache(pipe, zoo.StepForecastConfig(updates=3), lambda: generate(pipe, steps=STEPS))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with zoo.cached(pipe, planned), pytest.raises(ValueError, match="other timesteps"):
        generate(pipe, steps=STEPS)
    assert_clean(model)


seeds = itertools.count()


def _other_noise(pipe: Any, seed: int) -> None:
    pipe([1], num_inference_steps=4, seed=seed, output_type="latent")
