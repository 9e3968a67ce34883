"""Check and time the kernels of `zoo.kernels` on a CUDA GPU: `python tests/gpu_check.py`, less than eight minutes.

First correctness, where the first error ends the run; then the measurements of `zoo bench kernels` in as many rows as
the time allows: transformer blocks, compiled, with and without kernels, and the operators against eager and compiled
PyTorch and library calls. The tables come last. With `pytest tests/gpu_check.py` only the correctness is checked.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from kernel_cases import CASES, ODD, channels_last, check_kernel, outputs_and_gradients, strided

from zoo import kernels
from zoo.bench import Benchmark, Settings
from zoo.bench.kernels import MODES, measure_gpu
from zoo.bench.report import columns, facts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAPS = ["ska", "dwconv_gate", "frequency_filter"]  # operators that take any memory format
LARGE = ["frequency_filter, 64 x 64", "frequency_filter, written in parts"]  # the kernel takes them in 16 bits only
SECONDS = 400  # no further row is started after that many

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_pytorch(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype, "triton", "cuda")


@pytest.mark.parametrize("name", CASES)
def test_gaps_in_memory(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "triton", "cuda", layout=strided)


@pytest.mark.parametrize("name", MAPS)
def test_channels_last(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "triton", "cuda", layout=channels_last)


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    check_kernel(ODD[name], torch.float32, "triton", "cuda")


@pytest.mark.parametrize("name", LARGE)
def test_large_maps(name: str) -> None:
    check_kernel(ODD[name], torch.float16, "triton", "cuda")


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    inputs = [tensor.cuda() for tensor in CASES[name].inputs()]
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    outputs_and_gradients(CASES[name], inputs, "triton")  # compile first
    with kernels.use_backend("triton"), torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            CASES[name].function(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def correctness() -> int:
    """Run all checks and return how many there were."""
    checks = [partial(test_kernel_equals_pytorch, name, dtype) for name in CASES for dtype in DTYPES]
    checks += [partial(test_gaps_in_memory, name) for name in CASES]
    checks += [partial(test_channels_last, name) for name in MAPS]
    checks += [partial(test_odd_shapes, name) for name in ODD]
    checks += [partial(test_large_maps, name) for name in LARGE]
    checks += [partial(test_nothing_waits_for_the_gpu, name) for name in CASES]
    for check in checks:
        check()
    return len(checks)


def show(benchmark: Benchmark) -> None:
    """Print a table."""
    shown = columns(benchmark)
    table = [[column.heading for column in shown]]
    table += [[column.text(entry) for column in shown] for entry in benchmark.entries]
    widths = [max(len(row[number]) for row in table) for number in range(len(shown))]
    print(f"\n{benchmark.title}")
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(*benchmark.goals, sep="\n")


def main() -> None:
    """Check, time, print the tables."""
    parser = argparse.ArgumentParser(description="Check and time the Triton kernels on this GPU.")
    parser.add_argument("--mode", default=MODES[0], choices=MODES, help="of torch.compile; the second is slow")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The kernels need a CUDA GPU, and PyTorch finds none on this machine.")
    torch.manual_seed(0)
    started = time.monotonic()
    print(f"{correctness()} checks passed in {time.monotonic() - started:.0f} s", flush=True)
    found = measure_gpu(
        Settings(device="cuda", dtype=args.dtype, rounds=1),
        lambda row, done, total: print(f"{time.monotonic() - started:4.0f} s  {row}", flush=True),
        modes=(args.mode,),
        seconds=SECONDS - (time.monotonic() - started),
        models=False,
    )
    for benchmark in found:
        show(benchmark)
        print(*benchmark.notes, sep="\n")
    print(facts(found[0].environment), facts(found[0].conditions), f"compile mode {args.mode}", sep=", ")


if __name__ == "__main__":
    main()
