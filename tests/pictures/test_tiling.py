"""Tiles: equal to the whole map where that is claimed, within the budget, and what happens when something fails."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import build
from skimage import data
from torch import Tensor, nn

import zoo
from zoo.evaluation.metrics import psnr
from zoo.pictures import plans
from zoo.pictures.tiling import parse_bytes, plan_tiles, restore_tensor
from zoo.restoration.cfsr import CFSR

ROOT = Path(__file__).resolve().parents[2]


def small(name: str = "cfsr_x2", **kwargs: object) -> CFSR:
    """A network of 13 pixels of receptive field whose blocks matter."""
    return timm.create_model(name, embed_dim=8, depths=(1, 1), layer_scale_init=1.0, **kwargs).eval()


class Toy(nn.Module):
    """Enlarge by repetition: its contract and its faults are the test's."""

    def __init__(self, scale: int = 2, in_chans: int = 3, **contract: object) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.scale, self.in_chans, self.sizes = scale, in_chans, []
        for name, value in contract.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape))
        return F.interpolate(x, scale_factor=self.scale) * self.one


class Streamer(Toy):
    """A toy that takes the whole map or, as asked, strips."""

    def __init__(self, least: int = 1000, faults: int = 0, **contract: object) -> None:
        super().__init__(bytes_per_pixel=10**6, **contract)
        self.least, self.faults, self.asked = least, faults, []

    def stream_bytes(self, height: int, width: int) -> int:
        return self.least

    def stream(self, x: Tensor, *, memory: int | None = None, progress: Callable[[int, int], None]) -> Tensor:
        self.asked.append(memory)
        if len(self.asked) <= self.faults:
            raise torch.OutOfMemoryError("full")
        progress(1, 2)
        progress(2, 2)
        return self(x)


