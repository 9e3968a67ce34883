"""Temperature, calibration error and the threshold for pictures of other things."""

from __future__ import annotations

import pytest
import torch

from zoo.evaluation.calibration import calibrate, expected_calibration_error, find_temperature


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is true: each label is drawn from it."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8000, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_found(drawn: tuple[torch.Tensor, torch.Tensor], factor: float) -> None:
    logits, labels = drawn
    assert find_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_calibration_error() -> None:
    """Two bins by hand: 0.9 and 1 of 2 right, 0.6 and 1 of 1 right."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    error = expected_calibration_error(probabilities, torch.tensor([0, 1, 1]))
    assert error == pytest.approx((abs(1.8 - 1) + abs(0.6 - 1)) / 3)


def test_the_threshold_keeps_the_share(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = drawn
    others = torch.zeros(10, 5)
    others[0, 0] = 50.0
    found = calibrate(3 * logits, labels, others, keep=0.8)
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.kept == pytest.approx(0.8, abs=0.01)
    assert found.error[0] < 0.02 < 0.1 < found.error[1]
    assert found.fooled == pytest.approx(0.1)
    assert found.right > float((logits.argmax(-1) == labels).double().mean())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="0 images with 0 labels"):
        calibrate(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="keep is a share above 0"):
        calibrate(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), keep=0.0)
