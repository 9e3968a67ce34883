"""The two-mode point task: its rules, and its expert, who knows both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zoo.environments import PointTask


def test_seeds_make_the_episode() -> None:
    task = PointTask()
    first = task.reset([3, 4])
    assert first.shape == (2, 6)
    np.testing.assert_array_equal(task.reset([4])[0], first[1])
    assert not np.array_equal(first[0], first[1])


def test_the_straight_way_is_barred() -> None:
    """Whoever goes straight, or between left and right, runs into the obstacle."""
    task = PointTask()
    task.reset(range(100))
    while not task.finished.all():
        task.step(task.goal)
    assert not task.succeeded.any()
    assert (task.steps < task.max_steps).all()


@pytest.mark.parametrize("side", [1, -1])
def test_both_ways_lead_to_the_goal(side: int) -> None:
    task = PointTask()
    task.reset(range(200))
    nearest = np.full(200, np.inf)
    while not task.finished.all():
        task.step(task.expert(np.full(200, side)))
        nearest = np.minimum(nearest, np.linalg.norm(task.position - task.obstacle, axis=1))
    assert task.succeeded.all()
    assert (task.side == side).all()
    assert nearest.min() > task.radius + 0.9 * task.clearance
    assert task.steps.max() < 30


def test_moves_are_bounded() -> None:
    task = PointTask(max_move=0.2)
    task.reset([0])
    before = task.position
    task.step(before + 5.0)
    assert np.linalg.norm(task.position - before) == pytest.approx(0.2)
    task.step(np.array([[np.nan, 0.0]]))
    assert np.isfinite(task.position).all()


def test_a_move_may_not_cut_through_the_obstacle() -> None:
    """Start and end of a long move may both be free."""
    task = PointTask(max_move=3.0)
    task.reset([0])
    task.step(task.goal)
    assert task.failed.all()
    assert not task.succeeded.any()


def test_time_runs_out_and_nothing_moves_afterwards() -> None:
    task = PointTask(max_steps=3)
    task.reset([0, 1])
    for _ in range(3):
        task.step(task.position)
    assert task.failed.all()
    end = task.observe()
    np.testing.assert_array_equal(task.step(task.goal), end)
    assert (task.steps == 3).all()


def test_demonstrations_show_both_ways() -> None:
    task = PointTask()
    shown = task.demonstrations(200, seed=5)
    again = PointTask().demonstrations(200, seed=5)
    assert len(shown) > 190
    assert 0.35 < np.mean(task.side == 1) < 0.65
    for one, other in zip(shown, again, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        assert len(one.observations) == len(one.actions)
        assert np.linalg.norm(one.actions - one.observations[:, :2], axis=1).max() <= task.max_move + 1e-9
    assert not np.array_equal(shown[0].observations[0], task.demonstrations(1, seed=6)[0].observations[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"radius": 0.0}, "radius must be above 0, got 0.0"), ({"noise": -1.0}, "noise must not be negative, got -1.0")],
)
def test_wrong_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointTask(**changes)


def test_actions_of_another_shape() -> None:
    task = PointTask()
    task.reset([0, 1])
    with pytest.raises(ValueError, match=r"actions must be \(2, 2\), got \(1, 2\)"):
        task.step(np.zeros((1, 2)))
