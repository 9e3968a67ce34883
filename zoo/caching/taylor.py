"""Taylor factors: the last features and their finite differences, from which features of later steps are forecast."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TaylorFactors"]


class TaylorFactors:
    """Forecast a feature from its values at earlier steps.

    From Reusing to Forecasting (TaylorSeer, Liu et al., ICCV 2025), https://arxiv.org/abs/2503.06923, equations 3 to 5;
    used by CG-Taylor, https://arxiv.org/abs/2508.02240, as well. Every order is divided by the distance of the last two
    updates, as both published codes do: order 1 is linear extrapolation, and order 2 is exact for parabolas only where
    updates are evenly spaced. Order 0 repeats the last value.

    Args:
        max_order: Highest difference kept, from 0; `max_order + 1` features are held in the end.
        dtype: Type of the differences and of the sum; None is the type of the features.
    """

    def __init__(self, max_order: int, dtype: torch.dtype | None = None) -> None:
        self.max_order = max_order
        self.dtype = dtype
        self.step: int | None = None
        self.factors: list[Tensor] = []
        self._feature: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is anything to forecast from."""
        return self.step is not None

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return sum(factor.untyped_storage().nbytes() for factor in self.factors)

    def fits(self, feature: Tensor) -> bool:
        """Return whether a feature has the shape, type and device of those stored."""
        return self._feature == (feature.shape, feature.dtype, feature.device)

    def update(self, feature: Tensor, step: int) -> None:
        """Take in the feature of a step that was computed in full.

        A feature of another shape, type or device, or of a step that is stored already, starts anew.

        Args:
            feature: Any shape; kept as it is, not copied, unless it is a part of a larger tensor.
            step: Its step; steps may count up or down.
        """
        new = feature.detach()
        if new.untyped_storage().nbytes() > new.nbytes:
            new = new.clone()  # a part of a larger tensor would keep the whole of it in memory
        if self.dtype is not None:
            new = new.to(self.dtype)
        factors = [new]
        if self.max_order and self.step is not None and self.step != step and self.fits(feature):
            for previous in self.factors[: self.max_order]:
                difference = factors[-1] - previous
                factors.append(difference if step - self.step == 1 else difference.div_(step - self.step))
        self.factors, self.step = factors, step
        self._feature = feature.shape, feature.dtype, feature.device

    def predict(self, step: int) -> Tensor:
        """Return the forecast for a step, in the type of the features.

        Raises:
            RuntimeError: There was no update yet.
        """
        if self.step is None or self._feature is None:
            raise RuntimeError("There is nothing to forecast from before the first update.")
        distance = step - self.step
        total = self.factors[0]
        for order, factor in enumerate(self.factors[1:], start=1):
            total = torch.add(total, factor, alpha=distance**order / math.factorial(order))
        return total.to(self._feature[1])
