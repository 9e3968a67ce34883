"""Whether a schedule of steps fits a run: as many steps, at the same timesteps."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from zoo.caching.runs import RunTracker

__all__ = ["Fit", "PlannedSteps", "find_fit", "wrong_steps"]

_SAME_TIMESTEPS = 0.01  # of the largest: schedules of other timesteps do not fit


class PlannedSteps(Protocol):
    """What a schedule says of the runs that it is for."""

    @property
    def num_steps(self) -> int:
        """Calls of the denoiser in a run."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the scheduler, empty if unknown; not always as many as there are calls."""

    @property
    def scheduler(self) -> str | None:
        """Class of the scheduler, None if unknown."""


class Fit(NamedTuple):
    """How a schedule fits a run.

    Args:
        offset: Steps of the schedule before the first one of the run.
        timesteps: All those that the schedule has to fit, of an image-to-image run also those left out.
        wrong: Why it does not fit; None where it does.
        other_scheduler: What to warn of; None for nothing.
    """

    offset: int
    timesteps: list[float]
    wrong: str | None
    other_scheduler: str | None


def wrong_steps(name: str, schedule: PlannedSteps, steps: str) -> str:
    """Say that a run has other steps than a schedule."""
    return (
        f"The {name} schedule is for {schedule.num_steps} steps, this run has {steps}: calibrate for it with "
        f"zoo.calibrate_cache."
    )


def find_fit(name: str, schedule: PlannedSteps, run: RunTracker) -> Fit:
    """Compare a schedule with a run that has just begun.

    Args:
        name: Of the method, for messages.
        schedule: The schedule.
        run: Tells steps, timesteps and scheduler.
    """
    timesteps, offset, wrong, other = run.own_timesteps, 0, None, None
    if run.num_steps is not None and run.num_steps != schedule.num_steps:
        if run.timesteps is not None and len(run.timesteps) == schedule.num_steps:
            offset = run.start  # image-to-image: the end of the schedule's own timesteps
            timesteps = run.timesteps
        elif len(schedule.timesteps) == len(timesteps) and run.planned_fits(schedule.num_steps):
            pass  # a pipeline that makes fewer or more calls than its scheduler has timesteps, and made as many before
        else:
            wrong = wrong_steps(name, schedule, str(run.num_steps))
    scheduler = type(run.scheduler).__name__
    if wrong is None and timesteps and schedule.timesteps:
        largest = max(map(abs, schedule.timesteps))
        pairs = zip(timesteps, schedule.timesteps, strict=True)
        if any(abs(ours - theirs) > _SAME_TIMESTEPS * largest for ours, theirs in pairs):
            wrong = (
                f"The {name} schedule is for other timesteps ({schedule.scheduler}) than those of this run "
                f"({scheduler}): calibrate anew with zoo.calibrate_cache."
            )
        elif scheduler != schedule.scheduler:
            other = f"The {name} schedule was found with {schedule.scheduler}, not {scheduler}."
    return Fit(offset, timesteps, wrong, other)
