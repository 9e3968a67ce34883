"""`zoo classify` and `zoo restore`: models at work on the user's pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo import catalog
from zoo.cli.inputs import find_pictures
from zoo.cli.output import UsageError, print_json, print_table, progress, table


def default_model(task: str) -> str:
    """Return the shipped weights for a task.

    Raises:
        UsageError: None are shipped.
    """
    for name, facts in catalog.select(task=task).items():
        for tag, weight in facts["weights"].items():
            if weight["source"] == "shipped":
                return f"{name}.{tag}"
    raise UsageError(f"No weights for {task} are shipped: say --model.")
