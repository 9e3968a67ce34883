"""The benchmarks: how times become ratios, what is checked first, what is written; on tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import timm
import torch
from denoisers import pixel_dit
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from diffusers.hooks import SeaCacheConfig
from pipeline_folders import saved

import zoo
import zoo.bench.suites
import zoo.cli.bench
from zoo.bench import BenchError, Benchmark, Check, Entry, Goal, Ratio, Settings, compare_models
from zoo.bench.cache_dit import cache_dit_settings
from zoo.bench.caching import (
    FID_C,
    PSNR,
    RECOGNISED,
    SSIM,
    _goals,
    caching,
    class_images,
    class_subject,
    measure_caches,
    psnr_of_all,
    recogniser,
)
from zoo.bench.latency import Latency
from zoo.bench.memory import in_fresh_process, resident_peak
from zoo.bench.moe import moe
from zoo.bench.pipelines import ACTIVATED
from zoo.bench.report import columns, dumps, markdown, plot, to_json
from zoo.bench.restorers import restorers
from zoo.bench.subjects import Subject
from zoo.bench.suites import SUITES, cfsr, repaffn
from zoo.bench.tiling import tiling
from zoo.bench.timing import compare, environment, now, require_close, speedup
from zoo.caching.presets import HELD, PRESETS, STEPS, CacheSetting, cache_settings
from zoo.cli import main
from zoo.diffusion import PixelDiT, PixelDiTPipeline

QUICK = Settings(batch=1, threads=1, rounds=2, warmup=0)


def latency(median: float) -> Latency:
    return Latency(median=median, p20=median, p80=median, runs=1, device="cpu", threads=1)


def benchmark(**changes: Any) -> Benchmark:
    """Return a small made-up result."""
    fields: dict[str, Any] = dict(
        name="made_up",
        title="A against B",
        conditions={"batch": 1, "threads": 2},
        environment={"device": "cpu"},
        date="2026-01-01 00:00 UTC",
        reference="B",
        entries=(
            Entry(name="A", time=latency(10), speedup=speedup([20, 20], [10, 10]), macs=10**9, values={PSNR: 31.5}),
            Entry(name="B", time=latency(20), macs=2 * 10**9, values={PSNR: math.inf}),
        ),
        checks=(Check(what="outputs", value=1e-7, tolerance=1e-4),),
        goals=(Goal(what="A against B", value=2.0, wanted=1.5),),
        notes=("A note.",),
    )
    return Benchmark(**{**fields, **changes})


def test_speedup_compares_each_round_with_itself() -> None:
    """A round in which the machine was slow for both sides counts like any other."""
    ratio = speedup([20.0, 200.0, 20.0, 20.0, 20.0], [10.0, 100.0, 10.0, 10.0, 10.0])
    assert (ratio.median, ratio.p20, ratio.p80) == (2.0, 2.0, 2.0)


def test_calls_take_turns() -> None:
    """The rounds go A B A B, the untimed ones too, and every call is told."""
    order, told = [], []
    timed = compare(
        {"A": lambda: order.append("A"), "B": lambda: order.append("B")},
        Settings(rounds=2, warmup=1),
        reference="B",
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert order == ["A", "B"] * 3
    assert told == [(index, 6) for index in range(1, 7)]
    assert timed["A"][1] is not None
    assert timed["B"][1] is None
    assert timed["A"][0].runs == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"dtype": "float8"}, "float32, bfloat16, float16"),
        ({"device": "gpu"}, "no device"),
        ({"device": "cuda:97"}, "no device"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**wrong)


def test_unequal_outputs_are_not_timed() -> None:
    x = torch.ones(3)
    assert require_close("x", x + 1e-6, x).value == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(BenchError, match="differ by"):
        require_close("x", x + 1e-3, x)
    with pytest.raises(BenchError, match="differ by"):
        require_close("x", x * math.nan, x)
    with pytest.raises(BenchError, match="shapes"):
        require_close("x", torch.ones(2), x)


def test_goals() -> None:
    assert Goal(what="x", value=1.7, wanted=1.64).reached
    assert not Goal(what="x", value=1.6, wanted=1.64).reached
    assert Goal(what="x", value=1.1, wanted=1.2, at_most=True).reached
    assert "NOT reached" in str(Goal(what="x", value=1.3, wanted=1.2, at_most=True))


def test_json_has_a_fixed_form() -> None:
    """What programs read: keys, a verdict on each goal, None for what JSON has no number for."""
    data = json.loads(dumps([benchmark()]))
    assert data.keys() == {"schema", "benchmarks"}
    assert data["schema"] == 1
    (found,) = data["benchmarks"]
    assert found.keys() == {
        *("name", "title", "conditions", "environment", "date", "reference", "entries", "checks", "goals", "notes")
    }
    ours, rival = found["entries"]
    assert ours.keys() == {"name", "time", "speedup", "params", "macs", "peak_bytes", "values", "series", "settings"}
    assert ours["time"]["median"] == 10
    assert ours["speedup"] == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert rival["speedup"] is None
    assert rival["values"] == {PSNR: None}
    assert found["goals"] == [{"what": "A against B", "value": 2.0, "wanted": 1.5, "at_most": False, "reached": True}]


def test_markdown_shows_measured_columns_only() -> None:
    headings = [column.heading for column in columns(benchmark())]
    assert headings == ["", "median (ms)", "20 to 80 % (ms)", "times as fast as B", "GMACs", PSNR]
    page = markdown(benchmark())
    assert "| A | 10.00 | 10.00 to 10.00 | 2.00x (2.00 to 2.00) | 1 | 31.5 |" in page
    assert "| B | 20.00 | 20.00 to 20.00 | 1 | 2 | equal |" in page
    assert "- A against B: 2.00, wanted at least 1.5: reached." in page
    assert "batch 1, threads 2" in page


@pytest.mark.slow
def test_plot(tmp_path: Path) -> None:
    """It draws the MACs where fewer than two entries have a quality, and refuses to draw nothing."""
    assert plot(benchmark(), tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    accuracy = "top-1 accuracy (%)"
    entries = [Entry(name=str(y), time=latency(y), values={accuracy: float(y)}, series="s") for y in (1, 2, 3)]
    assert "<svg" in plot(benchmark(entries=tuple(entries)), tmp_path / "p.svg").read_text()
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(benchmark(entries=(Entry(name="A"),)), tmp_path / "q.png")


def test_environment_says_what_was_used() -> None:
    assert {"device", "torch", "timm", "Python"} <= environment().keys()
    assert environment()["torch"] == torch.__version__
    assert now().endswith("UTC")


def test_one_model_runs_merged_against_its_training_form() -> None:
    found = compare_models(["repavit_tiny"], QUICK, size=32)
    merged, training = found.entries
    assert found.reference == training.name == "repavit_tiny (training form)"
    assert merged.name == "repavit_tiny (merged)"
    assert merged.params is not None
    assert training.params is not None
    assert merged.params < training.params
    assert merged.speedup is not None
    assert merged.speedup.median > 0
    assert training.speedup is None
    (check,) = found.checks
    assert check.value <= check.tolerance
    assert "32" in found.conditions["input"]


def test_two_models_and_their_counts() -> None:
    """timm's models take part, attention is counted, and nothing is merged where nothing should be."""
    found = compare_models(["repavit_tiny", "test_vit"], QUICK, merge=False, goal=1e-6)
    ours, rival = found.entries
    assert [entry.name for entry in found.entries] == ["repavit_tiny", "test_vit"]
    assert ours.macs == 1_253_683_200 or ours.macs == pytest.approx(1.25e9, rel=0.01)
    assert rival.speedup is None
    assert found.goals[0].reached
    assert not found.checks


