"""Make a model fast for inference with one call: merge, type, layout, kernels, integers, compiler, cache, engine."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import nn

from zoo.engines import EngineName, attach, check_engine, detach, installed
from zoo.ffn.reparam import reparameterize
from zoo.kernels.dispatch import Backend, check_backend, get_backend, runs_kernel, set_backend
from zoo.processor import tell_of_emulation
from zoo.text import table_lines

__all__ = ["AccelerationReport", "AccelerationStep", "CompileMode", "accelerate"]

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""Modes of `torch.compile`."""

_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs
_FEWEST_CONVOLUTIONS = 3  # of a convolutional network: a transformer has one, its patch embedding
_FLOATS = ("float32", "float16", "bfloat16", "float64")

Quantization = Literal["int8", "int8-dynamic"]
"""Kinds of integer weights."""

_RECIPES = {"int8": "Int8WeightOnlyConfig", "int8-dynamic": "Int8DynamicActivationInt8WeightConfig"}  # of torchao

Model = TypeVar("Model")


@dataclass(frozen=True, kw_only=True)
class AccelerationStep:
    """One step of `accelerate`.

    Args:
        name: What the step is for.
        done: Whether it changed anything.
        said: What it did, or why it was left out.
    """

    name: str
    done: bool
    said: str


@dataclass(frozen=True, kw_only=True)
class AccelerationReport:
    """What `accelerate` did; `print` shows it as a table.

    Args:
        steps: In the order in which they were taken.
    """

    steps: tuple[AccelerationStep, ...]

    def __str__(self) -> str:
        rows = [(step.name, "done" if step.done else "left out", step.said) for step in self.steps]
        return "\n".join(table_lines(rows))


