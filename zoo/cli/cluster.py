"""`--ray`: pictures of one call on many workers and machines, by Ray Data; each worker loads the model once.

All machines see the pictures and the results at the same paths. What a worker that dies had begun is done again by
another: a result is written whole or not at all, so that nothing is lost and nothing half-written.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from zoo.cli.output import UsageError

__all__ = ["add_ray", "spread"]

T = TypeVar("T")
R = TypeVar("R")


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Add --ray and --workers."""
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="spread the pictures over a Ray cluster: its address, auto, or local"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --ray (default: one a core, or one a GPU)")


def spread(
    args: argparse.Namespace, items: Sequence[T], make: Callable[..., Callable[[T], R]], *arguments: Any
) -> Iterator[tuple[int, R]]:
    """Yield the number of each item and what is made of it, in the order in which they are done.

    Args:
        args: Of the command: `ray`, `workers` and `device`.
        items: What to work on; they are pickled.
        make: Called in each worker, with the arguments; what it returns is called with one item at a time.
        *arguments: They are pickled.

    Raises:
        UsageError: The number of workers is below 1, or there is no cluster at the address.
        ImportError: Ray is not installed.
    """
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers must be at least 1, got {args.workers}.")
    if not items:
        return
    ray, began = _connect(args.ray)
    folder = os.getcwd()

    class Worker:
        """What runs in a process of its own; its class carries the arguments, so that it can begin anew."""

        def __init__(self) -> None:
            os.chdir(folder)  # for paths as the user typed them
            self._work = make(*arguments)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"number": row["number"], "result": pickle.dumps(self._work(pickle.loads(row["item"])))}

    try:
        import ray.data as data

        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0)) if args.device != "cpu" else 0
        workers = min(len(items), args.workers or gpus or max(1, int(found.get("CPU", 1))))
        rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
        each = data.from_items(rows, override_num_blocks=len(rows))
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the line above has set it up
        options: dict[str, Any] = {"num_cpus": 1} | ({"num_gpus": 1} if gpus else {})
        worker: Any = Worker
        for row in each.map(worker, compute=data.ActorPoolStrategy(size=workers), **options).iter_rows():
            yield row["number"], pickle.loads(row["result"])
    finally:
        if began:
            ray.shutdown()


def _connect(address: str) -> tuple[Any, bool]:
    """Join a cluster, or begin one on this machine; return ray, and whether that began here."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs ray, which is missing: pip install 'ffn-zoo[ray]'.") from error
    if ray.is_initialized():
        return ray, False
    where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address}: there is no cluster: {' '.join(str(error).split())[:200]}") from error
    return ray, True
