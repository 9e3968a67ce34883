"""Calibration batches carry the target that the scheduler says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tests.denoisers import pixel_dit
from zoo.diffusion import PixelDiTPipeline
from zoo.moe.calibration import class_batches, flow_batches, sampled_images


def pipeline(prediction: str = "v_prediction") -> Any:
    pipe = PixelDiTPipeline(pixel_dit(), DDIMScheduler(prediction_type=prediction))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_targets(prediction: str) -> None:
    """Image and noise of a batch come back from its noisy image and its target."""
    pipe = pipeline(prediction)
    clean = torch.randn(6, 3, 8, 8)
    batch = next(class_batches(pipe, [(clean, torch.arange(6) % 4)]))
    alpha = pipe.scheduler.alphas_cumprod[batch["timestep"]].view(-1, 1, 1, 1)
    noise = (batch["hidden_states"] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    expected = {"epsilon": noise, "sample": clean, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
    torch.testing.assert_close(batch["target"], expected[prediction], rtol=1e-3, atol=1e-3)
    assert batch["timestep"].unique().numel() == 6  # one from each sixth of the schedule


def test_flow() -> None:
    latents = torch.randn(2, 4, 3)
    batch = next(flow_batches([{"latents": latents, "pooled_projections": torch.zeros(2, 1)}]))
    share = batch["timestep"].view(-1, 1, 1)
    torch.testing.assert_close(batch["hidden_states"], latents + share * batch["target"])
    assert batch["guidance"].tolist() == [3.5, 3.5]
    assert "latents" not in batch


def test_own_samples() -> None:
    found = list(sampled_images(pipeline(), 5, batch_size=3, steps=2))
    assert [len(images) for images, _ in found] == [3, 2]
    assert torch.cat([labels for _, labels in found]).tolist() == [0, 1, 2, 3, 0]
    assert all(images.min() >= -1 and images.max() <= 1 for images, _ in found)
    whole = torch.cat([images for images, _ in sampled_images(pipeline(), 5, batch_size=5, steps=2)])
    assert whole.shape == (5, 3, 8, 8)
