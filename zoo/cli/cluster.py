"""`--ray`: pictures of one call on many workers and machines, by Ray Data; each worker loads the model once.

All machines see the pictures and the results at the same paths. What a worker that dies had begun is done again by
another: a result is written whole or not at all, so that nothing is lost and nothing half-written. What ends one
worker after the other is given up, and said.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any, TypeVar

from zoo.cli.output import UsageError, at_least

__all__ = ["add_ray", "check_ray", "spread"]

T = TypeVar("T")
R = TypeVar("R")

_TRIES = 4
"""Workers that may die of one item: of a machine that is taken away at times, an item survives more than that."""


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Add --ray and --workers."""
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="spread the pictures over a Ray cluster: its address, auto, or local"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --ray (default: one a core, or one a GPU)")


def check_ray(args: argparse.Namespace) -> None:
    """Refuse what --ray cannot do, before anything is loaded.

    Raises:
        UsageError: There are --workers without --ray, or fewer than one.
        ImportError: Ray is not installed.
    """
    if args.ray is None and args.workers is not None:
        raise UsageError("--workers are those of --ray.")
    at_least(args, workers=1)
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        raise ImportError("--ray needs ray, which is missing: pip install 'ffn-zoo[ray]'.")


def spread(
    args: argparse.Namespace,
    items: Sequence[T],
    make: Callable[..., Callable[[T], R]],
    *arguments: Any,
    lost: Callable[[T, str], R],
) -> Iterator[tuple[int, R]]:
    """Yield the number of each item and what is made of it, in the order in which they are done.

    Args:
        args: Of the command: `ray`, `workers` and `device`.
        items: What to work on; they are pickled.
        make: Called in each worker, with the arguments; what it returns is called with one item at a time.
        *arguments: They are pickled.
        lost: Makes the result of an item that no worker survives, from the item and what happened in words.

    Raises:
        UsageError: There is no cluster at the address.
        Exception: What a worker raises, as it was there.
    """
    if not items:
        return
    with redirect_stdout(sys.stderr):  # Ray prints there what happened to a worker
        ray, began = _connect(args.ray)
        try:
            missing = set(range(len(items)))
            for number, (result, error) in _rows(ray, args, items, make, arguments):
                if error is not None:
                    raise error
                missing.discard(number)
                yield number, result
        finally:
            if began:
                ray.shutdown()
    for number in sorted(missing):
        yield number, lost(items[number], f"every worker that began it died, {_TRIES} times; is there enough memory?")


def _rows(
    ray: Any, args: argparse.Namespace, items: Sequence[T], make: Callable[..., Callable[[T], R]], arguments: Any
) -> Iterator[tuple[int, tuple[Any, Exception | None]]]:
    """Yield the number of each item, what is made of it, and what was raised instead."""
    folder = os.getcwd()

    class Worker:
        """What runs in a process of its own; its class carries the arguments, so that it can begin anew."""

        def __init__(self) -> None:
            os.chdir(folder)  # for paths as the user typed them
            self._failed: Exception | None = None
            try:
                self._work = make(*arguments)
            except Exception as error:  # Ray would wrap it in pages of its own
                self._failed = error

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            result, failed = None, self._failed
            try:
                result = None if failed else self._work(pickle.loads(row["item"]))
            except Exception as error:
                failed = error
            return {"number": row["number"], "result": _pickled(result, failed)}

    import ray.data as data

    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # what no worker survives
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0)) if args.device != "cpu" else 0
    workers = min(len(items), args.workers or gpus or max(1, int(found.get("CPU", 1))))
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    each = data.from_items(rows, override_num_blocks=len(rows))
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the line above has set it up
    # One item at a time: with one that ends its worker, others would wait and be given up too
    pool = data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
    options: dict[str, Any] = {"num_cpus": 1, "max_task_retries": _TRIES - 1} | ({"num_gpus": 1} if gpus else {})
    worker: Any = Worker
    for row in each.map(worker, compute=pool, **options).iter_rows():
        yield row["number"], pickle.loads(row["result"])


def _pickled(result: Any, error: Exception | None) -> bytes:
    try:
        said = pickle.dumps((result, error))
        pickle.loads(said)  # some errors cannot be built again from what they keep
    except Exception:
        said = pickle.dumps((None, RuntimeError(f"{type(error or result).__name__}: {error or 'cannot be sent'}")))
    return said


def _connect(address: str) -> tuple[Any, bool]:
    """Join a cluster, or begin one on this machine; return ray, and whether that began here."""
    import ray

    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its processes write to this terminal
    where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: there is no cluster: {' '.join(str(error).split())[:200]}") from error
    return ray, True
