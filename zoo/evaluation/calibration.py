"""Probabilities that are true, and a threshold below which a classifier knows none of its classes in a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Calibration", "calibrate", "expected_calibration_error", "find_temperature"]

_LEAST, _MOST = 0.05, 20.0  # of temperatures
_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found on held-out images.

    Args:
        temperature: Divides the logits.
        threshold: Largest probability of a picture below which no class counts as likely.
        error: Expected calibration error after division, and before it.
        kept: Share of the images of known classes that reach the threshold.
        right: Share of these that are told right.
        fooled: Share of the images of other things that reach it all the same; None without such images.
    """

    temperature: float
    threshold: float
    error: tuple[float, float]
    kept: float
    right: float
    fooled: float | None


def find_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that makes labels most likely (Guo et al., ICML 2017, arXiv 1706.04599, section 4.2).

    Args:
        logits: (N, classes).
        labels: (N,), int64.
    """
    logits = logits.double()
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(60):  # the loss has one minimum over the logarithm: shrink around it
        one, two = low + (high - low) / 3, high - (high - low) / 3
        if _loss(logits, labels, one) < _loss(logits, labels, two):
            high = two
        else:
            low = one
    return math.exp((low + high) / 2)


def _loss(logits: Tensor, labels: Tensor, log_temperature: float) -> float:
    return float(F.cross_entropy(logits / math.exp(log_temperature), labels))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = _BINS) -> float:
    """Return how far the largest probability is from the share told right, on average over bins of equal width.

    Args:
        probabilities: (N, classes).
        labels: (N,), int64.
        bins: Of [0, 1].
    """
    best, found = probabilities.double().max(-1)
    right = (found == labels).double()
    places = (best * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, places, best - right)
    return float(gaps.abs().sum() / len(labels))


def calibrate(logits: Tensor, labels: Tensor, others: Tensor | None = None, *, keep: float = 0.9) -> Calibration:
    """Find temperature and threshold on held-out images.

    The threshold is that which a share `keep` of the images of known classes reaches (Hendrycks and Gimpel, ICLR 2017,
    arXiv 1610.02136: the largest probability tells known from unknown).

    Args:
        logits: Of held-out images of the classes, (N, classes).
        labels: Of these, (N,), int64.
        others: Logits of images that show none of the classes, (M, classes); only to tell how many reach the threshold.
        keep: Share of images of known classes that reach it.

    Raises:
        ValueError: There are no images, or `keep` is no share.
    """
    if not len(logits) or len(logits) != len(labels):
        raise ValueError(f"{len(logits)} images with {len(labels)} labels: at least one of each, and as many.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is a share above 0 and up to 1, got {keep}.")
    temperature = round(find_temperature(logits, labels), 3)
    probabilities = (logits / temperature).softmax(-1)
    best, found = probabilities.max(-1)
    threshold = math.floor(float(best.double().quantile(1 - keep)) * 1000) / 1000
    passed = best >= threshold
    foreign = None if others is None else (others / temperature).softmax(-1).max(-1).values
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        error=(
            expected_calibration_error(probabilities, labels),
            expected_calibration_error(logits.softmax(-1), labels),
        ),
        kept=float(passed.double().mean()),
        right=float((found == labels)[passed].double().mean()),
        fooled=None if foreign is None else float((foreign >= threshold).double().mean()),
    )