@pytest.mark.parametrize("ensemble", [False, True])
def test_streams_what_does_not_fit_whole(ensemble: bool) -> None:
    model, x = Streamer(), torch.rand(1, 3, 40, 50)
    said: list[str] = []
    calls: list[tuple[int, int]] = []
    told = dict(inform=said.append, progress=lambda done, count: calls.append((done, count)))
    found = restore_tensor(model, x, budget="4GB", self_ensemble=ensemble, **told)
    assert (found - restore_tensor(model, x, self_ensemble=ensemble)).abs().max() < 1e-6
    assert said == ["whole"]
    calls.clear()
    x = torch.randint(0, 256, (1, 3, 90, 80), dtype=torch.uint8)
    found = restore_tensor(model, x, budget="4GB", levels=255, self_ensemble=ensemble, **told)
    assert said == ["whole", "streamed, exact"]
    assert torch.equal(found, F.interpolate(x.float(), scale_factor=2).to(torch.uint8))
    assert len(set(model.asked)) == 1
    assert 10**9 < model.asked[0] < 4 * 10**9
    passes = 8 if ensemble else 1
    assert calls == [(done, 2 * passes) for done in range(1, 2 * passes + 1)]


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_a_stream_are_rounded_as_they_come(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged CFSR streams large pictures within any budget; small ones, named tiles and a mean of turns do not."""
    monkeypatch.setattr(plans, "_STREAMED", 60 * 40)
    model = small()
    x = torch.randint(0, 65536, (1, channels, 60, 40), dtype=torch.int32).to(torch.uint16)
    whole = restore_tensor(model, x, levels=65535)
    floats = restore_tensor(model, x)
    model.reparameterize()
    said: list[str] = []
    calls: list[tuple[int, int]] = []
    told = dict(inform=said.append, progress=lambda done, count: calls.append((done, count)))
    for budget in (None, "8GB"):
        calls.clear()
        found = restore_tensor(model, x, levels=65535, budget=budget, **told)
        assert found.dtype == torch.int32
        assert (found - whole).abs().max() <= 1  # of 65535
        assert calls[-1] == (len(calls), len(calls))
    assert (restore_tensor(model, x, **told) - floats).abs().max() < 1e-5
    restore_tensor(model, x[..., 1:].contiguous(), **told)
    restore_tensor(model, x, tile=50, **told)
    restore_tensor(model, x, self_ensemble=True, **told)
    assert said[:4] == ["streamed, exact"] * 3 + ["whole"]
    assert "tiles" in said[4]
    assert said[5] == "whole"
    with torch.no_grad():
        model.conv_after_body.bias[0] = torch.nan
    with pytest.raises(RuntimeError, match="output of CFSR is not finite"):
        restore_tensor(model, x)


def test_a_stream_without_memory_and_bound_gets_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_STREAMED", 100)
    model = Streamer(least=1000, faults=1, streams_rows=True)
    model.stream = lambda x, **options: model.rows(x, **options)  # type: ignore[method-assign]
    asked: list[int | None] = []

    def rows(x: Tensor, *, memory: int | None, progress: object, write: Callable[[int, int, Tensor], object]) -> None:
        asked.append(memory)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("full")
        write(0, 0, model(x)[0])

    model.rows = rows
    x = torch.rand(1, 3, 20, 30)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(restore_tensor(model, x), model(x))
    assert asked == [None, 2000]
    assert "Out of memory with a stream; trying a stream of 0 MB." in caplog.text


def test_tiles_where_a_stream_does_not_fit_or_is_not_wanted() -> None:
    said: list[str] = []
    model, x = Streamer(least=10**12, receptive_field=4), torch.rand(1, 3, 90, 80)
    restore_tensor(model, x, budget="4GB", inform=said.append)
    model.least = 1000
    restore_tensor(model, x, budget="4GB", tile=60, inform=said.append)
    restore_tensor(model, x, budget="4GB", tile=60, overlap=2, inform=said.append)
    assert [words.partition(" tiles, ")[2] for words in said] == ["exact", "exact", "blended"]
    assert not model.asked


def test_a_stream_without_memory_gets_less(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Streamer(faults=2), torch.rand(1, 3, 90, 80)
    with caplog.at_level(logging.WARNING):
        restore_tensor(model, x, budget="4GB")
    first, second, third = model.asked
    assert (second, third) == (first // 2, first // 4)
    assert "Out of memory with a stream of" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        restore_tensor(Streamer(least=10**9, faults=9), x, budget="4GB")


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (33, 67), (67, 33), (100, 131)])
@pytest.mark.parametrize("name", ["cfsr_x2", "cfsr_x3", "cfsr_x4"])
def test_tiles_equal_the_whole(name: str, size: tuple[int, int]) -> None:
    """With the receptive field as overlap there is no seam and no approximation."""
    model, x = small(name), torch.rand(1, 3, *size)
    whole = restore_tensor(model, x)
    assert whole.shape == (1, 3, model.scale * size[0], model.scale * size[1])
    calls: list[tuple[int, int]] = []
    said: list[str] = []
    told = dict(inform=said.append, progress=lambda done, count: calls.append((done, count)))
    tiled = restore_tensor(model, x, tile=40, exact=True, **told)
    assert (tiled - whole).abs().max() < 1e-6
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    assert (said == ["whole"]) == (max(size) <= 40)


@pytest.mark.parametrize("name", ["cfsr", "restormer", "dat", "ffnetsr"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_progress_within_a_whole_picture(name: str, ensemble: bool) -> None:
    """Each block is told, so that there is a time left before the first of few parts is through; no hook stays."""
    model = build(name).eval()
    if hasattr(model, "reparameterize"):
        model.reparameterize()
    calls: list[tuple[int, int]] = []
    x = torch.rand(1, 3, 16, 16)
    restore_tensor(model, x, self_ensemble=ensemble, progress=lambda done, count: calls.append((done, count)))
    assert len(calls) > 1
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    assert not any(part._forward_hooks for part in model.modules())


def test_less_overlap_is_not_exact() -> None:
    """The test above can fail: half the receptive field leaves a difference, and blending keeps it small."""
    model, x = small(), torch.rand(1, 3, 64, 64)
    whole, blended = restore_tensor(model, x), restore_tensor(model, x, tile=40, overlap=6)
    assert 1e-6 < (blended - whole).abs().max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (45, 70), (96, 96)])
@pytest.mark.parametrize("contract", [{}, {"multiple_of": 8}, {"multiple_of": 8, "receptive_field": 5}])
@pytest.mark.parametrize("scale", [1, 2])
def test_any_network(size: tuple[int, int], contract: dict[str, int], scale: int) -> None:
    """Blending weights add up to one, padding is cut off, sizes are what the network asks for."""
    model, x = Toy(scale, **contract), torch.rand(2, 3, *size)
    expected = F.interpolate(x, scale_factor=scale)
    for options in ({}, {"tile": 48, "overlap": 8}, {"tile": 80}):
        assert (restore_tensor(model, x, **options) - expected).abs().max() < 1e-6
    step = contract.get("multiple_of", 1)
    assert all(shape[2] % step == 0 and shape[3] % step == 0 for shape in model.sizes)


@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    overlap=st.integers(0, 70),
    step=st.sampled_from([1, 4, 8]),
    pixels=st.integers(1, 80_000),
)
@settings(max_examples=80, deadline=None)
def test_plans(height: int, width: int, overlap: int, step: int, pixels: int) -> None:
    """Tiles cover the map once, are within the bound, and start at multiples; None only where nothing fits."""
    height, width, overlap = (-(-value // step) * step for value in (height, width, overlap))
    plan = plan_tiles(height, width, overlap, pixels, step)
    if plan is None:
        least = max(overlap, step)
        smallest = [min(2 * least + 2 * overlap, length) for length in (height, width)]
        assert smallest[0] * smallest[1] > pixels
        return
    sides = []
    for edges, length in ((plan.rows, height), (plan.columns, width)):
        assert (edges[0], edges[-1]) == (0, length)
        assert all(a < b for a, b in pairwise(edges))
        assert all(edge % step == 0 for edge in edges)
        sides.append(max(min(b + overlap, length) - max(a - overlap, 0) for a, b in pairwise(edges)))
    assert sides[0] * sides[1] <= plan.pixels <= pixels


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ("4GB", 4e9),
        ("512MiB", 2**29),
        ("300 mb", 3e8),
        ("1.5g", 1.5e9),
        (1000, 1000),
        (2e9, 2e9),
        ("4e9", 4e9),
        ("7", 7),
    ],
)
def test_sizes_in_words(given_size: str | float, expected: float) -> None:
    assert parse_bytes(given_size) == expected


@pytest.mark.parametrize("wrong", ["", "lots", "-4GB", "4XB", 0, -1, float("nan"), float("inf"), "GB"])
def test_sizes_that_are_none(wrong: str | float) -> None:
    with pytest.raises(ValueError, match=r"like \"4GB\""):
        parse_bytes(wrong)


def test_budget_chooses_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller budget makes more tiles of the same result; one that fits nothing says what would."""
    model, x = Toy(bytes_per_pixel=1000, receptive_field=4), torch.rand(1, 3, 128, 128)
    monkeypatch.setattr(plans, "held_bytes", lambda device: 0)
    monkeypatch.setattr(plans, "_RUNTIME_BYTES", 0)
    held = 3 * 256 * 256 * 8
    results = []
    for budget, fewest, most in (
        (held + 1000 * 128 * 128, 1, 1),
        (held + 1000 * 128 * 70, 2, 2),
        (held + 1000 * 1000, 20, 40),
    ):
        model.sizes.clear()
        results.append(restore_tensor(model, x, budget=budget))
        assert fewest <= len(model.sizes) <= most
        assert max(shape[2] * shape[3] for shape in model.sizes) * 1000 <= budget - held
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(ValueError, match=r"budget of 2 MB is too small for 128x128 .* allow at least \d+ MB") as caught:
        restore_tensor(model, x, budget=held)
    enough = str(caught.value).split("at least ")[1].rstrip(".")
    assert torch.equal(restore_tensor(model, x, budget=enough), results[0])


def test_tile_smaller_than_its_overlap() -> None:
    for options in ({"exact": True}, {"overlap": 13}):
        with pytest.raises(ValueError, match="tile must be at least 27, more than twice the overlap 13; got 26"):
            restore_tensor(small(), torch.rand(1, 3, 64, 64), tile=26, **options)
    with pytest.raises(ValueError, match="tile must be at least 3; got 2"):
        restore_tensor(small(), torch.rand(1, 3, 64, 64), tile=2)


def test_named_tiles_are_no_folly(caplog: pytest.LogCaptureFixture) -> None:
    """A tile hardly larger than twice a large receptive field: a handful of blended tiles, said, not thousands."""
    model, x, said = Toy(receptive_field=63), torch.rand(1, 3, 241, 321), []
    found = restore_tensor(model, x, tile=128, inform=said.append)
    assert len(model.sizes) < 20
    assert sum(shape[2] * shape[3] for shape in model.sizes) < 2 * 241 * 321
    assert "tiles, blended over 16 pixels; exact ones would be" in said[0]
    assert torch.allclose(found, F.interpolate(x, scale_factor=2), atol=1e-6)
    with caplog.at_level(logging.WARNING):
        restore_tensor(model, x, tile=128)
    assert "blended over 16 pixels" in caplog.text
    model.sizes.clear()
    restore_tensor(model, x, tile=60)  # no exact tile has that side
    assert len(model.sizes) < 60
    restore_tensor(model, x[..., :3, :130], tile=128, exact=True, inform=said.append)
    assert "exact" in said[-1]


def test_what_exact_tiles_cost_is_said_first() -> None:
    model, x, said = Toy(receptive_field=20), torch.rand(1, 3, 90, 90), []
    restore_tensor(model, x, tile=60, exact=True, inform=lambda words: said.append((words, len(model.sizes))))
    assert said[0][1] == 0
    assert re.fullmatch(r"25 tiles, exact, \d\.\d times the work of the whole picture", said[0][0])
    with pytest.raises(ValueError, match="Toy looks at the whole picture, so that tiles of 60 pixels cannot be exact"):
        restore_tensor(Toy(), x, tile=60, exact=True)
    with pytest.raises(ValueError, match="An overlap of 4 is not exact for Toy: give at least 20"):
        restore_tensor(model, x, tile=60, overlap=4, exact=True)


def test_a_budget_makes_no_folly_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "held_bytes", lambda device: 0)
    monkeypatch.setattr(plans, "_RUNTIME_BYTES", 0)
    model, x, said = Toy(bytes_per_pixel=1000, receptive_field=63), torch.rand(1, 3, 400, 400), []
    budget = 3 * 800 * 800 * 8 + 1000 * 200 * 200
    restore_tensor(model, x, budget=budget, inform=said.append)
    assert sum(shape[2] * shape[3] for shape in model.sizes) < 2 * 400 * 400
    assert "blended over 25 pixels" in said[0]
    model.sizes.clear()
    restore_tensor(model, x, budget=budget, exact=True, inform=said.append)
    assert "exact" in said[1]
    assert all(shape[2] * shape[3] <= 200 * 200 for shape in model.sizes)


