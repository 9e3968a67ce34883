"""AFFNet: the authors' outputs and sizes, its filter in all its forms against FFT and einsums, loading and merging."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from parity import protocol
from registered import randomize, relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import zoo
from zoo.backbones.affnet import AFFBlock, AFFNet, InvertedResidual, checkpoint_filter_fn, detect
from zoo.bench.plain_backbones import PLAIN, plain_filter
from zoo.kernels.dft import separable_dft, separable_kept
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter, dense_dft
from zoo.weights import CheckpointError, load_strict

RECORD = Path(__file__).parents[1] / "parity" / "affnet" / "affnet_et_256"
SMALL: dict[str, Any] = dict(dims=(8, 8, 16, 24, 32), depths=(1, 2, 1), num_classes=5)
COUNTS = {"affnet_et": (1436264, 1391656), "affnet_t": (2654232, 2568280), "affnet": (5568696, 5362760)}
SIZES = [(8, 8), (7, 7), (1, 1), (1, 2), (2, 1), (5, 3), (9, 8), (16, 16), (13, 17), (14, 14), (25, 33), (2, 40)]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def authors_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the authors' state dict, filled by the protocol; counters hold nonsense."""
    state = {key: torch.from_numpy(value) for key, value in protocol.fill_state_dict(record["state_dict"]).items()}
    for key, (shape, _) in record["state_dict"].items():
        state.setdefault(key, torch.full(shape, 7, dtype=torch.int64))
    return state


def small(**kwargs: Any) -> AFFNet:
    """Return a small model with random weights and statistics, in evaluation mode."""
    return randomize(timm.create_model("affnet_et", **{**SMALL, **kwargs})).eval()


