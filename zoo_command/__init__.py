"""Where the `zoo` command starts: help and lists come at once, because the package itself is run only when needed.

Importing `zoo` registers its models with timm, which takes the import of torch. So the command makes the package known
without running it, and `zoo.cli` runs it before any command but `list` and `info`.
"""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """Run the `zoo` command with the arguments of the process.

    Returns:
        The exit code.
    """
    if "zoo" not in sys.modules:
        spec = importlib.util.find_spec("zoo")
        assert spec is not None  # it is installed with this package
        sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    from zoo.cli import main as run

    return run()
