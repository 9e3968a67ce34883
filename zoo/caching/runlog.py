"""What a cache did in one sampling run, noted as it happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Call", "GateError", "RunLog"]


@dataclass
class Call:
    """One call of the denoiser.

    Args:
        context: Cache context, usually "cond", "uncond" or "default".
        step: Of the run, from 0.
        skipped: Something was left out.
        seconds: How long it took; None where the device does not wait for results.
    """

    context: str
    step: int
    skipped: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class GateError:
    """How far a forecast was off, by which a step was judged.

    Args:
        context: Cache context.
        step: Of the run, from 0.
        error: Relative to the true feature.
        skipped: The forecast was good enough.
        samples: Error of each sample, on the device; None where it was not asked for.
    """

    context: str
    step: int
    error: float
    skipped: bool
    samples: Tensor | None = None


@dataclass
class RunLog:
    """Everything noted in one run.

    Args:
        num_steps: Calls that were to come in each context; None if unknown.
        calls: Calls of the denoiser, in order.
        units: Steps that computed and steps that skipped a unit, by context and unit.
        errors: Of the gate, where there is one.
        bytes_held: Most memory held by stored features.
    """

    num_steps: int | None = None
    calls: list[Call] = field(default_factory=list)
    units: dict[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)
    errors: list[GateError] = field(default_factory=list)
    bytes_held: int = 0

    def note(self, context: str, units: Sequence[str], step: int, *, skipped: bool) -> None:
        """Note that units were computed or skipped; a unit called twice in a step counts once."""
        known = self.units
        for unit in units:
            pair = known.get((context, unit))
            if pair is None:
                pair = known[context, unit] = ([], [])
            steps = pair[skipped]
            if not steps or steps[-1] != step:
                steps.append(step)
        if skipped and self.calls:
            self.calls[-1].skipped = True
