"""`zoo.tune_cache` and `zoo tune-cache`: what is recommended keeps the budget, is saved and found; nothing stays."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hooked import assert_clean, class_pipeline
from PIL import Image
from tiny_folders import denoiser_folder
from torch import nn

import zoo
from zoo.bench.caching import PSNR, psnr_of_all
from zoo.bench.timing import Settings
from zoo.bench.tuning import (
    Budget,
    Tuning,
    _between,
    _beyond,
    _cg_line,
    _lines,
    _Sweep,
    as_images,
    best_entries,
    tune_cache,
)
from zoo.caching import CGTaylorConfig
from zoo.caching.presets import PRESETS, Preset, Subject
from zoo.caching.saved import SavedSetting
from zoo.cli import main
from zoo.diffusion import PixelDiTPipeline

STEPS = 8
QUICK = Settings(rounds=1, threads=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "user"))
    return tmp_path / "user"


class Work:
    """A clock that counts what is computed, so that nothing depends on the machine: a linear layer takes 1 ms."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds += 1e-3 * isinstance(module, nn.Linear)


@pytest.fixture(scope="module", autouse=True)
def work() -> Iterator[Work]:
    clock = Work()
    handle = nn.modules.module.register_module_forward_hook(clock.count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.bench.tuning.processor_clock", lambda device: clock)
        yield clock
    handle.remove()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try one line of CG-Taylor, BAC and fewer steps: a sweep takes as long as there are lines."""

    def lines(*args: Any) -> Iterator[Preset]:
        found = {line.method: line for line in _lines(*args)}
        return iter([found[method] for method in ("CG-Taylor", "BAC", "no cache") if method in found])

    monkeypatch.setattr("zoo.bench.tuning._lines", lines)


def runner(pipe: Any, made: list[int] | None = None) -> Any:
    def run(steps: int) -> Any:
        if made is not None:
            made.append(steps)
        return pipe([1, 2], num_inference_steps=steps, generator=torch.manual_seed(0), output_type="pt")

    return run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tuning, list[int]]:
    made: list[int] = []
    pipe = class_pipeline()
    folder = tmp_path_factory.mktemp("settings")
    return (
        pipe,
        tune_cache(pipe, runner(pipe, made), budget="psnr>=25", steps=STEPS, settings=QUICK, folder=folder),
        made,
    )


def test_recommendation_keeps_the_budget(tuned: tuple[Any, Tuning, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved gives the PSNR that is stated, and "auto" finds it."""
    pipe, tuning, made = tuned
    assert_clean(pipe.transformer)
    assert tuning.setting is not None
    assert tuning.path is not None
    assert SavedSetting.load(tuning.path).name == tuning.setting.name
    expected = as_images(runner(pipe)(STEPS))
    monkeypatch.setenv("ZOO_CACHE", str(tuning.path.parent))
    with zoo.cached(pipe, "auto", steps=STEPS, guidance=3.0):
        found = psnr_of_all(as_images(runner(pipe)(STEPS)), expected)
    assert found >= 25
    stated = tuning.setting.measured.get(PSNR, math.inf)
    assert found == pytest.approx(stated, abs=1e-3)
    assert tuning.setting.name in str(tuning)
    assert len(made) < 100


class Prior(DiffusionPipeline):
    """A pipeline whose denoiser goes by another name than transformer or UNet."""

    def __init__(self, prior: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(prior=prior, scheduler=scheduler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the pipeline of the denoiser does."""
        pipe = PixelDiTPipeline(self.prior, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe(*args, **kwargs)


def test_a_denoiser_of_another_name(few: None, tmp_path: Path) -> None:
    """What was found for it is saved, and found again."""
    inner = class_pipeline()
    pipe = Prior(inner.transformer, inner.scheduler)
    tuning = tune_cache(pipe, runner(pipe), budget="psnr>=25", steps=STEPS, settings=QUICK, folder=tmp_path / "user")
    assert tuning.setting is not None
    zoo.enable_cache(pipe, "auto")
    zoo.disable_cache(pipe)
    assert_clean(pipe.prior)


def test_everything_is_tried(tuned: tuple[Any, Tuning, list[int]]) -> None:
    _, tuning, _ = tuned
    methods = {entry.series.split(", ")[0] for entry in tuning.benchmark.entries}
    rivals = {PRESETS[name].method for name in ("first-block", "diffusers-taylorseer", "mag")}
    assert methods == {"Step forecast", "CG-Taylor", "BAC", "TaylorSeer", "no cache", *rivals}
    names = [entry.name for entry in tuning.benchmark.entries]
    assert len(names) == len(set(names))
    steps = {entry.name: entry.values["steps computed"] for entry in tuning.benchmark.entries}
    assert steps["no cache, 4 steps"] == 4
    assert all(0 < value <= STEPS for value in steps.values())
    assert all(entry.values["held (MiB)"] > 0 for entry in tuning.benchmark.entries if entry.series[:2] != "no")


@pytest.mark.usefixtures("few")
def test_where_fewer_steps_serve_better_nothing_is_saved(
    cache: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def slow(*args: Any) -> Iterator[None]:
        with zoo.cached(*args):
            yield
        work.seconds += 10

    monkeypatch.setattr("zoo.bench.tuning.cached", slow)
    pipe = class_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tuning = tune_cache(pipe, runner(pipe), budget="psnr>=1", steps=STEPS, settings=QUICK)
    assert tuning.fewer_steps is not None
    assert tuning.path is None
    assert not cache.exists()
    assert f"take {tuning.fewer_steps} steps without a cache" in str(tuning)
    assert "Nothing is saved" in str(tuning)


def test_the_best_at_each_speed(tuned: tuple[Any, Tuning, list[int]]) -> None:
    entries = tuned[1].benchmark.entries
    speeds = [entry.speedup.median for entry in entries[1:] if entry.speedup]
    assert speeds == sorted(speeds)
    front = best_entries(entries)
    assert front[0] is entries[0]
    assert len(front) < len(entries)
    for entry in entries[1:]:
        likeness = entry.values[PSNR]
        assert any(
            best.speedup and best.speedup.median >= entry.speedup.median and best.values[PSNR] >= likeness
            for best in front[1:]
        )


def test_a_disturbed_run_is_measured_again(work: Work) -> None:
    pipe = class_pipeline()
    run, made = runner(pipe), list[int]()

    def disturbed(steps: int) -> Any:
        made.append(steps)
        if made.count(4) == 1 and steps == 4:
            work.seconds += 10
        return run(steps)

    subject = Subject(pipe=pipe, run=lambda: run(STEPS), steps=STEPS)
    sweep = _Sweep(subject=subject, run=disturbed, settings=QUICK, budget=Budget.parse("psnr>=1"), progress=None)
    line = Preset(
        method="no cache",
        knob="steps",
        label="{:g}",
        values=lambda steps: (6, 4, 3),
        config=lambda subject, value: None,
    )
    found = [sweep.candidate(line, value) for value in (6, 4, 3)]
    sweep.measure_line([each for each in found if each is not None], "trying")
    assert made.count(4) == 2
    assert made.count(3) == made.count(6) == 1
    assert [round(trial.speedup, 2) for trial in sweep.trials.values()] == [1.33, 2.0, 2.67]


@pytest.mark.usefixtures("few")
def test_a_speed_to_reach(cache: Path) -> None:
    """Where no cache is fast enough, that is said, nothing is saved, and fewer steps may serve."""
    pipe = class_pipeline()
    tuning = tune_cache(pipe, runner(pipe), budget="speedup>=500", steps=STEPS, settings=QUICK)
    assert (tuning.setting, tuning.path, tuning.fewer_steps) == (None, None, None)
    assert "No cache keeps speedup>=500; the nearest is" in str(tuning)
    assert not cache.exists()
    assert_clean(pipe.transformer)


@pytest.mark.parametrize("failing", range(1, 40, 9))
def test_failure_in_mid_sweep(failing: int, cache: Path) -> None:
    """Whenever the user stops it, no hook is left, nothing is saved, and the pipeline computes as before."""
    pipe = class_pipeline()
    run = runner(pipe)
    expected = as_images(run(STEPS))
    calls = []

    def stop(module: Any, args: Any) -> None:
        calls.append(None)
        if len(calls) == failing * STEPS:
            raise KeyboardInterrupt

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tune_cache(pipe, run, steps=STEPS, settings=QUICK)
    handle.remove()
    assert_clean(pipe.transformer)
    assert torch.equal(as_images(run(STEPS)), expected)
    assert not cache.exists()


@pytest.mark.usefixtures("few")
def test_a_cache_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method breaking in mid-run does not end the sweep; it is named."""

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("zoo.caching.cg_taylor.Gate.decide", broken)
    pipe = class_pipeline()
    tuning = tune_cache(pipe, runner(pipe), budget="psnr>=1", steps=STEPS, settings=QUICK, save=False)
    assert "Not measured: CG-Taylor. out of luck" in tuning.benchmark.notes
    assert tuning.setting is not None
    assert tuning.path is None
    assert_clean(pipe.transformer)


def test_refusals() -> None:
    pipe = class_pipeline()
    for changes, message in (
        ({"budget": "psnr>30"}, "A budget is like 'psnr>=30'"),
        ({"budget": "lpips>=1"}, "A budget is like"),
        ({"budget": "psnr>=0"}, "A budget is like"),
        ({"steps": 4}, "With 4 steps there is next to nothing to skip"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_cache(pipe, runner(pipe), **{"steps": STEPS, **changes})
    with zoo.cached(pipe, CGTaylorConfig()), pytest.raises(ValueError, match="a cache already"):
        tune_cache(pipe, runner(pipe), steps=STEPS)
    assert str(Budget.parse(" ssim >= 0.95 ")) == "ssim>=0.95"


def test_values_between_and_beyond() -> None:
    threshold, interval = _cg_line((0.1, 0.4), 1, 1), replace(PRESETS["taylorseer"])
    assert _between(threshold, 0.1, 0.4) == 0.2
    assert _between(interval, 2, 3) is None
    assert _between(interval, 3, 8) == 5
    assert _beyond(threshold, 0.1, 0.2, 50) == 0.4
    assert _beyond(interval, 3, 5, 50) == 8
    assert _beyond(interval, 3, 2, 50) is None
    assert _beyond(PRESETS["bac"], 17, 10, 50) == 6
    assert _beyond(PRESETS["bac"], 10, 25, 50) is None


def test_what_a_run_may_return() -> None:
    images = torch.rand(2, 3, 4, 5)
    arrays = images.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray((array * 255).astype(np.uint8)) for array in arrays]

    class Video:
        frames = torch.rand(2, 4, 3, 4, 5)

    assert torch.equal(as_images(images), images)
    assert torch.equal(as_images(arrays), images)
    assert torch.equal(as_images(list(images)), images)
    assert as_images(Video()).shape == (8, 3, 4, 5)
    assert (as_images(pil) - images).abs().max() <= 1 / 255
    with pytest.raises(TypeError, match="got str"):
        as_images("a cat")
    with pytest.raises(TypeError, match=r"must be \(B, C, H, W\), got \(4, 5\)"):
        as_images(images[0, 0])


@pytest.mark.usefixtures("few")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON, plot and timeline; the setting lies beside the model, and `zoo generate --cache auto` takes it."""
    folder = denoiser_folder(tmp_path / "model")
    call = [
        "tune-cache",
        str(folder),
        "--steps",
        "8",
        "--count",
        "2",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    plot, line = tmp_path / "plot.png", tmp_path / "line.svg"
    assert main([*call, "--budget", "psnr>=20", "--plot", str(plot), "--timeline", str(line), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"] == "psnr>=20"
    assert Path(found["saved"]).parent == folder
    assert found["recommended"] in {entry["name"] for entry in found["benchmarks"][0]["entries"]}
    assert plot.stat().st_size > 10_000
    assert line.is_file()
    sheet = tmp_path / "grid.png"
    options = ["--steps", "8", "--count", "2", "-o", str(sheet), "--timeline", str(tmp_path / "again.png")]
    assert main(["generate", "--model", str(folder), "--cache", "auto", *options, "--json"]) == 0
    assert (tmp_path / "again.png").is_file()
    assert (
        main(["generate", "--model", str(folder), "--cache", "auto", "--steps", "9", "-o", str(tmp_path / "x.png")])
        == 2
    )
    assert "No cache setting is saved for PixelDiT" in capsys.readouterr().err
    assert main([*call, "--speedup", "900", "-o", str(tmp_path / "other")]) == 1
    out = capsys.readouterr().out
    assert "No cache keeps speedup>=900" in out
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["pixeldit.cifar1"], "pixeldit.cifar10"),
        (["pixeldit.cifar10", "--budget", "psnr>=30", "--speedup", "2"], "not allowed with"),
        (["pixeldit.cifar10", "--speedup", "1"], "--speedup must be above 1"),
        (["pixeldit.cifar10", "--count", "0"], "--count must be at least 1"),
        (["pixeldit.cifar10", "--plot", "a.txt"], "--plot writes .png"),
        (["pixeldit.cifar10", "--prompts", "none.txt"], "none.txt"),
        (["cfsr_x2.bsds"], "not a diffusion pipeline"),
    ],
)
def test_wrong_calls(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune-cache", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_prompts_are_for_other_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    folder = denoiser_folder(tmp_path / "model")
    assert main(["tune-cache", str(folder), "--prompts", str(prompts)]) == 2
    assert "makes pictures of classes: give --classes" in capsys.readouterr().err
    prompts.write_text("\n")
    assert main(["tune-cache", str(folder), "--prompts", str(prompts)]) == 2
    assert "holds no prompts" in capsys.readouterr().err
