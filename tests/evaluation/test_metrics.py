"""PSNR and SSIM: known values, other implementations, and the literature's figures for bicubic interpolation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from zoo.data.resize import imresize
from zoo.evaluation.metrics import FeatureStatistics, frechet_distance, luma, psnr, square_root, ssim


def images(size: tuple[int, int] = (40, 33), channels: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw 8-bit images and noisy versions of them."""
    target = torch.nn.functional.interpolate(torch.rand(batch, channels, 9, 9), size, mode="bicubic").clamp(0, 1)
    target = (target * 255).round() / 255
    return (target + 0.05 * torch.randn_like(target)).clamp(0, 1), target


def test_luma() -> None:
    """Studio swing: black is 16, white 235, gray the same as three equal channels."""
    colors = torch.tensor([[0.0, 0, 0], [255, 255, 255], [255, 0, 0]]).view(3, 3, 1, 1)
    assert luma(colors).flatten().tolist() == pytest.approx([16, 235, 81.481], abs=1e-3)
    assert luma(colors, rounded=True).flatten().tolist() == [16, 235, 81]
    half = torch.tensor([132.0, 4, 6]).view(1, 3, 1, 1)  # exactly 52.5, which 1000 * 65.481 in floats falls short of
    assert luma(half, rounded=True).item() == 53
    gray = torch.rand(1, 1, 4, 4) * 255
    assert torch.allclose(luma(gray), luma(gray.expand(1, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) or \(B, 3, H, W\), got \(1, 2, 4, 4\)"):
        luma(torch.zeros(1, 2, 4, 4))


def test_psnr_of_a_known_error() -> None:
    target = torch.full((2, 3, 8, 8), 100 / 255)
    output = target.clone()
    output[1] += 5 / 255
    found = psnr(output, target, space="rgb")
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([math.inf, 10 * math.log10(255**2 / 25)])
    on_luma = 10 * math.log10(255**2 / (5 * 219 / 255) ** 2)
    assert float(psnr(output, target, space="y")[1]) == pytest.approx(on_luma, abs=1e-4)


def test_quantize() -> None:
    """Rounding to 8 bits, half to even, and clamping; or not."""
    target = torch.full((1, 1, 4, 4), 100 / 255)
    assert math.isinf(psnr(target + 0.4 / 255, target, space="rgb"))
    assert math.isfinite(psnr(target + 0.4 / 255, target, space="rgb", quantize=False))
    white = torch.ones(1, 1, 4, 4)
    assert math.isinf(psnr(white * 1.5, white, space="rgb"))


def test_crop() -> None:
    output, target = images()
    spoiled = output.clone()
    spoiled[..., :3, :] = 0
    spoiled[..., -3:] = 0
    assert torch.equal(psnr(spoiled, target, space="y", crop=3), psnr(output, target, space="y", crop=3))
    assert torch.equal(ssim(spoiled, target, space="y", crop=3), ssim(output, target, space="y", crop=3))


@pytest.mark.parametrize("space", ["y", "rgb"])
def test_ssim_is_scikit_images(space: str) -> None:
    """scikit-image's map without the border of five pixels, as MATLAB does; torchmetrics' mean has the border in."""
    output, target = images()
    found = ssim(output, target, space=space, quantize=False)
    planes = [255 * image.double() for image in (output, target)]
    if space == "y":
        planes = [luma(image) for image in planes]
    for index in range(2):
        _, values = structural_similarity(
            *(image[index].permute(1, 2, 0).numpy() for image in planes),
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            full=True,
        )
        assert float(found[index]) == pytest.approx(values[5:-5, 5:-5].mean(), abs=1e-6)


def test_ssim_of_equal_images_is_one() -> None:
    _, target = images()
    assert ssim(target, target, space="y").tolist() == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_refusals(measure: object) -> None:
    output, target = images()
    with pytest.raises(ValueError, match="alike, got"):
        measure(output[..., 1:], target, space="y")
    with pytest.raises(ValueError, match='space must be "y" or "rgb", got \'luma\''):
        measure(output, target, space="luma")
    with pytest.raises(ValueError, match="leave pixels of a 40x33 image, got 17"):
        measure(output, target, space="y", crop=17)
    with pytest.raises(ValueError, match="leave pixels of a 40x12 image, got 6"):
        measure(output[..., :12], target[..., :12], space="y", crop=6)


def test_ssim_needs_room() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels after the crop, got 10x30"):
        ssim(*images((14, 34)), space="y", crop=2)


ANCHORS = {  # dB of bicubic enlargement, the customary table (rounded luma)
    ("Set5", 2): 33.64,
    ("Set5", 3): 30.39,
    ("Set5", 4): 28.42,
    ("Set14", 2): 30.31,
    ("Set14", 4): 26.09,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), ANCHORS, ids=str)
def test_bicubic_anchors(name: str, scale: int, data_dir: Path) -> None:
    values = []
    for path in sorted((data_dir / "sr" / name / "LR_bicubic" / f"X{scale}").glob("*.png")):
        low = np.asarray(Image.open(path).convert("RGB"))
        stem = path.stem.removesuffix(f"x{scale}")
        high = np.asarray(Image.open(data_dir / "sr" / name / "HR" / f"{stem}.png").convert("RGB"))
        output = imresize(low, scale)
        high = high[: output.shape[0], : output.shape[1]]
        pair = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in (output, high)]
        values.append(float(psnr(*pair, space="y", crop=scale, rounded_luma=True)))
    assert len(values) == {"Set5": 5, "Set14": 14}[name]
    assert np.mean(values) == pytest.approx(ANCHORS[name, scale], abs=0.006)


def test_statistics_come_batch_by_batch() -> None:
    """Mean and covariance are those of all images, also far from zero, whatever the batches."""
    features = 1e4 + torch.randn(57, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    found = FeatureStatistics(5)
    for batch in features.split([1, 20, 0, 36]):
        found.update(batch)
    torch.testing.assert_close(found.mean, features.mean(0))
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)
    assert found.count == 57


def test_refused_statistics() -> None:
    found = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"features must be \(B, 3\), got \(2, 4\)"):
        found.update(torch.zeros(2, 4))
    found.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = found.covariance
    for samples, side in ((2, 4), (1, 3)):
        with pytest.raises(ValueError, match=r"two or more, .* must be of one size"):
            frechet_distance(torch.zeros(samples, 3), torch.zeros(3), torch.eye(side))


def test_frechet_distance_of_diagonal_covariances() -> None:
    """Without correlation it is the sum over axes of (m1 - m2)² + (s1 - s2)²."""
    means, deviations = torch.randn(2, 7, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    centred = torch.randn(30, 7, dtype=torch.float64)
    samples = torch.linalg.qr(centred - centred.mean(0)).Q * 29**0.5 * deviations[0] + means[0]
    torch.testing.assert_close(samples.T.cov(), deviations[0].square().diag())
    found = frechet_distance(samples, means[1], square_root(deviations[1].square().diag()))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_in_general() -> None:
    """It does not change under rotation or exchange, is 0 for equal sets, and stands fewer samples than features."""

    def distance(first: Tensor, second: Tensor) -> float:
        return frechet_distance(first, second.mean(0), square_root(second.T.cov()))

    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64) * 2 + 1
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    found = distance(x, y)
    assert found > 1
    assert distance(y, x) == pytest.approx(found, rel=1e-6)
    assert distance(x @ turn, y @ turn) == pytest.approx(found, rel=1e-6)
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    product = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real.sum()
    plain = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * product
    assert found == pytest.approx(float(plain), rel=1e-5)
