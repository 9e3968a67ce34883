"""Check and time the kernels of `zoo.kernels` on a CUDA GPU: `python tests/gpu_check.py`, less than eight minutes.

First correctness, where the first error ends the run; then the operators against eager and compiled PyTorch and the
best library call, on shapes of real models; then whole transformer blocks, compiled, with and without kernels. The
table comes last; a kernel's losses stay in it. With `pytest tests/gpu_check.py` only the correctness is checked.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from kernel_cases import CASES, ODD, channels_last, check_kernel, outputs_and_gradients, strided

from zoo import kernels
from zoo.moe.experts import MoEFFN, sorted_experts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SECONDS = 420  # no further row is started after that many

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


@pytest.mark.parametrize("name", ["ska", "dwconv_gate"])
def test_channels_last(name: str) -> None:
    check_kernel(CASES[name], torch.float32, "triton", "cuda", layout=channels_last)


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name: str) -> None:
    check_kernel(ODD[name], torch.float32, "triton", "cuda")


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
    checks += [partial(test_channels_last, name) for name in ("ska", "dwconv_gate")]
    checks += [partial(test_odd_shapes, name) for name in ODD]
    checks += [partial(test_nothing_waits_for_the_gpu, name) for name in CASES]
    for check in checks:
        check()
    return len(checks)


def _numbers(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


class Bench:
    """Time functions and keep the rows of the table.

    Args:
        mode: Of `torch.compile`.
    """

    def __init__(self, mode: str) -> None:
        self.mode, self.started, self.rows = mode, time.monotonic(), list[list[str]]()

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: list[Tensor],
        rivals: dict[str, Callable[..., Any]] | None = None,
        *,
        train: bool = False,
    ) -> None:
        """Time a function with its kernels, without, compiled without, and its rivals.

        Args:
            name: Of the row.
            function: Calls functions of `zoo.kernels`.
            inputs: Its tensors.
            rivals: Other ways to compute the same.
            train: Time the backward pass too.
        """
        if time.monotonic() - self.started > SECONDS:
            print(f"{name}: left out, the time is up")
            return
        inputs = [tensor.detach().requires_grad_(train and tensor.is_floating_point()) for tensor in inputs]
        torch._dynamo.reset()
        compiled = torch.compile(function, mode=self.mode, fullgraph=True)
        with kernels.use_backend("torch"):
            times = {"eager": _median(function, inputs, train), "compile": _median(compiled, inputs, train)}
            for rival, other in (rivals or {}).items():
                times[rival] = _median(other, inputs, train)
            with torch.no_grad():
                out = function(*inputs)
        with kernels.use_backend("triton"):
            own = _median(function, inputs, train)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                function(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        moved, flops = sum(tensor.nbytes for tensor in (*inputs, *outputs)), counter.get_total_flops()
        rate = "" if train else f"{moved / own / 1e9:.2f} TB/s, {flops / own / 1e9:.0f} TFLOP/s"
        best = min(times, key=lambda key: times[key])
        columns = ", ".join(f"{key} {value:.3f}" for key, value in times.items())
        self.rows.append([name, f"{own:.3f}", columns, f"{times[best] / own:.2f}x {best}", rate])
        print(*self.rows[-1], sep=" | ", flush=True)


def _median(function: Callable[..., Any], inputs: list[Tensor], train: bool) -> float:
    """Return the median time in ms, with an empty cache before each call; compiled and warmed up before."""
    from triton.testing import do_bench

    def step() -> None:
        out = function(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(part) for part in outputs])

    if train:
        step()
        return float(do_bench(step, return_mode="median"))
    with torch.no_grad():
        function(*inputs)
        return float(do_bench(lambda: function(*inputs), return_mode="median"))


def operators(bench: Bench) -> None:
    """Time every operator on shapes of models."""
    for rows, dim in ((12608, 1024), (16448, 1280), (4096, 3072)):
        weights = [_numbers(dim, dim, scale=dim**-0.5) for _ in range(3)]
        x, bias = _numbers(rows, dim), _numbers(dim)
        joined = torch.cat([weights[2], weights[1]], 1).t()
        library = partial(_joined_repa, joined=joined)
        inputs = [x, weights[0], bias, weights[1], weights[2], bias]
        bench.add(f"repa_ffn {rows} x {dim}", kernels.repa_ffn, inputs, {"one product": library})
    _experts(bench)
    for channels, size in ((64, 28), (128, 14), (256, 7)):
        x, weight = _numbers(128, channels, size, size), _numbers(128, channels // 8, 9, size, size)
        name = f"ska 128 x {channels} x {size} x {size}"
        bench.add(name, kernels.ska, [x, weight])
        last = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)  # tap by tap, as merged layers do
        bench.add(f"{name} channels last", kernels.ska, [x.contiguous(memory_format=torch.channels_last), last])
        bench.add(f"{name} training", kernels.ska, [x, weight], train=True)
    for hidden, size in ((128, 256), (1024, 32)):
        x = _numbers(1, 2 * hidden, size, size).contiguous(memory_format=torch.channels_last)
        inputs, name = [x, _numbers(2 * hidden, 1, 3, 3)], f"dwconv_gate 1 x {2 * hidden} x {size} x {size}"
        bench.add(name, kernels.dwconv_gate, inputs)
        bench.add(f"{name} training", kernels.dwconv_gate, inputs, train=True)
    for batch, tokens, dim in ((1, 4096, 3072), (128, 256, 384)):
        x, y = _numbers(batch, tokens, dim), _numbers(batch, tokens, dim)
        gate, scale, shift = _numbers(batch, 3 * dim).chunk(3, 1)
        name = f"{batch} x {tokens} x {dim}"
        bench.add(f"modulate {name}", kernels.modulate, [x, scale, shift])
        bench.add(f"gate_modulate {name}", kernels.gate_modulate, [x, y, gate, scale, shift])
        bench.add(f"gate_modulate {name} training", kernels.gate_modulate, [x, y, gate, scale, shift], train=True)


def _joined_repa(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, weight: Tensor, bias: Tensor, *, joined: Tensor
) -> Tensor:
    """Compute `repa_ffn` as one library product over inputs and activated channels side by side."""
    both = x.new_empty(x.shape[0], x.shape[1] + up.shape[0])
    both[:, : x.shape[1]] = x
    hidden = both[:, x.shape[1] :]
    torch.addmm(up_bias, x, up.t(), out=hidden)
    torch.ops.aten.gelu_(hidden)
    return torch.addmm(bias, both, joined)


def _experts(bench: Bench) -> None:
    """Time the mixture of experts against the layer's grouped products, which are compiled too."""
    layer = MoEFFN(3072, 3072, shared_dim=0, expert_dim=768, experts=12, top_k=2, activation="gelu_tanh")
    layer = layer.to("cuda", torch.bfloat16).requires_grad_(False)
    x, gates = _numbers(4096, 3072), _numbers(4096, 2).abs()
    index = torch.rand(4096, 12, device="cuda").topk(2).indices

    def grouped(x: Tensor, gates: Tensor, index: Tensor, *weights: Tensor) -> Tensor:
        return sorted_experts(layer, x, gates, index, torch.zeros_like(x))

    assert layer.experts_up_bias is not None
    bench.add(
        "routed_experts 4096 x 3072, 2 of 12",
        partial(_gelu_experts, other=grouped),
        [x, gates, index, layer.experts_up, layer.experts_up_bias, layer.experts_down],
    )


