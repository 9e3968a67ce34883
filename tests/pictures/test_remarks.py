"""What reading says: heard where it is wanted, and the process's filters are as before, whoever reads at a time."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from zoo.pictures.remarks import pillow_silenced, remark, without_remarks


def test_readers_side_by_side_leave_the_filters() -> None:
    """Whatever their order of entering and leaving."""
    entered, leave = threading.Barrier(3), threading.Event()

    def read() -> None:
        with without_remarks(), pillow_silenced():
            entered.wait(10)
            leave.wait(10)
            remark("unheard", 1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(2) as pool:
            with pillow_silenced():
                tasks = [pool.submit(read) for _ in range(2)]
                entered.wait(10)
                warnings.warn_explicit("Truncated", UserWarning, "a.py", 1, module="PIL.TiffImagePlugin")
            leave.set()  # the first that came has left
            for task in tasks:
                task.result()
        assert list(warnings.filters) == before
        remark("heard", 1)
    assert [str(each.message) for each in heard] == ["heard"]
    with pytest.warns(UserWarning, match="in this thread"):
        remark("in this thread", 1)
