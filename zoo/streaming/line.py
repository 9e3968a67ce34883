"""A line of stages through which strips of a picture pass, worked on by several threads at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["run_line", "single_threads"]

Stage = Callable[[Any], Any]
"""Takes the next item, gives one back or None where none is ready yet. None says that no more come: the last is due."""

_WAITING = 2  # items before a stage from which the one before it rests

_lock = threading.Lock()
_kept: list[int] = []  # torch's number of threads, once for each run that is under way


@contextmanager
def single_threads() -> Iterator[None]:
    """Have torch run each operation on one thread, in threads that begin now.

    The number belongs to the process: a run that begins within another takes over what that one found, not its 1, which
    would otherwise be left behind for ever.
    """
    with _lock:
        _kept.append(_kept[0] if _kept else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            torch.set_num_threads(_kept.pop())


def run_line(stages: Sequence[Stage], items: Sequence[Any], workers: int) -> None:
    """Pass items through stages one after the other; what the last stage returns is dropped.

    Each stage takes all items in their order, one at a time; different stages work at the same time. Threads take the
    item that has come furthest, so that few wait, and work is even however unlike the stages are. The threads of an
    operation would wait for each other at every layer; here each thread has operations of its own.

    Args:
        stages: What is done with the items.
        items: For the first stage.
        workers: Threads; with more than one, torch's own are set to one meanwhile.

    Raises:
        BaseException: What a stage raised first; nothing is begun after it.
    """
    line = _Line(stages, items)
    if workers == 1:
        line.work()
    else:
        with single_threads(), ThreadPoolExecutor(workers) as pool:
            for _ in range(workers):
                pool.submit(line.work)
            line.wait()
    if line.error is not None:
        raise line.error


class _Line:
    def __init__(self, stages: Sequence[Stage], items: Sequence[Any]) -> None:
        self.stages = stages
        self.boxes: list[deque[Any]] = [deque([*items, None]), *(deque() for _ in stages[1:])]
        self.busy = [False] * len(stages)
        self.changed = threading.Condition()
        self.is_over = False
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Wait for the end; an interruption of the waiting thread ends the line."""
        try:
            with self.changed:
                self.changed.wait_for(lambda: self.is_over)
        except BaseException as error:
            self._end(error)

    @torch.no_grad()  # a thread has its own setting
    def work(self) -> None:
        """Take items that are ready until all have passed."""
        while (index := self._next()) is not None:
            try:
                item = self.boxes[index].popleft()
                results = [self.stages[index](item)]
                results = [result for result in results if result is not None] + ([None] if item is None else [])
            except BaseException as error:
                self._end(error)
                return
            with self.changed:
                self.busy[index] = False
                if index + 1 < len(self.stages):
                    self.boxes[index + 1].extend(results)
                elif item is None:
                    self.is_over = True
                self.changed.notify_all()

    def _next(self) -> int | None:
        """Claim the furthest stage that can work; wait for one; None at the end."""
        with self.changed:
            while not self.is_over:
                for index in reversed(range(len(self.stages))):
                    full = index + 1 < len(self.stages) and len(self.boxes[index + 1]) >= _WAITING
                    if self.boxes[index] and not self.busy[index] and not full:
                        self.busy[index] = True
                        return index
                self.changed.wait()
        return None

    def _end(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.is_over = True
            self.changed.notify_all()