def _gelu_experts(*inputs: Tensor, other: Callable[..., Tensor]) -> Tensor:
    """Run the kernel where it is chosen, else the layer's own way: the plain formula computes every expert."""
    if kernels.get_backend() == "triton":
        return kernels.routed_experts(*inputs, activation="gelu_tanh")
    return other(*inputs)


def _attention(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    q, k, v = F.linear(x, weights["qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), weights["out"])


def _vit_block(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    x = x + _attention(F.layer_norm(x, x.shape[-1:]), weights, 16)
    keys = ("fc1", "bias", "fc2", "linear", "bias")
    return kernels.repa_ffn(x.flatten(0, 1), *(weights[key] for key in keys)).view(x.shape)


def _dit_block(x: Tensor, condition: Tensor, weights: dict[str, Tensor]) -> Tensor:
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = condition.chunk(6, 1)
    branch = _attention(kernels.modulate(x, scale, shift), weights, x.shape[-1] // 64)
    x, out = kernels.gate_modulate(x, branch, gate, scale_ffn, shift_ffn)
    out = F.linear(F.gelu(F.linear(out, weights["fc1"]), approximate="tanh"), weights["fc2"])
    return x + gate_ffn[:, None] * out


def blocks(bench: Bench) -> None:
    """Time transformer blocks, compiled with and without kernels."""
    for name, batch, tokens, dim, hidden in (
        ("merged RePaViT-L block", 64, 197, 1024, 1024),
        ("FLUX-size DiT block", 1, 4096, 3072, 12288),
        ("DiT-S/2 block", 128, 256, 384, 1536),
    ):
        shapes = {"qkv": (3 * dim, dim), "out": (dim, dim), "fc1": (hidden, dim), "fc2": (dim, hidden)}
        weights = {key: _numbers(*shape, scale=shape[1] ** -0.5) for key, shape in shapes.items()}
        weights |= {"linear": _numbers(dim, dim, scale=dim**-0.5), "bias": _numbers(dim)}
        x = _numbers(batch, tokens, dim)
        block: Callable[..., Tensor] = partial(_vit_block, weights=weights)
        inputs = [x]
        if "DiT" in name:
            block, inputs = partial(_dit_block, weights=weights), [x, _numbers(batch, 6 * dim)]
        torch._dynamo.reset()
        times = {}
        for backend in ("torch", "triton"):
            with kernels.use_backend(backend):
                times[backend] = _median(torch.compile(block, mode=bench.mode, fullgraph=True), inputs, False)
        own, without = times["triton"], times["torch"]
        bench.rows.append([name, f"{own:.3f}", f"compile {without:.3f}", f"{without / own:.2f}x compile", ""])


def main() -> None:
    """Check, time, print the table."""
    parser = argparse.ArgumentParser(description="Check and time the Triton kernels on this GPU.")
    parser.add_argument("--mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs (slow)")
    mode = parser.parse_args().mode
    if not torch.cuda.is_available():
        sys.exit("The kernels need a CUDA GPU, and PyTorch finds none on this machine.")
    torch.manual_seed(0)
    started = time.monotonic()
    print(f"{correctness()} checks passed in {time.monotonic() - started:.0f} s", flush=True)
    bench = Bench(mode)
    bench.started = started
    blocks(bench)
    operators(bench)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, median ms, compile mode {mode}")
    table = [["what", "kernels", "others", "against the best", "rate"], *bench.rows]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
