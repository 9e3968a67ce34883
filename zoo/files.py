"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole"]


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place when the block ends well.

    Args:
        path: File or folder, replaced if it exists; missing folders above it are made.

    Raises:
        OSError: The folder above cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".zoo-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            temporary.chmod(0o644)  # safetensors makes files that only their owner reads
        os.replace(temporary, path)
