"""What caching brings a diffusion policy: plans a second and success, beside fewer steps in the same time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler

import zoo
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.timing import Progress, Settings, compare, environment, torch_threads
from zoo.caching.bac import BACConfig, uniform_schedule
from zoo.caching.calibration import calibrate
from zoo.diffusion.diffusion_policy import DiffusionPolicyPipeline
from zoo.environments import PointTask, PolicyResults, evaluate_policy
from zoo.environments.evaluation import Environment, first_plans

__all__ = ["measure_policy", "policy", "policy_caches"]

SUCCESS = "success (%)"
LOW, HIGH = "95 % confidence: from (%)", "to (%)"
ACTION_ERROR = "action error"
RATE = "plans a second"
COMPUTED = "units computed (%)"
GOAL_SPEED = 3.0
_CALIBRATION_SEEDS = range(2_000_000, 2_000_008)  # neither trained nor evaluated on
_FIRST_SEED = 3_000_000  # of the episodes; those of training and validation begin at 0 and 1 000 000
_PLANS = ((0.1, 3), (0.1, 5), (0.2, 5))  # updates over steps, union; the second is the paper's in simulation
_SHARED = (0.1, 0.16)  # updates over steps where all units share them; the last step comes on top


def policy_caches(pipe: Any, task: Environment, steps: int) -> dict[str, Any]:
    """Return the caches to compare, calibrated on the first plans of some episodes.

    Args:
        pipe: A `DiffusionPolicyPipeline` without a cache.
        task: Where it acts.
        steps: Of the scheduler.
    """
    calibration = calibrate(
        pipe, BACConfig(), lambda: first_plans(pipe, task, _CALIBRATION_SEEDS, num_inference_steps=steps)
    )
    caches: dict[str, Any] = {}
    for share, union in _PLANS:
        updates = max(1, round(share * steps))
        schedule = calibration.plan(BACConfig(updates=updates, union=union))
        caches[f"BAC, {updates} updates, union of {union}"] = BACConfig(schedule=schedule)
    for share in _SHARED:
        updates = max(1, round(share * steps))
        schedule = calibration.plan(BACConfig(updates=updates, shared=True))
        caches[f"BAC, {updates} shared updates"] = BACConfig(schedule=schedule)
    for updates in dict.fromkeys(max(1, round(share * steps)) for share, _ in _PLANS):
        uniform = uniform_schedule(pipe.transformer, steps, updates)
        caches[f"uniform, {updates} updates"] = BACConfig(schedule=uniform)
    caches["TaylorSeer, every 4 steps"] = zoo.TaylorSeerConfig(interval=4, max_order=1)
    return caches


def _with(pipe: Any, *, cache: Any = None, ddim: bool = False) -> DiffusionPolicyPipeline:
    """Return a copy of a pipeline with a cache or with DDIM."""
    other = DiffusionPolicyPipeline(
        copy.deepcopy(pipe.transformer),
        copy.deepcopy(pipe.scheduler),
        pipe.config.n_action_steps,
        pipe.config.observation_range,
        pipe.config.action_range,
    )
    if ddim:
        other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    other.set_progress_bar_config(disable=True)
    if cache is not None:
        zoo.enable_cache(other, cache)
    return other


def measure_policy(
    pipe: Any,
    task: Environment,
    caches: Mapping[str, Any],
    settings: Settings,
    *,
    steps: int = 100,
    episodes: int = 200,
    progress: Progress | None = None,
) -> tuple[tuple[Entry, ...], dict[str, PolicyResults], float]:
    """Run a policy without a cache, with each cache, and with DDIM: as many steps as fit into the slowest cache's time,
    and a tenth of all.

    Caches are on before anything is timed, as on a robot. All runs are of the same episodes from the same noise.

    Args:
        pipe: A `DiffusionPolicyPipeline` without a cache.
        task: Where it acts.
        caches: Configurations by name.
        settings: Rounds, threads and device of the timing; the batch is the number of plans made at once.
        steps: Of the scheduler, without and with caches.
        episodes: To measure success by.
        progress: Told after each step.

    Returns:
        The lines, uncached first; the evaluations by name; how many times as fast the policy would be if nothing were
        computed after the first step.
    """
    uncached = f"no cache, {steps} steps"
    pipes = {uncached: (_with(pipe), steps)}
    pipes |= {name: (_with(pipe, cache=config), steps) for name, config in caches.items()}
    least = _with(pipe, cache=BACConfig(schedule=uniform_schedule(pipe.transformer, steps, 1)))
    config = pipe.transformer.config
    observations = torch.from_numpy(task.reset(range(settings.batch)))
    observations = observations[:, None].expand(-1, config.n_obs_steps, -1)

    def plan(planner: Any, count: int) -> Callable[[], object]:
        return lambda: planner(observations, num_inference_steps=count, generator=torch.Generator().manual_seed(0))

    calls = {name: plan(*each) for name, each in pipes.items()}
    timed = compare({**calls, "least": plan(least, steps)}, settings, reference=uncached, progress=progress)
    floor = timed.pop("least")[1]
    assert floor is not None
    slowest = min(speed.median for _, speed in timed.values() if speed is not None)
    count = steps // max(2, round(slowest))  # diffusers' DDIM goes by whole strides: what lies between is worse
    rivals = {f"DDIM, {each} steps": (_with(pipe, ddim=True), each) for each in (count, max(1, steps // 10))}
    pipes |= rivals
    again = {uncached: calls[uncached]} | {name: plan(*each) for name, each in rivals.items()}
    timed_again = compare(again, settings, reference=uncached, progress=progress)
    timed |= {name: timed_again[name] for name in rivals}
    results = {}
    for done, (name, (planner, own_steps)) in enumerate(pipes.items()):
        if progress is not None:
            progress(f"{episodes} episodes: {name}", done, len(pipes))
        results[name] = evaluate_policy(planner, task, episodes, _FIRST_SEED, num_inference_steps=own_steps)

    def entry(name: str) -> Entry:
        found, (time, speed) = results[name], timed[name]
        values = {
            SUCCESS: 100 * found.success_rate,
            LOW: 100 * found.interval[0],
            HIGH: 100 * found.interval[1],
            RATE: 1000 * settings.batch / time.median,
        }
        if name != uncached:
            values[ACTION_ERROR] = found.action_error(results[uncached])
        if name in caches:
            (summary,) = zoo.cache_summary(pipes[name][0]).denoisers
            assert summary.computed_share is not None  # the evaluation has run
            values[COMPUTED] = 100 * summary.computed_share
        return Entry(name=name, time=time, speedup=speed, values=values, series=name.partition(",")[0])

    return tuple(entry(name) for name in pipes), results, floor.median


def policy(
    settings: Settings,
    progress: Progress | None = None,
    *,
    name: str = "diffusion_policy.point",
    steps: int = 100,
    episodes: int = 200,
) -> list[Benchmark]:
    """BAC on the shipped diffusion policy; wanted: 3 times as fast, success within uncached's interval."""
    pipe = zoo.create_pipeline(name, dtype=settings.torch_dtype).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    task = PointTask()
    with torch_threads(settings.threads):
        caches = policy_caches(pipe, task, steps)
        entries, results, floor = measure_policy(
            pipe, task, caches, settings, steps=steps, episodes=episodes, progress=progress
        )
    ours = next(entry for entry in entries if entry.name.endswith("shared updates"))
    low, _ = results[entries[0].name].interval
    assert ours.speedup is not None
    return [
        Benchmark(
            name="policy",
            title=f"Caches of diffusion steps on {name}",
            conditions=settings.conditions(
                scheduler=type(pipe.scheduler).__name__, steps=steps, episodes=episodes, task=type(task).__name__
            ),
            environment=environment(settings.device),
            reference=entries[0].name,
            entries=entries,
            goals=(
                Goal(what=f"{ours.name}, times as fast as uncached", value=ours.speedup.median, wanted=GOAL_SPEED),
                Goal(
                    what=f"{ours.name}, success (%), against the low end of uncached's interval",
                    value=ours.values[SUCCESS],
                    wanted=round(100 * low, 2),
                ),
            ),
            notes=(
                "All runs are of the same episodes from the same noise; intervals are Wilson's.",
                "Shared updates: all units are computed at the same steps, chosen by the mean of their likenesses; the "
                "last step comes on top, as with the other BAC schedules.",
                "Action error: root mean square difference of the first plans from those without a cache; the task is "
                "2 wide.",
                f"If nothing were computed after the first step, a plan would be {floor:.2f} times as fast.",
            ),
        )
    ]
