"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["cache_dir", "is_hidden", "walk", "whole"]

_SYSTEM_NAMES = ("__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini", "lost+found")  # in small letters


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is not the user's: hidden, or written by a system (`__MACOSX`, `Thumbs.db`)."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def cache_dir() -> Path:
    """Return the user's folder for what zoo keeps: that of `ZOO_CACHE`, or zoo in the platform's cache folder."""
    if folder := os.environ.get("ZOO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoo"


def walk(
    folder: str | Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through a folder and all below it as `os.walk` does, through links too; hidden folders are left out.

    A link to what is walked through anyway, or to a folder that it lies in, is not followed: nothing comes twice, and
    it ends.

    Args:
        folder: Where it begins.
        onerror: Told of a folder that cannot be read, which is then passed over; None raises.

    Yields:
        Path, names of the folders in it, which the caller may sort or shorten, and names of the files.

    Raises:
        OSError: A folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    entered = [Path(folder).resolve()]
    for parent, folders, names in os.walk(folder, onerror=onerror or stop, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in [name for name in folders if os.path.islink(os.path.join(parent, name))]:
            target = Path(parent, name).resolve()
            around = any(inner.is_relative_to(target) for inner in (entered[0], Path(parent).resolve()))
            if around or any(_is_below(target, each) for each in entered):
                folders.remove(name)
            else:
                entered.append(target)
        yield parent, folders, names


def _is_below(path: Path, folder: Path) -> bool:
    """Tell whether a walk through a folder comes to a path."""
    return path.is_relative_to(folder) and not any(map(is_hidden, path.relative_to(folder).parts))


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
        mode = _usual_mode(Path(folder))  # safetensors makes files that only their owner reads
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(mode | (file.stat().st_mode & 0o111))
            shutil.rmtree(path, ignore_errors=True)
        else:
            temporary.chmod(mode)
        os.replace(temporary, path)


def _usual_mode(folder: Path) -> int:
    """Return the mode that new files get from the umask, without changing it for other threads."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode
