"""Run the Triton kernels in Triton's interpreter and compile them for a GPU, each in a process of its own.

Triton looks once, when it is first imported, whether it is to interpret.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow  # every program of a kernel takes a millisecond to interpret, every kernel seconds to compile
@pytest.mark.parametrize(
    ("files", "interpret"),
    [(("interpreter.py", "wiring.py"), "1"), (("compiler.py",), "0")],
    ids=["interpret", "compile"],
)
def test_triton_kernels(files: tuple[str, ...], interpret: str, tmp_path: Path) -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: there are no kernels to run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"ZOO_KERNELS": "torch", "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *files]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
