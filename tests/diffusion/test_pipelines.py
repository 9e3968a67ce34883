"""PixelDiTPipeline: from labels to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh_process
import numpy as np
import pytest
import torch
from denoisers import pixel_dit
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from zoo.diffusion import PixelDiT, PixelDiTPipeline
from zoo.moe import MoEConfig, convert

NAMES = {0: "cat", 1: "dog", 2: "frog", 3: "ship"}
SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


def scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, timestep_spacing="trailing"
    )


def pipeline(**changes: Any) -> PixelDiTPipeline:
    torch.manual_seed(0)
    pipe = PixelDiTPipeline(pixel_dit(**changes), scheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Oracle(PixelDiT):
    """Knows the answer: predicts the velocity that leads to one fixed image."""

    truth = torch.linspace(-0.9, 0.9, 192).view(1, 3, 8, 8)
    alphas = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        low, high = timestep.double().floor().long(), timestep.double().ceil().long()
        alpha = torch.lerp(self.alphas[low], self.alphas[high], timestep.double() - low).view(-1, 1, 1, 1)
        noise = (hidden_states.double() - alpha.sqrt() * self.truth) / (1 - alpha).sqrt()
        velocity = (alpha.sqrt() * noise - (1 - alpha).sqrt() * self.truth).float()
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_every_scheduler_finds_the_image(cls: type) -> None:
    """With a perfect denoiser all schedulers end at one image: noise scale, input scale and timesteps are right."""
    torch.manual_seed(0)
    oracle = Oracle(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_classes=4)
    pipe = PixelDiTPipeline(oracle, cls.from_config(scheduler().config))
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1], num_inference_steps=20, seed=0, output_type="pt").images
    expected = (oracle.truth / 2 + 0.5).expand_as(images)
    assert (images - expected).abs().max() < 0.03


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_every_scheduler_is_seeded(cls: type) -> None:
    """The same seed gives the same image, whatever else is in the batch; another seed another image."""
    pipe = pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    images = pipe(["cat", "dog"], num_inference_steps=4, seed=[5, 7], output_type="pt").images
    alone = pipe("dog", num_inference_steps=4, seed=7, output_type="pt").images
    assert images.isfinite().all()
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, pipe("dog", num_inference_steps=4, seed=8, output_type="pt").images, atol=1e-2)


def test_guidance_in_one_batch_equals_two_calls() -> None:
    pipe = pipeline()
    noise = torch.randn(2, 3, 8, 8)
    batched = pipe([1, 2], num_inference_steps=5, guidance_scale=2.5, latents=noise, output_type="latent").images
    steps, sample = scheduler(), noise
    steps.set_timesteps(5)
    with torch.no_grad():
        for timestep in steps.timesteps:
            time = timestep.expand(2)
            conditional = pipe.transformer(sample, time, torch.tensor([1, 2])).sample
            unconditional = pipe.transformer(sample, time, torch.tensor([4, 4])).sample
            guided = unconditional + 2.5 * (conditional - unconditional)
            sample = steps.step(guided, timestep, sample).prev_sample
    torch.testing.assert_close(batched, sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 2), (0.0, 2), (3.0, 4)])
def test_guidance_doubles_the_batch_only_where_needed(guidance_scale: float, batch: int) -> None:
    pipe, seen = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    pipe([0, 1], num_inference_steps=2, guidance_scale=guidance_scale, seed=0)
    assert seen == [batch, batch]


def test_model_without_null_label_cannot_be_guided() -> None:
    pipe = pipeline(class_dropout_prob=0.0)
    pipe(0, num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        pipe(0, num_inference_steps=1, guidance_scale=2.0)


def test_output_types() -> None:
    pipe = pipeline()
    call = dict(class_labels=["frog", 3], num_inference_steps=2, seed=1)
    tensor = pipe(**call, output_type="pt").images
    array = pipe(**call, output_type="np").images
    pictures = pipe(**call).images
    assert tensor.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    np.testing.assert_allclose(np.asarray(pictures[0]), array[0] * 255, atol=0.51)
    assert torch.equal(pipe(**call, output_type="pt", return_dict=False)[0], tensor)


def test_generators_and_latents() -> None:
    pipe = pipeline()
    seeded = pipe([0, 1], num_inference_steps=2, seed=3, output_type="pt").images
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(pipe([0, 1], num_inference_steps=2, generator=generators, output_type="pt").images, seeded)
    one = pipe([0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert torch.equal(one[0], seeded[0])
    assert not torch.equal(one[1], seeded[1])


def test_callback_sees_and_replaces_latents() -> None:
    pipe, steps = pipeline(), []

    def zero(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append((index, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(0, num_inference_steps=3, callback_on_step_end=zero, output_type="pt").images
    assert [index for index, _ in steps] == [0, 1, 2]
    assert (images == 0.5).all()


def test_eta_reaches_the_scheduler() -> None:
    pipe = pipeline()
    call = dict(class_labels=0, num_inference_steps=4, seed=0, output_type="pt")
    assert not torch.equal(pipe(**call).images, pipe(**call, eta=1.0).images)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no eta"):
        pipe(**call, eta=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"class_labels": "cta"},
            "No class is called 'cta'. Did you mean 'cat'\\? The classes are cat, dog, frog, ship",
        ),
        ({"class_labels": "Ship"}, "Did you mean 'ship'"),
        ({"class_labels": [0, 4]}, "from 0 to 3, got 4"),
        ({"class_labels": -1}, "from 0 to 3, got -1"),
        ({"class_labels": []}, "empty"),
        ({"output_type": "jpeg"}, "output_type must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"seed": [1, 2]}, "1 images, but 2 seeds"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents must be \(1, 3, 8, 8\), got \(1, 3, 4, 4\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may hold 'latents' only"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"class_labels": 0, **arguments})


def test_names_need_names() -> None:
    with pytest.raises(ValueError, match="no class names"):
        PixelDiTPipeline(pixel_dit(), scheduler())("cat")
    with pytest.raises(ValueError, match="each of the 4 classes its own name"):
        PixelDiTPipeline(pixel_dit(), scheduler(), id2label={0: "cat", 1: "dog"})


def test_scheduler_for_another_prediction_is_refused() -> None:
    """Otherwise a default DDIMScheduler() would take the velocity for noise and draw nonsense."""
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"predicts 'v_prediction'.*'epsilon'.*DDIMScheduler.from_config"):
        pipe(0)


def test_save_and_load(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is PixelDiTPipeline
    assert type(loaded.transformer) is PixelDiT
    assert loaded.id2label == NAMES
    call = dict(class_labels=["ship", "cat"], num_inference_steps=3, seed=0, output_type="pt")
    assert torch.equal(loaded(**call).images, pipe(**call).images)
    half = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    assert half(**call).images.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["zoo", "diffusers", "moe"])
def test_diffusers_finds_the_class_in_a_new_process(tmp_path: Path, first: str) -> None:
    """Whichever is imported first; and importing zoo does not import diffusers."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "dense")
    experts, _ = convert(pipe.transformer, MoEConfig(scores="random"))
    pipe.register_modules(transformer=experts)
    pipe.save_pretrained(tmp_path / "moe")
    imports = {
        "zoo": "import sys, zoo; assert 'diffusers' not in sys.modules; import zoo.diffusion, diffusers",
        "diffusers": "from diffusers import DiffusionPipeline; import diffusers, zoo.diffusion",
        "moe": "import zoo.moe, zoo.diffusion, diffusers",
    }[first]
    dense, moe = str(tmp_path / "dense"), str(tmp_path / "moe")
    program = (
        f"{imports}; load = diffusers.DiffusionPipeline.from_pretrained; print(type(load({dense!r})));"
        f"assert type(load({moe!r}).transformer).__name__ == 'MoEPixelDiT'"
    )
    done = fresh_process.run(program)
    assert "<class 'zoo.diffusion.pipelines.PixelDiTPipeline'>" in done.stdout, done.stderr
