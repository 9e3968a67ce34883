"""Feature maps of networks that run strip by strip: in memory as long as they fit, then in temporary files."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, Self

import torch
from torch import Tensor

__all__ = ["FeatureMap", "Workspace", "strips"]


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of strips of at most `rows` rows that cover `height` rows."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


class FeatureMap:
    """A map (height, width, channels), written and read by rows; from `Workspace.new`.

    Args:
        shape: Height, width, channels.
        device: Where strips are returned, and where the map lies if it is in memory.
        dtype: Of the map.
        file: Open temporary file that holds the map; None holds it in memory.
    """

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, file: BinaryIO | None = None
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._file = file
        self._tensor = torch.empty(shape, device=device, dtype=dtype) if file is None else None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        height, width, channels = self.shape
        return height * width * channels * self.dtype.itemsize

    @property
    def in_memory(self) -> bool:
        """Whether the map is held in memory."""
        return self._tensor is not None

    @property
    def is_open(self) -> bool:
        """Whether the map can be used: it was not released."""
        return self._tensor is not None or (self._file is not None and not self._file.closed)

    def read(self, first: int, end: int) -> Tensor:
        """Return rows [first, end), (end - first, width, channels); a view of the map where that is in memory.

        Raises:
            IndexError: The rows are not all in the map.
        """
        self._check(first, end)
        if self._tensor is not None:
            return self._tensor[first:end]
        rows = torch.empty((end - first, *self.shape[1:]), dtype=self.dtype)
        file, data = self._open_at(first), _bytes(rows)
        while data:
            data = data[file.readinto(data) :]  # type: ignore[attr-defined]
        return rows.to(self.device)

    def write(self, first: int, rows: Tensor) -> None:
        """Write (n, width, channels) as the rows from `first` on.

        Raises:
            IndexError: The rows are not all in the map.
            OSError: The disk is full.
        """
        self._check(first, first + rows.shape[0])
        if self._tensor is not None:
            self._tensor[first : first + rows.shape[0]] = rows
        else:
            file, data = self._open_at(first), _bytes(rows.to("cpu", self.dtype).contiguous())
            while data:
                data = data[file.write(data) :]

    def release(self) -> None:
        """Give the memory or the file back; the map cannot be used any more."""
        self._tensor = None
        if self._file is not None:
            self._file.close()

    def _check(self, first: int, end: int) -> None:
        if not 0 <= first <= end <= self.shape[0]:
            raise IndexError(f"Rows {first} to {end} are not in a map of {self.shape[0]} rows.")

    def _open_at(self, row: int) -> BinaryIO:
        assert self._file is not None
        self._file.seek(row * self.shape[1] * self.shape[2] * self.dtype.itemsize)
        return self._file


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(rows.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]


class Workspace:
    """Makes the feature maps of one streamed run, and keeps count of their memory; a context manager.

    Args:
        memory: Bytes that maps may take; further ones go to temporary files. None is no limit.
        device: Of the maps.
        dtype: Of the maps.
    """

    def __init__(self, memory: int | None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.memory, self.device, self.dtype = memory, torch.device(device), dtype
        self._maps: list[FeatureMap] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for feature_map in self._maps:
            feature_map.release()
        self._maps.clear()

    @property
    def held(self) -> int:
        """Bytes of the maps that are in memory."""
        return sum(feature_map.nbytes for feature_map in self._maps if feature_map.in_memory)

    def new(self, height: int, width: int, channels: int) -> FeatureMap:
        """Return an empty map, in memory if it still fits there.

        Raises:
            OSError: The temporary folder has no room for it.
        """
        self._maps = [feature_map for feature_map in self._maps if feature_map.is_open]
        size = height * width * channels * self.dtype.itemsize
        file: BinaryIO | None = None
        if self.memory is not None and self.held + size > self.memory:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if free < size:
                raise OSError(
                    errno.ENOSPC,
                    f"A map of {size / 1e9:.1f} GB does not fit in memory, and {tempfile.gettempdir()} has "
                    f"{free / 1e9:.1f} GB free: allow more memory, or set TMPDIR to a folder with more room.",
                )
            file = tempfile.TemporaryFile(prefix="zoo-", buffering=0)  # noqa: SIM115  closed by release()
            file.truncate(size)
        feature_map = FeatureMap((height, width, channels), self.device, self.dtype, file)
        self._maps.append(feature_map)
        return feature_map
