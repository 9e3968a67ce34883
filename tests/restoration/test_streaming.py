"""Feature maps by rows, in memory and in files, and the window of rows that a convolution sees."""

from __future__ import annotations

import errno
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from zoo.streaming.line import run_line, single_threads
from zoo.streaming.maps import FeatureMap, Workspace
from zoo.streaming.strips import RowWindow, add_product, depthwise_strip, linear_strip, strips


@pytest.mark.parametrize(("height", "rows"), [(1, 1), (7, 3), (6, 3), (2, 9)])
def test_strips_cover_all_rows(height: int, rows: int) -> None:
    found = list(strips(height, rows))
    assert [row for first, end in found for row in range(first, end)] == list(range(height))
    assert all(0 < end - first <= rows for first, end in found)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("memory", [None, 0], ids=["memory", "file"])
def test_what_is_written_is_read(memory: int | None, channels_first: bool) -> None:
    """Rows come back as they were written, also parts of them and over old ones, in either layout."""
    layout = (lambda rows: rows.permute(2, 0, 1)) if channels_first else (lambda rows: rows)
    full = torch.randn(9, 4, 5)  # (H, W, C)
    with Workspace(memory) as workspace:
        feature_map = workspace.new(9, 4, 5, channels_first=channels_first)
        assert feature_map.in_memory == (memory is None)
        assert feature_map.nbytes == full.numel() * 4
        for first, end in strips(9, 4):
            feature_map.write(first, layout(full[first:end]))
        for first, end in ((0, 9), (3, 7), (8, 9), (2, 2)):
            assert torch.equal(feature_map.read(first, end), layout(full[first:end]))
        feature_map.write(2, layout(full[5:8]))
        assert torch.equal(feature_map.read(1, 6), layout(full[[1, 5, 6, 7, 5]]))


def test_low_precision_in_a_file() -> None:
    with Workspace(0, dtype=torch.bfloat16) as workspace:
        feature_map = workspace.new(3, 2, 4)
        rows = torch.randn(3, 2, 4).bfloat16()
        feature_map.write(0, rows)
        assert torch.equal(feature_map.read(0, 3), rows)


@pytest.mark.parametrize("memory", [None, 0], ids=["memory", "file"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_rows_beyond_the_map(memory: int | None, channels_first: bool) -> None:
    with Workspace(memory) as workspace:
        feature_map = workspace.new(4, 3, 2, channels_first=channels_first)
        strip = torch.zeros((2, 3, 3) if channels_first else (3, 3, 2))
        with pytest.raises(IndexError, match="Rows 2 to 5 are not in a map of 4 rows"):
            feature_map.write(2, strip)
        with pytest.raises(IndexError, match="Rows 1 to 6"):
            feature_map.read(1, 6)


def test_memory_is_counted() -> None:
    """Maps lie in memory as long as they fit; what is released makes room."""
    with Workspace(1000) as workspace:
        first, second = workspace.new(5, 5, 8), workspace.new(5, 5, 8)  # 800 bytes each
        assert (first.in_memory, second.in_memory) == (True, False)
        assert workspace.held == 800
        first.release()
        assert not first.is_open
        assert workspace.held == 0
        assert workspace.new(5, 5, 10).in_memory
        assert second.is_open
    assert not second.is_open
    assert workspace.held == 0


def test_files_are_gone_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail() -> FeatureMap:
        with Workspace(0) as workspace:
            feature_map = workspace.new(4, 4, 4)
            feature_map.write(0, torch.zeros(4, 4, 4))
            raise KeyboardInterrupt
        return feature_map

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with Workspace(10) as workspace, pytest.raises(OSError, match="set TMPDIR") as caught:
        workspace.new(4, 4, 4)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("height", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_window_convolves_the_whole_map(height: int, rows: int) -> None:
    """Strips of every height, uneven ones too, give the padded convolution of the whole map."""
    x, kernel = torch.randn(3, height, 5, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    expected = F.conv2d(x[None], kernel, padding=1, groups=3)[0]
    for uneven in (False, True):
        window = RowWindow(3, height, rows, 5, x.device, x.dtype)
        found, first = [], 0
        while first < height:
            end = min(first + (rows if not uneven or first == 0 else rows + 1), height)
            window.open(end - first).copy_(x[:, first:end])
            if window.fresh:
                assert window.seen.shape == (3, window.fresh + 2, 5)
                found.append(depthwise_strip(window.seen, kernel))
            window.advance()
            first = end
        assert torch.allclose(torch.cat(found, 1), expected)


def test_products_of_strips() -> None:
    """Linear layers write into part of a larger map; residual products leave their input as it is."""
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(6, 4), torch.randn(6)
    buffer = torch.zeros(6, 9, 5)
    linear_strip(weight, bias, x.flatten(1), buffer[:, 2:5])
    expected = torch.einsum("oc,chw->ohw", weight, x) + bias[:, None, None]
    assert torch.allclose(buffer[:, 2:5], expected, atol=1e-5)
    assert buffer[:, :2].abs().max() == buffer[:, 5:].abs().max() == 0
    linear_strip(weight, None, x.flatten(1), buffer[:, 2:5])
    assert torch.allclose(buffer[:, 2:5], expected - bias[:, None, None], atol=1e-5)
    y, kept = torch.randn(6, 3, 5), x.clone()
    found = add_product(x, weight.T.contiguous(), y)
    assert torch.allclose(found, x + torch.einsum("co,ohw->chw", weight.T, y), atol=1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_line_keeps_the_order_and_flushes_each_stage(workers: int) -> None:
    """Stages that give back what they got before: the last comes when no more do. Each works on one item at a time."""

    def late() -> Callable[[int | None], int | None]:
        kept: list[int] = []
        lock = threading.Lock()

        def stage(item: int | None) -> int | None:
            assert lock.acquire(blocking=False), "two threads in one stage"
            kept.extend([] if item is None else [item])
            ready = kept.pop(0) if len(kept) == 2 or (kept and item is None) else None
            lock.release()
            return ready

        return stage

    out: list[int] = []
    last = lambda item: out.extend([] if item is None else [item])  # noqa: E731
    run_line(
        [lambda item: item, late(), lambda item: None if item is None else 2 * item, late(), last], range(20), workers
    )
    assert out == list(range(0, 40, 2))
    out.clear()
    run_line([late(), last], [], workers)
    assert out == []


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_stage_ends_the_line(workers: int) -> None:
    seen: list[int] = []

    def fail(item: int) -> int:
        seen.append(item)
        raise MemoryError("full")

    threads = torch.get_num_threads()
    with pytest.raises(MemoryError, match="full"):
        run_line([lambda item: item, fail, lambda item: None], range(1000), workers)
    assert seen == [0]
    assert torch.get_num_threads() == threads


def test_runs_side_by_side_leave_the_number_of_threads() -> None:
    """As in a server that restores several pictures at a time: it would compute on one thread ever after."""
    threads = torch.get_num_threads()
    entered, leave = threading.Event(), threading.Event()

    def run() -> None:
        with single_threads():
            entered.set()
            leave.wait(10)

    def seen() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:
            with single_threads():
                assert seen() == 1
                task = pool.submit(run)
                entered.wait(10)
            assert torch.get_num_threads() == 3  # the first that came has left
            leave.set()
            task.result()
        assert seen() == 3
    finally:
        torch.set_num_threads(threads)