def test_models_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different tasks"):
        compare_models(["repavit_tiny", "cfsr_x2"], QUICK, size=32)
    with pytest.raises(ValueError, match="No model is called 'repavit_tin'"):
        compare_models(["repavit_tin"], QUICK)
    with pytest.raises(ValueError, match="different models"):
        compare_models(["repavit_tiny", "repavit_tiny"], QUICK)


def test_peak_sees_what_a_call_takes() -> None:
    before, peak = resident_peak(lambda: torch.ones(16, 2**20))
    assert peak - before >= 60 * 2**20


@pytest.mark.slow
def test_fresh_process() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()


def test_repaffn_suite() -> None:
    (found,) = repaffn(QUICK, sizes={"tiny": (16, 0.75)})
    ours, mask = found.entries
    assert found.name == "repaffn_tiny"
    assert len(found.checks) == 3
    assert ours.params == mask.params
    assert ours.values["kept for backward (MiB)"] < mask.values["kept for backward (MiB)"]
    assert found.goals[0].wanted == 1.3


def test_cfsr_suite() -> None:
    """Both sides compute the same with edge branches that count."""
    (found,) = cfsr(QUICK, size=16, embed_dim=8, depths=(1,), kernel_size=3)
    assert found.checks[0].value < 1e-5
    assert found.goals[0].wanted == 1.15
    assert found.conditions["output"] == "3x32x32"


