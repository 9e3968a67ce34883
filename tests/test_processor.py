"""What compiled code may use here, from Linux's list of the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo import processor


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu smep sse2 avx2 hypervisor avx512f ssse3\n",
            "Some CPU @ 2 GHz",
            ("avx2", "avx512f", "sse2", "ssse3"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", "", ("asimd", "sve")),
    ],
)
def test_what_linux_lists(
    text: str, name: str, found: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    assert processor.instructions.__wrapped__() == found
    assert processor.processor_name() == name or not name


def test_elsewhere_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert processor.instructions.__wrapped__() == ()
    assert processor.processor_name()
