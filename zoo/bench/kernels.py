"""The operators of `zoo.kernels` against eager and compiled PyTorch and library calls; on a CPU, plain formulas.

On a GPU the kernels are checked first and timed by Triton's `do_bench`, which empties the cache before every call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo import kernels as ops
from zoo.bench.kernel_rows import Row, block_rows, operator_rows
from zoo.bench.kernel_tuning import tune
from zoo.bench.latency import summarize
from zoo.bench.plain_backbones import plain_ska
from zoo.bench.report import Benchmark, Check, Entry, Goal
from zoo.bench.subjects import subject
from zoo.bench.timing import Progress, Settings, compare, environment, now, require_close, speedup, torch_threads

__all__ = ["MODES", "kernels", "measure_gpu", "measure_row", "not_measured"]

MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of `torch.compile` that the kernels have to beat."""

ROOFLINES = {"NVIDIA H100 80GB HBM3": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12)}
"""Name of a GPU -> dense products of 16-bit numbers (FLOP/s) and memory (bytes/s), as its maker states them."""

_TRAFFIC, _RATE, _ROOF = "TB/s", "TFLOP/s", "% of the roofline"
_RIVALS = {"eager": "eager (ms)", "compile": "compile (ms)", "autotune": "max-autotune (ms)", "library": "library (ms)"}
_OPERATORS = "Kernels against eager and compiled PyTorch and the best library call"
_LIBRARIES = (
    "Library calls: repa_ffn as one product over inputs and activated channels side by side; frequency_filter by FFT;"
    " for ska in contiguous maps a kernel of the design that its authors published. routed_experts has grouped products"
    " as its eager and compiled rivals. Losses stay in the table."
)
_MODELS = (("lsnet_t", 128), ("restormer_denoise_color", 1), ("pixeldit.cifar10", 128))  # batch

Timer = Callable[[Callable[[], object]], float]
"""Returns the median time of a call in ms."""


def kernels(settings: Settings, progress: Progress | None = None) -> list[Benchmark]:
    """Measure the kernels on a GPU, or the operators' CPU paths; what a machine cannot measure is an empty table."""
    if torch.device(settings.device).type != "cuda":
        return [_cpu(settings, progress), not_measured()]
    if settings.tune:
        with torch.cuda.device(settings.device):
            rows = operator_rows(settings.device, settings.torch_dtype)
            tune(rows, do_bench, progress, total=_count(operator_rows))
    on_cpu = Settings(**{**vars(settings), "device": "cpu", "dtype": "float32"})
    return [*measure_gpu(settings, progress), _cpu(on_cpu, progress)]