def make_filter(dim: int = 24, sparsity_threshold: float = 0.0) -> AdaptiveFrequencyFilter:
    """Return a filter in float64 whose masks are far from constant."""
    module = AdaptiveFrequencyFilter(dim, sparsity_threshold=sparsity_threshold, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def plain_copy(model: nn.Module) -> nn.Module:
    rival = copy.deepcopy(model)
    for module in rival.modules():
        if type(module) in PLAIN["affnet"]:
            module.forward = MethodType(PLAIN["affnet"][type(module)], module)
    return rival


@pytest.mark.parametrize(("threshold", "suffix"), [(0.01, ""), (0.0, "_shrink0")])
@pytest.mark.parametrize("form", ["trained", "merged", "products", "plain"])
@torch.no_grad()
def test_parity_with_the_authors(threshold: float, suffix: str, form: str) -> None:
    """Stages, features and logits in float64 within 1e-10 of the authors' code, however the filters are computed."""
    record, outputs = protocol.load(RECORD)
    model = timm.create_model("affnet_et", sparsity_threshold=threshold)
    assert count(model) == record["num_params"]
    load_strict(model, authors_state(record), checkpoint_filter_fn)
    model.double().eval()
    if form == "merged":
        report = zoo.reparameterize(model)
        assert report.difference < 1e-12
    if form == "plain":
        model = plain_copy(model)
    if form == "products":
        for module in model.modules():
            if isinstance(module, AdaptiveFrequencyFilter):
                module.forward = module._products
    final, stages = model.forward_intermediates(torch.from_numpy(protocol.make_input(**record["input"])).double())
    found = {f"stage{index}": value for index, value in enumerate(stages, 1)}
    found |= {"exp": final, "pooled": model.forward_head(final, pre_logits=True), "logits": model.forward_head(final)}
    found = {name + suffix: value for name, value in found.items()}
    compared = 0
    for key, expected in outputs.items():
        place = record["sampled"].get(key, {"of": key, "index": ":"})
        if place["of"] in found:
            index = tuple(_slice(part) for part in place["index"].strip("[]").split(","))
            assert protocol.rel_error(found[place["of"]][index].numpy(), expected) < 1e-10, key
            compared += 1
    assert compared == (8 if not suffix else 2)


def _slice(text: str) -> slice:
    return slice(*(int(part) if part.strip() else None for part in text.split(":")))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    """As published; merged without norms and projections, counted by hand."""
    before, after = COUNTS[name]
    model = timm.create_model(name, device="meta").eval()
    assert count(model) == before
    norms = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    blocks = [module.dim for module in model.modules() if isinstance(module, AFFBlock)]
    assert before - after == norms + sum(dim * dim + 3 * dim for dim in blocks)
    zoo.reparameterize(model, measure=False)
    assert count(model) == count(timm.create_model(name, device="meta", merged=True)) == after


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transforms(size: tuple[int, int]) -> None:
    """Both kinds of matrices give torch's FFT, and the real part of the sum over frequencies that are not Hermitian."""
    height, width = size
    columns = width // 2 + 1
    x = torch.randn(3, height, width, dtype=torch.float64)
    spectrum = torch.randn(3, height, columns, dtype=torch.complex128)
    expected, back = torch.fft.rfft2(x, norm="ortho"), torch.fft.irfft2(spectrum, s=size, norm="ortho")
    to, fro = dense_dft(height, width, x.dtype, x.device)
    found = torch.view_as_complex((x.flatten(1) @ to).view(3, height, columns, 2))
    assert (found - expected).abs().max() < 1e-13
    assert ((torch.view_as_real(spectrum).flatten(1) @ fro.t()).view_as(x) - back).abs().max() < 1e-13
    row, column, column_back, row_back = separable_dft(height, width, x.dtype, x.device)
    found = (column @ (x @ row).view(3, 2 * height, columns)).view(3, 2, height, columns)
    assert (torch.complex(found[:, 0], found[:, 1]) - expected).abs().max() < 1e-13
    stacked = torch.stack((spectrum.real, spectrum.imag), 1).view(3, 2 * height, columns)
    assert (((column_back @ stacked).view(3, height, 2 * columns) @ row_back) - back).abs().max() < 1e-13


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_filter_in_all_forms(size: tuple[int, int], batch: int, threshold: float) -> None:
    """Dense, by FFT, by real products; with and without gradients; both memory formats: one result."""
    module = make_filter(sparsity_threshold=threshold)
    x = torch.randn(batch, 24, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_filter(module, x)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            network = module._complex_network(x.dtype)
            for found in (
                module(image),
                module._dense(image, network),
                module._fourier(image, network),
                module._products(image),
            ):
                assert found.shape == x.shape
                assert relative(found, expected) < 1e-12
    assert relative(module(x).detach(), expected) < 1e-12


@pytest.mark.parametrize("size", [(4, 6), (7, 7), (12, 9)], ids=str)
def test_gradients_of_all_forms(size: tuple[int, int]) -> None:
    """First and second derivatives by input and weights are those of the plain formulation."""
    module = make_filter(16)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 16, *size, dtype=torch.float64)

    def gradients(run: Any) -> list[Tensor]:
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad((run(x) * weight).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(value.square().sum() for value in first), inputs)
        return [value.detach() for value in (*first, *second)]

    expected = gradients(lambda x: plain_filter(module, x))
    for run in (module, module._products):
        for found, wanted in zip(gradients(run), expected, strict=True):
            assert relative(found, wanted) < 1e-9


def test_kept_matrices_serve_training_after_inference() -> None:
    """Matrices that were made in inference mode can be used where gradients are recorded."""
    module = make_filter()
    x = torch.randn(2, 24, 3, 7, dtype=torch.float64)
    with torch.inference_mode():
        module(x)
        module._products(x)
    for run in (module, module._products):
        run(x.requires_grad_()).sum().backward()


@torch.no_grad()
def test_filter_runs_in_float32() -> None:
    """Under autocast and with low-precision weights: only inputs, weights and outputs are rounded."""
    module = make_filter().float()
    x = torch.randn(2, 24, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.clone()))
        assert module(x).dtype == torch.float32
        mixed = module(x)
    assert torch.equal(mixed, module(x))
    low = copy.deepcopy(module).bfloat16()
    exact = copy.deepcopy(low).float()
    assert torch.equal(low(x.bfloat16()), exact(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (45, 71), (9, 1)], ids=str)
