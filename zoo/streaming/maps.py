"""Feature maps of networks that run strip by strip: in memory as long as they fit, then in temporary files."""

from __future__ import annotations

import errno
import shutil
import tempfile
from typing import BinaryIO, Self

import torch
from torch import Tensor

__all__ = ["FeatureMap", "Workspace"]


class FeatureMap:
    """A map (height, width, channels), written and read by rows; from `Workspace.new`.

    Args:
        shape: Height, width, channels.
        device: Where strips are returned, and where the map lies if it is in memory.
        dtype: Of the map.
        file: Open temporary file that holds the map; None holds it in memory.
        channels_first: Strips of n rows are (channels, n, width), as convolutions and matrix products on a CPU like
            them best; otherwise (n, width, channels).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        file: BinaryIO | None = None,
        channels_first: bool = False,
    ) -> None:
        self.shape, self.device, self.dtype, self.channels_first = shape, device, dtype, channels_first
        self._file = file
        height, width, channels = shape
        size = (channels, height, width) if channels_first else shape
        self._tensor = torch.empty(size, device=device, dtype=dtype) if file is None else None

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
            return self._tensor[:, first:end] if self.channels_first else self._tensor[first:end]
        _, width, channels = self.shape
        row = (channels, width) if self.channels_first else (width, channels)
        rows = torch.empty((end - first, *row), dtype=self.dtype)
        file, data = self._open_at(first), _bytes(rows)
        while data:
            data = data[file.readinto(data) :]  # type: ignore[attr-defined]
        return (rows.transpose(0, 1) if self.channels_first else rows).to(self.device)

    def write(self, first: int, rows: Tensor) -> None:
        """Write (n, width, channels) as the rows from `first` on.

        Raises:
            IndexError: The rows are not all in the map.
            OSError: The disk is full.
        """
        end = first + rows.shape[1 if self.channels_first else 0]
        self._check(first, end)
        if self._tensor is not None:
            self.read(first, end).copy_(rows)
        else:
            if self.channels_first:
                rows = rows.transpose(0, 1)
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

    def new(self, height: int, width: int, channels: int, *, channels_first: bool = False) -> FeatureMap:
        """Return an empty map, in memory if it still fits there.

        Args:
            height: Rows.
            width: Pixels of a row.
            channels: Channels.
            channels_first: Layout of its strips, see `FeatureMap`.

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
        feature_map = FeatureMap((height, width, channels), self.device, self.dtype, file, channels_first)
        self._maps.append(feature_map)
        return feature_map
