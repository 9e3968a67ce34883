"""The benchmark of policies, on a tiny one."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

import zoo.bench.policy as bench
from zoo.bench import Settings
from zoo.diffusion import DiffusionPolicyPipeline, DiffusionPolicyTransformer
from zoo.environments import PointTask


def tiny() -> DiffusionPolicyPipeline:
    torch.manual_seed(0)
    model = DiffusionPolicyTransformer(
        observation_dim=6, num_layers=2, num_attention_heads=2, attention_head_dim=8
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = DiffusionPolicyPipeline(model, DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_policy_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """One table: uncached, caches, DDIM in the same time and in a tenth of the steps; what was given has no cache."""
    pipe, told = tiny(), []
    monkeypatch.setattr(bench.zoo, "create_pipeline", lambda name, dtype: pipe)
    (found,) = bench.policy(
        Settings(batch=1, threads=1, rounds=2, warmup=0), lambda *done: told.append(done), steps=20, episodes=3
    )
    names = [entry.name for entry in found.entries]
    assert names[:9] == [
        "no cache, 20 steps",
        "BAC, 2 updates, union of 3",
        "BAC, 2 updates, union of 5",
        "BAC, 4 updates, union of 5",
        "BAC, 2 shared updates",
        "BAC, 3 shared updates",
        "uniform, 2 updates",
        "uniform, 4 updates",
        "TaylorSeer, every 4 steps",
    ]
    assert all(name.startswith("DDIM, ") for name in names[9:])
    assert names[-1] == "DDIM, 2 steps"
    uncached, *others = found.entries
    assert uncached.speedup is None
    assert bench.ACTION_ERROR not in uncached.values
    for entry in found.entries:
        assert entry.values[bench.LOW] <= entry.values[bench.SUCCESS] <= entry.values[bench.HIGH]
        assert entry.values[bench.RATE] == pytest.approx(1000 / entry.time.median)
    assert all(entry.values[bench.ACTION_ERROR] > 0 for entry in others)
    assert 10 <= others[0].values[bench.COMPUTED] <= others[1].values[bench.COMPUTED] < 100
    assert others[5].values[bench.COMPUTED] == 10
    assert [goal.wanted for goal in found.goals] == [3.0, 0.0]
    assert "without a cache" in " ".join(found.notes)
    assert told
    assert not pipe.transformer.is_cache_enabled


def test_copies_share_nothing() -> None:
    """Each run has a network, a scheduler and a cache of its own."""
    pipe, task = tiny(), PointTask()
    caches = bench.policy_caches(pipe, task, 20)
    one, other = (bench._with(pipe, cache=caches["uniform, 4 updates"], ddim=ddim) for ddim in (False, True))
    assert type(one.scheduler) is DDPMScheduler
    assert type(other.scheduler).__name__ == "DDIMScheduler"
    assert one.scheduler is not pipe.scheduler
    assert one.transformer is not other.transformer
    assert one.transformer.is_cache_enabled
    assert not pipe.transformer.is_cache_enabled