def accelerate(
    model: Model,
    dtype: str | torch.dtype | None = None,
    compile: bool | CompileMode = False,
    kernels: Backend | None = None,
    cache: Any = None,
    *,
    quantize: Quantization | None = None,
    engine: EngineName | None = None,
    example: Any = None,
    dynamic: bool = False,
    threads: int | None = None,
) -> Model:
    """Make a model fast for inference, in place: every step that fits it, in the order in which they work.

    1. Evaluation mode: in training mode nothing can be merged.
    2. `zoo.reparameterize`, in the type that the model has, because sums of merged weights need its precision.
    3. The type of the weights. Inputs have to come in this type too; diffusers pipelines see to that themselves.
    4. Channels-last memory format for convolutional networks; zoo's own models choose their memory format themselves.
    5. The backend of `zoo.kernels`, which is set for the whole process, as compiled programs are guarded by it.
    6. Integer weights of the linear layers, those left out whose kernels run.
    7. `torch.compile`: the repeated blocks of a diffusers model, else, and for CUDA graphs, the whole model; it sees
       all of the above. The compiler runs at the first call.
    8. The cache, last: its hooks have to lie outside of what is compiled.
    9. Where one is asked for, the engine: another runtime runs `forward`. Its graph is built at the first call of a
       shape, through `zoo.export`, and kept on disk (in `ZOO_CACHE`, or zoo in the platform's cache folder) under a
       digest of weights, code, shapes and versions; the first result is compared with the model's, 1e-4 of the largest
       output at most. Weights that change later make a new one. All else of the model stays as it is.

    Args:
        model: A backbone or restorer of zoo or timm, any other module, a diffusers model, or a pipeline, whose
            denoisers are merged, compiled and cached.
        dtype: Floating-point type, such as "bfloat16"; None keeps the model's.
        compile: Compile; a mode of `torch.compile` instead of True sets it. "reduce-overhead" records CUDA graphs,
            which pays for batches of a few images on a GPU; an output then lives until the next call only.
        kernels: As in `zoo.kernels.set_backend`; None keeps the backend in use, "auto" unless one was set.
        cache: As in `zoo.enable_cache`; for diffusion models.
        quantize: "int8" keeps the weights of linear layers, of a pipeline those of its denoisers, as 8-bit integers,
            and computes in the model's type; "int8-dynamic" multiplies integers, too, with inputs rounded as they come.
            Needs torchao (the extra `quantize`). Adapters (LoRA) keep their type.
        engine: "onnxruntime" (extra `export`), "openvino" (extra `openvino`), "inductor" (needs a C++ compiler, and a
            minute for each shape), "eager", or "auto": times what is installed on each new shape, in turns, and takes
            the fastest, eager where nothing is; inductor takes part with `compile=True`. None leaves the model's own.
            Engines run float32 on the CPU.
        example: An input, or a tuple of inputs: the engine is made ready for its shape now instead of at the first
            call.
        dynamic: Have the engine keep one graph for all shapes, instead of one for each of the last four: for inputs
            that are never alike. Costs speed in OpenVINO.
        threads: Of the engine; None takes torch's number at the time of the call.

    Returns:
        The model, whose `zoo_report` says what was done and what was not.

    Raises:
        TypeError: The model is neither a module nor a pipeline.
        ValueError: An argument is unknown, arguments do not go together, the model is not a diffusion model and a cache
            is asked for, or it is compiled or cached already.
        RuntimeError: The backend of the kernels cannot run here.
        ImportError: torchao or the engine is not installed; the message names the extra.
        EngineError: The engine lacks an operator of the model, or computes something else.

    Example:
        >>> model = zoo.accelerate(timm.create_model("repavit_small"), dtype="bfloat16", compile=True)
        >>> print(model.zoo_report)
    """
    diffusion = _is_diffusion(model)
    if not diffusion and not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch module or a diffusers pipeline, got {type(model).__name__}.")
    engine = None if engine is None else check_engine(engine)
    precision, mode = _precision(dtype), _mode(compile)
    backend = get_backend() if kernels is None else check_backend(kernels)
    if cache is not None and not diffusion:
        raise ValueError(f"A cache needs a diffusers model or pipeline; {type(model).__name__} has no steps to skip.")
    if cache is not None and mode in _GRAPHS:
        raise ValueError(f'compile="{mode}" records CUDA graphs, which overwrite what a cache keeps: use compile=True.')
    _check_quantization(quantize)
    foreign = engine not in (None, "eager")
    if foreign and cache is not None:
        raise ValueError(f"A cache skips blocks of the denoiser, and the engine {engine!r} runs it whole: choose one.")
    if foreign and mode is not None and engine != "auto":
        raise ValueError(f"compile=True is for eager PyTorch and engine='auto', not for the engine {engine!r}.")
    if foreign and precision not in (None, torch.float32):
        raise ValueError(f"The engine {engine!r} runs float32, not {dtype}.")
    if foreign and quantize is not None:
        raise ValueError(f"quantize is for eager PyTorch, not for the engine {engine!r}: choose one.")
    parts, networks = _parts(model, diffusion)
    for part in parts:
        if hasattr(part, "_orig_mod") or any(module._compiled_call_impl for module in part.modules()):
            raise ValueError(f"This {type(part).__name__} is compiled already: accelerate compiles after merging.")
    steps = (
        _evaluate(parts),
        _merge(networks),
        _cast(model, parts, precision),
        _reorder(parts),
        _use_kernels(networks, backend, diffusion),
        *(() if quantize is None else (_quantize(networks, quantize),)),
        _compile(networks, None if foreign else mode),
        _enable_cache(model, cache, diffusion),
    )
    cast(Any, model).zoo_report = AccelerationReport(steps=steps)
    if engine is not None:
        _use_engine(model, networks, engine, mode is not None, dynamic, threads)
    if example is not None:
        with torch.no_grad():
            cast(Any, model)(*(example if isinstance(example, tuple) else (example,)))
    return model


def _is_diffusion(model: Any) -> bool:
    diffusers = sys.modules.get("diffusers")  # where it was not imported, nothing is of its classes
    if diffusers is None:
        return False
    if isinstance(model, nn.Module):
        return isinstance(model, diffusers.ModelMixin)
    from zoo.caching.core import is_pipeline

    return is_pipeline(model)


