"""Spectra of hidden activations, and the inspection of a model's feed-forward layers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_models import KINDS, batches, build, vit

from zoo.ffn.inspection import inspect_ffns, plot_inspection
from zoo.ffn.spectrum import eigenvalues, jensen_shannon, spectrum, statistics


def test_limits_of_the_statistics() -> None:
    """Flat: SE = ln D, PR = D, EEE = 0; one direction: SE = 0, PR = 1, EEE = 1 - 1/D."""
    flat = statistics(torch.ones(32, dtype=torch.float64))
    assert flat.entropy == pytest.approx(math.log(32))
    assert flat.participation == pytest.approx(32)
    assert flat.early_enrichment == pytest.approx(0, abs=1e-12)
    single = statistics(eigenvalues(torch.diag(torch.tensor([5.0] + [0.0] * 31))))
    assert single.entropy == pytest.approx(0, abs=1e-8)
    assert single.participation == pytest.approx(1)
    assert single.early_enrichment == pytest.approx(1 - 1 / 32)


def test_divergence_limits() -> None:
    p = torch.rand(16, dtype=torch.float64)
    assert jensen_shannon(p, 3 * p) == pytest.approx(0, abs=1e-12)
    left, right = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    left[0] = right[2] = 1
    assert jensen_shannon(left, right) == pytest.approx(math.log(2))


def test_rotation_and_scale_do_not_matter() -> None:
    rows = torch.randn(500, 8, dtype=torch.float64) * torch.arange(1, 9)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    a, b = (statistics(eigenvalues(torch.cov(x.t()))) for x in (rows, 3 * rows @ turn))
    assert a.entropy == pytest.approx(b.entropy)
    assert a.participation == pytest.approx(b.participation)


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_those_of_the_hidden_vectors(kind: str) -> None:
    """Against the covariance of all rows at once; few tokens limit the dimensions."""
    model, data = build(kind), batches(kind)
    found = spectrum(model, data, at_once=2)
    name, layer = next(iter(found.items()))
    from zoo.ffn.technique import ffn_layers, model_output

    rows: list[torch.Tensor] = []
    ffn = ffn_layers(model)[name]
    handle = ffn.down.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].flatten(0, -2)[:, ffn.first_column :])
    )
    with torch.no_grad():
        for batch in data:
            model_output(model, batch)
    handle.remove()
    expected = statistics(eigenvalues(torch.cov(torch.cat(rows).double().t())), layer.after.dims)
    assert layer.after.participation == pytest.approx(expected.participation, rel=1e-3)
    assert layer.after.dims == min(ffn.hidden_dim, len(torch.cat(rows)) - 1)
    assert 0 <= layer.divergence <= math.log(2)


def test_a_linear_activation_leaves_the_spectrum() -> None:
    model = vit(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.fill_(60.0)
    (layer,) = spectrum(model, batches("timm")).values()
    assert layer.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_inspection_finds_the_idle_layer(kind: str, tmp_path: Path) -> None:
    """A layer whose second product is zero is the one that can lose most."""
    from zoo.ffn.technique import ffn_layers

    model = build(kind)
    ffns = ffn_layers(model)
    idle = list(ffns)[-1]
    with torch.no_grad():
        ffns[idle].down.weight[:, ffns[idle].first_column :] = 0
        if ffns[idle].owns_output_bias:
            ffns[idle].down.bias.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = inspect_ffns(model, batches(kind))
    assert report.advice().startswith(idle)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name[idle].error == pytest.approx(0, abs=1e-6)
    assert sum(layer.share for layer in report.layers) == pytest.approx(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plot_inspection(report, tmp_path / "x.png", "model")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_data_are_needed() -> None:
    with pytest.raises(ValueError, match="needs data"):
        spectrum(vit(), [])
