"""The processor of this machine: its name, the instructions that compiled code may use, types that it emulates."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.notices import notice

if TYPE_CHECKING:
    import torch

__all__ = ["emulates", "instructions", "processor_name", "tell_of_emulation"]

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


def emulates(dtype: torch.dtype | None) -> bool:
    """Tell whether torch computes a 16-bit type without instructions for it on this processor.

    An x86 core with AVX2 alone (most laptops) takes twice as long for attention as in float32, 7 times for a small
    linear layer, 25 for a convolution, 90 for a large product (torch 2.15). Of other architectures nothing is known:
    False.
    """
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def tell_of_emulation(dtype: torch.dtype | None, device: torch.device | str, instead: str) -> bool:
    """Say once, before the work, that a type is emulated where it runs; return whether it is.

    Args:
        dtype: Type of weights or arithmetic; None is as it was.
        device: Where it runs; only the CPU emulates.
        instead: What to ask for, such as "--dtype float32".
    """
    import torch

    if torch.device(device).type != "cpu" or not emulates(dtype):
        return False
    name = str(dtype).removeprefix("torch.")
    notice(
        f"This processor ({processor_name()}) has no instructions for {name}: torch emulates it, many times slower "
        f"than float32. Take {instead}."
    )
    return True


def _line(field: str) -> str:
    """Return the first value of a field of Linux's list; empty where there is none."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
