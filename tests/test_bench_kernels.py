"""`zoo bench kernels`: what is compared and checked, the tables without a GPU, tuning; on tiny shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo.bench.kernels as bench
from zoo import kernels
from zoo.bench import BenchError, Settings
from zoo.bench.kernel_rows import Row, block_rows, operator_rows
from zoo.bench.kernel_tuning import fastest_tiles, save_tiles, tune
from zoo.bench.report import dumps, markdown, plot_ratios
from zoo.bench.timing import require_close
from zoo.cli import main
from zoo.kernels import launch

QUICK = Settings(batch=1, threads=1, rounds=2, warmup=0)


def times(*values: float) -> Any:
    """Return a timer that gives these milliseconds in turns: ours, eager, library."""
    left = list(values)
    return lambda call: left.pop(0)


def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_row_is_compared_with_its_fastest_rival() -> None:
    x = torch.ones(1000, 500, dtype=torch.bfloat16)
    row = Row(name="double", function=double, inputs=[x], library=lambda x: x + x, wanted=3.0, share=50.0)
    measured = bench.measure_row(
        *(row, QUICK),
        modes=(),
        rooflines=(1e12, 4e9),  # bytes decide: 2 MB at 4 GB/s take 0.5 ms
        backend="auto",
        timer=times(1.0, 3.0, 2.0, 2.0, 6.0, 4.0),
    )
    entry, checks, goals = measured
    assert entry.time is not None
    assert entry.time.median == 1.5
    assert entry.speedup is not None
    assert entry.speedup.median == 2.0  # both rounds: library against ours
    assert entry.values == {
        **{"eager (ms)": 4.5, "library (ms)": 3.0, "TB/s": pytest.approx(2e6 / 1.5e-3 / 1e12), "TFLOP/s": 0.0},
        "% of the roofline": pytest.approx(100 * 0.5 / 1.5),
    }
    assert [(goal.value, goal.reached) for goal in goals] == [(pytest.approx(100 / 3), False), (2.0, False)]
    assert checks[0].value < 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_wrong_kernels_are_not_timed(train: bool) -> None:
    def function(x: Tensor) -> Tensor:
        wrong = 1.1 if kernels.get_backend() != "torch" else 1.0
        return (x * wrong if train else x + wrong - 1).sin()

    row = Row(name="sine", function=function, inputs=[torch.ones(5)], train=train)
    with pytest.raises(BenchError, match="sine"):
        bench.measure_row(row, QUICK, modes=(), backend="auto", timer=times())


def test_wrong_library_calls_are_not_timed() -> None:
    row = Row(name="double", function=double, inputs=[torch.ones(5)], library=lambda x: 3 * x)
    with pytest.raises(BenchError, match="double, library"):
        bench.measure_row(row, QUICK, modes=(), backend="auto", timer=times())
    unchecked = Row(**{**vars(row), "checked": False})
    entry, _, _ = bench.measure_row(unchecked, QUICK, modes=(), backend="auto", timer=lambda call: 1.0)
    assert entry.values["library (ms)"] == 1.0


def test_kernels_are_held_against_their_library_call() -> None:
    row = Row(name="double", function=double, inputs=[torch.ones(5)], library=lambda x: x + x, over_library=2.0)
    _, _, (goal,) = bench.measure_row(row, QUICK, modes=(), backend="auto", timer=times(1.0, 5.0, 3.0, 1.0, 5.0, 3.0))
    assert (goal.what, goal.value, goal.wanted) == ("double, times as fast as the library call", 3.0, 2.0)


def test_training_rows_time_gradients() -> None:
    called: list[bool] = []

    def function(x: Tensor) -> Tensor:
        called.append(torch.is_grad_enabled())
        return x.sin()

    row = Row(name="sine", function=function, inputs=[torch.ones(5)], train=True)
    entry, _, _ = bench.measure_row(row, QUICK, modes=(), backend="auto", timer=lambda call: call() and 1.0)
    assert entry.values.keys() == {"eager (ms)"}
    assert sum(called) > len(called) / 2


def test_rows_have_names_without_a_gpu() -> None:
    rows = [*operator_rows("meta", torch.bfloat16), *block_rows("meta", torch.bfloat16)]
    assert len({row.name for row in rows}) == len(rows) > 25
    operators = {row.name.partition(" ")[0] for row in rows}
    assert operators >= {name for name in kernels.__all__ if name.islower() and "backend" not in name}


def test_rows_can_be_called() -> None:
    """On meta tensors, since sizes are those of the table."""
    for row in (*operator_rows("meta", torch.bfloat16), *block_rows("meta", torch.bfloat16)):
        if "experts" not in row.name:  # sorting needs data
            outputs = row.function(*row.inputs)
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            assert first.dtype == torch.bfloat16, row.name


def test_tables_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [(f"row {number}", double, lambda x: x + x, [torch.ones(4)]) for number in range(2)]
    monkeypatch.setattr(bench, "_cpu_rows", lambda batch: iter(rows))
    measured, empty = bench.kernels(QUICK)
    assert [entry.name for entry in measured.entries] == ["row 0", "row 1"]
    assert all(entry.speedup is not None for entry in measured.entries)
    page = markdown(empty)
    assert "No GPU was at hand" in page
    assert "zoo bench kernels --device cuda" in page
    assert "Written" in page
    assert "Measured" in markdown(measured)
    assert page.count("| - | - | - |") >= len(empty.entries) > 20
    values = json.loads(dumps([empty]))["benchmarks"][0]["entries"][0]["values"]
    assert set(values.values()) == {None}
    assert plot_ratios([measured, empty], tmp_path / "kernels.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_ratios([empty], tmp_path / "empty.png")


def test_cpu_rows_compute_the_plain_formulas() -> None:
    with torch.inference_mode(), kernels.use_backend("torch"):
        names = [require_close(name, ours(*x), plain(*x)).what for name, ours, plain, x in bench._cpu_rows(1)]
    assert {name.partition(" ")[0] for name in names} == {"ska", "dwconv_gate", "repa_ffn"}


def test_tuning_takes_the_fastest_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="tuning asks triton whether tiles fit")
    used: list[launch.Tiles] = []

    def function(x: Tensor) -> Tensor:
        for kernel in ("ska", "ska channels last"):
            default = {"tile": 1024, "num_warps": 4}
            used.append(launch.choose(kernel, x, outputs=8, inner=9, rows=len(x), default=default))
        return x

    def timer(call: Any) -> float:
        call()
        first, second = used[-2:]
        return abs(first["tile"] - 512) + first["num_warps"] + abs(second["tile"] - 2048) - second["num_warps"] / 100

    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    row = Row(name="ska", function=function, inputs=[torch.ones(5, dtype=torch.bfloat16)])
    found = fastest_tiles(row, timer, "auto", {})
    sizes = "N=8 K=9 bfloat16 M<=8"
    best = {("ska", sizes): {"tile": 512, "num_warps": 2}, ("ska channels last", sizes): {"tile": 2048, "num_warps": 8}}
    assert found == best
    assert fastest_tiles(row, timer, "auto", best) == {}
    save_tiles({("repa_ffn", "N=1"): {"block_rows": 64}}, "NVIDIA H200")
    monkeypatch.setattr("zoo.bench.kernel_tuning.fastest_tiles", lambda *args: best)
    path = tune([row], timer)
    assert path == tmp_path / "nvidia_h200.json"
    assert launch.tuned("NVIDIA H200") == best | {("repa_ffn", "N=1"): {"block_rows": 64}}
    launch.tuned.cache_clear()


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = ("row", double, lambda x: x + x, [torch.ones(4)])
    monkeypatch.setattr(bench, "_cpu_rows", lambda batch: iter([row]))
    assert main(["bench", "kernels", "--rounds", "1", "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md", "kernels.png"]
    assert "not measured" in (tmp_path / "kernels.md").read_text()
    assert main(["bench", "kernels", "--tune"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "kernels: Triton kernels" in " ".join(capsys.readouterr().out.split())


def test_gpu_suite_lists_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement on a GPU, with everything that needs one stood in for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(bench, "_gpu_environment", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "device", _Nothing)
    clock = iter([0.0, 0.0, 99.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    rows = [Row(name=name, function=double, inputs=[torch.ones(3)]) for name in ("first", "second")]
    monkeypatch.setattr(bench, "block_rows", lambda device, dtype: iter([]))
    monkeypatch.setattr(bench, "operator_rows", lambda device, dtype: iter(rows))
    entry, checks, goals = bench.measure_row(rows[0], QUICK, modes=(), backend="auto", timer=lambda call: 1.0)
    monkeypatch.setattr(bench, "measure_row", lambda *args, **options: (entry, checks, goals))
    (found,) = bench.measure_gpu(QUICK, seconds=50, models=False)
    assert [each.name for each in found.entries] == ["first"]
    assert "Left out, the time was up: second." in found.notes
    assert not math.isnan(found.entries[0].values["eager (ms)"])


class _Nothing:
    """A context that does nothing."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