def test_tiling_hints_of_a_network() -> None:
    """ "internal" is never cut; "discouraged" is, with more overlap, and that is said."""
    x, said = torch.rand(1, 3, 200, 200), []
    for hint in ("internal", "discouraged"):
        restore_tensor(Toy(tiling=hint, name="Net"), x, tile=160, inform=said.append)
    assert said[0] == "whole"
    assert "tiles are discouraged for Net" in said[1]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 0, 8)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        restore_tensor(Toy(), torch.zeros(shape))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("Not enough memory: you tried to allocate 4 bytes"),
    ],
)
def test_out_of_memory_makes_tiles_smaller(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Greedy(Toy):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] * x.shape[3] > 700:
                raise error
            return super().forward(x)

    x = torch.rand(1, 3, 64, 64)
    with caplog.at_level(logging.WARNING):
        result = restore_tensor(Greedy(receptive_field=2), x)
    assert torch.equal(result, F.interpolate(x, scale_factor=2))
    assert "Out of memory" in caplog.text


def test_other_errors_are_not_retried() -> None:
    class Broken(Toy):
        def forward(self, x: Tensor) -> Tensor:
            self.sizes.append(tuple(x.shape))
            raise RuntimeError("shape mismatch")

    model = Broken()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        restore_tensor(model, torch.rand(1, 3, 64, 64))
    assert len(model.sizes) == 1


