"""ONNX graphs are written in the form that runtimes are fastest with, and compute the same."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from zoo.export.onnx_graph import rewrite


class Gated(nn.Module):
    """A product that is cut in three, as gates and queries, keys and values are."""

    def __init__(self, bias: bool, sizes: tuple[int, ...], kept: bool = False) -> None:
        super().__init__()
        self.product, self.sizes, self.kept = nn.Linear(6, sum(sizes), bias=bias), sizes, kept

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.product(x.relu())
        parts = x.split(self.sizes, -1) if len(set(self.sizes)) > 1 else x.chunk(len(self.sizes), -1)
        whole = (x.sigmoid(),) if self.kept else ()
        return *(part.tanh() for part in parts), *whole


class Wide(nn.Module):
    """A depthwise convolution between others."""

    def __init__(self, channels: int, filters: int, bias: bool) -> None:
        super().__init__()
        kwargs = dict(stride=2, padding=1, groups=channels, bias=bias)
        self.net = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels * filters, 3, **kwargs), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.net(x),)


def rewritten(module: nn.Module, x: Tensor, folder: Path) -> onnx.GraphProto:
    """Write a module with an open batch, rewrite it, compare it with the module at two batches; return the graph."""
    program = torch.onnx.export(
        module.eval(), (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    rewrite(program.model.graph)
    path = folder / "model.onnx"
    onnx_ir.save(program.model, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given in (x, x[:1]):
        found = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        with torch.no_grad():
            expected = module(given)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(torch.from_numpy(one), other, atol=1e-6)
    return onnx.load(path).graph


@pytest.mark.parametrize(("bias", "sizes"), [(True, (4, 4)), (False, (4, 4, 4)), (True, (2, 2, 7))])
def test_a_product_that_is_cut_is_computed_in_parts(bias: bool, sizes: tuple[int, ...], tmp_path: Path) -> None:
    graph = rewritten(Gated(bias, sizes), torch.randn(3, 5, 6), tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert "Split" not in kinds
    assert kinds.count("MatMul") == len(sizes)
    weights = [value for value in graph.initializer if len(value.dims) == 2]
    assert sorted(value.dims[1] for value in weights) == sorted(sizes)  # the whole one is gone


def test_a_product_that_others_read_whole_stays(tmp_path: Path) -> None:
    graph = rewritten(Gated(True, (4, 4), kept=True), torch.randn(3, 5, 6), tmp_path)
    assert [node.op_type for node in graph.node].count("MatMul") == 1


@pytest.mark.parametrize(("channels", "filters", "bias"), [(4, 2, True), (6, 1, True), (3, 3, False)])
def test_depthwise_convolutions_have_a_filter_a_channel(
    channels: int, filters: int, bias: bool, tmp_path: Path
) -> None:
    """So many channels that four divides them, which ONNX Runtime's fast kernels need."""
    graph = rewritten(Wide(channels, filters, bias), torch.randn(2, channels, 6, 5), tmp_path)
    (conv,) = (node for node in graph.node if node.op_type == "Conv")
    shape = next(tuple(value.dims) for value in graph.initializer if value.name == conv.input[1])
    assert shape[0] == next(a.i for a in conv.attribute if a.name == "group") == -(-channels * filters // 4) * 4


def test_what_runtimes_know_stays(tmp_path: Path) -> None:
    graph = rewritten(Wide(8, 1, True), torch.randn(2, 8, 6, 5), tmp_path)
    assert [node.op_type for node in graph.node] == ["Relu", "Conv", "Relu"]