@torch.no_grad()
def test_plain_blocks(size: tuple[int, int]) -> None:
    """The rival of the benchmarks gives the same, merged and not, at any size, and runs no fast code."""
    model = small().double()
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    expected = model(x)
    assert relative(plain_copy(model)(x), expected) < 1e-12
    zoo.reparameterize(model, measure=False)
    assert relative(model(x), expected) < 1e-12
    assert relative(plain_copy(model)(x), expected) < 1e-12


@torch.no_grad()
def test_merged_blocks_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose widened maps are large is computed in parts, which changes nothing."""
    monkeypatch.setattr("zoo.layers.cache_blocking._BYTES", 2 * 48 * 16 * 16 * 8)
    block = randomize(InvertedResidual(12, 12, expand_ratio=4.0)).double().eval()
    x = torch.randn(5, 12, 16, 16, dtype=torch.float64)
    kept, expected = x.clone(), block(x)
    zoo.reparameterize(block)
    parts: list[int] = []
    block.block.register_forward_pre_hook(lambda module, args: parts.append(len(args[0])))
    assert relative(block(x), expected) < 1e-12
    assert parts == [2, 2, 1]
    assert torch.equal(x, kept), "the input was written to"


def test_merged_model_can_be_trained() -> None:
    """Gradients of the merged form are those of the function, also where activations could run in place."""
    model = small().double()
    zoo.reparameterize(model, measure=False)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(net(x).square().sum(), [value for value in net.parameters() if value.requires_grad])
        for net in (model, plain_copy(model))
    )
    assert len(found) > 50
    for ours, plain in zip(found, expected, strict=True):
        assert relative(ours, plain) < 1e-9


@torch.no_grad()
def test_merged_form_in_graphs() -> None:
    """TorchScript, tracing and `torch.export` of the merged model, of sizes that are powers of two or odd."""
    model = small()
    zoo.reparameterize(model, measure=False)
    x = torch.rand(2, 3, 160, 224)
    expected = model(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    assert relative(torch.jit.load(buffer)(x), expected) < 1e-5
    assert relative(torch.jit.trace(model, x[:1])(x), expected) < 1e-5
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [node for node in program.graph.nodes if "fft" in str(node.target) or "complex" in str(node.target)]
    assert relative(program.module()(torch.cat((x, x))), torch.cat((expected, expected))) < 1e-5


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_filter() -> None:
    """One graph a size, in which the transforms are constants; what is kept outside of graphs stays real."""
    module = make_filter().float()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch, size in ((2, (8, 8)), (3, (8, 8)), (2, (7, 9))):
        x = torch.randn(batch, 24, *size)
        assert relative(compiled(x), module(x)) < 1e-5
    assert counter.frame_count <= 3
    if Version(torch.__version__) >= Version("2.15"):  # 2.11 records how they are made, which costs time only
        assert not [node for graph in counter.graphs for node in graph.graph.nodes if "cos" in str(node.target)]
    assert type(separable_kept(7, 9, torch.float32, torch.device("cpu"))[0]) is Tensor


@torch.no_grad()
def test_exported_filter_takes_any_size() -> None:
    """The program makes the transforms itself: for batches and maps of sizes that it has not seen."""
    module = make_filter().float()
    sizes = {0: torch.export.Dim("batch"), 2: 4 * torch.export.Dim("height"), 3: 4 * torch.export.Dim("width")}
    program = torch.export.export(module, (torch.randn(2, 24, 16, 12),), dynamic_shapes=(sizes,), strict=False).module()
    for shape in ((1, 24, 8, 20), (3, 24, 32, 4)):
        x = torch.randn(shape)
        assert relative(program(x), module(x)) < 1e-5


@pytest.mark.parametrize(
    ("output_stride", "reductions", "dilations"),
    [(32, [2, 4, 8, 16, 32], (1, 1)), (16, [2, 4, 8, 16, 16], (1, 1)), (8, [2, 4, 8, 8, 8], (1, 2))],
)
@torch.no_grad()
def test_output_stride(output_stride: int, reductions: list[int], dilations: tuple[int, int]) -> None:
    """Stride becomes dilation, that of the stage before; the weights are the same."""
    model = small(output_stride=output_stride)
    model.load_state_dict(small().state_dict())
    assert [info["reduction"] for info in model.feature_info] == reductions
    first = [model.stages[i][0].block.conv_dw.conv for i in (3, 4)]
    assert tuple(conv.dilation[0] for conv in first) == dilations
    x = torch.rand(1, 3, 64, 96)
    for found, reduction in zip(model.forward_intermediates(x)[1], reductions, strict=True):
        assert found.shape[-2:] == (64 // reduction, 96 // reduction)


def test_threshold_is_handed_on_and_matters() -> None:
    model, dense = small(sparsity_threshold=0.5), small()
    filters = [module for module in model.modules() if isinstance(module, AdaptiveFrequencyFilter)]
    assert len(filters) == 4
    assert {module.sparsity_threshold for module in filters} == {0.5}
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert relative(model(x), dense(x)) > 1e-3


def test_authors_files_are_recognised() -> None:
    """From keys and shapes alone; they load whole."""
    record, _ = protocol.load(RECORD)
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in record["state_dict"].items()}
    assert detect(state) == ("affnet_et", dict(in_chans=3, num_classes=1000, merged=False))
    model = timm.create_model("affnet_et", device="meta")
    converted = checkpoint_filter_fn(state, model)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert detect(timm.create_model("repavit_tiny", device="meta").state_dict()) is None


def test_segmentation_files_give_their_encoder() -> None:
    """Keys with a prefix, no last convolution, no classifier: the model keeps its own there."""
    record, _ = protocol.load(RECORD)
    state = {
        f"encoder.{key}": value
        for key, value in authors_state(record).items()
        if not key.startswith(("conv_1x1_exp", "classifier"))
    }
    state["seg_head.classifier.block.conv.weight"] = torch.zeros(1)
    assert detect(state) == ("affnet_et", dict(in_chans=3, num_classes=0, merged=False))
    model = timm.create_model("affnet_et")
    before = model.final_conv.conv.weight.clone()
    load_strict(model, state, checkpoint_filter_fn)
    assert torch.equal(model.stem.conv.weight, state["encoder.conv_1.block.conv.weight"])
    assert torch.equal(model.final_conv.conv.weight, before)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_files_are_recognised(name: str, merged: bool) -> None:
    arguments = dict(num_classes=7, in_chans=1, merged=merged)
    model = timm.create_model(name, device="meta", **arguments)
    assert detect(model.state_dict()) == (name, arguments)


def test_forms_that_do_not_fit_are_refused() -> None:
    merged = small(merged=True)
    with pytest.raises(ValueError, match="merged=True"):
        load_strict(small(), merged.state_dict(), checkpoint_filter_fn)
    with pytest.raises(ValueError, match="merged=False"):
        load_strict(merged, small().state_dict(), checkpoint_filter_fn)
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_strict(small(), small(dims=(8, 8, 16, 24, 40)).state_dict(), checkpoint_filter_fn)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dims=(8, 16)), "dims must have 5 entries"),
        (dict(dims=(8, 8, 12, 24, 32)), "multiple of 8"),
        (dict(output_stride=4), "output_stride must be 32, 16 or 8"),
        (dict(sparsity_threshold=-1), "sparsity_threshold must be at least 0"),
        (dict(global_pool="token"), "global_pool must be one of"),
        (dict(global_pool=""), "no classes"),
    ],
    ids=str,
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_pruned_to_the_stages_asked_for() -> None:
    model = small()
    before, x = count(model), torch.rand(2, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[1, 3], stop_early=True, intermediates_only=True)
    assert model.prune_intermediate_layers([1, 3]) == [1, 3]
    assert count(model) < before
    found = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert model(x).shape == (2, 24, 4, 4)


def test_drop_path_is_linear_and_off_by_default() -> None:
    rates = [
        getattr(module.drop_path, "drop_prob", 0.0)
        for module in small(drop_path_rate=0.3).modules()
        if hasattr(module, "drop_path")
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert not [module for module in small().modules() if type(module).__name__ == "DropPath"]
