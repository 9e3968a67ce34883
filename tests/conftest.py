"""Fixtures that all tests share: reproducible numbers, one thread a worker, data that may or may not be at hand."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import logging
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

import fresh_process
import numpy as np
import pytest
import torch

_SHARED = Path(__file__).resolve().parents[2] / "shared"  # a folder beside the checkout, where there is one


_CACHE = tempfile.mkdtemp(prefix="zoo-tests-")
os.environ["HF_HOME"] = _CACHE  # before the Hub's libraries are imported: tests leave nothing in the user's cache
os.environ["ZOO_CACHE"] = os.path.join(_CACHE, "zoo")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the Hub fails at once instead of after its retries
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHON_COLORS"):
    os.environ.pop(_name, None)  # what the caller's terminal is like: tests read what a pipe gets, whole lines


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes one thread, as more would only wait for each other, and a twin."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", 0):  # a process that runs tests
        importlib.import_module("timm")
        fresh_process.start()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


gc.disable()  # importing leaves no garbage, but a million objects to look through again and again


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage again, of what tests make only and seldom; no traces, for which pytest's handler asks."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
    traces = logging.getLogger("torch.__trace")
    traces.handlers.clear()
    traces.propagate = True  # pytest adds its handler to loggers that do not


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches of this process, and what was left out of collecting, which bindings count at the end."""
    gc.unfreeze()
    shutil.rmtree(_CACHE, ignore_errors=True)


_TRACE = pytest.StashKey[TextIO]()


def _trace(worker: str, parent: int) -> Path:
    return Path(tempfile.gettempdir()) / f"zoo-tests-{parent}-{worker}.txt"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let a worker process that crashes write where; its standard error is not seen."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        session.config.stash[_TRACE] = _trace(worker, os.getppid()).open("w")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Install the handler of crashes anew for every test: compilers that others load have handlers of their own."""
    if _TRACE in item.config.stash:
        file = item.config.stash[_TRACE]
        file.seek(0)
        file.truncate()
        print(item.nodeid, file=file, flush=True)
        faulthandler.disable()
        faulthandler.enable(file)
        _leave_alternate_stack()


class _Stack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _leave_alternate_stack() -> None:
    """Let handlers of signals run on the usual stack.

    Core files of workers that died in `test_triton_kernels` show the kernel's own SIGSEGV in wait4, as the child ended:
    torch's data loader handles SIGCHLD, Python asks for the alternate stack, and that one could not be written to.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, 2, 0)), None)  # SS_DISABLE


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say how a worker process ended that was not told to; xdist itself only says that it did."""
    trace = _trace(node.gateway.id, os.getpid())
    if error:
        code = node.gateway._io.popen.wait(timeout=10)
        where = trace.read_text(errors="replace") if trace.is_file() else ""
        print(f"\n{node.gateway.id} ended with code {code} (negative: a signal)\n{where[:6000]}", file=sys.stderr)
    trace.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _folder(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ[variable]) if os.environ.get(variable) else default
    if not folder.is_dir():
        pytest.skip(f"{what} are not at hand: {variable} names no folder")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Return the folder of the reference records made with the authors' code; skip where there is none."""
    return _folder("ZOO_REFERENCE", _SHARED / "parity", "reference records")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real photos and benchmark sets; skip where there is none."""
    return _folder("ZOO_DATA", _SHARED / "data", "real images")
