"""The expert of PushT by itself: its model of the block, and its way around it."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.environments import pusht_expert
from zoo.environments.pusht_expert import PushTExpert


def test_distance_to_the_block() -> None:
    points = np.array([[0, -15], [60, 45], [30, 45], [63, -4], [0, 60], [-100, 15]], dtype=float)
    np.testing.assert_allclose(pusht_expert._distance(points), [15, 15, 15, 5, -15, 40])


def test_the_pusher_touches_one_side_at_each_place() -> None:
    expert = PushTExpert()
    assert 60 < len(expert._places) < 80
    np.testing.assert_allclose(pusht_expert._distance(expert._places), 15.0)
    np.testing.assert_allclose(pusht_expert._distance(expert._ring)[expert._gates], 21.0, atol=3)


def test_pushes_are_integrals_of_their_first_move() -> None:
    """The end of a push in closed form is that of many short ones."""
    expert = PushTExpert()
    for length in (5, 13):
        parts = 4000
        turn = expert._turns[:, length] / parts
        first = expert._shifts[:, 0] / pusht_expert._LENGTHS[0] * pusht_expert._LENGTHS[length] / parts
        first /= np.sinc(expert._turns[:, 0] / 2 / np.pi)[:, None]
        angle = (np.arange(parts) + 0.5)[:, None] * turn - expert._turns[:, 0] / 2
        ends = np.stack(
            [
                (np.cos(angle) * first[:, 0] - np.sin(angle) * first[:, 1]).sum(0),
                (np.sin(angle) * first[:, 0] + np.cos(angle) * first[:, 1]).sum(0),
            ],
            axis=1,
        )
        np.testing.assert_allclose(expert._shifts[:, length], ends, atol=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_the_way_to_a_push_keeps_off_the_block(seed: int) -> None:
    """A block that stays where it is: the pusher comes to a place of a push, and is only there as near as that."""
    rng = np.random.default_rng(seed)
    expert, block = PushTExpert(), np.array([*rng.uniform(150, 360, 2), rng.uniform(-np.pi, np.pi)])
    turn = pusht_expert._rotation(block[2])
    while True:
        pusher = rng.uniform(0, 512, 2)
        if pusht_expert._distance((pusher - block[:2]) @ turn) > 15:
            break
    for _ in range(200):
        place = (pusher - block[:2]) @ turn
        if np.linalg.norm(expert._places - place, axis=1).min() < 9:
            break
        action = expert(pusher, block)
        assert np.linalg.norm(action - pusher) < 50 + 1e-9
        np.testing.assert_array_equal(action, expert(pusher, block))
        steps = pusher + (action - pusher) * np.linspace(0, 0.5, 20)[:, None]
        assert pusht_expert._distance((steps - block[:2]) @ turn).min() > 14
        pusher = steps[-1]
    else:
        pytest.fail("the pusher never reached the block")


def test_a_block_in_its_goal_is_hardly_moved() -> None:
    """A push of 1 pixel at most, where each makes it worse."""
    expert, goal = PushTExpert(), np.array([256.0, 256.0, np.pi / 4])
    assert (expert._gains(pusht_expert._rotation(goal[2]), goal) < 0).all()
    further = expert._gains(pusht_expert._rotation(1.0), np.array([200.0, 300.0, 1.0]))
    assert further.max() > 20
