"""Every model compiles as one graph, exports with an open batch, and backbones still go through TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from registered import BACKBONES, FAMILIES, images, relative, small_graph
from torch._dynamo.testing import CompileCounter

import zoo


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("merged", [False, True], ids=["training form", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compile_without_graph_breaks(family: str, merged: bool) -> None:
    """Equal to eager, and at most one recompilation over three sizes, which only the merged form is asked for."""
    model = small_graph(family)
    if merged:
        zoo.reparameterize(model, measure=False)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    side = images(family).shape[-1]
    sizes = [None] * 3 if family in BACKBONES else [(side, side + 2), (side + 2, side + 6), (side + 4, side)]
    for batch, size in list(zip((2, 3, 5), sizes, strict=True))[: 3 if merged else 1]:
        sample = images(family, batch, size=size)
        assert relative(compiled(sample), model(sample)) < 1e-5
    assert counter.frame_count <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_training_step(family: str) -> None:
    """The training graph compiles too, and gives eager's gradients."""
    model = small_graph(family).train()
    eager, compiled = {}, {}
    for store, run in ((eager, model), (compiled, torch.compile(model, fullgraph=True, backend="eager"))):
        for name, buffer in model.named_buffers():  # both start from the same statistics
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        model.zero_grad()
        run(images(family)).square().mean().backward()
        store.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in eager.values())
    for name, gradient in eager.items():
        assert float((compiled[name] - gradient).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export_with_open_batch(family: str) -> None:
    """In training form; merged, with open sizes where there are any, it is tested in tests/export."""
    model = small_graph(family)
    shapes = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (images(family, 2),), dynamic_shapes=(shapes,)).module()
    for batch in (1, 2, 5):
        sample = images(family, batch)
        assert relative(program(sample), model(sample)) < 1e-5


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_torchscript(family: str) -> None:
    """Backbones only, as in timm's own tests: PyTorch has deprecated it."""
    model, batch = small_graph(family), images(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    assert relative(scripted(batch), model(batch)) < 1e-5
