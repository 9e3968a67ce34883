"""Models by engine, precision, batch and threads: turns, references, accuracy, refusals, plots; on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import zoo
from zoo.bench import BenchError, Benchmark, Entry, Grid, Ratio, Settings, compare_grid, grid, timing
from zoo.bench.engines import _goals, _large_goals, engines, plot_families
from zoo.bench.grid import DIFFERENCE, LIKENESS, PRECISIONS, refusal
from zoo.bench.grid_plot import _decimals, plot_grid
from zoo.bench.latency import Latency
from zoo.bench.report import SAME, columns, markdown
from zoo.bench.subjects import subject
from zoo.cli import bench, main
from zoo.data.images import images_to_judge
from zoo.evaluation.calibration import expected_calibration_error
from zoo.processor import instructions

QUICK = Settings(rounds=1, warmup=0)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination runs once a round; those of one number of threads together, with as many."""
    order: list[tuple[int, int, int]] = []

    def made(batch: int, threads: int) -> Any:
        call = lambda: order.append((batch, threads, torch.get_num_threads()))  # noqa: E731
        return SimpleNamespace(threads=threads, call=call, times=[])

    before = torch.get_num_threads()
    runs = [made(batch, threads) for batch in (1, 16) for threads in (1, 2)]
    told: list[tuple[int, int]] = []
    grid._time(runs, Settings(rounds=2, warmup=1), lambda what, done, total: told.append((done, total)))
    assert order == [(1, 1, 1), (16, 1, 1), (1, 2, 2), (16, 2, 2)] * 3
    assert [len(each.times) for each in runs] == [2] * 4
    assert told == [(done, 12) for done in range(1, 13)]
    assert torch.get_num_threads() == before


def run(model: str, pair: tuple[str, str], batch: int, times: list[float], threads: int = 1) -> Any:
    subject = SimpleNamespace(source=model, name=model)
    engine, precision = pair
    return SimpleNamespace(
        subject=subject, pair=pair, engine=engine, precision=precision, batch=batch, threads=threads, times=times
    )


