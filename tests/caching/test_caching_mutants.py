"""Caches: bugs of one line that the other tests would let live."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from denoisers import pixel_dit
from torch import Tensor

import zoo
from zoo.caching.bac import BACConfig
from zoo.caching.calibration import calibrate
from zoo.caching.cg_taylor import CGTaylorConfig
from zoo.caching.runs import RunTracker
from zoo.caching.schedules import BACSchedule, block_error, bubbling_union, similarity, uniform_steps

STEPS = 5


def schedule(**changes: Any) -> BACSchedule:
    values: dict[str, Any] = dict(
        model="DiT", num_steps=10, units={"a": (0, 4), "b": (0, 2, 9)}, kinds={"a": "attention", "b": "feed_forward"},
        errors={"a": 0.5, "b": 0.25}, scheduler=None, timesteps=(), updates=2,
    )  # fmt: skip
    return BACSchedule(**{**values, **changes})


def phases(steps: int, *edges: int) -> tuple[tuple[float, ...], ...]:
    """Likeness of steps: 1 within a phase, 0 between two; a phase begins at each edge."""
    phase = [sum(step >= edge for edge in edges) for step in range(steps)]
    return tuple(tuple(float(a == b) for b in phase) for a in phase)


# --- schedules for another number of steps


def test_other_steps_keep_the_share_of_updates() -> None:
    """Rounded to the nearest, at least one."""
    made = schedule(objective="uniform", updates=3)
    for steps, updates in ((10, 3), (20, 6), (5, 2), (4, 1), (12, 4), (1, 1)):
        found = made.resampled(steps)
        assert found.updates == updates
        assert set(found.units.values()) == {uniform_steps(steps, updates)}
        assert found.num_steps == steps


def test_other_steps_are_spread_evenly_where_timesteps_are_unknown() -> None:
    """The first and the last step are those of the calibration; each step between counts as the nearest one."""
    made = schedule(units={"a": (0, 4)}, kinds={"a": "attention"}, matrices={"a": phases(10, 4)})
    for steps in (10, 19, 28):
        near = [round(step * 9 / (steps - 1)) for step in range(steps)]
        first = next(step for step, place in enumerate(near) if place >= 4)
        found = made.resampled(steps)
        assert 0 in found.units["a"]
        assert first in found.units["a"]
    assert made.resampled(1).units == {"a": (0,)}


def test_other_steps_are_matched_by_their_timesteps() -> None:
    """Timesteps that crowd at the beginning fall into the first phase."""
    times = tuple(float(900 - 100 * step) for step in range(10))
    made = schedule(units={"a": (0, 4)}, kinds={"a": "attention"}, matrices={"a": phases(10, 4)}, timesteps=times)
    given = [900.0, 890.0, 880.0, 860.0, 700.0, 620.0, 540.0, 300.0, 200.0, 0.0]
    assert made.resampled(10, given).units == {"a": (0, 6)}
    assert made.resampled(10).units == {"a": (0, 4)}
    assert made.resampled(10, given).timesteps == tuple(given)


def test_other_steps_keep_union_and_last_step() -> None:
    matrices = {"a": phases(10, 3), "b": phases(10, 6)}
    united = schedule(
        units={"a": (0, 3, 6, 9), "b": (0, 6, 9)}, kinds={"a": "attention", "b": "feed_forward"}, matrices=matrices,
        union=("a",),
    )  # fmt: skip
    found = united.resampled(10)
    assert found.units == united.units
    half = united.resampled(5)
    assert all(steps[-1] == 4 for steps in half.units.values())
    assert set(half.units["b"]) <= set(half.units["a"])
    alone = dataclasses.replace(united, units={"a": (0, 3), "b": (0, 6)}, union=()).resampled(10)
    assert alone.units == {"a": (0, 3), "b": (0, 6)}


def test_a_union_takes_feed_forwards_that_come_later() -> None:
    kinds: Any = {"f0": "feed_forward", "a": "attention", "f1": "feed_forward", "b": "attention"}
    steps = {"f0": (0, 1), "a": (0, 2), "f1": (0, 3), "b": (0, 4)}
    assert bubbling_union(steps, kinds, ["a"]) == {**steps, "a": (0, 2, 3)}
    assert bubbling_union(steps, kinds, ["f0", "b"]) == {**steps, "f0": (0, 1, 3)}


def test_errors_are_means_over_pairs_and_elements() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0]])
    assert block_error(features) == pytest.approx((4 + 2 + 4) / 3 / 2)
    assert block_error(features[:1]) == 0.0
    torch.testing.assert_close(similarity(features, "l1")[0, 1], torch.tensor(2.0))
    torch.testing.assert_close(similarity(features, "mse")[0, 1], torch.tensor(5.0))


# --- calibration


def run_contexts(model: Any, batches: dict[str, int], steps: int = STEPS) -> None:
    """Call a model in several contexts a step, each with a batch of its own."""
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(size, 3, 8, 8, generator=generator) for name, size in batches.items()}
    with torch.no_grad():
        for step in range(steps):
            for name, size in batches.items():
                with model.cache_context(name):
                    timestep = torch.full((size,), 900.0 - 150 * step)
                    model(images[name] - 0.1 * step, timestep=timestep, class_labels=torch.arange(size) % 4)


def test_samples_of_unequal_contexts_count_alike() -> None:
    """A guided batch of three beside one unguided picture: four trajectories, each a quarter of the mean."""
    model, seen = pixel_dit(), []
    name = "transformer_blocks.1.ff"
    handle = model.transformer_blocks[1].ff.register_forward_hook(lambda module, args, output: seen.append(output))
    found = calibrate(model, BACConfig(), lambda: run_contexts(model, {"cond": 3, "uncond": 1}))
    handle.remove()
    samples: list[Tensor] = []
    for context in (seen[0::2], seen[1::2]):
        samples += list(torch.stack(context, dim=1).flatten(2))
    assert [tuple(sample.shape) for sample in samples] == [(STEPS, samples[0].shape[1])] * 4
    assert found.trajectories == 4
    expected = torch.stack([similarity(sample) for sample in samples]).mean(0)
    torch.testing.assert_close(found.matrices[name], expected)
    assert found.errors[name] == pytest.approx(sum(map(block_error, samples)) / 4, rel=1e-5)
    assert found.sizes[name] == pytest.approx(float(torch.stack(samples).abs().mean()), rel=1e-5)


# --- where a run begins


def test_a_run_inside_the_schedule_begins_at_its_first_index() -> None:
    """Image-to-image: the pipeline counts from 3 of 9; the run has 6 steps, 0 to 5."""
    model = pixel_dit()
    labels, images = torch.tensor([0, 1]), torch.randn(2, 3, 8, 8)
    with zoo.cached(model, CGTaylorConfig(threshold=1e6)), torch.no_grad():
        for start in (3, 1):  # a second run that starts elsewhere is a run of its own
            zoo.caching.core.reset_cache(model)
            for index in range(start, 9):
                with model.cache_context("cond", step_index=index, num_inference_steps=9):
                    model(images, timestep=torch.full((2,), 900.0 - index), class_labels=labels)
            run = model.__dict__["_zoo_cache"].run
            assert (run.step, run.num_steps) == (8 - start, 9 - start)
            assert run.is_last
            units = zoo.cache_summary(model).denoisers[0].units
            assert units[1].computed[0] == 0
            assert units[1].computed[-1] == 8 - start


class Scheduler:
    """What a tracker asks of a scheduler."""

    def __init__(self, begin: int | None = None) -> None:
        self.timesteps = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
        self.begin_index = begin

        class Config:
            num_train_timesteps = 1000

        self.config = Config()


class Pipe:
    """What a tracker asks of a pipeline."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler


