"""Feed-forward operators with Triton kernels; PyTorch computes them wherever no kernel does.

Importing needs neither triton nor a GPU. The functions here are plain PyTorch unless the backend in use runs the
kernel for the given tensors; then they are custom operators `torch.ops.zoo.NAME`, one node for compilers and exporters.
Layers call them, and name those they call in `kernel_operators`, from which `zoo.accelerate` reports.
A kernel is a node that compilers cannot fuse with its neighbours, so "auto" runs only those whose gain was measured.
"""

from zoo.kernels.adaln import gate_modulate, modulate
from zoo.kernels.dispatch import Backend, get_backend, set_backend, use_backend
from zoo.kernels.experts import routed_experts
from zoo.kernels.frequency import frequency_filter
from zoo.kernels.gated import dwconv_gate
from zoo.kernels.repa import repa_ffn
from zoo.kernels.ska import ska

__all__ = [
    "Backend",
    "dwconv_gate",
    "frequency_filter",
    "gate_modulate",
    "get_backend",
    "modulate",
    "repa_ffn",
    "routed_experts",
    "set_backend",
    "ska",
    "use_backend",
]
