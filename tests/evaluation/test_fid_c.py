"""FID-C: the shipped statistics, and how they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from zoo.evaluation import fid_c
from zoo.evaluation.fid_c import (
    FID_C,
    FID_C_ERROR,
    RECOGNISED,
    Judge,
    Reference,
    SampleJudge,
    load_judge,
    load_reference,
    write_reference,
)


def small() -> Judge:
    size = dict(embed_dim=16, depth=1, num_heads=2, img_size=16, patch_size=8)
    overlay = dict(input_size=(3, 16, 16))
    return Judge(timm.create_model("repavit_tiny", num_classes=3, pretrained_cfg_overlay=overlay, **size))


def test_shipped_statistics() -> None:
    """They are of the shipped classifier, well formed, and tell noise from pictures' statistics."""
    found, judge = load_reference(), load_judge()
    assert found.count == 10_000
    features, classes = judge(torch.rand(4, 3, 32, 32))
    assert features.shape == (4, len(found.mean))
    assert classes.shape == (4,)
    assert torch.equal(found.covariance, found.covariance.T)
    assert torch.linalg.eigvalsh(found.covariance).min() > -1e-6
    assert fid_c.STATISTICS.stat().st_size < 1e6
    exact = torch.distributions.MultivariateNormal(found.mean, found.covariance + 1e-9 * torch.eye(len(found.mean)))
    assert found.distance(exact.sample((5000,))) < 0.1 * found.distance(features)


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal sets have distance 0; other weights of the classifier are noticed."""
    judge, images = small(), torch.rand(30, 3, 16, 16)
    path = tmp_path / "s.safetensors"
    assert write_reference(images.split(8), judge, path) == 30
    found = load_reference(path)
    assert isinstance(found, Reference)
    assert found.count == 30
    assert found.distance(judge(images)[0]) == pytest.approx(0, abs=1e-5)
    assert found.distance(judge(torch.zeros_like(images))[0]) > 1e-4
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(fid_c, "sha256_of", lambda file: "0")
    with pytest.raises(ValueError, match="other weights of emov2_1m"):
        load_reference(path)
    with pytest.raises(ValueError, match="no images"):
        write_reference([], judge, path)


def test_judge_agrees_with_the_model() -> None:
    """Pooled features go into the classifier; images of other sizes are enlarged."""
    judge = small()
    model, images = judge.model, torch.rand(5, 3, 16, 16)

    def normalised(images: Tensor) -> Tensor:
        return (images - torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(
            model.pretrained_cfg["std"]
        ).view(3, 1, 1)

    features, classes = judge(images)
    with torch.inference_mode():
        logits = model(normalised(images))
        torch.testing.assert_close(model.get_classifier()(features), logits)
    assert torch.equal(classes, logits.argmax(1))
    assert judge(torch.rand(2, 3, 8, 8))[0].shape == (2, features.shape[1])


def test_error_of_a_difference() -> None:
    """Where the distance is the mean of the features, the jackknife gives the standard error of a paired mean."""

    class Mean:
        count = 0

        def distance(self, features: torch.Tensor) -> float:
            return float(features.mean())

    judge = SampleJudge([0])
    judge._judge = lambda images: (images[:, 0, 0, :1], None)  # type: ignore[assignment]
    judge._reference = Mean()  # type: ignore[assignment]
    torch.manual_seed(0)
    images = torch.randn(400, 1, 1, 1)
    others = images + 0.5 * torch.randn(400, 1, 1, 1)
    assert judge.difference_error(images, others) == pytest.approx(0.5 / 400**0.5, rel=0.3)
    assert judge.difference_error(images, images) == 0


def test_samples_are_compared_with_others() -> None:
    torch.manual_seed(0)
    images, judge = torch.rand(4, 3, 32, 32), SampleJudge([0, 1, 2, 3])
    assert list(judge(images)) == [FID_C, RECOGNISED]
    found = judge(images, images.flip(-1))
    assert list(found) == [FID_C, FID_C_ERROR, RECOGNISED]
    assert found[FID_C] > 0 < found[FID_C_ERROR]
