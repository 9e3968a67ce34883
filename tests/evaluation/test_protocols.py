"""Named protocols: the papers' noise bit for bit, and each number against another implementation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d
from skimage.metrics import structural_similarity

from zoo.data.degradations import JpegCompression, noisy
from zoo.data.photos import Pair
from zoo.data.resize import imresize
from zoo.evaluation.metrics import luma, mae, measure, psnr, ssim
from zoo.evaluation.protocols import PROTOCOLS, find_protocol, protocol_of_task
from zoo.evaluation.realblur import align
from zoo.evaluation.restorers import load_pair


def images(size: tuple[int, int] = (40, 33), channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw an 8-bit image and a noisy version of it, of floats beyond [0, 1] here and there."""
    target = torch.nn.functional.interpolate(torch.rand(1, channels, 9, 9), size, mode="bicubic").clamp(0, 1)
    target = (target * 255).round() / 255
    return target + 0.05 * torch.randn_like(target), target


@pytest.mark.parametrize("sigma", [15, 25.0, 50])
def test_noise_is_numpys_bit_for_bit(sigma: float) -> None:
    """What Restormer's test script does, and the global generator is not touched."""
    image = np.random.rand(13, 17, 3).astype(np.float32)
    expected = image.copy()
    np.random.seed(0)
    expected += np.random.normal(0, sigma / 255.0, expected.shape)
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    found = noisy(image, sigma)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert np.array_equal(np.random.get_state()[1], state)
    assert not np.array_equal(found, image)


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """MATLAB's `ssim` of an array of any number of axes, by SciPy: sigma 1.5, radius 5, replicated borders."""
    place = np.arange(-5, 6)
    weights = np.exp(-(place**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(z: np.ndarray) -> np.ndarray:
        for axis in range(z.ndim):
            z = correlate1d(z, weights, axis, mode="nearest")
        return z

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = (blur(a * b) - m for a, b, m in (
        (x, x, mean_x**2), (y, y, mean_y**2), (x, y, mean_x * mean_y)
    ))  # fmt: skip
    values = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((values / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 33), (5, 4)])
def test_ssim_of_a_volume(size: tuple[int, int], channels: int) -> None:
    output, target = images(size, channels)
    planes = [(image[0].clamp(0, 1) * 255).round().permute(1, 2, 0).double().numpy() for image in (output, target)]
    found = float(ssim(output, target, space="rgb", window="volume"))
    assert found == pytest.approx(by_hand(*planes), abs=1e-9)
    if channels == 3 and min(size) > 10:
        assert found > float(ssim(output, target, space="rgb")), "noise differs from channel to channel"


def test_ssim_with_a_uniform_window_is_scikit_images_default() -> None:
    output, target = images()
    planes = [image[0].clamp(0, 1).permute(1, 2, 0).double().numpy() for image in (output, target)]
    expected = structural_similarity(*planes, channel_axis=2, data_range=1)
    found = float(ssim(output, target, space="rgb", quantize=False, window="uniform"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_rounded_luma_is_exact() -> None:
    """Halves go up, as whole numbers decide them; float32 would not see them all."""
    colors = torch.randint(0, 256, (2000, 3, 8, 8), dtype=torch.int64)
    total = 65481 * colors[:, 0] + 128553 * colors[:, 1] + 24966 * colors[:, 2]
    assert torch.equal(luma(colors.float(), rounded=True)[:, 0].long(), (total + 127_500) // 255_000 + 16)
    halves = torch.tensor([[0.0, 204, 68], [2, 44, 141]]).view(2, 3, 1, 1)  # luma 125.5 and 52.5
    assert luma(halves, rounded=True).flatten().tolist() == [126, 53]


def test_mean_absolute_error() -> None:
    target = torch.full((2, 3, 8, 8), 0.5)
    output = target.clone()
    output[1, :, :4] += 0.1
    assert mae(output, target, space="rgb", quantize=False).tolist() == pytest.approx([0, 0.05], abs=1e-7)


@pytest.mark.parametrize("name", [name for name, protocol in PROTOCOLS.items() if not protocol.aligned])
def test_protocols_name_their_numbers(name: str) -> None:
    """Each gives what it promises; equal images are perfect; what it leaves out has no influence."""
    protocol, (output, target) = find_protocol(name), images()
    found = measure(protocol, output, target, scale=3)
    assert tuple(found) == protocol.metrics
    assert all(value.shape == (1,) and value.dtype == torch.float64 for value in found.values())
    perfect = measure(protocol, target, target, scale=3)
    assert math.isinf(perfect["psnr"])
    assert float(perfect["ssim"]) == pytest.approx(1, abs=1e-9)
    again = measure(protocol, output.clamp(0, 1), target, scale=3)
    assert all(torch.equal(again[key], found[key]) for key in found), "values beyond [0, 1] are clamped"
    rounded = (output.clamp(0, 1) * 255).round() / 255
    same = math.isclose(measure(protocol, rounded, target, scale=3)["psnr"], found["psnr"], abs_tol=1e-6)
    assert same == protocol.quantize
    spoiled = output.clone()
    spoiled[..., :3, :] = 0
    assert torch.equal(measure(protocol, spoiled, target, scale=3)["psnr"], found["psnr"]) == protocol.crop_scale


def test_protocols_are_their_formulas() -> None:
    output, target = images()
    found = {name: measure(protocol, output, target, scale=2) for name, protocol in PROTOCOLS.items()}
    assert found["y-crop"]["psnr"] == psnr(output, target, space="y", crop=2)
    assert found["rgb"]["psnr"] == found["deblur"]["psnr"] == psnr(output, target, space="rgb")
    assert found["derain"]["ssim"] == ssim(output, target, space="y", rounded_luma=True)
    assert found["deblur"]["ssim"] == ssim(output, target, space="rgb", window="volume")
    error = (output.clamp(0, 1) - target).double().square().mean()
    assert float(found["dpdd"]["psnr"]) == pytest.approx(float(-10 * torch.log10(error)), abs=1e-5)
    assert found["sidd"]["psnr"] == found["dpdd"]["psnr"]
    unrounded = (output.clamp(0, 1) - target).abs().double().mean()
    assert float(found["dpdd"]["mae"]) == pytest.approx(float(unrounded), rel=1e-6)


def test_aligned_images() -> None:
    """RealBlur: neither brightness nor a small shift counts; what comes from beyond the border is left out."""
    large = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 14), (96, 84), mode="bicubic").clamp(0, 1)
    target, shifted = large[..., 4:-4, 4:-4], large[..., 6:-2, 3:-5]
    protocol = find_protocol("realblur")
    found = measure(protocol, shifted, target)
    assert (measure(find_protocol("deblur"), shifted, target)["psnr"] < 25).all()
    assert (found["psnr"] > 33).all(), "brightness is scaled before the shift is found, which costs a little"
    assert (found["ssim"] > 0.99).all()
    darker = measure(protocol, 0.7 * shifted, target)
    assert torch.allclose(darker["psnr"], found["psnr"], atol=0.1), "but for rounding to 8 bits"
    aligned, mask = align(0.9 * shifted[0], target[0])
    assert 0.93 < float(mask.mean()) < 0.99
    assert float(((aligned - target[0]) * mask).abs().max()) < 0.06
    noise = 0.05 * torch.randn_like(target)
    noisier = measure(protocol, target + noise, target)
    assert torch.allclose(noisier["psnr"], measure(find_protocol("deblur"), target + noise, target)["psnr"], atol=0.3)


def test_ssim_of_aligned_images_is_scikit_images() -> None:
    """Gaussian weights, population covariances, five pixels of border left out."""
    output, target = images((48, 40))
    aligned, mask = align((output[0].clamp(0, 1) * 255).round() / 255, target[0])
    planes = [(image * mask).permute(1, 2, 0).double().numpy() for image in (target[0], aligned)]
    _, similarity = structural_similarity(
        *planes, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, data_range=1, full=True
    )
    inner = mask.double().numpy()[5:-5, 5:-5, None]
    expected = (similarity[5:-5, 5:-5] * inner).sum() / (3 * inner.sum())
    found = measure(find_protocol("realblur"), output, target)
    assert float(found["ssim"]) == pytest.approx(expected, abs=1e-6)
    error = np.square(planes[0] - planes[1]).sum() / (3 * mask.sum().item())
    assert float(found["psnr"]) == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_images_that_cannot_be_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, target = torch.full((1, 3, 32, 32), 0.5), images((32, 32))[1]
    with pytest.raises(ValueError, match="cannot be aligned with its truth"):
        measure(find_protocol("realblur"), flat, target)
    with pytest.raises(ValueError, match="SSIM needs at least 11 pixels a side"):
        measure(find_protocol("realblur"), flat[..., :9], flat[..., :9])
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'ffn-zoo\[realblur\]'"):
        align(target[0], target[0])


def test_tasks_have_protocols() -> None:
    names = [protocol_of_task(task).name for task in ("sr", "denoise", "derain", "deblur", "defocus", "restore")]
    assert names == ["y-crop", "rgb", "derain", "deblur", "dpdd", "jpeg"]
    with pytest.raises(ValueError, match=r"No protocol is called 'y'; there are y-crop"):
        find_protocol("y")
    with pytest.raises(ValueError, match="No protocol is customary for the task 'colour'"):
        protocol_of_task("colour")
    with pytest.raises(ValueError, match="window must be one of gaussian, volume, uniform"):
        ssim(*images(), space="rgb", window="box")  # type: ignore[arg-type]


def test_photos_are_made_the_same_each_time(tmp_path: Path) -> None:
    """JPEG after shrinking, and the random ways of real photos by the place of an image in its set."""
    clean = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(clean).save(tmp_path / "a.png")
    pair = Pair(tmp_path / "a.png")
    source, target = load_pair(pair, PROTOCOLS["jpeg"], scale=2, quality=75)
    expected = JpegCompression(75)(imresize(clean, 0.5), np.random.default_rng(0))
    assert np.array_equal((source[0] * 255).round().permute(1, 2, 0).numpy(), expected)
    assert target.shape == (1, 3, 24, 32)
    assert load_pair(pair, PROTOCOLS["jpeg"], quality=40)[0].shape == (1, 3, 24, 32)
    first, again, other = (load_pair(pair, PROTOCOLS["photo"], scale=2, index=i)[0] for i in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="needs degraded images as files"):
        load_pair(pair, PROTOCOLS["jpeg"], scale=2)