def begun(scheduler: Scheduler, first: float) -> RunTracker:
    """Return a tracker that has seen a pipeline's first call, of a timestep."""
    pipe: Any = Pipe(scheduler)
    model = pixel_dit()
    tracker = RunTracker(model, pipe)
    handles = tracker.attach(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8), timestep=torch.tensor([first]), class_labels=torch.tensor([0]))
    for handle in handles:
        handle.remove()
    return tracker


@pytest.mark.parametrize(
    ("first", "begin", "start"),
    [
        (900.0, None, 0),
        (500.0, None, 2),
        (503.0, None, 2),
        (100.0, None, 4),
        (600.0, None, 0),
        (500.0, 3, 3),
        (0.5, None, 2),  # a share of the training timesteps
    ],
)
def test_the_start_is_found_among_the_timesteps(first: float, begin: int | None, start: int) -> None:
    """By the scheduler's own word, else by the timestep that is as near as rounding explains."""
    tracker = begun(Scheduler(begin), first)
    assert (tracker.start, tracker.num_steps, tracker.step) == (start, 5 - start, 0)


@pytest.mark.parametrize(("first", "start"), [(1.0, 0), (0.996, 0), (0.0, 0), (0.5, 1)])
def test_a_share_of_the_first_timestep_is_no_last_one(first: float, start: int) -> None:
    """1 of 1000 is where schedules of flow matching end, and 1 all of what is left to do where they begin."""
    scheduler = Scheduler()
    scheduler.timesteps = torch.tensor([1000.0, 500.0, 1.0])
    tracker = begun(scheduler, first)
    assert (tracker.start, tracker.num_steps) == (start, 3 - start)
