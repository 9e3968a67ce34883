"""How the papers measure restored images, by name: what is compared, in which numbers, and the noise they add.

Facts only, without torch, so that `zoo --help` can list them; `zoo.evaluation.metrics.measure` computes the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PROTOCOLS", "Protocol", "ProtocolName", "find_protocol", "protocol_of_task"]

ProtocolName = Literal["y-crop", "rgb", "derain", "deblur", "realblur", "dpdd", "sidd", "jpeg", "photo"]
SsimWindow = Literal["gaussian", "volume", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to compare a restored image with the truth.

    Args:
        name: What it is called.
        space: "y" compares BT.601 luma, "rgb" all channels.
        rounded_luma: Luma is rounded to whole numbers, as MATLAB does for 8-bit images.
        crop_scale: Leave out as many border pixels on each side as the scale is, none at scale 1.
        quantize: Round to 8 bits first; otherwise floats are compared.
        window: Of SSIM; see `zoo.evaluation.metrics.ssim`.
        mae: Report the mean absolute error too.
        aligned: Lay the restored image onto the truth first, and leave out what has no counterpart; see
            `zoo.evaluation.realblur`.
        degradation: What makes the input of a clean image: "bicubic", "noise", "jpeg", "photo", or None where it is
            given as a file.
        summary: One line for tables and cards.
    """

    name: str
    space: Literal["y", "rgb"] = "rgb"
    rounded_luma: bool = False
    crop_scale: bool = False
    quantize: bool = True
    window: SsimWindow = "gaussian"
    mae: bool = False
    aligned: bool = False
    degradation: Literal["bicubic", "noise", "jpeg", "photo"] | None = None
    summary: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers it gives."""
        return ("psnr", "ssim", "mae") if self.mae else ("psnr", "ssim")


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="y-crop",
            space="y",
            crop_scale=True,
            degradation="bicubic",
            summary="BasicSR's for super-resolution: MATLAB bicubic LR, 8-bit output, unrounded BT.601 luma, as many "
            "border pixels cropped as the scale is, SSIM with an 11x11 Gaussian",
        ),
        Protocol(
            name="rgb",
            degradation="noise",
            summary="Gaussian denoising: noise of np.random.seed(0) for each image, neither clipped nor rounded, 8-bit "
            "output, all RGB values, no crop, SSIM with an 11x11 Gaussian, mean of the channels",
        ),
        Protocol(
            name="derain",
            space="y",
            rounded_luma=True,
            summary="MATLAB's for deraining: 8-bit output, luma rounded to 8 bits (rgb2ycbcr), no crop, SSIM with an "
            "11x11 Gaussian (ssim_index)",
        ),
        Protocol(
            name="deblur",
            window="volume",
            summary="MATLAB's for GoPro and HIDE: 8-bit RGB, no crop, SSIM of the image as a volume (3-D Gaussian of "
            "sigma 1.5, replicated border)",
        ),
        Protocol(
            name="realblur",
            aligned=True,
            summary="RealBlur: 8-bit RGB, brightness scaled and image warped onto the truth (ECC homography, needs "
            "OpenCV), pixels without counterpart left out, SSIM with an 11x11 Gaussian, mean of the channels",
        ),
        Protocol(
            name="dpdd",
            quantize=False,
            window="uniform",
            mae=True,
            summary="DPDD: unrounded RGB, no crop, scikit-image's SSIM (7x7 mean), mean absolute error of [0, 1]; "
            "LPIPS is not measured",
        ),
        Protocol(
            name="sidd",
            quantize=False,
            window="volume",
            summary="SIDD validation blocks: unrounded RGB, no crop, MATLAB's SSIM of the image as a volume",
        ),
        Protocol(
            name="jpeg",
            space="y",
            crop_scale=True,
            degradation="jpeg",
            summary="compressed photos: MATLAB bicubic LR (none at scale 1), Pillow's JPEG with colour at half "
            "resolution (--jpeg-quality), 8-bit output, unrounded BT.601 luma, as many border "
            "pixels cropped as the scale is",
        ),
        Protocol(
            name="photo",
            space="y",
            crop_scale=True,
            degradation="photo",
            summary="real photos as zoo.data.degradations.RealPhoto makes them (blur, resizing, camera noise, JPEG, in "
            "random order, with the generator (0, i) for image i), 8-bit output, unrounded BT.601 luma, as many border "
            "pixels cropped as the scale is",
        ),
    )
}
"""Every named protocol."""

_OF_TASK = {
    "sr": "y-crop",
    "denoise": "rgb",
    "derain": "derain",
    "deblur": "deblur",
    "defocus": "dpdd",
    "restore": "jpeg",
}


def find_protocol(name: str) -> Protocol:
    """Return a protocol by its name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"No protocol is called {name!r}; there are {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def protocol_of_task(task: str) -> Protocol:
    """Return the protocol that is customary for a task: "sr", "denoise", "derain", "deblur", "defocus" or "restore".

    Raises:
        ValueError: There is none for this task.
    """
    if task not in _OF_TASK:
        raise ValueError(f"No protocol is customary for the task {task!r}; tasks are {', '.join(_OF_TASK)}.")
    return PROTOCOLS[_OF_TASK[task]]
