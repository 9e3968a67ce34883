"""Counting and timing, on models small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_process
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo import catalog
from zoo.bench.latency import compare_latency, latency
from zoo.cards import catalog_writer
from zoo.cards.catalog_writer import write_catalog
from zoo.profiling import count_macs, count_params


class Attention(nn.Module):
    """One head without projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_counts_by_hand() -> None:
    """3x3 convolution to 8 channels at 10x10, depthwise 3x3, linear layer: products only."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 5),
    ).to("meta")
    assert count_params(network) == (3 * 9 * 8 + 8) + (9 * 8 + 8) + (800 * 5 + 5)
    assert count_macs(network, torch.empty(1, 3, 10, 10, device="meta")) == 100 * (3 * 9 * 8 + 9 * 8) + 800 * 5


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_attention_is_counted(device: str) -> None:
    """Two products of tokens times tokens times channels, and what PyTorch fuses of a whole encoder layer."""
    assert count_macs(Attention(), torch.empty(1, 2, 7, 16, device=device)) == 2 * 2 * 7 * 7 * 16
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device=device).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(layer, torch.empty(1, 7, 16, device=device)) == 7 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 7 * 7 * 16
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(4, 4)
    assert count_params(nn.ModuleList([layer, layer])) == 20


def test_latency_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls alternate, warm-up rounds are left out, gradients are off; the clock is the test's own."""
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr("zoo.bench.latency.time.perf_counter", lambda: now[0])

    def slow() -> None:
        assert torch.is_inference_mode_enabled()
        order.append("slow")
        now[0] += 0.001 * len(order)

    times = compare_latency({"slow": slow, "fast": lambda: order.append("fast")}, warmup=1, runs=3)
    assert order == ["slow", "fast"] * 4
    assert times["slow"].median == pytest.approx(5)  # 3, 5 and 7 ms; the first round, 1 ms, only warms up
    assert times["fast"].median == 0
    assert (times["slow"].p20, times["slow"].p80) == pytest.approx((3.8, 6.2))
    assert times["slow"].runs == 3
    assert latency(slow, warmup=0, runs=1).p80 == pytest.approx(9)
    with pytest.raises(ValueError, match="runs must be at least 1"):
        latency(slow, runs=0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident size is read from /proc")
def test_peak_memory_sees_what_was_freed() -> None:
    """A 64 MB tensor that is gone at the end still counts; in a fresh process, which has no freed memory to reuse."""
    code = (
        "import time, torch; from zoo.bench.memory import peak_memory; "
        "print(peak_memory(lambda: (torch.ones(16 * 2**20), time.sleep(0.5))))"
    )
    done = fresh_process.run(code)
    assert 60e6 < int(done.stdout) < 90e6


def test_written_catalog_is_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a model; --check compares and changes nothing."""
    facts = {"b": {"task": "sr", "params": 2}, "a": {"task": "sr", "params": 3}}
    monkeypatch.setattr(catalog_writer, "build_catalog", lambda: facts)
    path = tmp_path / "catalog.json"
    monkeypatch.setattr(catalog, "PATH", path)
    assert write_catalog(path) == facts
    text = path.read_text()
    assert list(json.loads(text)) == ["b", "a"]
    assert len(text.splitlines()) == 4
    assert catalog_writer.main(["--check"]) == 0
    path.write_text("{}\n")
    assert catalog_writer.main(["--check"]) == 1
    assert path.read_text() == "{}\n"
    assert "make catalog" in capsys.readouterr().out