@pytest.mark.slow
def test_tiling_suite() -> None:
    (found,) = tiling(QUICK, size=48, budgets=("4GB",))
    (entry,) = found.entries
    assert entry.values["before the call (MiB)"] <= entry.values["peak of the process (MiB)"]
    assert entry.values["tiles"] == 1
    assert found.goals[0].at_most
    assert found.goals[0].reached
    with pytest.raises(ValueError, match="on the CPU"):
        tiling(Settings(batch=2))


@pytest.fixture(scope="module")
def pipe() -> PixelDiTPipeline:
    """A tiny pipeline with random weights that do something."""
    torch.manual_seed(0)
    model = PixelDiT(num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8, patch_size=4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline = PixelDiTPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_caches_beside_fewer_steps(pipe: PixelDiTPipeline) -> None:
    """Threshold 0 changes nothing, a large one does; what fits no network is told, not raised."""
    candidates = [
        CacheSetting(method="FBC", setting="0", config=FirstBlockCacheConfig(threshold=0)),
        CacheSetting(method="FBC", setting="9", config=FirstBlockCacheConfig(threshold=9.0)),
        CacheSetting(method="SeaCache", setting="defaults", config=SeaCacheConfig()),
    ]
    judge = recogniser(lambda images: torch.tensor([0, 2]), [0, 1])
    make = class_images(pipe, [0, 1], guidance_scale=3.0)
    found = measure_caches(pipe, make, 2, candidates, QUICK, steps=6, judge=judge)
    by_name = {entry.name: entry for entry in found.entries}
    assert found.uncached.name == "no cache, 6 steps"
    assert PSNR not in found.uncached.values
    assert math.isinf(by_name["FBC, 0"].values[PSNR])
    assert 0 < by_name["FBC, 9"].values[PSNR] < 100
    assert by_name["FBC, 9"].series == "FBC"
    assert found.uncached.values[RECOGNISED] == 50
    assert list(found.refused) == ["SeaCache, defaults"]
    assert "Wan" in found.refused["SeaCache, defaults"]
    counts = {int(entry.values["steps in the same time"]) for entry in found.entries if entry.series == "FBC"}
    assert all(count == 6 or f"no cache, {count} steps" in by_name for count in counts)
    assert not hasattr(pipe.transformer, "_zoo_cache")


def test_every_cache_is_tried(pipe: PixelDiTPipeline) -> None:
    subject = class_subject(pipe, [0], steps=4, guidance_scale=3.0)
    assert {each.method for each in cache_settings(subject)} == {preset.method for preset in PRESETS.values()}


@pytest.mark.slow
def test_caching_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped denoiser, judged on more images than are timed at once; the mildest setting of every cache."""

    def mildest(subject: Any) -> list[CacheSetting]:
        return list({setting.method: setting for setting in reversed(cache_settings(subject))}.values())[::-1]

    monkeypatch.setattr("zoo.bench.caching.cache_settings", mildest)
    (found,) = caching(Settings(batch=1, count=2, rounds=1, warmup=0, threads=1), steps=6)
    assert found.conditions["images"] == 2
    uncached, *others = found.entries
    assert set(uncached.values) == {FID_C, RECOGNISED, STEPS}
    for entry in others:
        assert set(entry.values) >= {PSNR, SSIM, FID_C, RECOGNISED}
        assert 0 < entry.values[FID_C] < math.inf
    held = {entry.series for entry in others if entry.values.get(HELD)}
    assert held >= {"CG-Taylor", "BAC", "TaylorSeer", "First Block Cache", "TaylorSeer of diffusers", "MagCache"}
    assert [column.heading for column in columns(found)][4:7] == [PSNR, SSIM, FID_C]
    assert [goal.wanted for goal in found.goals[:2]] == [36, 32]


def test_goals_of_caching() -> None:
    """Our best at 3 and 4 times the speed counts, and its lead over everything that is as fast."""

    def entry(series: str, setting: str, speed: float, psnr: float, fid_c: float) -> Entry:
        ratio = Ratio(median=speed, p20=speed, p80=speed)
        return Entry(name=f"{series}, {setting}", speedup=ratio, values={PSNR: psnr, FID_C: fid_c}, series=series)

    entries = [
        entry("Step forecast", "a", 3.1, 40, 2),
        entry("Step forecast", "b", 4.2, 31, 3),
        entry("CG-Taylor", "a", 1.5, 50, 1),
        entry("First Block Cache", "a", 1.1, 60, 1),  # too slow to count
        entry("First Block Cache", "b", 1.4, 47, 1),
        entry("TaylorSeer of diffusers", "a", 2.5, 41, 2.5),
        entry("no cache", "16 steps", 3.1, 30, 4),
        entry("no cache", "11 steps", 4.5, 29, 1),
    ]
    found = _goals(entries)
    assert [(goal.value, goal.reached) for goal in found] == [
        (40, True),
        (31, False),
        (10, True),
        (-1, False),
        (-2, True),
        (2, False),
    ]
    assert found[3].what == "least lead over other caches from 1.3 to 4 times the speed (PSNR (dB))"
    told = _goals(entries, lambda *names: float(names == ("Step forecast, b", "no cache, 11 steps")))
    assert told[4].what.endswith("(standard error 0.00)")
    assert told[5].what.endswith("(standard error 1.00)")
    assert [goal.reached for goal in _goals([entry("CG-Taylor", "a", 2.0, 50, 1)])] == [False, False]
    assert _goals([entry("First Block Cache", "a", 3.0, 50, 1)]) == ()


@pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is optional")
def test_cache_dit_leaves_nothing_behind(pipe: PixelDiTPipeline) -> None:
    """It works on ours, starts anew in every run, and the pipeline is afterwards what it was."""
    make = class_images(pipe, [0, 1], guidance_scale=3.0)
    expected = make(8, range(2))
    setting = cache_dit_settings(8)[-1]
    with setting.on(pipe):
        first = make(8, range(2))
        assert torch.equal(make(8, range(2)), first)
        assert 0 < setting.notes(pipe)["steps computed"] <= 8
    assert torch.equal(make(8, range(2)), expected)
    assert "forward" not in vars(pipe.transformer)


def test_more_images_than_are_timed(pipe: PixelDiTPipeline) -> None:
    """They are those that one call would make, in the same order."""
    candidates = [CacheSetting(method="FBC", setting="9", config=FirstBlockCacheConfig(threshold=9.0))]
    make = class_images(pipe, [0, 1, 2, 3, 4], guidance_scale=3.0)
    parts = measure_caches(pipe, make, 5, candidates, QUICK, steps=4, timed=2, fewer_steps=False)
    whole = measure_caches(pipe, make, 5, candidates, QUICK, steps=4, fewer_steps=False)
    uncached = whole.uncached.name
    torch.testing.assert_close(parts.images[uncached], whole.images[uncached])
    assert parts.images["FBC, 9"].shape == whole.images["FBC, 9"].shape


def test_psnr_of_all() -> None:
    """One level of 255 off everywhere is 48.1 dB, whatever the number of images."""
    images = torch.full((2, 3, 4, 4), 0.4)
    assert psnr_of_all(images + 1 / 255, images) == pytest.approx(48.13, abs=0.01)
    assert math.isinf(psnr_of_all(images + 1e-4, images))


def test_command_knows_every_suite() -> None:
    assert list(zoo.cli.bench.SUITES) == list(SUITES)


def test_command_writes_whole_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["bench", "repavit_tiny", "--size", "32", "--rounds", "1", "--batch", "1", "--threads", "1"]
    assert main([*call, "-o", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "models.json").read_text())
    assert printed == written
    assert "repavit_tiny (merged)" in (tmp_path / "models.md").read_text()
    assert main([*call, "-o", str(tmp_path)]) == 2
    assert "--force replaces it" in capsys.readouterr().err


def test_command_says_whether_goals_are_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 1 tells a script that a number was not reached; the results are written all the same."""
    missed = benchmark(goals=(Goal(what="A against B", value=1.0, wanted=1.5),))
    monkeypatch.setattr(zoo.bench.suites, "run", lambda names, progress, **overrides: [missed])
    assert main(["bench", "cfsr", "--plot", str(tmp_path / "p.png")]) == 1
    assert "NOT reached" in capsys.readouterr().out
    assert (tmp_path / "p.png").is_file()
    assert main(["bench", "cfsr", "-q"]) == 1
    assert capsys.readouterr().out == "A\t2.000\n"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["cfsr", "repavit_tiny"], "models or named benchmarks, not both"),
        (["cfsr", "--size", "32"], "--size is for models"),
        (["cfsr", "repaffn", "--plot", "p.png"], "--plot takes one"),
        (["repavit_tiny", "--plot", "p.txt"], "--plot writes .png"),
        (["cfsr", "--count", "3"], "--count is for `zoo bench caching`"),
        (["pixeldit.cifar10", "--count", "3", "--size", "8"], "--size is for models"),
        (["repavit_tiny", "--count", "3"], "--count is for pipelines; repavit_tiny is a model"),
        (["repavit_tiny", "--batch", "0"], "--batch must be at least 1"),
        (["repavt"], "named benchmark is called repavit"),
        (["repavit_tiny", "--device", "tpu"], "tpu"),
    ],
)
def test_wrong_calls(call: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *call]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_json_of_nothing() -> None:
    assert to_json([]) == {"schema": 1, "benchmarks": []}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_light_x2", "restormer_denoise_color", "ffnetsr_light_x2"])
