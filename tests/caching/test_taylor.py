"""Taylor factors: the golden cases, and what happens to types, shapes and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import cases
from torch import Tensor

from zoo.caching.taylor import TaylorFactors


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", cases("taylor"))
def test_golden(case: dict[str, Any]) -> None:
    factors = TaylorFactors(case["max_order"])
    for update in case["updates"]:
        factors.update(doubles(update["value"]), update["step"])
        expected = doubles(update["factors"])
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.stack(factors.factors), expected, rtol=0, atol=1e-10 * scale)
    for prediction in case["predictions"]:
        expected = doubles(prediction["value"])
        tolerance = 1e-10 * float(expected.abs().max())
        torch.testing.assert_close(factors.predict(prediction["step"]), expected, rtol=0, atol=tolerance)


def test_linear_features_are_forecast_exactly() -> None:
    factors = TaylorFactors(1)
    for step in (0, 1, 4):
        factors.update(doubles([3.0 - 2 * step, 0.5 * step]), step)
    assert factors.predict(9).tolist() == [-15.0, 4.5]


def test_nothing_to_forecast_from() -> None:
    factors = TaylorFactors(2)
    assert not factors.ready
    with pytest.raises(RuntimeError, match="before the first update"):
        factors.predict(3)


def test_another_shape_or_the_same_step_starts_anew() -> None:
    factors = TaylorFactors(1)
    factors.update(torch.ones(1, 3), 0)
    factors.update(torch.ones(2, 3), 1)
    assert len(factors.factors) == 1
    factors.update(torch.zeros(2, 3), 1)
    assert len(factors.factors) == 1
    assert not factors.fits(torch.zeros(2, 3, dtype=torch.float64))
    assert factors.fits(torch.zeros(2, 3))


def test_type_of_factors() -> None:
    """Sums are in another type, results in the features' own; order 0 repeats the feature bit for bit."""
    feature = torch.randn(4).bfloat16()
    factors = TaylorFactors(1, torch.float32)
    factors.update(feature, 0)
    factors.update(2 * feature, 1)
    assert {factor.dtype for factor in factors.factors} == {torch.float32}
    assert torch.equal(factors.predict(2), (3 * feature.float()).bfloat16())
    same = TaylorFactors(0)
    same.update(feature, 0)
    assert torch.equal(same.predict(5), feature)


def test_a_part_does_not_hold_the_whole_in_memory() -> None:
    joined = torch.randn(2, 10, 4)
    factors = TaylorFactors(1)
    factors.update(joined[:, -4:], 0)
    assert factors.nbytes == 2 * 4 * 4 * 4
    factors.update(joined[:, :4] + 0, 1)
    assert factors.nbytes == 2 * 2 * 4 * 4 * 4


def test_no_gradient_is_kept() -> None:
    feature = torch.ones(2, requires_grad=True) * 2
    factors = TaylorFactors(0)
    factors.update(feature, 0)
    assert not factors.predict(1).requires_grad