def _parts(model: Any, diffusion: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return all networks, and those that are merged, compiled and cached: of a pipeline the denoisers."""
    if not diffusion:
        return [model], [model]
    from zoo.caching.core import active_cache, denoisers

    if active_cache(model) is not None:
        raise ValueError(f"This {type(model).__name__} has a cache already: call zoo.disable_cache, then accelerate.")
    pipeline, networks = denoisers(model)
    if pipeline is None:
        return [model], [model]  # not what a wrapper holds: that one is refused
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)], networks


def _precision(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    near = difflib.get_close_matches(str(dtype), _FLOATS, 1, 0)[0]
    raise ValueError(f"dtype must be one of {', '.join(_FLOATS)}, got {dtype!r}. Did you mean {near}?")


def _mode(compile: bool | CompileMode) -> CompileMode | None:
    modes = get_args(CompileMode)
    if isinstance(compile, bool):
        return "default" if compile else None
    if compile not in modes:
        near = difflib.get_close_matches(str(compile), modes, 1, 0)[0]
        raise ValueError(f"compile must be a bool or one of {', '.join(modes)}, got {compile!r}. Did you mean {near}?")
    return compile


def _evaluate(parts: list[nn.Module]) -> AccelerationStep:
    trained = [type(part).__name__ for part in parts if any(module.training for module in part.modules())]
    for part in parts:
        part.eval()
    said = f"{', '.join(trained)} was in training mode" if trained else "in evaluation mode already"
    return AccelerationStep(name="evaluation mode", done=bool(trained), said=said)


def _merge(networks: list[nn.Module]) -> AccelerationStep:
    reports = [reparameterize(network, measure=False) for network in networks]
    layers = sum(len(report.layers) for report in reports)
    if not layers:
        return AccelerationStep(name="merge", done=False, said="no layer has anything to fold")
    before, after = (sum(getattr(report, name) for report in reports) for name in ("params_before", "params_after"))
    return AccelerationStep(name="merge", done=True, said=f"{layers} layers, {before:,} -> {after:,} parameters")


def _cast(model: Any, parts: list[nn.Module], dtype: torch.dtype | None) -> AccelerationStep:
    kinds = {parameter.dtype for part in parts for parameter in part.parameters() if parameter.is_floating_point()}
    before = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    if dtype is None or kinds == {dtype}:
        reason = "not asked for" if dtype is None else "has it already"
        return AccelerationStep(name="type", done=False, said=f"{before}: {reason}")
    places = {parameter.device.type for part in parts for parameter in part.parameters()}
    said = f"{before} -> {str(dtype).removeprefix('torch.')}"
    if "cpu" in places and tell_of_emulation(dtype, "cpu", "dtype=None, or move the model to a GPU first"):
        said += ", which this processor emulates: slower"
    model.to(dtype)
    return AccelerationStep(name="type", done=True, said=said)


def _check_quantization(quantize: Quantization | None) -> None:
    kinds = get_args(Quantization)
    if quantize is None:
        return
    if quantize not in kinds:
        near = difflib.get_close_matches(str(quantize), kinds, 1, 0)[0]
        raise ValueError(f"quantize must be None, {' or '.join(kinds)}, got {quantize!r}. Did you mean {near}?")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("Integer weights need torchao, which is missing: pip install 'ffn-zoo[quantize]'.")


def _quantize(networks: list[nn.Module], quantize: Quantization) -> AccelerationStep:
    import torchao.quantization

    config = getattr(torchao.quantization, _RECIPES[quantize])()
    changed = size = 0
    for network in networks:
        kept = {
            id(layer)
            for module in network.modules()
            if any(
                runs_kernel(name, *list(module.parameters())[:1]) for name in getattr(module, "kernel_operators", ())
            )
            for layer in module.modules()
        }
        layers = {
            name
            for name, module in network.named_modules()
            if type(module) is nn.Linear and "lora_" not in name and id(module) not in kept
        }
        size += sum(cast(torch.Tensor, network.get_submodule(name).weight).nbytes for name in layers)
        changed += len(layers)
        torchao.quantization.quantize_(network, config, filter_fn=lambda module, name, layers=layers: name in layers)
    if not changed:
        return AccelerationStep(name="integer weights", done=False, said="no linear layer that runs in PyTorch")
    said = f"{quantize}: {changed} linear layers, {size / 2**20:.1f} MiB before"
    return AccelerationStep(name="integer weights", done=True, said=said)


def _reorder(parts: list[nn.Module]) -> AccelerationStep:
    reordered = []
    for part in parts:
        convolutions = sum(isinstance(module, nn.Conv2d) for module in part.modules())
        if convolutions >= _FEWEST_CONVOLUTIONS and not _is_ours(part):
            cast(Any, part).to(memory_format=torch.channels_last)
            reordered.append(f"{type(part).__name__} ({convolutions} convolutions)")
    if reordered:
        return AccelerationStep(name="channels last", done=True, said=", ".join(reordered))
    said = "zoo's models choose it themselves" if any(map(_is_ours, parts)) else "not a convolutional network"
    return AccelerationStep(name="channels last", done=False, said=said)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("zoo.")


def _use_kernels(networks: list[nn.Module], backend: Backend, diffusion: bool) -> AccelerationStep:
    if diffusion:
        from zoo.diffusion.adaln import adopt_kernels

        for network in networks:
            adopt_kernels(network)
    set_backend(backend)
    wanted: dict[str, bool] = {}
    for network in networks:
        for module in network.modules():
            for operator in getattr(module, "kernel_operators", ()):
                wanted[operator] = wanted.get(operator, False) or runs_kernel(operator, *list(module.parameters())[:1])
    running = ", ".join(sorted(operator for operator, runs in wanted.items() if runs))
    idle = ", ".join(sorted(operator for operator, runs in wanted.items() if not runs))
    if running:
        rest = f"; PyTorch: {idle}" if idle else ""
        return AccelerationStep(name="kernels", done=True, said=f"{backend}, for the whole process: {running}{rest}")
    if not wanted:
        return AccelerationStep(name="kernels", done=False, said="no layer uses an operator of zoo.kernels")
    reasons = {
        "auto": "no gain was measured for them, or not on this device",
        "torch": "as asked for",
        "triton": "they need a CUDA device",
        "interpret": "they need a CPU",
    }
    return AccelerationStep(name="kernels", done=False, said=f"{backend}: PyTorch computes {idle}: {reasons[backend]}")


def _compile(networks: list[nn.Module], mode: CompileMode | None) -> AccelerationStep:
    if mode is None:
        return AccelerationStep(name="compile", done=False, said="not asked for")
    on_cuda = all(parameter.is_cuda for network in networks for parameter in network.parameters())
    note = ""
    if mode == "reduce-overhead" and not on_cuda:
        mode, note = "default", "; reduce-overhead needs a CUDA device"
    said = []
    for network in networks:
        repeated = getattr(network, "_repeated_blocks", None)
        if repeated and mode not in _GRAPHS:  # the graph of a block would overwrite what the block before gave it
            cast(Any, network).compile_repeated_blocks(mode=mode)
            extent = f"every {', '.join(repeated)}"
        else:
            network.compile(mode=mode)
            extent = "whole"
        said.append(f"{type(network).__name__}: {extent}")
    return AccelerationStep(name="compile", done=True, said=f"{', '.join(said)}, mode {mode}, at the first call{note}")


def _enable_cache(model: Any, cache: Any, diffusion: bool) -> AccelerationStep:
    if cache is None:
        said = "not asked for" if diffusion else "for diffusion models"
        return AccelerationStep(name="cache", done=False, said=said)
    from zoo.caching.core import active_cache, enable_cache

    enable_cache(model, cache)
    return AccelerationStep(name="cache", done=True, said=type(active_cache(model)).__name__)


def _use_engine(
    model: Any, networks: list[nn.Module], engine: EngineName, compiler: bool, dynamic: bool, threads: int | None
) -> None:
    """Attach an engine, and keep the report true once it is chosen and built."""
    report: AccelerationReport = model.zoo_report
    if engine == "eager":
        for network in networks:
            detach(network)
        step = AccelerationStep(name="engine", done=False, said="eager, as asked for")
        model.zoo_report = replace(report, steps=(*report.steps, step))
        return
    said: list[str] = []

    def tell(words: str) -> None:
        said.append(words)
        step = AccelerationStep(name="engine", done=True, said="; ".join(said[-4:]))
        model.zoo_report = replace(report, steps=(*report.steps, step))

    chosen = [name for name in installed() if name != "eager" and (compiler or name != "inductor")]
    for network in networks:
        attach(network, engine, dynamic=dynamic, threads=threads, candidates=chosen, told=tell)
    tell(f"{engine}, made ready at the first call of each shape")
