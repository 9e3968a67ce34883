"""Routing statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.denoisers import denoise, dit
from zoo.moe import MoEConfig, convert, expert_layers
from zoo.moe.routing import RouterLoad, record_routing


def test_counts_every_choice(tmp_path: Path) -> None:
    moe, _ = convert(dit(), MoEConfig(scores="random"))
    with record_routing(moe) as summary:
        denoise(moe, steps=2, batch=2)
    tokens = 2 * 2 * 16
    for found in summary.layers.values():
        assert found.tokens == tokens
        assert found.counts.sum() == 2 * tokens
        assert 0 <= found.balance <= 1
        assert 0.99 < found.uncertainty <= 1.0001  # a new router is undecided
    denoise(moe, steps=1)
    assert summary.layers["transformer_blocks.0.ff"].tokens == tokens  # no hook is left
    assert "transformer_blocks.2.ff" in str(summary)
    assert summary.plot(tmp_path / "load.png").stat().st_size > 5000


def test_extremes() -> None:
    even, single = RouterLoad(counts=torch.ones(4)), RouterLoad(counts=torch.tensor([8.0, 0, 0, 0]))
    assert even.balance == pytest.approx(1)
    assert single.balance == pytest.approx(0)


def test_nothing_ran(tmp_path: Path) -> None:
    moe, _ = convert(dit(), MoEConfig(scores="random", top_k=0))
    with record_routing(moe) as summary:
        denoise(moe, steps=1)
    assert "No router ran" in str(summary)
    with pytest.raises(ValueError, match="No router ran"):
        summary.plot(tmp_path / "load.png")
    with pytest.raises(ValueError, match="no experts"), record_routing(nn.Linear(2, 2)):
        pass
    assert expert_layers(moe)
