"""What the numbers of a picture mean as light: profiles, gAMA, cHRM and cICP, and conversion to sRGB."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image, ImageCms

from zoo.pictures.metadata import Metadata
from zoo.pictures.picture import Array, Picture

__all__ = ["from_linear", "has_meaning", "profile_of", "to_linear", "to_srgb"]

# x and y of white, red, green and blue by the code points of H.273
_PRIMARIES = {
    1: (0.3127, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}  # transfer functions that are a power
_PQ, _HLG = 16, 18
_WHITE = 203.0  # cd/m2 of diffuse white in PQ pictures, ITU-R BT.2408


def has_meaning(metadata: Metadata) -> bool:
    """Tell whether chunks of a PNG, or a box of an AVIF, say something else than sRGB where there is no profile."""
    if metadata.icc_profile is not None:
        return False
    if metadata.cicp is not None:
        return metadata.cicp[:2] not in ((1, 13), (1, 1), (2, 2), (1, 2))
    if metadata.intent is not None:
        return False
    usual = metadata.gamma is None or abs(metadata.gamma - 0.45455) < 0.002
    primaries = metadata.chromaticity
    return not usual or (primaries is not None and _differ(primaries, _PRIMARIES[1]))


def _differ(first: Any, second: Any) -> bool:
    return any(abs(a - b) > 0.002 for a, b in zip(first, second, strict=True))


def is_hdr(metadata: Metadata) -> bool:
    """Tell whether the numbers stand for light up to thousands of cd/m2 (PQ or HLG), which no profile can say."""
    return metadata.icc_profile is None and metadata.cicp is not None and metadata.cicp[1] in (_PQ, _HLG)


def profile_of(metadata: Metadata, gray: bool) -> bytes:
    """Return the profile that says what gAMA and cHRM, or cICP other than PQ and HLG, say.

    Args:
        metadata: For which `has_meaning`, and not `is_hdr`.
        gray: Whether the picture is gray.
    """
    gamma, primaries, curve = None, _PRIMARIES[1], None
    if metadata.cicp is not None:
        primaries = _PRIMARIES.get(metadata.cicp[0], primaries)
        gamma = _GAMMAS.get(metadata.cicp[1])
    else:
        primaries = metadata.chromaticity or primaries  # type: ignore[assignment]
        gamma = None if metadata.gamma is None else 1 / metadata.gamma
    if gamma is None:
        curve = np.round(_srgb_to_linear(np.linspace(0, 1, 4096)) * 65535).astype(np.uint16)
    white, red, green, blue = ((*primaries[i : i + 2], 1.0) for i in (0, 2, 4, 6))
    options: dict[str, Any] = {"gamma": gamma} if curve is None else {"transferfunction": curve}
    if gray:
        return bytes(imagecodecs.cms_profile("gray", whitepoint=white, **options))
    return bytes(imagecodecs.cms_profile("rgb", whitepoint=white, primaries=(*red, *green, *blue), **options))


def says_srgb(icc_profile: bytes) -> bool:
    """Tell whether a profile is sRGB by its description."""
    try:
        return "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)))
    except (OSError, ImageCms.PyCMSError):
        return False


def to_srgb(picture: Picture) -> tuple[Picture, str | None]:
    """Return a picture in sRGB without profile, and what was done, for a format that holds none.

    A profile that cannot be used, because it is damaged or for other channels, is left out.
    """
    metadata = picture.metadata
    plain = dataclasses.replace(
        metadata, icc_profile=None, gamma=None, chromaticity=None, intent=None, cicp=None, light=()
    )
    if picture.black is not None:
        return dataclasses.replace(_from_inks(picture), metadata=plain), None
    if is_hdr(metadata):
        color = _sdr(picture)
        return (
            dataclasses.replace(picture, color=color, metadata=plain),
            "light above white is cut off, colours become sRGB",
        )
    profile = metadata.icc_profile
    if profile is None and has_meaning(metadata):
        profile = profile_of(metadata, picture.color.shape[2] == 1)
    if profile is None or says_srgb(profile):
        return dataclasses.replace(picture, metadata=plain), None
    try:
        color = _transform(picture.color, profile)
    except (ValueError, RuntimeError, TypeError):
        return dataclasses.replace(picture, metadata=plain), "the colour profile cannot be used and is left out"
    return dataclasses.replace(picture, color=color, metadata=plain), "colours become sRGB"


def _transform(color: Array, profile: bytes) -> Array:
    """Bring colour or gray from a profile to sRGB."""
    space = "gray" if color.shape[2] == 1 else "rgb"
    deep = color.dtype == np.float32
    pixels = np.round(color.clip(0, 1) * 65535).astype(np.uint16) if deep else color
    pixels = np.ascontiguousarray(pixels[..., 0] if space == "gray" else pixels)
    if space == "gray":
        curve = np.round(_srgb_to_linear(np.linspace(0, 1, 4096)) * 65535).astype(np.uint16)
        target = imagecodecs.cms_profile("gray", whitepoint=(0.3127, 0.329, 1.0), transferfunction=curve)
    else:
        target = imagecodecs.cms_profile("srgb")
    out = imagecodecs.cms_transform(
        pixels,
        profile,
        target,
        colorspace=space,
        outcolorspace=space,
        outdtype=pixels.dtype,
        planar=False,
        outplanar=False,
    )
    out = out.reshape(color.shape)
    return out.astype(np.float32) / 65535 if deep else out


def _from_inks(picture: Picture) -> Picture:
    """Turn CMYK into RGB, by its profile if it has one."""
    inks = picture.planes() if picture.alpha is None else picture.planes()[..., :4]
    if inks.dtype != np.uint8:
        inks = np.round(inks / picture.peak * 255).astype(np.uint8)
    image = Image.fromarray(255 - inks, "CMYK")
    profile = picture.metadata.icc_profile
    try:
        converted = (
            image.convert("RGB")
            if profile is None
            else ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        )
    except (ImageCms.PyCMSError, OSError):
        converted = image.convert("RGB")
    assert converted is not None  # it is not done in place
    alpha = picture.alpha
    if alpha is not None and alpha.dtype != np.uint8:
        alpha = np.round(alpha / picture.peak * 255).astype(np.uint8)
    return dataclasses.replace(picture, color=np.asarray(converted), black=None, alpha=alpha, mode="RGB")


def _sdr(picture: Picture) -> Array:
    """Bring PQ or HLG to sRGB, with diffuse white as white."""
    cicp = picture.metadata.cicp
    assert cicp is not None
    value = picture.color.astype(np.float64) / picture.peak
    if cicp[1] == _PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = value ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * 10000 / _WHITE
    else:  # ITU-R BT.2100, shown at 1000 cd/m2
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
        light = scene**1.2 * 1000 / _WHITE
    if light.shape[2] == 3:
        source, target = (_to_xyz(_PRIMARIES.get(code, _PRIMARIES[1])) for code in (cicp[0], 1))
        light = light @ (np.linalg.inv(target) @ source).T
    out = _linear_to_srgb(light.clip(0, 1))
    return out.astype(np.float32) if picture.peak == 1 else np.round(out * picture.peak).astype(picture.color.dtype)


def _to_xyz(primaries: tuple[float, ...]) -> Array:
    white, *others = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(*[iter(primaries)] * 2, strict=True))
    columns = np.stack(others, 1)
    return columns * np.linalg.solve(columns, white)


def _srgb_to_linear(value: Array) -> Array:
    return np.where(value <= 0.04045, value / 12.92, ((np.maximum(value, 0) + 0.055) / 1.055) ** 2.4)


def _linear_to_srgb(value: Array) -> Array:
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * np.maximum(value, 0) ** (1 / 2.4) - 0.055)


def to_linear(value: Array, metadata: Metadata) -> Array:
    """Return light for the numbers of a picture, both in [0, 1]: by gAMA where it stands alone, else as in sRGB."""
    gamma = metadata.gamma if has_meaning(metadata) and metadata.cicp is None else None
    return value ** (1 / gamma) if gamma else _srgb_to_linear(value)


def from_linear(light: Array, metadata: Metadata) -> Array:
    """Return the numbers of a picture for light; the reverse of `to_linear`."""
    gamma = metadata.gamma if has_meaning(metadata) and metadata.cicp is None else None
    return light**gamma if gamma else _linear_to_srgb(light)
