"""The expert of PushT: where to push the block next, from a model of how it slides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["PushTExpert"]

Floats = NDArray[np.float64]

# the block and the pusher of gym-pusht, in pixels, in the block's frame
_RADIUS = 15.0
_BARS = np.array([[(-60, 0), (60, 30)], [(-15, 30), (15, 120)]], dtype=float)  # lower and upper corner of each
_CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], dtype=float)
_MASS_CENTRE = np.array([0.0, 45.0])
_INERTIA = 3000.0  # at a mass of 1
_GOAL_POSITION, _GOAL_ANGLE = np.array([256.0, 256.0]), np.pi / 4
_TABLE = 512.0

_LEVER = 85.0  # pixels: a rotation counts as much as the way of a point so far from the centre of mass
_CLEARANCE = 6.0  # between pusher and block on the way to another place
_TOUCH = 9.0  # distance to a place at which a push begins
_CHANGE = 26.0  # way that leaving the block and coming back counts for
_SETTLE = 5.0  # way that every push counts for at least
_LEAD = 50.0  # how far an action may be ahead of the pusher, which bounds its speed
_LENGTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128], dtype=float)  # of pushes


class PushTExpert:
    """Choose the push that brings the block nearest to its goal for its way, and make it, or walk to where it begins.

    Friction stops the block at once, and the pusher touches it without friction. So a push of length d at a place with
    the normal n (into the block) and the torque t = r x n moves the block's centre of mass along n by
    d / (1 + t^2 / I), and turns it by t / I times that. While the pusher stays at its place on the block this goes on
    as a rotation about a fixed point, so the end of each of about a thousand pushes is known in closed form. The
    choice depends on the present positions alone and is made anew at each step.
    """

    def __init__(self) -> None:
        outline, outward = _outline(_RADIUS)
        # where two sides meet at the inside the pusher would touch both, and at an outer corner none
        touching = np.abs(_distance(outline) - _RADIUS) < 1e-6
        self._places, normals = outline[touching], -outward[touching]
        self._ring = _outline(_RADIUS + _CLEARANCE)[0]  # the way around the block
        gaps = np.linalg.norm(self._places[:, None] - self._ring, axis=2)
        self._gates = gaps.argmin(1)  # where on the ring the way to each place branches off
        sides = np.linalg.norm(np.roll(self._ring, -1, axis=0) - self._ring, axis=1)
        self._along, self._around = np.cumsum(sides) - sides, sides.sum()

        arms = self._places + _RADIUS * normals - _MASS_CENTRE
        torques = arms[:, 0] * normals[:, 1] - arms[:, 1] * normals[:, 0]
        slid = _LENGTHS / (1 + torques**2 / _INERTIA)[:, None]
        self._turns = torques[:, None] / _INERTIA * slid  # (P, L)
        half = self._turns / 2  # an arc is shorter than its way by this sinc, and leaves at half of its angle
        chord = slid * np.sinc(half / np.pi)
        sine, cosine, (x, y) = np.sin(half), np.cos(half), normals.T[:, :, None]
        self._shifts = np.stack([chord * (cosine * x - sine * y), chord * (sine * x + cosine * y)], axis=2)  # (P, L, 2)

    def __call__(self, pusher: Floats, block: Floats) -> Floats:
        """Return the action (2,).

        Args:
            pusher: Its position (2,), in pixels of the table.
            block: Position and angle of the block, (3,), as gym-pusht has them.
        """
        turn = _rotation(block[2])
        place = (pusher - block[:2]) @ turn  # in the block's frame, like all that follows
        gaps = np.linalg.norm(self._places - place, axis=1)
        touches = gaps < _TOUCH
        first = int(np.linalg.norm(self._ring - place, axis=1).argmin())
        ahead = (self._along[self._gates] - self._along[first]) % self._around
        ways = np.linalg.norm(self._ring[first] - place) + np.minimum(ahead, self._around - ahead) + _CHANGE
        ways = np.where(touches, gaps, ways) + _SETTLE
        gains = self._gains(turn, block) / (ways[:, None] + _LENGTHS)
        on_table = self._places @ turn.T + block[:2]
        gains[((on_table < 0) | (on_table > _TABLE)).any(1)] = -np.inf
        chosen, length = np.unravel_index(int(gains.argmax()), gains.shape)
        if touches[chosen]:
            end = _rotation(self._turns[chosen, length]) @ (self._places[chosen] - _MASS_CENTRE)
            target = end + _MASS_CENTRE + self._shifts[chosen, length]
        else:
            target = self._walk(place, int(chosen), first, bool(ahead[chosen] <= self._around / 2))
        way = turn @ (target - place)
        return np.clip(pusher + way * min(1.0, _LEAD / max(float(np.linalg.norm(way)), 1e-9)), 0.0, _TABLE)

    def _gains(self, turn: Floats, block: Floats) -> Floats:
        """Return how much nearer (pixels) to the goal each push brings the block (P, L)."""
        goal = _GOAL_POSITION + _rotation(_GOAL_ANGLE) @ _MASS_CENTRE
        missing = (goal - block[:2]) @ turn - _MASS_CENTRE
        angle = _GOAL_ANGLE - block[2]

        def error(shifts: Floats, turns: Floats) -> Floats:
            return np.sqrt(((missing - shifts) ** 2).sum(-1) + 2 * _LEVER**2 * (1 - np.cos(angle - turns)))

        return error(np.zeros(2), np.zeros(())) - error(self._shifts, self._turns)

    def _walk(self, place: Floats, chosen: int, first: int, forward: bool) -> Floats:
        """Return the farthest point on the way around the block that the pusher can go to straight."""
        sign = 1 if forward else -1
        count = (sign * (self._gates[chosen] - first)) % len(self._ring)
        points = self._ring[(first + sign * np.arange(count + 1)) % len(self._ring)]
        points = np.concatenate([points, self._places[chosen : chosen + 1]])
        straight = place + (points[:, None] - place) * np.linspace(0, 1, 25)[1:, None]  # (N, 24, 2)
        kept = np.append(np.full(count + 1, _RADIUS + _CLEARANCE / 2), _RADIUS - 0.5)
        # a pusher that is nearer already may leave
        free = np.flatnonzero(_distance(straight).min(1) > np.minimum(kept, _distance(place) - 1e-6))
        return points[free[-1]] if len(free) else points[min(1, count)]


def _rotation(angle: float) -> Floats:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _distance(points: Floats) -> Floats:
    """Return the distance of points (..., 2) to the block, negative inside."""
    beyond = np.maximum(_BARS[:, 0] - points[..., None, :], points[..., None, :] - _BARS[:, 1])  # (..., 2 bars, 2)
    outside = np.hypot(*np.moveaxis(np.maximum(beyond, 0.0), -1, 0))
    return (outside + np.minimum(beyond.max(-1), 0.0)).min(-1)


def _outline(offset: float, spacing: float = 6.0) -> tuple[Floats, Floats]:
    """Return points about `spacing` apart on the block's sides moved out by `offset`, and the normals there (N, 2)."""
    ways = np.roll(_CORNERS, -1, axis=0) - _CORNERS
    normals = np.stack([ways[:, 1], -ways[:, 0]], axis=1) / np.linalg.norm(ways, axis=1, keepdims=True)
    corners = _CORNERS + offset * (normals + np.roll(normals, 1, axis=0))
    points, outward = [], []
    for start, end, normal in zip(corners, np.roll(corners, -1, axis=0), normals, strict=True):
        count = round(float(np.linalg.norm(end - start)) / spacing)
        points.append(start + (np.arange(count)[:, None] + 0.5) / count * (end - start))
        outward.append(np.tile(normal, (count, 1)))
    return np.concatenate(points), np.concatenate(outward)