def test_restorers_suite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks through the whole path: equal outputs, ratios, peaks, goals.

    Peaks are measured in this process, not in one each: `test_tiling_suite` starts one.
    """
    monkeypatch.setattr("zoo.bench.restorers.in_fresh_process", lambda call, *args: call(*args))
    arguments = {
        "dat_light_x2": dict(depths=(2,)),
        "restormer_denoise_color": dict(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1),
        "ffnetsr_light_x2": dict(dim=16, depth=2),
    }[name]
    settings = Settings(batch=1, rounds=1, warmup=0, threads=1)
    (found,) = restorers(settings, models=[name], size=(32, 40), arguments=arguments)
    streams = name.startswith("restormer")
    assert [entry.name for entry in found.entries] == [
        f"{name} (merged)",
        "plain formulation",
        *([f"{name} (streamed)"] if streams else []),
    ]
    assert len(found.checks) == 1 + streams
    assert all(check.value < 1e-3 for check in found.checks)
    assert all(entry.peak_bytes is not None and entry.peak_bytes >= 0 for entry in found.entries)
    assert len(found.goals) == {"dat_light_x2": 2, "restormer_denoise_color": 4, "ffnetsr_light_x2": 1}[name]


def test_mixture_of_experts() -> None:
    """The benchmark checks that both formulations agree, and measures all three."""
    (found,) = moe(Settings(batch=1, rounds=1, warmup=0, threads=1), tokens=64, dim=48)
    assert len(found.entries) == 4
    assert found.checks[0].value < 1e-4
    assert [goal.wanted for goal in found.goals] == [3.0, 0.8]


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture of experts is measured at every top-k; with all experts on it makes the images of the dense model."""
    torch.manual_seed(0)
    dense = pixel_dit(num_classes=10)
    experts, _ = zoo.moe.convert(dense, zoo.MoEConfig(experts=3, top_k=1, scores="random"))
    pruned, _ = zoo.moe.convert(dense, zoo.MoEConfig(experts=3, top_k=0, scores="random"))
    for name, transformer in (("dense", dense), ("experts", experts), ("pruned", pruned)):
        PixelDiTPipeline(transformer, DDIMScheduler(), dict(enumerate(CIFAR10))).save_pretrained(tmp_path / name)
    call = ["bench", *(str(tmp_path / name) for name in ("dense", "experts", "pruned")), "--json"]
    assert main([*call, "--count", "3", "--batch", "2", "--rounds", "1", "--steps", "2", "--threads", "1"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    by_name = {entry["name"]: entry["values"] for entry in found["entries"]}
    assert list(by_name) == ["dense", *(f"experts, top {k}" for k in (0, 1, 2, 3)), "pruned"]
    assert by_name["experts, top 3"][PSNR] > 50 > by_name["experts, top 0"][PSNR]
    activated = [by_name[f"experts, top {k}"][ACTIVATED] for k in (0, 1, 2, 3)]
    assert activated == sorted(set(activated))
    assert by_name["pruned"][ACTIVATED] == activated[0]
    assert all({FID_C, RECOGNISED} <= set(values) for values in by_name.values())
    assert (found["conditions"]["images"], found["conditions"]["steps"]) == (3, 2)


def test_pipelines_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts in place of classes; nothing that knows CIFAR-10 alone judges other images, ten classes or not."""
    words = [f"class {number}" for number in range(10)]
    PixelDiTPipeline(pixel_dit(num_classes=10), DDIMScheduler(), dict(enumerate(words))).save_pretrained(
        tmp_path / "ten"
    )
    quick = ["--rounds", "1", "--steps", "2", "--threads", "1", "--json"]
    assert main(["bench", str(tmp_path / "ten"), "--count", "4", *quick]) == 0
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    assert [entry["values"] for entry in found["entries"]] == [{}]
    flux = saved("flux", tmp_path / "flux")
    call = ["bench", flux, "--prompt", "a cat", "--height", "16", "--width", "16", *quick]
    assert main([*call, "--caches", "taylorseer=2,first-block,cg-taylor"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    by_series = {entry["series"]: entry["values"] for entry in found["entries"]}
    assert {"no cache", "TaylorSeer", "First Block Cache", "CG-Taylor"} <= set(by_series)
    assert PSNR in by_series["TaylorSeer"]
    assert FID_C not in by_series["TaylorSeer"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["pixeldit.cifar10", "--caches", "cgtaylor"], "Did you mean cg-taylor?"),
        (["pixeldit.cifar10", "--caches", "cg-taylor=x"], "NAME=NUMBER"),
        (["pixeldit.cifar10", "diffusion_policy.point", "--caches", "bac"], "takes one pipeline"),
        (["pixeldit.cifar10", "repavit_tiny"], "repavit_tiny is a model and pixeldit.cifar10 a pipeline"),
        (["pixeldit.cifar10", "--prompt", "a cat"], "give --classes instead of --prompt"),
        (["caching", "--steps", "4"], "--steps is for pipelines; caching is a named benchmark"),
        (["pixeldit.cifar10", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_wrong_calls_of_pipelines(call: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *call]) == 2
    assert said in capsys.readouterr().err


def test_pipelines_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders whose last part is the same are told apart; what is drawn without a quality is their size."""
    names = {}
    for place, layers in (("a", 1), ("b", 2)):
        pipe = PixelDiTPipeline(pixel_dit(num_layers=layers), DDIMScheduler())
        pipe.save_pretrained(tmp_path / place / "pipeline")
        names[place] = str(tmp_path / place / "pipeline")
    quick = ["--rounds", "1", "--steps", "1", "--count", "1", "--threads", "1"]
    assert main(["bench", *names.values(), *quick, "-o", str(tmp_path / "out")]) == 0
    (found,) = json.loads((tmp_path / "out" / "pipelines.json").read_text())["benchmarks"]
    assert [entry["name"] for entry in found["entries"]] == list(names.values())
    assert (tmp_path / "out" / "pipelines.png").is_file()
    assert main(["bench", names["a"], *quick, "-o", str(tmp_path / "one")]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["pipelines.json", "pipelines.md"]
    for wrong in ("mag=-1", "cg-taylor=-0.1", "taylorseer=2.5"):
        assert main(["bench", names["a"], *quick, "--caches", wrong]) == 2
        assert f"--caches {wrong}: " in capsys.readouterr().err


BLOCKS = """
import ctypes, sys
import torch
from zoo.bench.memory import map_large_blocks
from zoo.pictures.plans import held_bytes

libc, size, count = ctypes.CDLL(None), 100 * 1024, 400
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def given_back():
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    full = held_bytes(torch.device("cpu"))
    for block in blocks[:-1]:  # the last one holds the others' place in the heap
        libc.free(block)
    return (full - held_bytes(torch.device("cpu"))) / (size * count)

if sys.argv[1] == "mapped":
    map_large_blocks()
print(given_back())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_blocks_that_are_mapped_go_back_when_freed(tmp_path: Path) -> None:
    """Else what an earlier call freed counts for a later one, or is filled by it, by chance."""
    for how in ("usual", "mapped"):  # each in a process of its own: holes of the first would be filled
        done = fresh_process.run(BLOCKS, how, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (float(done.stdout) > 0.9) == (how == "mapped"), (how, done.stdout)


def test_experts_that_read_values_are_counted() -> None:
    """On the meta device their tokens cannot be counted: `zoo bench` failed on a trained sigma-MoE."""
    inputs = (torch.randn(1, 3, 16, 16),)
    found = []
    for changed in (False, True):
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
        if changed:
            zoo.moe.sigma_moe.apply(model, None)
        found.append(
            Subject(
                source="x", name="x", merged=False, task="classification", model=model.eval(), inputs=inputs, named={}
            ).macs()
        )
    assert 0 < found[1] < found[0]


def test_arguments_of_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the other commands; refused where nothing is built with them."""
    command = ["bench", "test_resnet", "--size", "32", "--batch", "1", "--rounds", "1"]
    counts = []
    for more in ([], ["--model-args", "num_classes=3"]):
        assert zoo.cli.main([*command, *more, "--json"]) == 0
        counts.append(int(re.search(r'"params": (\d+)', capsys.readouterr().out)[1]))  # type: ignore[index]
    assert counts[1] < counts[0]
    for names, said in (
        (["engines", "--model-args", "depth=1"], "--model-args is for models; engines is a named benchmark"),
        (["pixeldit.cifar10", "--model-args", "depth=1"], "--model-args is for models; pixeldit.cifar10 is a pipeline"),
        (["test_resnet", "--model-args", "depth"], "--model-args takes KEY=VALUE"),
    ):
        assert zoo.cli.main(["bench", *names]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("zoo.bench.models.compare", None)  # before anything is timed
    assert zoo.cli.main([*command, "--plot", str(tmp_path / "a.png")]) == 2
    assert "A plot needs two points, and test_resnet has nothing to merge" in capsys.readouterr().err