def do_bench(call: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU in ms, with an empty cache before each."""
    from triton.testing import do_bench as median

    return float(median(call, return_mode="median"))


def measure_gpu(
    settings: Settings,
    progress: Progress | None = None,
    *,
    modes: Sequence[str] = MODES,
    seconds: float = math.inf,
    models: bool = True,
) -> list[Benchmark]:
    """Check and time operators, then blocks and models with and without kernels.

    Args:
        settings: A CUDA device; each round is one call of `do_bench` for everything in turns.
        progress: Told after each row.
        modes: Of `torch.compile`.
        seconds: No row is started after that many; a note says which were left out.
        models: Whole models too.

    Raises:
        BenchError: A kernel does not compute what PyTorch computes.
    """
    torch.manual_seed(0)
    started = time.monotonic()
    conditions = {"dtype": settings.dtype, "rounds": settings.rounds}
    rooflines = ROOFLINES.get(torch.cuda.get_device_name(settings.device))
    device, dtype = settings.device, settings.torch_dtype
    done, total = 0, _count(block_rows, operator_rows)
    # Blocks first: they are few, and the last to be given up where time is short.
    found = {"blocks": _Table(), "operators": _Table(_LIBRARIES), "models": _Table()}
    with torch.cuda.device(device):
        for title, rows in (("blocks", block_rows(device, dtype)), ("operators", operator_rows(device, dtype))):
            for row in rows:
                done += 1
                if time.monotonic() - started > seconds:
                    found[title].left_out.append(row.name)
                    continue
                whole = title == "blocks"
                found[title].add(measure_row(row, settings, modes=modes, whole=whole, rooflines=rooflines))
                if progress is not None:
                    progress(row.name, done, total)
        if models and time.monotonic() - started < seconds:
            for entry, goals in _models(settings):
                found["models"].add((entry, (), goals))
    shared: dict[str, Any] = {"environment": _gpu_environment(device), "date": now()}
    titles = {
        "operators": (_OPERATORS, "the best rival"),
        "blocks": ("Transformer blocks, compiled with kernels", "the best without kernels"),
        "models": ("Models, compiled with kernels", "compiled without"),
    }
    return [
        Benchmark(
            name=f"kernels_cuda_{key}",
            title=title,
            conditions=conditions if key != "models" else {**conditions, "mode": "default"},
            reference=reference,
            **found[key].parts(),
            **shared,
        )
        for key, (title, reference) in titles.items()
        if found[key].entries or found[key].left_out
    ]


def _count(*sources: Callable[[str, torch.dtype], Iterator[Row]]) -> int:
    """Return how many rows there will be."""
    return sum(1 for source in sources for _ in source("meta", torch.bfloat16))


class _Table:
    """Entries, checks, goals, notes and what was left out."""

    def __init__(self, *always: str) -> None:
        self.always = always
        self.entries, self.checks, self.goals = list[Entry](), list[Check](), list[Goal]()
        self.left_out: list[str] = []

    def add(self, measured: tuple[Entry, Sequence[Check], Sequence[Goal]]) -> None:
        entry, checks, goals = measured
        self.entries.append(entry)
        self.checks += checks
        self.goals += goals

    def parts(self) -> dict[str, Any]:
        """Return fields of a `Benchmark`."""
        notes = (f"Left out, the time was up: {', '.join(self.left_out)}.",) if self.left_out else ()
        return {
            "entries": tuple(self.entries),
            "checks": tuple(self.checks),
            "goals": tuple(self.goals),
            "notes": (*self.always, *notes),
        }


def measure_row(
    row: Row,
    settings: Settings,
    *,
    modes: Sequence[str] = MODES,
    whole: bool = False,
    rooflines: tuple[float, float] | None = None,
    backend: ops.Backend = "triton",
    timer: Timer = do_bench,
) -> tuple[Entry, tuple[Check, ...], tuple[Goal, ...]]:
    """Check one row, time it and its rivals in turns, and compare it with the fastest of them.

    Args:
        row: What to measure.
        settings: Rounds.
        modes: Of `torch.compile`, for the rivals.
        whole: The row is a block: it is compiled with its kernels too.
        rooflines: FLOP/s and bytes/s of the device; None leaves the per cent blank.
        backend: Computes the row; its rivals are plain PyTorch.
        timer: Times one call.

    Raises:
        BenchError: The results differ.
    """
    inputs = [tensor.detach().requires_grad_(row.train and tensor.is_floating_point()) for tensor in row.inputs]
    checks, outputs, flops = _checked(row, inputs, backend)
    torch._dynamo.reset()
    ours = torch.compile(row.function, mode=modes[0]) if whole and modes else row.function
    calls: Calls = {"ours": (backend, _step(ours, inputs, row.train))}
    rivals = {"eager": row.function}
    for mode in modes:
        rivals["compile" if mode == MODES[0] else "autotune"] = torch.compile(row.function, mode=mode)
    if row.library is not None:
        rivals["library"] = row.library
    calls |= {name: ("torch", _step(function, inputs, row.train)) for name, function in rivals.items()}
    times = _times(calls, settings.rounds, timer)
    own = summarize(times["ours"], inputs[0].device)
    medians = {name: summarize(times[name]).median for name in rivals}
    ratio = speedup(times[min(medians, key=lambda name: medians[name])], times["ours"])
    values = {_RIVALS[name]: median for name, median in medians.items()}
    if not row.train and not whole:
        moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
        values |= {_TRAFFIC: moved / own.median / 1e9, _RATE: flops / own.median / 1e9}
        if rooflines is not None and inputs[0].element_size() == 2:
            least = 1e3 * max(flops / rooflines[0], moved / rooflines[1])
            values[_ROOF] = 100 * least / own.median
    goals = []
    if row.share is not None and _ROOF in values:
        goals.append(Goal(what=f"{row.name}, {_ROOF}", value=values[_ROOF], wanted=row.share))
    if row.wanted is not None:
        what = f"{row.name}, times as fast as the best rival"
        goals.append(Goal(what=what, value=ratio.median, wanted=row.wanted))
    if row.over_library is not None:
        what = f"{row.name}, times as fast as the library call"
        value = speedup(times["library"], times["ours"]).median
        goals.append(Goal(what=what, value=value, wanted=row.over_library))
    return Entry(name=row.name, time=own, speedup=ratio, values=values), checks, tuple(goals)


Calls = dict[str, tuple[ops.Backend, Callable[[], object]]]
"""Name -> backend and call."""


def _times(calls: Calls, rounds: int, timer: Timer) -> dict[str, list[float]]:
    """Time calls in turns, after one run of each, in which compilers work."""
    for backend, call in calls.values():
        with ops.use_backend(backend):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (backend, call) in calls.items():
            with ops.use_backend(backend):
                times[name].append(timer(call))
    return times


def _checked(row: Row, inputs: list[Tensor], backend: ops.Backend) -> tuple[tuple[Check, ...], tuple[Tensor, ...], int]:
    """Compare a row, and what its library computes, with the formula in float32; return also outputs and FLOPs."""
    exact = [tensor.detach().float() if tensor.is_floating_point() else tensor for tensor in inputs]
    with ops.use_backend("torch"), torch.no_grad():
        expected = _tuple(row.function(*exact)) if not _keeps_weights(row) else _tuple(row.function(*inputs))
        others = [_tuple(row.library(*inputs))] if row.library is not None and row.checked else []
    with ops.use_backend(backend), torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = _tuple(row.function(*inputs))
    checks = []
    for found, what in ((outputs, row.name), *((other, f"{row.name}, library") for other in others)):
        for value, truth in zip(found, expected, strict=True):
            checks.append(require_close(what, value, truth, _TOLERANCE[value.dtype]))
    if row.train:
        checks += _same_gradients(row, inputs, exact, backend)
    return (max(checks, key=lambda check: check.value),), outputs, counter.get_total_flops()


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest output; TF32 in float32


def _keeps_weights(row: Row) -> bool:
    """Return whether a row has weights besides its inputs, which are of one type with them."""
    return (isinstance(row.function, partial) and "weights" in row.function.keywords) or "experts" in row.name


def _same_gradients(row: Row, inputs: list[Tensor], exact: list[Tensor], backend: ops.Backend) -> list[Check]:
    """Compare gradients with those of the formula in float32."""
    exact = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in exact]
    with ops.use_backend("torch"):
        expected = _gradients(row.function, exact)
    with ops.use_backend(backend):
        found = _gradients(row.function, inputs)
    return [
        require_close(f"{row.name}, gradients", value, truth, _TOLERANCE[value.dtype])
        for value, truth in zip(found, expected, strict=True)
    ]


def _gradients(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = _tuple(function(*inputs))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return torch.autograd.grad(outputs, wanted, [torch.ones_like(part) for part in outputs])


def _step(function: Callable[..., Any], inputs: list[Tensor], train: bool) -> Callable[[], object]:
    """Return a call without arguments."""

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    return partial(_gradients, function, inputs) if train else forward


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _models(settings: Settings) -> Iterator[tuple[Entry, tuple[Goal, ...]]]:
    """Yield whole models, compiled with and without kernels; merged RePaViT-Large also against timm's ViT-Large."""
    for name, batch in (*_MODELS, ("repavit_large", 64)):
        at_batch = Settings(**{**vars(settings), "batch": batch})
        times = {backend: _model_times(name, at_batch, backend) for backend in ("triton", "torch")}
        values = {"compiled without (ms)": summarize(times["torch"]).median}
        goals: tuple[Goal, ...] = ()
        if name == "repavit_large":
            rival = _model_times("vit_large_patch16_224", at_batch, "torch")
            values["timm's ViT-Large, compiled (ms)"] = summarize(rival).median
            ratio = max(speedup(rival, own).median for own in times.values())
            goals = (Goal(what="merged RePaViT-Large against timm's ViT-Large", value=ratio, wanted=1.8),)
        yield (
            Entry(
                name=f"{name}, batch {batch}",
                time=summarize(times["triton"], settings.device),
                speedup=speedup(times["torch"], times["triton"]),
                values=values,
            ),
            goals,
        )


def _model_times(name: str, settings: Settings, backend: ops.Backend) -> list[float]:
    torch._dynamo.reset()
    ours = subject(name, settings, check=False)
    compiled = torch.compile(ours.model)

    def call() -> object:
        with torch.no_grad():
            return compiled(*ours.inputs, **ours.named)

    with ops.use_backend(backend):
        call()
        return [do_bench(call) for _ in range(settings.rounds)]


def _gpu_environment(device: str) -> dict[str, str]:
    import triton

    return {**environment(device), "triton": triton.__version__, "CUDA": str(torch.version.cuda)}


def not_measured() -> Benchmark:
    """Return the operators' table without a number in it, as it stands until there is a GPU."""
    headings = [*_RIVALS.values(), "kernel (ms)", "times as fast as the best rival", _TRAFFIC, _RATE, _ROOF]
    empty = dict.fromkeys(headings, math.nan)
    return Benchmark(
        name="kernels_cuda",
        title=f"{_OPERATORS}: not measured",
        conditions={"dtype": "bfloat16"},
        environment={"device": "none"},
        reference=None,
        entries=tuple(Entry(name=row.name, values=empty) for row in operator_rows("meta", torch.bfloat16)),
        notes=(
            _LIBRARIES,
            "No GPU was at hand: the kernels were run in Triton's interpreter and compiled for sm_90, nothing else."
            ' Until there are numbers, the backend "auto" runs none of them.',
            "To fill the table on a machine with a GPU: `zoo bench kernels --device cuda --dtype bfloat16 --tune"
            " -o docs/benchmarks --force`.",
        ),
    )


def _cpu(settings: Settings, progress: Progress | None) -> Benchmark:
    """Time what the operators compute on a CPU against the formulas as they are first written down."""
    torch.manual_seed(0)
    entries, checks = [], []
    with torch_threads(settings.threads), torch.inference_mode(), ops.use_backend("torch"):
        for name, ours, plain, inputs in _cpu_rows(settings.batch):
            checks.append(require_close(name, ours(*inputs), plain(*inputs)))
            cast = [tensor.to(settings.torch_dtype) for tensor in inputs]
            calls = {"ours": partial(ours, *cast), "plain": partial(plain, *cast)}
            timed = compare(calls, settings, reference="plain", progress=progress)
            entries.append(Entry.of(name, timed["ours"], values={"plain formula (ms)": timed["plain"][0].median}))
    return Benchmark(
        name="kernels_cpu",
        title="Operators on a CPU against the plain formulas",
        conditions=settings.conditions(),
        environment=environment(settings.device),
        reference="the plain formula",
        entries=tuple(entries),
        checks=(max(checks, key=lambda check: check.value),),
        notes=(
            "Plain formulas: SKA from unfolded neighbourhoods; GDFN as convolution, chunk and gelu * mul; merged RePa"
            " as three linear layers and a sum. All in eager mode.",
        ),
    )


CpuRow = tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]
"""Name, operator, plain formula, float32 inputs."""


