"""The demo: its parts on tiny networks, and its page, which must stand on its own."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig
from diffusers.hooks import SeaCacheConfig
from hypothesis import given
from hypothesis import strategies as st

import zoo.demo
from zoo.bench import Check, Entry, Settings
from zoo.bench.caching import PSNR, RECOGNISED
from zoo.bench.latency import Latency
from zoo.bench.timing import speedup
from zoo.caching.presets import CacheSetting
from zoo.cli import main
from zoo.demo import Models, headline, load_models, parts, render, run_demo
from zoo.demo.page import Point, _ticks, bars, before_after, data_uri, page, scatter, table
from zoo.demo.parts import (
    ClassifiedPhoto,
    Generation,
    Merge,
    Photo,
    Upscaling,
    classify_photos,
    generate,
    merge,
    photos,
    shown,
    upscale,
)
from zoo.demo.report import Results
from zoo.diffusion import PixelDiT, PixelDiTPipeline
from zoo.evaluation.fid_c import Judge
from zoo.ffn.reparam import LayerReport, ReparamReport
from zoo.restoration.cfsr import CFSR
from zoo.weights import CheckpointError

QUICK = Settings(batch=1, threads=1, rounds=1, warmup=0)
VOID = {"meta", "img", "input", "br", "link", "line", "circle", "polyline"}


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def latency(median: float) -> Latency:
    return Latency(median=median, p20=median, p80=median, runs=1, device="cpu", threads=1)


@pytest.fixture
def photo() -> Photo:
    return Photo(
        name="Noise & <dust>", credit="nobody", pixels=noise(43, 50, 3), window=(0, 0, 40, 40), detail=(4, 4, 16)
    )


@pytest.fixture
def results(photo: Photo) -> Results:
    """Made-up results of the right form."""
    ratio = speedup([200.0], [100.0])
    fast = Entry(
        name="Cache, 1", time=latency(1500), speedup=ratio, values={PSNR: 31.5, RECOGNISED: 50.0}, series="Cache"
    )
    slow = Entry(name="no cache, 4 steps", time=latency(3000), values={RECOGNISED: 75.0}, series="no cache")
    fewer = Entry(name="no cache, 2 steps", time=latency(1500), speedup=ratio, values={PSNR: 20.0}, series="no cache")
    exact = Entry(name="Cache, 0", time=latency(3000), speedup=ratio, values={PSNR: float("inf")}, series="Cache")
    generation = Generation(
        names=("cat", "dog"),
        labels=(0, 0, 1, 1),
        images=(noise(4, 8, 8, 3), noise(4, 8, 8, 3)),
        predicted=((0, 0, 1, 0), (0, 1, 1, 0)),
        cache=fast,
        uncached=slow,
        steps=4,
        guidance_scale=3.0,
        scheduler="DDIMScheduler",
        params=4_200_000,
        study=(slow, exact, fast, fewer),
        study_images=2,
        rule="the fastest that kept 30 dB",
    )
    upscaling = Upscaling(
        photo=photo,
        scale=2,
        original=noise(42, 50, 3),
        small=noise(21, 25, 3),
        bicubic=noise(42, 50, 3),
        restored=noise(42, 50, 3),
        psnr=(30.0, 31.25),
        ssim=(0.9, 0.91),
        seconds=0.5,
        model="net_x2",
    )
    layer = LayerReport(name="blocks.0", folded=("3 BatchNorms",), params_before=9, params_after=4)
    merged = Merge(
        entries=(
            Entry(name="ours, merged", time=latency(10), speedup=speedup([17.0], [10.0])),
            Entry(name="ours, training form", time=latency(16), speedup=speedup([17.0], [16.0])),
            Entry(name="timm vit", time=latency(17)),
        ),
        report=ReparamReport(layers=(layer,), params_before=9_000_000, params_after=4_000_000),
        check=Check(what="x", value=1e-6, tolerance=1e-4),
        batch=2,
        rounds=3,
        image_size=224,
    )
    classified = ClassifiedPhoto(
        photo=photo, shown=noise(40, 40, 3), seen=noise(8, 8, 3), top=(("cat", 0.6), ("dog", 0.4)), belongs=False
    )
    return Results(
        generation=generation,
        upscalings=[upscaling, dataclasses.replace(upscaling, scale=1, jpeg=40, psnr=(28.0, 29.5), model="net_real")],
        merge=merged,
        classified=[classified],
        denoiser="denoiser.tag",
        classifier="classifier.tag",
        environment={"device": "cpu (a processor)", "torch": "2"},
        threads=2,
        date="2026-01-01 00:00 UTC",
        seconds=99.0,
    )


class _Reader(HTMLParser):
    """Checks that elements are closed in order, and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def read(html: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader.seen


def test_page_stands_on_its_own(results: Results) -> None:
    """No address leads out of it; pictures are within; every element is closed; what is shown is described."""
    html = render(results)
    assert "http" not in html
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    seen = read(html)
    images = [attributes for tag, attributes in seen if tag == "img"]
    assert len(images) >= 8 + 2 * (2 + 4) + 2
    assert all((image["src"] or "").startswith("data:image/png;base64,iVBOR") for image in images)
    assert all(image["alt"] for image in images)
    assert not [tag for tag, _ in seen if tag in ("link", "iframe", "object", "embed")]
    assert all(not attributes.get("src") for tag, attributes in seen if tag == "script")
    targets = {attributes.get("id") for _, attributes in seen}
    links = [attributes["href"] or "" for tag, attributes in seen if tag == "a"]
    assert len(links) == 5
    assert {link.removeprefix("#") for link in links} <= targets
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_page_shows_the_results(results: Results) -> None:
    """Names are escaped; numbers are those given; what is recognised is marked."""
    html = render(results)
    assert "Noise &amp; &lt;dust&gt;" in html
    assert "<dust>" not in html
    assert "without a network connection" in html
    assert "31.25 dB" in html
    assert "+1.25 dB" in html
    assert "JPEG 40 28.00 dB, <strong>net_real 29.50 dB</strong>" in html
    assert html.count('class="hit"') == 3 + 2
    assert "equal" in html  # a cache that changes nothing
    assert "None of the ten classes fits" in html
    assert "blocks.0" in html
    values = [value for value, _ in headline(results)]
    assert values == ["2.00x", "75 %", "+1.25 dB", "1.70x"]
    for value in values:
        assert f"<strong>{value}</strong>" in html


def test_page_without_finite_points(results: Results) -> None:
    """Caches that change nothing cannot be plotted; the page says the rest."""
    study = results.generation.study[:2]
    generation = dataclasses.replace(results.generation, study=study)
    html = render(dataclasses.replace(results, generation=generation))
    assert "<svg" not in html
    read(html)


def test_plot() -> None:
    points = [Point(x=1, y=30, series="a<b", label="1"), Point(x=2.5, y=20, series="c", label="2", marked=True)]
    svg = scatter(points, "speed", "quality", mark=(1.0, "none"))
    assert "a&lt;b, 1: 1.00, 30.0" in svg
    assert svg.count("<circle") == 2
    read(svg)
    with pytest.raises(ValueError, match="needs points"):
        scatter([], "x", "y")


@given(st.lists(st.floats(-1e4, 1e4, allow_subnormal=False).map(lambda value: round(value, 3)), min_size=1))
def test_ticks_enclose_all_values(values: list[float]) -> None:
    ticks = _ticks(values)
    assert ticks[0] <= min(values) + 1e-9
    assert ticks[-1] >= max(values) - 1e-9
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_blocks() -> None:
    """Single blocks are well formed, too."""
    assert data_uri(noise(2, 2)).startswith("data:image/png;base64,")
    assert "marked" in table(("", "n"), [("a", "1"), ("b", "2")], marked=[1])
    assert "width:50.0%" in bars([("a", 2.0, "2"), ("b", 1.0, "1")])
    assert "width:100.0%" not in bars([("a", 0.4, "40 %")], full=1.0)
    read(before_after(noise(2, 2, 3), noise(2, 2, 3), ("a", "b"), "c"))
    read(page(title="t", lead="", tiles=[], sections=[("s", "<p>x</p>")], foot=""))


def test_photos_come_with_the_package() -> None:
    """Windows and details lie within the photos, at every scale."""
    for photo in photos().values():
        height, width = photo.pixels.shape[:2]
        top, left, tall, wide = photo.window
        assert top + tall <= height // 4 * 4
        assert left + wide <= width // 4 * 4
        assert photo.detail[0] + photo.detail[2] <= height // 4 * 4
        assert photo.detail[1] + photo.detail[2] <= width // 4 * 4
        assert photo.credit


def small_cfsr() -> CFSR:
    return CFSR(scale=2, embed_dim=8, depths=(1,), kernel_size=3, interpolation_init=True).eval().requires_grad_(False)


def test_upscale(photo: Photo) -> None:
    found = upscale(photo, small_cfsr(), "small")
    assert found.original.shape == found.bicubic.shape == found.restored.shape == (42, 50, 3)
    assert found.small.shape == (21, 25, 3)
    assert found.restored.dtype == np.uint8
    assert all(np.isfinite(found.psnr))
    assert all(0 < value < 1 for value in found.ssim)
    compressed = upscale(photo, small_cfsr(), "small", jpeg=20)
    assert compressed.jpeg == 20
    assert np.array_equal(compressed.original, found.original)
    assert not np.array_equal(compressed.small, found.small)


def test_what_is_shown_is_cut_out() -> None:
    for photo in photos().values():
        cut = shown(photo)
        assert all(side % 8 == 0 for side in cut.pixels.shape[:2])
        (top, left, side), (y, x, _) = photo.detail, cut.detail
        detail = cut.pixels[y : y + side, x : x + side]
        assert np.array_equal(detail, photo.pixels[top : top + side, left : left + side])


def small_classifier(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=classes).eval().requires_grad_(False)


def test_classify_photos(photo: Photo) -> None:
    (found,) = classify_photos(small_classifier(4), ("a", "b", "c", "d"), [(photo, False)])
    assert len(found.top) == 3
    assert found.top[0][1] >= found.top[1][1] >= found.top[2][1]
    assert found.shown.shape == (40, 40, 3)
    assert found.seen.shape == (160, 160, 3)


@pytest.fixture(scope="module")
def pipe() -> PixelDiTPipeline:
    torch.manual_seed(0)
    model = PixelDiT(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8, patch_size=4, num_classes=2
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline = PixelDiTPipeline(model, scheduler, id2label={0: "cat", 1: "dog"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_generate(pipe: PixelDiTPipeline) -> None:
    """The cache that is chosen is good enough, or the best; samples are those of the classes, without and with it."""
    candidates = [
        CacheSetting(method="FBC", setting="strong", config=FirstBlockCacheConfig(threshold=9.0)),
        CacheSetting(method="FBC", setting="exact", config=FirstBlockCacheConfig(threshold=0)),
    ]
    found = generate(
        pipe,
        Judge(small_classifier(2)).classes,
        QUICK,
        per_class=2,
        steps=5,
        wanted_psnr=500.0,
        candidates=candidates,
    )
    assert found.cache.name == "FBC, exact"
    assert found.rule == "the fastest that kept 500 dB"
    assert found.labels == (0, 0, 1, 1)
    assert found.images[0].shape == (4, 8, 8, 3)
    assert (found.images[0] == found.images[1]).all()
    assert found.names == ("cat", "dog")
    assert found.study_images == 2
    sea = CacheSetting(method="SeaCache", setting="defaults", config=SeaCacheConfig())
    with pytest.raises(ValueError, match="No cache works"):
        generate(pipe, Judge(small_classifier(2)).classes, QUICK, steps=2, candidates=[sea])


def test_merge() -> None:
    found = merge(QUICK, name="repavit_tiny", rival="test_vit")
    assert [entry.name for entry in found.entries] == [
        "repavit_tiny, merged",
        "repavit_tiny, training form",
        "timm test_vit",
    ]
    assert len(found.report.layers) == 12
    assert found.check.value <= found.check.tolerance
    assert found.entries[-1].speedup is None
    assert found.image_size == 224


@pytest.mark.slow
def test_run(pipe: PixelDiTPipeline, monkeypatch: pytest.MonkeyPatch, photo: Photo) -> None:
    """All parts together, in order, each told; and the page of what they found."""
    album = dict.fromkeys(("cat", "astronaut", "coffee", "rocket"), photo)
    monkeypatch.setattr(zoo.demo, "photos", lambda: album)
    cache = CacheSetting(method="FBC", setting="0.1", config=FirstBlockCacheConfig(threshold=0.1))
    monkeypatch.setattr(parts, "cache_settings", lambda *_: [cache])
    models = Models(
        pipe=pipe, classifier=small_classifier(2), upscalers={"small": small_cfsr()}, real={"real": small_cfsr()}
    )
    monkeypatch.setattr(zoo.demo, "merge", lambda settings, **_: merge(QUICK, name="repavit_tiny", rival="test_vit"))
    told: list[str] = []
    found = run_demo(models, threads=1, per_class=1, steps=3, progress=lambda what, done, total: told.append(what))
    stages = list(dict.fromkeys(what.partition(":")[0] for what in told))
    assert stages == ["trying caches", "generating", "restoring photos"]
    read(render(found))


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which are missing, and nothing is written."""
    monkeypatch.setattr(zoo.demo, "cards_dir", lambda: tmp_path)
    with pytest.raises(CheckpointError, match=r"pixeldit\.cifar10, repavit_tiny\.cifar10"):
        load_models()
    assert main(["demo", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "The demo needs the weights pixeldit.cifar10" in error
    assert not list(tmp_path.iterdir())


def test_command_replaces_only_its_own_report(
    results: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo.demo, "load_models", lambda: None)
    monkeypatch.setattr(zoo.demo, "run_demo", lambda models, **_: results)
    report = tmp_path / "report.html"
    for _ in range(2):
        assert main(["demo", "-o", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "1.70x" in printed
        assert str(report) in printed.replace("\n", "")
    read(report.read_text(encoding="utf-8"))
    assert main(["demo", "-o", str(tmp_path), "-q"]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    report.write_text("mine")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert report.read_text() == "mine"
    assert main(["demo", "-o", str(tmp_path), "--force", "--json"]) == 0
    assert '"value": "75 %"' in capsys.readouterr().out
    assert main(["demo", "--threads", "0"]) == 2
