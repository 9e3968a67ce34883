"""Settings on disk, and how "auto" finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import denoise, pixel_dit
from diffusers import EulerDiscreteScheduler, FasterCacheConfig, FirstBlockCacheConfig
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig
from hooked import assert_clean, class_pipeline, generate
from tiny_folders import denoiser_folder

import zoo
from zoo.caching import BACConfig, CGTaylorConfig, SavedSetting, StepForecastConfig, TaylorSeerConfig
from zoo.caching.bac import uniform_schedule
from zoo.caching.saved import default_guidance, fingerprint, folder_for
from zoo.caching.step_schedules import StepSchedule
from zoo.files import cache_dir
from zoo.weights import cards_dir


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user folder."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "user"))
    return tmp_path / "user"


def setting(model: Any = None, **changes: Any) -> SavedSetting:
    model = model or pixel_dit()
    values: dict[str, Any] = dict(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        scheduler="DDIMScheduler",
        num_steps=6,
        guidance=3.0,
        name="CG-Taylor, threshold 1e+09",
        config=CGTaylorConfig(threshold=1e9),
        measured={"PSNR (dB)": 31.2},
    )
    return SavedSetting(**{**values, **changes})


@pytest.mark.parametrize(
    "config",
    [
        CGTaylorConfig(threshold=0.03, last_order=2, factors_dtype=torch.float32),
        BACConfig(updates=3, schedule=uniform_schedule(pixel_dit(), 6, 3)),
        TaylorSeerConfig(interval=3, units=("transformer_blocks.*",)),
        FirstBlockCacheConfig(threshold=0.1),
        TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=["a.*"], taylor_factors_dtype=torch.float16),
        MagCacheConfig(num_inference_steps=3, mag_ratios=[1.0, 0.5, 0.25]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_round_trip(config: Any, tmp_path: Path) -> None:
    """Every tuned configuration comes back as it was, from a file of plain JSON."""
    file = setting(config=config).save(tmp_path / "new")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert json.loads(file.read_text())["config"]["class"] == type(config).__name__
    found = SavedSetting.load(file)
    assert found.measured == {"PSNR (dB)": 31.2}
    assert type(found.config) is type(config)
    for key, value in vars(config).items():
        again = getattr(found.config, key)
        assert (
            torch.equal(again, value)
            if isinstance(value, torch.Tensor)
            else again == value or list(again) == list(value)
        )


def test_functions_cannot_be_saved(tmp_path: Path) -> None:
    config = FasterCacheConfig(tensor_format="BCHW", attention_weight_callback=lambda module: 0.5)
    with pytest.raises(ValueError, match=r"FasterCacheConfig: attention_weight_callback=.* cannot be saved"):
        setting(config=config).save(tmp_path)
    assert not list(tmp_path.glob("cache_*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "of another version"),
        ({"config": {"class": "None", "fields": {}}}, "asks for None, which is unknown"),
        ({"config": {"class": "CGTaylorConfig", "fields": {"treshold": 1}}}, "treshold"),
        ({"config": {}}, "class"),
    ],
)
def test_broken_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = setting().save(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"is no saved setting of a cache: .*{message}"):
        SavedSetting.load(file)


def test_auto(cache: Path) -> None:
    """It is the saved setting for pipelines and models, and says so when a run has other steps."""
    pipe = class_pipeline()
    with zoo.cached(pipe, CGTaylorConfig(threshold=1e9)):
        expected = generate(pipe)
    with pytest.raises(ValueError, match=r"No cache setting is saved for PixelDiT.*`zoo tune-cache PIPELINE --budget"):
        zoo.enable_cache(pipe, "auto")
    with pytest.raises(ValueError, match=r"num_steps 4 .*With 4 steps there is next to nothing to skip"):  # not to tune
        zoo.enable_cache(pipe, "auto", steps=4)
    assert_clean(pipe.transformer)
    setting(pipe.transformer).save(cache)
    zoo.enable_cache(pipe, "auto")
    assert torch.equal(generate(pipe), expected)
    with pytest.warns(UserWarning, match="tuned for 6 steps, this run has 9"):
        generate(pipe, steps=9)
    zoo.disable_cache(pipe)
    model = pixel_dit()
    with zoo.cached(model, "auto"):
        assert denoise(model).isfinite().all()
    assert_clean(model)


def test_auto_chooses_by_the_key(cache: Path) -> None:
    """Another scheduler, steps, guidance or network has settings of its own."""
    pipe = class_pipeline()
    setting(config=CGTaylorConfig(threshold=1.0)).save(cache)
    setting(config=CGTaylorConfig(threshold=2.0), num_steps=9).save(cache)
    setting(config=CGTaylorConfig(threshold=3.0), num_steps=9, guidance=1.5).save(cache)
    with pytest.raises(ValueError, match=r"Several cache settings .* by steps= and guidance=: .*steps=9, guidance=1.5"):
        zoo.enable_cache(pipe, "auto")
    with pytest.raises(ValueError, match="Several"):
        zoo.enable_cache(pipe, "auto", steps=9)
    with zoo.cached(pipe, "auto", steps=9, guidance=1.5):
        assert zoo.cache_summary(pipe).denoisers[0].config.threshold == 3
    with zoo.cached(pipe, "auto", steps=6):
        assert zoo.cache_summary(pipe).denoisers[0].config.threshold == 1
    with pytest.raises(ValueError, match="num_steps 20"):
        zoo.enable_cache(pipe, "auto", steps=20)
    with pytest.raises(ValueError, match='go with config="auto"'):
        zoo.enable_cache(pipe, CGTaylorConfig(), steps=20)
    with pytest.raises(TypeError, match=r'is no cache configuration.*"auto"'):
        zoo.enable_cache(pipe, "fast")
    with pytest.raises(ValueError, match="No cache setting"):
        zoo.enable_cache(pixel_dit(num_layers=2), "auto")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"scheduler EulerDiscreteScheduler .*saved: DDIMScheduler"):
        zoo.enable_cache(pipe, "auto", steps=6)
    assert_clean(pipe.transformer)


def test_folders(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the user's own model; in the user's folder where that is not possible, which comes first."""
    folder = denoiser_folder(tmp_path / "model")
    pipe = zoo.create_pipeline(str(folder))
    assert folder_for(pipe) == folder_for(pipe.transformer) == folder
    assert folder_for(class_pipeline()) == cache == cache_dir()
    pipe.register_to_config(_name_or_path=str(cards_dir() / "pixeldit.cifar10"))
    assert folder_for(pipe) == cache
    pipe.register_to_config(_name_or_path=str(folder))
    setting(pipe.transformer, config=CGTaylorConfig(threshold=1.0)).save(folder)
    with zoo.cached(pipe, "auto"):
        assert zoo.cache_summary(pipe).denoisers[0].config.threshold == 1
    setting(pipe.transformer, config=CGTaylorConfig(threshold=2.0)).save(cache)
    with zoo.cached(pipe.transformer, "auto"):
        assert zoo.cache_summary(pipe).denoisers[0].config.threshold == 2
    monkeypatch.delenv("ZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "zoo"
    assert default_guidance(pipe) == 3.0


def test_shipped_setting() -> None:
    """ "auto" works on the shipped pipeline at 50 steps as it is."""
    pipe = zoo.create_pipeline("pixeldit.cifar10")
    with zoo.cached(pipe, "auto"):
        config = zoo.cache_summary(pipe).denoisers[0].config
    assert isinstance(config, StepForecastConfig)
    assert isinstance(config.schedule, StepSchedule)
    assert len(config.schedule.steps) == config.updates
    with pytest.raises(ValueError, match=r"`zoo tune-cache pixeldit.cifar10 --steps 20 --budget 'psnr>=30'`"):
        zoo.enable_cache(pipe, "auto", steps=20)
