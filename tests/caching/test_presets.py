"""The one table of named caches."""

from __future__ import annotations

import math

import pytest
from hooked import class_pipeline, generate

import zoo
from zoo.caching.presets import PRESETS, Subject, cache_setting, cache_settings
from zoo.cli.generate import CACHES


def subject(steps: int = 6) -> Subject:
    pipe = class_pipeline()
    return Subject(pipe=pipe, run=lambda: generate(pipe, steps=steps), steps=steps)


def test_the_command_line_offers_what_the_table_has() -> None:
    assert set(CACHES.items()) <= {(name, preset.knob) for name, preset in PRESETS.items()}


def test_settings_work_or_say_why_not() -> None:
    made = subject()
    refused = {}
    for setting in cache_settings(made):
        try:
            with zoo.cached(made.pipe, setting.config):
                generate(made.pipe)
        except ValueError as error:
            refused[setting.method] = str(error)
    assert list(refused) == ["SeaCache", "Text KV Cache"]
    assert not any("\n" in message for message in refused.values())


def test_values() -> None:
    made = subject()
    assert cache_setting("cg-taylor", made).name == "CG-Taylor, threshold 0.02, orders 2"
    assert cache_setting("bac", made, 4).config.schedule.updates == 4
    assert [each.setting for each in cache_settings(made, ["bac"])] == ["3 updates", "2 updates"]
    with pytest.raises(ValueError, match="No cache is called 'bag'; there are step-forecast, cg-taylor, bac"):
        cache_setting("bag", made)


@pytest.mark.parametrize("name", ["step-forecast", "bac"])
def test_more_updates_than_steps_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=7: a run of 6 steps computes at most 6"):
        cache_setting(name, subject(), 7)


def test_mag_cache_is_calibrated() -> None:
    ratios = subject(4).magnitude_ratios
    assert len(ratios) == 4
    assert ratios[0] == 1.0
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
