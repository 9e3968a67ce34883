"""What tests of several caches ask of a model."""

from __future__ import annotations

from typing import Any

import torch
from denoisers import dit, pixel_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from torch import Tensor, nn

from zoo.caching.hooks import placed_hooks
from zoo.diffusion import PixelDiTPipeline


class Count:
    """Count the calls of a module's own forward, below all hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.calls, forward = 0, module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(*args, **kwargs)

        module.forward = counted


def assert_clean(model: nn.Module) -> None:
    """No trace of a cache is left."""
    assert not list(placed_hooks(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert "_zoo_cache" not in model.__dict__
    assert not getattr(model, "_cache_config", None)
    for module in list(model.modules())[1:]:
        assert "forward" not in module.__dict__
        assert "_diffusers_hook" not in module.__dict__


def class_pipeline(kind: str = "pixel_dit") -> DiffusionPipeline:
    """Return a pipeline around PixelDiT (with CacheMixin) or diffusers' DiT (without, and without any context)."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    if kind == "pixel_dit":
        pipe: DiffusionPipeline = PixelDiTPipeline(pixel_dit(), scheduler)
    else:
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        model = dit()
        for block in model.transformer_blocks:  # the pipeline asks for class 1000
            block.norm1.emb.class_embedder.embedding_table = nn.Embedding(1001, 16)
        pipe = DiTPipeline(model, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline, seed: int = 0, steps: int = 6, labels: tuple[int, ...] = (1, 2)) -> Tensor:
    """Run the pipeline."""
    return pipe(list(labels), num_inference_steps=steps, generator=torch.manual_seed(seed), output_type="pt").images


def abort_after(pipe: DiffusionPipeline, stop_after: int, **arguments: Any) -> None:
    """Run the pipeline and stop it in the scheduler, as an impatient user does."""
    step, calls = pipe.scheduler.step, []

    def abort(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    pipe.scheduler.step = abort
    try:
        generate(pipe, **arguments)
    except KeyboardInterrupt:
        return
    finally:
        del pipe.scheduler.step
    raise AssertionError("it was to be aborted")