def test_references() -> None:
    """Each model against itself on the first engine; one engine: against the second model; one model: by the image."""
    eager, onnx = ("eager", "fp32"), ("onnxruntime", "fp32")
    one = Grid(batches=(1, 4), threads=(1,))
    two = Grid(precisions=("fp32", "bf16"), threads=(1,))
    bf16 = ("eager", "bf16")
    runs = [run("A", eager, 4, [6, 8]), run("A", bf16, 4, [3, 4]), run("B", bf16, 4, [1, 1]), run("C", eager, 4, [1])]
    ratios, reference = grid._ratios(runs, two, 3)
    assert ratios == [SAME, Ratio(median=2.0, p20=2.0, p80=2.0), None, SAME]  # B could not run in fp32
    assert reference == "fp32"
    ratios, reference = grid._ratios([run("A", eager, 1, [2.0]), run("B", eager, 1, [8.0])], one, 2)
    assert ratios == [Ratio(median=4.0, p20=4.0, p80=4.0), SAME]
    assert reference == "B"
    ratios, reference = grid._ratios([run("A", onnx, 1, [2.0]), run("A", onnx, 4, [4.0])], one, 1)
    assert ratios == [SAME, Ratio(median=2.0, p20=2.0, p80=2.0)]
    assert reference == "A, batch 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two of CIFAR-10's classes, not the first two."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name in ("cat", "ship"):
        (root / name).mkdir()
        for index in range(3):
            pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_lists_on_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Precision by batch; accuracy counts the model's own labels; JSON, Markdown and the picture have all of it."""
    name = "repavit_tiny.cifar10"
    call = ["bench", name, "--precision", "fp32,bf16", "--batch", "1,4", "--threads", "1", "--rounds", "1"]
    assert main([*call, "--data", str(folder), "--samples", "5", "-o", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    settings = [(each["settings"]["precision"], each["settings"]["batch"]) for each in found["entries"]]
    assert settings == [("fp32", 1), ("bf16", 1), ("fp32", 4), ("bf16", 4)]
    assert [each["name"] for each in found["entries"]][1] == f"{name} (merged), bf16, batch 1"
    model = zoo.create_model(name, pretrained=True).eval()
    loader = images_to_judge(model, str(folder), 2, 5)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    assert {int(label) for _, labels in loader for label in labels} == {CIFAR10.index("cat"), CIFAR10.index("ship")}
    values = [each["values"] for each in found["entries"]]
    assert values[0]["top-1 of 5 images (%)"] == values[2]["top-1 of 5 images (%)"] == 100 * right / 5
    assert values[0]["top-1 of 5 images (%)"] <= values[0]["top-5 (%)"] <= 100
    probabilities, labels = zip(*((model(images).softmax(-1), labels) for images, labels in loader), strict=True)
    error = expected_calibration_error(torch.cat(probabilities), torch.cat(labels))
    assert values[0]["calibration error (%)"] == pytest.approx(100 * error, abs=1e-3)
    assert DIFFERENCE not in values[0]
    assert 0 < values[1][DIFFERENCE] < 0.1
    assert found["reference"] == "fp32"
    assert found["conditions"]["batch"] == "1 and 4"
    assert "| bf16 | 4 |" in (tmp_path / "models.md").read_text()


def test_int8_on_engines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of `zoo export`, calibrated with the pictures of `data`; without them a note says what is missing."""
    monkeypatch.setitem(grid.OFFERED, "eager", ("fp32",))
    monkeypatch.setitem(grid.OFFERED, "onnxruntime", ("int8",))
    every = Grid(engines=("eager", "onnxruntime"), precisions=("fp32", "int8"), batches=(2,), threads=(1,))
    name = "repavit_tiny.cifar10"
    found = compare_grid([name], every, QUICK, data=str(folder), samples=6)
    pairs = [(entry.settings["engine"], entry.settings["precision"]) for entry in found.entries]
    assert pairs == [("eager", "fp32"), ("onnxruntime", "int8")]
    assert 1e-4 < found.entries[1].values[DIFFERENCE] < 0.2
    assert "top-1 of 6 images (%)" in found.entries[1].values
    kept = next(match for note in found.notes if (match := re.search(r"(\d+) of 32 layers in float", note)))
    vnni = {"avx512_vnni", "avx_vnni"} & set(instructions())
    assert int(kept[1]) == 2 if vnni else 2 <= int(kept[1]) <= 17  # first and last; without VNNI more is lost, and kept
    without = compare_grid(["repavit_tiny"], every, QUICK, size=32)
    assert {entry.settings["engine"] for entry in without.entries} == {"eager"}
    assert any("int8 on engines is left out" in note and "--data DIR" in note for note in without.notes)


def test_refused_before_anything_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders without classes, strange classes, other tasks, sizes that a model does not take: one line each."""
    monkeypatch.setattr(grid, "_runs", lambda *args, **options: pytest.fail("work before the refusal"))
    name, none, strange = "repavit_tiny.cifar10", tmp_path / "none", tmp_path / "strange"
    none.mkdir()
    picture = next(folder.rglob("*.png")).read_bytes()
    for label in ("cat", "unicorn"):
        (strange / label).mkdir(parents=True)
        (strange / label / "0.png").write_bytes(picture)
    for call, said in (
        ([name, "--data", str(none)], "holds neither"),
        ([name, "--data", str(strange)], "the class 'unicorn', which is none of the known ones, 'airplane'"),
        (["repavit_tiny", "cfsr_x2", "--size", "32", "--engine", "eager"], "Models of different tasks"),
        ([name, "./nothing"], "There is no file or folder ./nothing."),
    ):
        assert main(["bench", *call]) == 2
        error = capsys.readouterr().err
        assert said in error, error
        assert error.count("\n") == 1
        assert "named benchmark" not in error


def test_a_size_that_a_model_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        raise AssertionError("Input height (100) doesn't match model (160).\nmore")

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.forward", wrong)
    with pytest.raises(BenchError, match=r"does not run on an input of 3x160x160: Input height .+\(160\)\.$"):
        subject("test_vit", QUICK)


def test_memory_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for every combination; here in this process, in `test_fresh_process` in one of its own."""
    monkeypatch.setattr(grid, "in_fresh_process", lambda call, *args: call(*args))
    every = Grid(precisions=("fp32", "bf16"), batches=(1,), threads=(1,))
    found = compare_grid(["repavit_tiny"], every, QUICK, size=32, memory=True)
    assert [each.settings["precision"] for each in found.entries] == ["fp32", "bf16"]
    assert all(each.peak_bytes is not None and each.peak_bytes >= 0 for each in found.entries)
    assert found.conditions["input"] == "3x32x32 for all"


def test_one_line_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine does not offer is left out with a note; where all is, the call is refused."""
    assert list(bench._PRECISIONS) == list(PRECISIONS)
    assert refusal("onnxruntime", "bf16") == f"onnxruntime runs {', '.join(grid.OFFERED['onnxruntime'])}, not bf16"
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    with pytest.raises(ValueError, match=r"eager runs int8 with torchao.*'ffn-zoo\[quantize\]'"):
        Grid(precisions=("int8",))
    assert Grid(precisions=("fp32", "int8")).pairs == [("eager", "fp32")]
    for wrong, said in (
        (dict(batches=(1, 1)), "different values"),
        (dict(threads=(0,)), "threads must be at least 1"),
        (dict(precisions=("bf61",)), "Did you mean bf16"),
        (dict(engines=("onnx",)), "Did you mean onnxruntime"),
    ):
        with pytest.raises(ValueError, match=said):
            Grid(**wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(grid, "_runs", lambda each, *args, **options: ([], [f"Left out: {each.source}: why."]))
    with pytest.raises(BenchError, match="Left out: repavit_tiny: why"):
        compare_grid(["repavit_tiny"], Grid(), QUICK)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["--batch", "1,0"], "--batch must be at least 1, got 0"),
        (["--batch", "-3"], "--batch must be at least 1, got -3"),
        (["--threads", "1,two"], "--threads takes whole numbers such as 1 or 1,16, got '1,two'"),
        (["--threads", "1,,2"], "--threads takes whole numbers"),
        (["--engine", "eagr"], "Did you mean eager?"),
        (["--engine", ","], "--engine takes one or more names"),
        (["--precision", "int7"], "Did you mean int8?"),
        (["--precision", "fp32", "--dtype", "bfloat16"], "leave out --dtype bfloat16"),
        (["--engine", "auto", "--precision", "bf16"], "auto runs fp32, not bf16"),
        (["--samples", "3"], "--samples counts images of --data"),
        (["--data", "nowhere"], "--data names no folder: nowhere"),
        (["--data", __file__], f"It is a file: give its folder, {Path(__file__).parent}."),
        (["--data", "."], "Accuracy is measured of classifiers with weights"),
        (["--data", ".", "--size", "32"], "leave out the --size"),
        (["--budgets", "0.5"], "--budgets is for `zoo bench ffn`"),
    ],
)
def test_wrong_calls(call: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "repavit_tiny", *call]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["cfsr", "--batch", "1,2"], "--batch takes one number for cfsr"),
        (["pixeldit.cifar10", "--threads", "1,2"], "--threads takes one number for pipelines"),
        (["cfsr", "--engine", "eager"], "--engine is for models and `zoo bench engines`"),
        (["pixeldit.cifar10", "--precision", "bf16"], "--precision is for models; pixeldit.cifar10 is a pipeline"),
    ],
)
def test_lists_where_they_are_for_nothing(call: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *call]) == 2
    assert said in capsys.readouterr().err


