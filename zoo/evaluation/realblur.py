"""Lay a deblurred image onto its truth, as the evaluation of RealBlur does: brightness, then a homography.

Real-World Blur Dataset for Learning and Benchmarking Deblurring Algorithms (Rim et al., ECCV 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["align"]

_ITERATIONS = 100
_FILTER = 5  # side of the Gaussian that both images are smoothed with first, pixels


def align(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the brightness of an image and warp it, so that it fits another best.

    The factor is that of least squares, the homography maximises the enhanced correlation coefficient of the gray
    images (100 iterations), and pixels are interpolated by a cubic.

    Args:
        output: (C, H, W), 1 or 3 channels, in [0, 1].
        target: The same shape and range.

    Returns:
        The aligned image (C, H, W), not clamped, and where it has pixels: (H, W), 1 or 0; float32 on the CPU.

    Raises:
        ValueError: No homography is found, for example in an image of one colour.
        ImportError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("Aligning images needs OpenCV, which is missing: pip install 'ffn-zoo[realblur]'.") from error
    image, truth = (x.detach().cpu().float().permute(1, 2, 0).numpy().copy() for x in (output, target))
    image *= np.vdot(image, truth) / max(float(np.vdot(image, image)), 1e-12)

    def gray(x: NDArray[np.float32]) -> Any:
        return cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) if x.shape[2] == 3 else np.ascontiguousarray(x[..., 0])

    start: Any = np.eye(3, dtype=np.float32)
    no_mask: Any = None  # OpenCV's types ask for one
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ITERATIONS, 0)
    try:
        _, warp = cv2.findTransformECC(
            gray(truth), gray(image), start, cv2.MOTION_HOMOGRAPHY, criteria, no_mask, _FILTER
        )
    except cv2.error as error:
        raise ValueError("The image cannot be aligned with its truth: the two have too little in common.") from error
    size, inverse = (image.shape[1], image.shape[0]), cv2.WARP_INVERSE_MAP
    aligned = cv2.warpPerspective(image, warp, size, flags=cv2.INTER_CUBIC + inverse, borderMode=cv2.BORDER_REFLECT)
    ones = np.ones(image.shape[:2], np.float32)
    mask = cv2.warpPerspective(ones, warp, size, flags=cv2.INTER_NEAREST + inverse, borderMode=cv2.BORDER_CONSTANT)
    return torch.from_numpy(aligned.reshape(image.shape)).permute(2, 0, 1), torch.from_numpy(mask)
