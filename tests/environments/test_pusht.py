"""PushT in its simulator: rules, the expert's model of it, and training on it."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import diffusion_policy
from torch import Tensor

from zoo.data.demonstrations import Demonstrations
from zoo.environments import PushTTask, evaluate_policy, pusht_expert


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    monkeypatch.setitem(sys.modules, "gym_pusht.envs", None)
    with pytest.raises(ImportError, match=r"needs gym-pusht: pip install 'ffn-zoo\[pusht\]'"):
        PushTTask()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_steps": 0}, "max_steps must be above 0, got 0"), ({"noise": -1.0}, "noise must not be negative, got -1.0")],
)
def test_wrong_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PushTTask(**changes)


@pytest.fixture
def simulator() -> Any:
    """Return gym-pusht's environment."""
    pusht = pytest.importorskip("gym_pusht.envs", reason="gym-pusht is not installed: the extra 'pusht'")
    environment = pusht.PushTEnv()
    environment.reset(seed=0)
    return environment


def test_the_expert_knows_the_block(simulator: Any) -> None:
    assert simulator.block.moment / simulator.block.mass == pytest.approx(pusht_expert._INERTIA)
    assert tuple(simulator.block.center_of_gravity) == tuple(pusht_expert._MASS_CENTRE)
    corners = [np.array(shape.get_vertices()) for shape in simulator.block.shapes]  # a set
    bars = sorted((np.stack([each.min(0), each.max(0)]) for each in corners), key=lambda bar: bar[0, 1])
    np.testing.assert_allclose(bars, pusht_expert._BARS, atol=1e-9)
    (pusher,) = simulator.agent.shapes
    assert pusher.radius == pusht_expert._RADIUS
    np.testing.assert_allclose(simulator.goal_pose, [*pusht_expert._GOAL_POSITION, pusht_expert._GOAL_ANGLE])


@pytest.mark.parametrize("place", [3, 20, 40, 60])
def test_pushes_end_where_the_expert_expects(simulator: Any, place: int) -> None:
    """A pusher that stays at its place on the block for 24 pixels."""
    expert, start, length = pusht_expert.PushTExpert(), np.array([250.0, 220.0, 0.7]), 9
    turn, at = pusht_expert._rotation(start[2]), expert._places[place]
    block, agent = simulator.block, simulator.agent
    block.angle = start[2]
    block.position = tuple(start[:2])
    agent.position = tuple(start[:2] + turn @ at)
    centre = start[:2] + turn @ pusht_expert._MASS_CENTRE
    for part in np.linspace(0, 1, 60)[1:].tolist() + [1.0] * 10:
        angle = part * expert._turns[place, length]
        half = expert._turns[place, length] / 2
        chord = pusht_expert._rotation(angle / 2 - half) @ expert._shifts[place, length]
        moved = chord * (math.sin(angle / 2) / math.sin(half) if abs(half) > 1e-9 else part)
        target = centre + turn @ (moved + pusht_expert._rotation(angle) @ (at - pusht_expert._MASS_CENTRE))
        simulator.step(target)
    found = np.array(block.position) + pusht_expert._rotation(block.angle) @ pusht_expert._MASS_CENTRE
    np.testing.assert_allclose(found, centre + turn @ expert._shifts[place, length], atol=2)
    assert block.angle - start[2] == pytest.approx(expert._turns[place, length], abs=0.04)


@pytest.mark.usefixtures("simulator")
def test_seeds_make_the_episode() -> None:
    task = PushTTask()
    first = task.reset([3, 4])
    assert first.shape == (2, 18)
    np.testing.assert_array_equal(task.reset([4])[0], first[1])
    assert not np.array_equal(first[0], first[1])


@pytest.mark.usefixtures("simulator")
def test_the_expert_covers_the_goal() -> None:
    task = PushTTask()
    shown = task.demonstrations(2, seed=7)
    assert len(shown) == 2
    assert task.succeeded.all()
    assert (task.coverage > 0.95).all()
    np.testing.assert_array_equal(task.scores, 1.0)
    assert task.steps.max() < 250
    for one, other in zip(shown, PushTTask().demonstrations(2, seed=7), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert one.observations.shape == (len(one.actions), 18)
        assert np.linalg.norm(one.actions - one.observations[:, :2], axis=1).max() < 50 + 1e-9


@pytest.mark.usefixtures("simulator")
def test_time_runs_out_and_nothing_moves_afterwards() -> None:
    task = PushTTask(max_steps=2)
    before = task.reset([0, 1])
    for _ in range(2):
        found = task.step(np.array([[1e9, -1.0], [np.nan, 100.0]]))
    assert np.isfinite(found).all()
    assert found[0, 0] > before[0, 0]
    assert abs(found[1, 0] - before[1, 0]) < 1e-6
    assert task.finished.all()
    assert not task.succeeded.any()
    assert (task.scores >= 0).all()
    assert (task.scores < 1).all()
    np.testing.assert_array_equal(task.step(np.zeros((2, 2))), found)
    np.testing.assert_array_equal(task.expert(), found[:, :2])
    with pytest.raises(ValueError, match=r"actions must be \(2, 2\), got \(1, 2\)"):
        task.step(np.zeros((1, 2)))


@pytest.mark.usefixtures("simulator")
def test_evaluation() -> None:
    """What is reported: success, and the highest reward."""
    task = PushTTask(max_steps=8)

    class ToTheMiddle:
        transformer = SimpleNamespace(config=diffusion_policy(observation_dim=18).config)

        def __call__(self, observations: Tensor, **arguments: Any) -> Any:
            return SimpleNamespace(actions=torch.full((len(observations), 4, 2), 256.0))

    found = evaluate_policy(ToTheMiddle(), task, episodes=3)
    assert found.success_rate == 0
    assert found.calls == 2
    assert found.scores == tuple(task.scores)
    assert found.mean_score == pytest.approx(task.coverage.mean() / 0.95)


@pytest.mark.usefixtures("simulator")
def test_demonstrations_for_training() -> None:
    """The same data module as for the point."""
    data = Demonstrations(PushTTask(), episodes=1, val_episodes=1, horizon=8, batch_size=16)
    data.setup("fit")
    observations, actions = next(iter(data.train_dataloader()))
    assert (observations.shape, actions.shape) == ((16, 2, 18), (16, 8, 2))
    low, high = data.ranges()[1]
    assert len(low) == 2
    assert min(low) >= 0
    assert max(high) <= 512
