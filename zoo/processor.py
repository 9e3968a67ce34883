"""The processor of this machine: its name, and the instructions that compiled code may use."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

__all__ = ["instructions", "processor_name"]

_CPUINFO = Path("/proc/cpuinfo")  # Linux
_USED = re.compile(r"abm|adx|amx|asimd|avx|bf16|bmi|f16c|fma|gfni|i8mm|movbe|popcnt|s?sse|sme\b|sve|v?aes|v?pclmul|xop")


def processor_name() -> str:
    """Return the processor's name, from Linux's list where there is one."""
    return _line("model name") or platform.processor() or platform.machine()


@functools.cache
def instructions() -> tuple[str, ...]:
    """Return the sets of instructions that a compiler may use here, by Linux's names, sorted; none where not known."""
    found = _line("flags") or _line("Features")
    return tuple(sorted(name for name in set(found.split()) if _USED.match(name)))


def _line(field: str) -> str:
    """Return the first value of a field of Linux's list; empty where there is none."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
