"""Figures of matplotlib, which comes with an extra."""

from __future__ import annotations

from typing import Any

__all__ = ["new_figure"]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need the 'demo' extra (matplotlib is missing): pip install 'ffn-zoo[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")
