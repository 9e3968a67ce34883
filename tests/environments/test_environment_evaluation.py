"""Evaluation of policies: paired episodes, success, confidence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoisers import diffusion_policy
from torch import Tensor

from zoo.environments import PointTask, evaluate_policy, wilson_interval
from zoo.environments.evaluation import first_plans


class ExpertPolicy:
    """Plan what the expert would do, with noise of the generators."""

    def __init__(self, task: PointTask, noise: float = 0.0) -> None:
        self.transformer = SimpleNamespace(config=diffusion_policy(observation_dim=6).config)
        self.task, self.noise, self.batches = task, noise, []

    def __call__(self, observations: Tensor, generator: list[torch.Generator], **arguments: Any) -> Any:
        self.batches.append(len(observations))
        assert observations.shape[1:] == (2, 6)
        simulated = PointTask()
        simulated.reset(range(len(observations)))
        last = observations[:, -1].numpy()
        simulated.position, simulated.goal, simulated.obstacle = last[:, :2], last[:, 2:4], last[:, 4:]
        plan = []
        for _ in range(4):
            plan.append(torch.from_numpy(simulated.expert(simulated.side * 0 + 1)))
            simulated.step(plan[-1].numpy())
        noise = torch.stack([torch.randn(4, 2, generator=each, dtype=torch.float64) for each in generator])
        return SimpleNamespace(actions=torch.stack(plan, dim=1) + self.noise * noise)


def test_an_expert_succeeds() -> None:
    task = PointTask()
    policy, told = ExpertPolicy(task), []
    found = evaluate_policy(policy, task, episodes=20, seed=3, progress=lambda *done: told.append(done))
    assert found.success_rate == 1.0
    assert found.seeds == tuple(range(3, 23))
    assert policy.batches[0] == 20
    assert len(policy.batches) == found.calls
    assert told[-1] == (20, 20)
    assert str(found).startswith("20 of 20 episodes succeeded: 100.0 % (95 % confidence: 83.9 to 100.0 %)")


def test_episodes_are_paired_and_independent() -> None:
    """Another number of episodes changes none of them; the same seeds give the same noise."""
    task = PointTask()
    policy = ExpertPolicy(task, noise=0.05)
    many, few = (evaluate_policy(policy, task, count) for count in (12, 4))
    assert many.succeeded[:4] == few.succeeded
    torch.testing.assert_close(many.first_plans[:4], few.first_plans)
    assert many.action_error(evaluate_policy(policy, task, 12)) == 0.0
    plain = evaluate_policy(ExpertPolicy(task), task, 12)
    assert many.action_error(plain) == pytest.approx(0.05, rel=0.2)
    with pytest.raises(ValueError, match="same seeds"):
        many.action_error(few)
    torch.testing.assert_close(first_plans(policy, task, range(12)), many.first_plans)


def test_wilson_interval() -> None:
    """Numbers of the literature (Newcombe 1998, table I), and both ends."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    for wrong in ((3, 2), (0, 0), (-1, 5)):
        with pytest.raises(ValueError, match="no rate"):
            wilson_interval(*wrong)


def test_wrong_policies() -> None:
    task = PointTask()
    policy = SimpleNamespace(transformer=diffusion_policy())
    with pytest.raises(ValueError, match="observations of 3 numbers and gives actions of 2, the task has"):
        evaluate_policy(policy, task)
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluate_policy(ExpertPolicy(task), task, episodes=0)