def _cpu_rows(batch: int) -> Iterator[CpuRow]:
    for channels, size in ((64, 28), (128, 14)):
        x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
        taps = torch.randn(batch, size, size, 9, channels // 8).permute(0, 4, 3, 1, 2)  # tap by tap, as in LSNet
        yield f"ska {batch} x {channels} x {size} x {size}", ops.ska, plain_ska, [x, taps]
    for hidden, size, memory in ((128, 64, ""), (512, 16, ""), (128, 64, " channels last")):
        x, weight = torch.randn(batch, 2 * hidden, size, size), torch.randn(2 * hidden, 1, 3, 3) / 3
        if memory:
            x = x.contiguous(memory_format=torch.channels_last)
        yield f"dwconv_gate {batch} x {2 * hidden} x {size} x {size}{memory}", ops.dwconv_gate, _plain_gate, [x, weight]
    for dim in (384, 768):
        rows = 197 * batch
        layers = [nn.Linear(dim, dim) for _ in range(2)]
        down = torch.randn(dim, dim) / dim**0.5
        up, linear = ([layer.weight.detach(), layer.bias.detach()] for layer in layers)
        yield f"repa_ffn {rows} x {dim}", ops.repa_ffn, _plain_repa, [torch.randn(rows, dim), *up, down, *linear]


def _plain_gate(x: Tensor, weight: Tensor) -> Tensor:
    a, b = F.conv2d(x, weight, padding=1, groups=x.shape[1]).chunk(2, 1)
    return F.gelu(a) * b


def _plain_repa(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.gelu(F.linear(x, up, up_bias)), down)