def test_not_finite_in_half_precision(caplog: pytest.LogCaptureFixture) -> None:
    """The tile is computed again in float32, and the network keeps its precision."""

    class Overflows(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (torch.inf if x.dtype == torch.bfloat16 else 1)

    model = Overflows().bfloat16()
    x = torch.rand(1, 3, 8, 8) + 0.1
    with caplog.at_level(logging.WARNING):
        result = restore_tensor(model, x)
    assert torch.equal(result, F.interpolate(x, scale_factor=2))
    assert "not finite" in caplog.text
    assert model.one.dtype == torch.bfloat16


def test_not_finite_at_all() -> None:
    model = Toy()
    model.one.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="output of Toy is not finite"):
        restore_tensor(model, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("levels", [None, 255, 65535])
def test_levels(levels: int | None) -> None:
    """Whole numbers are the rounded floats, from whole tiles and from blended ones."""
    model = small()
    x = torch.randint(0, 256, (1, 3, 48, 50), dtype=torch.uint8)
    reference = restore_tensor(model, x.float() / 255)
    found = restore_tensor(model, x, levels=levels)
    assert found.dtype == {None: torch.float32, 255: torch.uint8, 65535: torch.int32}[levels]
    expected = reference if levels is None else (reference.clamp(0, 1) * levels).round()
    assert (found.float() - expected).abs().max() == 0
    toy, wide = Toy(), torch.randint(0, 65536, (1, 3, 90, 80), dtype=torch.int32).to(torch.uint16)
    assert torch.equal(
        restore_tensor(toy, wide, levels=65535, tile=60, overlap=8),
        F.interpolate(wide.double(), scale_factor=2).int(),
    )


def test_self_ensemble() -> None:
    """The result turns with its input, and is the mean of eight runs."""
    model, x = small(), torch.rand(1, 3, 20, 31)
    result = restore_tensor(model, x, self_ensemble=True)
    turned = restore_tensor(model, torch.rot90(x, 1, (2, 3)), self_ensemble=True)
    assert (torch.rot90(result, 1, (2, 3)) - turned).abs().max() < 1e-6
    assert (result - restore_tensor(model, x)).abs().max() > 1e-4
    tiled = restore_tensor(model, x, self_ensemble=True, tile=29, exact=True)
    assert (tiled - result).abs().max() < 1e-6


def test_channels() -> None:
    """Gray goes through a colour network as gray; colour goes through a gray network channel by channel."""
    gray = torch.rand(1, 1, 12, 14)
    assert restore_tensor(small(), gray).shape == (1, 1, 24, 28)
    one, color = small(in_chans=1), torch.rand(2, 3, 12, 14)
    result = restore_tensor(one, color)
    assert (result[:, 1:2] - restore_tensor(one, color[:, 1:2])).abs().max() < 1e-6
    with pytest.raises(ValueError, match="CFSR restores 3 channels, the map has 2"):
        restore_tensor(small(), torch.rand(1, 2, 8, 8))


def test_mode_of_the_network_is_kept() -> None:
    model = small().train()
    restore_tensor(model, torch.rand(1, 3, 8, 8))
    assert model.training


_PEAK = """
import sys
import torch
torch.set_num_threads(1)
import timm
import zoo
from zoo.pictures.tiling import restore_tensor
model = timm.create_model("cfsr_x2", depths=(1,)).eval()
model.reparameterize()
budget = int(sys.argv[1])
tiles = []
x = torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8)
out = restore_tensor(model, x, budget=budget, levels=255, progress=lambda done, count: tiles.append(count))
assert out.shape == (1, 3, 2048, 2048)
facts = dict(line.split(":", 1) for line in open("/proc/self/status"))
most, files = (int(facts[name].split()[0]) for name in ("VmHWM", "RssFile"))  # of libraries: not counted
print((most - files) * 1024, len(tiles))  # ru_maxrss begins with the most that the starting process held
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_memory_of_a_large_picture() -> None:
    """1024x1024 pixels: the whole process stays within its budget and 20 %; blocks as wide as the real network's."""
    budget = 700_000_000
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(budget)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, tiles = map(int, done.stdout.split())
    print(f"peak {peak / 1e6:.0f} MB of {budget / 1e6:.0f} MB, {tiles} tiles")
    assert tiles > 1
    assert peak <= 1.2 * budget


@pytest.mark.slow
@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
def test_tiles_of_the_shipped_denoiser_have_no_seams(photo: str) -> None:
    """Its attention sees the whole map, so tiles only come near it: above 45 dB, where tiles meet as well."""
    model = zoo.create_model("restormer_tiny_denoise_color.bsds", pretrained=True).eval()
    zoo.reparameterize(model)
    clean = torch.from_numpy(getattr(data, photo)()[:160, :192].copy()).permute(2, 0, 1)[None].float() / 255
    noisy = clean + 25 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    whole, said = restore_tensor(model, noisy), []
    tiled = restore_tensor(model, noisy, tile=128, inform=said.append)
    assert "tiles, blended" in said[0]
    assert psnr(tiled, whole, space="rgb") > 45
    strips = zip(tiled.split(8, 2), whole.split(8, 2), strict=True)
    assert min(float(psnr(ours, theirs, space="rgb")) for ours, theirs in strips) > 45