def test_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("zoo.engines.runtimes.importlib.util.find_spec", lambda name, *more: None)
    assert main(["bench", "repavit_tiny", "--engine", "eager,openvino"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'ffn-zoo[openvino]'" in error
    assert error.count("\n") == 1


def test_a_busy_machine_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer free cores than threads: one line; an idle machine, or one with free cores, nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for load, threads, said in ((0.2, 4, ""), (2.0, 2, ""), (2.0, 3, "a load of 2.0 on 4 cores before 3 threads ran")):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        found = timing.busy(threads)
        assert said in found
        assert bool(said) == bool(found)
    assert timing.busy(8).startswith("8 threads share 4 cores")


def test_threads_where_none_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (("1", 1), ("3,2", 3), ("", 2), ("many", 2), ("0", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert bench._usual_threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert bench._usual_threads() == 2


def entry(model: str, engine: str, speed: float, *, batch: int = 1, ms: float = 1.0, **more: Any) -> Entry:
    """Return a made-up line."""
    precision = more.pop("precision", "fp32")
    chosen: dict[str, str | int] = {"model": model, "engine": engine, "precision": precision, "batch": batch}
    return Entry(
        name=f"{model}, {engine}",
        time=Latency(median=ms, p20=ms, p80=ms, runs=1, device="cpu", threads=1),
        speedup=Ratio(median=speed, p20=speed, p80=speed),
        settings={**chosen, "threads": 1, **more.pop("settings", {})},
        **more,
    )


def result(entries: list[Entry], name: str = "models") -> Benchmark:
    return Benchmark(
        name=name, title="Made up, batch 1", conditions={}, environment={"device": "cpu"}, date="", reference="eager",
        entries=tuple(entries),
    )  # fmt: skip


def test_goals_of_engines() -> None:
    """The best engine in float32 counts, eager where none is faster; what auto leaves to eager is not slower."""
    lines = [
        entry("emov2_1m (merged)", "onnxruntime", 4.0),
        entry("emov2_1m (merged)", "eager", 9.0, precision="bf16"),
        entry("lsnet_t (merged)", "openvino", 0.5),
        entry("lsnet_t (merged)", "auto", 0.97, settings={"taken": "eager"}),
        entry("affnet_et (merged)", "openvino", 100.0),
        entry("cfsr_x2.bsds (merged)", "openvino", 1.5),
    ]
    mean, slowest, restorer = _goals(lines, 1, ["emov2_1m", "lsnet_t", "affnet_et"])
    assert (mean.value, mean.wanted) == (pytest.approx(2.0), 2.5)
    assert slowest.reached
    assert "lsnet_t" in slowest.what
    assert (restorer.value, restorer.wanted) == (1.5, 1.4)
    large = [
        entry("repavit_base (merged)", "onnxruntime", 1, ms=50),
        entry("repavit_base (merged)", "onnxruntime", 1, ms=30, precision="int8"),
        entry("vit_base_patch16_224", "onnxruntime", 1, ms=90),
        entry("vit_base_patch16_224", "openvino", 1, ms=900),
    ]
    small, equal = _large_goals(large, "batch 1")
    assert (small.value, equal.value) == (pytest.approx(3.0), pytest.approx(1.8))
    assert "onnxruntime in int8" in small.what


def test_table_shows_what_varies() -> None:
    lines = [entry("A", "eager", 1.0, ms=2), entry("A", "openvino", 2.0)]
    assert [each.heading for each in columns(result(lines))][:2] == ["model", "engine"]
    assert "batch" not in {each.heading for each in columns(result(lines))}
    assert "| A | eager | 2.00 | 2.00 to 2.00 | 1 |" in markdown(result(lines))


@pytest.mark.slow
def test_times_below_one_are_written_as_those_above() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(0.2, 3)
    axes.xaxis.set_minor_formatter(_decimals())
    figure.canvas.draw()
    texts = {label.get_text() for label in axes.get_xticklabels(minor=True)}
    assert {"0.3", "2"} <= texts


def test_plots(tmp_path: Path) -> None:
    """Accuracy, else work, else throughput against time; a suite's families as bars."""
    top1 = "top-1 of 100 images (%)"
    many = [
        entry(f"model_{index}", engine, 1.0, ms=(1 + index) * share, values={top1: float(index)})
        for index in range(40)
        for share, engine in ((1.0, "eager"), (0.5, "openvino"))
    ]
    text = plot_grid(result(many), tmp_path / "many.svg").read_text()
    assert text.startswith("<?xml")
    one = [entry("A", "eager", 1.0), entry("A", "eager", 2.0, batch=4)]
    assert plot_grid(result(one), tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    bars = [result(many[:12], name=f"engines_batch{batch}_threads1") for batch in (1, 16)]
    assert plot_families(bars, tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_families([result(many)], tmp_path / "none.png")


def test_suite_of_engines() -> None:
    """One table for each batch and number of threads, with its goals; a restorer at batch 1, in dB too."""
    found = engines(
        QUICK, families=["repavit_tiny"], restorer="cfsr_x2", large=None, size=32, engines=["eager"],
        precisions=["fp32", "bf16"], batches=[1, 2], threads=[1],
    )  # fmt: skip
    assert [each.name for each in found] == ["engines_batch1_threads1", "engines_batch2_threads1"]
    first, second = found
    assert [each.name for each in first.entries] == [
        "repavit_tiny (merged), eager, fp32",
        "repavit_tiny (merged), eager, bf16",
        "cfsr_x2 (merged), eager, fp32",
        "cfsr_x2 (merged), eager, bf16",
    ]
    assert len(second.entries) == 2
    assert first.entries[3].values[LIKENESS] > 20
    assert "--batch 1,2 --threads 1 --rounds 1" in first.notes[-1]
    assert [goal.wanted for goal in first.goals] == [1.4]
