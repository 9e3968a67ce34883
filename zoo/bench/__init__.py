"""Benchmarks: two sides in one process and in turns, after a check that both compute the same."""

from zoo.bench.grid import Grid, compare_grid
from zoo.bench.models import compare_models
from zoo.bench.report import Benchmark, Check, Entry, Goal, Ratio
from zoo.bench.timing import BenchError, Settings

__all__ = [
    "BenchError",
    "Benchmark",
    "Check",
    "Entry",
    "Goal",
    "Grid",
    "Ratio",
    "Settings",
    "compare_grid",
    "compare_models",
]
