"""The picture of a run: its cells are what the summary says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from denoisers import denoise, flux
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from hooked import class_pipeline, generate
from matplotlib.figure import Figure
from PIL import Image

import zoo
from zoo.caching import BACConfig, CGTaylorConfig, TaylorSeerConfig, timeline
from zoo.caching.bac import uniform_schedule


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def cells(axes: Any) -> list[list[int]]:
    (mesh,) = axes.collections
    return [[int(value) for value in row] for row in mesh.get_array()]


def test_gate_and_units(drawn: list[Figure], tmp_path: Path) -> None:
    """1 is skipped, 2 computed, 3 forced: warm-up and the last step."""
    pipe = class_pipeline()
    zoo.enable_cache(pipe, CGTaylorConfig(threshold=1e9, warmup_steps=2))
    with pytest.raises(ValueError, match="has not run yet"):
        timeline(pipe, tmp_path / "a.png")
    generate(pipe, steps=7)
    file = timeline(pipe, tmp_path / "a.png")
    with Image.open(file) as image:
        assert image.width > 800
    units, gate = drawn[0].axes
    assert cells(units) == [[2] * 7, [3, 3, 1, 1, 1, 1, 3]]
    assert [label.get_text() for label in units.get_yticklabels()] == ["first block", "other blocks"]
    assert (
        gate.get_title(loc="left")
        == "CG-Taylor, threshold 1000000000.0, warmup steps 2 on PixelDiT: 3 of 7 steps computed"
    )
    assert list(gate.lines[0].get_xdata()) == [2, 3, 4, 5]


def test_contexts_and_many_units(drawn: list[Figure], tmp_path: Path) -> None:
    model = flux()
    with zoo.cached(model, TaylorSeerConfig(interval=2, warmup_steps=2)):
        denoise(model, contexts=("cond", "uncond"))
        timeline(model, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert ["context cond:" in titles[0], "context uncond:" in titles[1]] == [True, True]
    for axes in drawn[0].axes:
        assert {tuple(row) for row in cells(axes)} == {(3, 3, 1, 2, 1, 2)}
        assert len(axes.get_yticklabels()) == 8


def test_schedules_and_diffusers_caches(drawn: list[Figure], tmp_path: Path) -> None:
    pipe = class_pipeline()
    for config, expected in (
        (BACConfig(schedule=uniform_schedule(pipe.transformer, 6, 2)), {(2, 1, 1, 2, 1, 1)}),
        (FirstBlockCacheConfig(threshold=1e9), {(2, 1, 1, 1, 1, 1)}),
    ):
        with zoo.cached(pipe, config):
            generate(pipe)
            timeline(pipe, tmp_path / "a.png")
        assert {tuple(row) for row in cells(drawn[-1].axes[0])} == expected
    assert drawn[0].axes[0].get_ylabel() == "transformer_blocks"
    assert drawn[0].axes[0].get_yticklabels()[0].get_text() == "0.attn1"
    with zoo.cached(pipe, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)):
        generate(pipe)
        with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig does not tell what it skips"):
            timeline(pipe, tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no cache of zoo's"):
        timeline(pipe, tmp_path / "a.png")
