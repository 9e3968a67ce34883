"""What a cache did in the last run, in numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["FIRST_BLOCK", "CacheSummary", "Call", "DenoiserSummary", "GateError", "RunLog", "UnitSteps"]

FIRST_BLOCK = "first block"
"""What summaries call the block that a gate judges by."""
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Call:
    """One call of the denoiser.

    Args:
        context: Branch of guidance: the cache context, usually "cond", "uncond" or "default", numbered where several
            branches share it.
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
        context: As for `Call`.
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
        num_steps: Steps that were to come; None if unknown.
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


@dataclass(frozen=True)
class UnitSteps:
    """Steps that computed and steps that skipped a part of a model, in one context."""

    context: str
    unit: str
    computed: tuple[int, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DenoiserSummary:
    """What the cache of one denoiser did in its last run.

    Args:
        model: Class of the denoiser.
        config: Configuration of the cache.
        calls: Calls of the denoiser by context.
        skipping_calls: Those in which something was left out.
        units: What was computed and skipped; empty for those of diffusers' caches that do not tell.
        errors: Of the gate, in order; empty where there is none.
        bytes_held: Most memory held by stored features, bytes; None where it is unknown.
        seconds: Time in the denoiser; None where the device does not wait for results.
        seconds_saved: About what the skipping calls would have taken longer, from the median of the others; None where
            it cannot be said.
    """

    model: str
    config: Any
    calls: dict[str, int]
    skipping_calls: dict[str, int]
    units: tuple[UnitSteps, ...]
    errors: tuple[GateError, ...]
    bytes_held: int | None
    seconds: float | None
    seconds_saved: float | None

    @classmethod
    def of(cls, model: str, config: Any, log: RunLog, bytes_now: int | None) -> DenoiserSummary:
        """Sum up what was noted.

        Args:
            model: Class of the denoiser.
            config: Configuration of the cache.
            log: Of the last run.
            bytes_now: Memory held now; None where it is unknown.
        """
        times = [call.seconds for call in log.calls if call.seconds is not None]
        known = len(times) == len(log.calls) > 0
        calls = {call.context: 0 for call in log.calls}
        skipping = dict(calls)
        for call in log.calls:
            calls[call.context] += 1
            skipping[call.context] += call.skipped
        units = (UnitSteps(*key, tuple(pair[0]), tuple(pair[1])) for key, pair in log.units.items())
        return cls(
            model=model,
            config=config,
            calls=calls,
            skipping_calls=skipping,
            units=tuple(units),
            errors=tuple(log.errors),
            bytes_held=None if bytes_now is None else max(bytes_now, log.bytes_held),
            seconds=sum(times) if known else None,
            seconds_saved=_saved(log) if known else None,
        )

    @property
    def computed_share(self) -> float | None:
        """Share of all unit calls that were computed, 0 to 1; None where it is unknown."""
        computed = sum(len(unit.computed) for unit in self.units)
        total = computed + sum(len(unit.skipped) for unit in self.units)
        return computed / total if total else None

    @property
    def computed_steps(self) -> float | None:
        """Steps computed, on average over parts and contexts; None where it is unknown.

        The first block of CG-Taylor, which is computed at every step for its gate, is left out.
        """
        counts = [len(unit.computed) for unit in self.units if unit.unit != FIRST_BLOCK]
        return sum(counts) / len(counts) if counts else None

    @property
    def error_quantiles(self) -> dict[float, float]:
        """Least, quartiles and largest of the gate's errors, by share; empty where there are none."""
        values = sorted(error.error for error in self.errors if error.error == error.error)
        return {share: _quantile(values, share) for share in _QUANTILES} if values else {}

    def lines(self) -> list[str]:
        """Return the text, by lines."""
        method = type(self.config).__name__
        if not self.calls:
            return [f"{method} on {self.model}: not run yet"]
        lines = [f"{method} on {self.model}"]
        for context, count in self.calls.items():
            lines.append(f"  {context}: {count} steps, {self.skipping_calls[context]} with something left out")
            own = [unit for unit in self.units if unit.context == context]
            groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
            for unit in own:
                groups.setdefault((unit.computed, unit.skipped), []).append(unit.unit)
            if len(groups) > 8:  # one line a unit would bury the rest
                counts = [len(unit.computed) for unit in own]
                mean = sum(counts) / len(counts)
                lines.append(f"    {len(own)} units computed {mean:.1f} steps on average, {min(counts)}-{max(counts)}")
            else:
                for (computed, skipped), names in groups.items():
                    what = names[0] if len(names) == 1 else f"{len(names)} units"
                    lines.append(f"    {what}: computed {len(computed)} ({_ranges(computed)}), skipped {len(skipped)}")
        if not self.units:
            lines.append("  this cache of diffusers does not tell what it skips")
        if self.error_quantiles:
            values = ", ".join(f"{value:.4g}" for value in self.error_quantiles.values())
            lines.append(f"  gate error, least / quartiles / largest of {len(self.errors)}: {values}")
            lines += [
                f"    step {error.step}, {error.context}, by sample: "
                + ", ".join(f"{value:.4g}" for value in error.samples.tolist())
                for error in self.errors
                if error.samples is not None
            ]
        if self.bytes_held is not None:
            lines.append(f"  held at most {self.bytes_held / 2**20:.2f} MiB")
        if self.seconds is not None:
            saved = "" if self.seconds_saved is None else f", about {self.seconds_saved:.3f} s saved"
            lines.append(f"  {self.seconds:.3f} s in the denoiser{saved}")
        return lines


@dataclass(frozen=True)
class CacheSummary:
    """What the caches of a pipeline did in its last run; `print` shows it.

    Args:
        denoisers: One for each denoiser.
    """

    denoisers: tuple[DenoiserSummary, ...]

    def __str__(self) -> str:
        return "\n".join(line for each in self.denoisers for line in each.lines())

    def __rich__(self) -> str:
        from rich.markup import escape

        return escape(str(self))


def _saved(log: RunLog) -> float | None:
    full = [call.seconds for call in log.calls if not call.skipped and call.seconds is not None]
    short = [call.seconds for call in log.calls if call.skipped and call.seconds is not None]
    if not full:
        return None
    return max(0.0, len(short) * statistics.median(full) - sum(short))


def _quantile(values: list[float], share: float) -> float:
    """Return a quantile of sorted values, between two of them where need be."""
    at = share * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low]) if high > low and at > low else values[low]


def _ranges(steps: tuple[int, ...]) -> str:
    """Write steps as "0-2, 7, 9"."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts) or "none"
