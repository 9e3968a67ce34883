"""Whether another runtime is worth building for a picture, decided without building it."""

from __future__ import annotations

import time

import torch
from torch import nn

from zoo.engines import attach, engine_of, installed

__all__ = ["engine_if_worthwhile"]

_PROBE = 64  # pixels a side of what is timed
_WORTHWHILE = 120.0  # seconds in eager mode from which building (10 to 20 s of one core, once a network) pays


def engine_if_worthwhile(model: nn.Module, size: tuple[int, int], worthwhile: float = _WORTHWHILE) -> str:
    """Let "auto" choose the engine of a restorer where a picture takes it long, in place.

    The time is told from a small part: a tenth of a second's work. Networks that see the whole picture keep their
    streams.

    Args:
        model: The restorer.
        size: Height and width of the picture, pixels.
        worthwhile: Seconds in eager mode from which an engine is looked for.

    Returns:
        What was decided and why, in words; nothing where that was done before, or does not matter.
    """
    parameter = next(model.parameters())
    fits = parameter.dtype == torch.float32 and parameter.device.type == "cpu" and not model.training
    if not fits or engine_of(model) is not None or getattr(model, "receptive_field", None) is None:
        return ""
    names = [name for name in installed() if name not in ("eager", "inductor")]
    if not names:
        return ""
    step = int(getattr(model, "multiple_of", 1))
    side = -(-_PROBE // step) * step
    image = torch.rand(1, int(getattr(model, "in_chans", 3)), side, side)
    times = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    seconds = min(times) * size[0] * size[1] / side**2
    if seconds < worthwhile:
        return ""
    attach(model, "auto", candidates=names)
    return f"--engine auto: {seconds / 60:.0f} minutes in eager mode, so {' and '.join(names)} are built and timed"
