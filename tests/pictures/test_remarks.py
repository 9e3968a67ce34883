"""What reading says is heard where it is wanted; filters and bounds stay as before, whoever reads at a time."""

from __future__ import annotations

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, PngImagePlugin

from zoo.pictures.picture import PictureError
from zoo.pictures.read import open_picture
from zoo.pictures.remarks import pillow_silenced, pillow_unbounded, remark, without_remarks


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


def test_readers_side_by_side_leave_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's protection against files made to fill the memory: a bound for one picture is not one for others."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    entered, leave = threading.Barrier(2), threading.Event()

    def read() -> None:
        with pillow_unbounded():
            entered.wait(10)
            leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with pillow_unbounded():
            task = pool.submit(read)
            entered.wait(10)
            assert open_picture(io.BytesIO(file.getvalue()), max_pixels=200).size == (10, 20)
        with pytest.raises(PictureError, match="its 20x10 pixels are more than 198"):  # while the other still reads
            open_picture(io.BytesIO(file.getvalue()))
        leave.set()
        task.result()
    assert before == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)
    with pytest.raises(PictureError, match="is refused"):
        open_picture(io.BytesIO(file.getvalue()))
