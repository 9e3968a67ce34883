"""What the README says to users of Flux, Wan and Qwen-Image, line by line on tiny instances of their pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from denoisers import randomize
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from hooked import assert_clean
from torch import Tensor

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
LINES = [
    part
    for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    for part in block.split("\n\n")
    if "from_pretrained" in part
]


def text(words: str, width: int = 12) -> Tensor:
    return torch.randn(1, 3, width, generator=torch.Generator().manual_seed(len(words)))


class TinyFlux(FluxPipeline):
    """Flux without text encoders, for pictures of 16x16."""

    def encode_prompt(self, prompt: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return text(prompt), text(prompt)[:, 0], torch.zeros(3, 3)

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> TinyFlux:
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=1, latent_channels=4, shift_factor=0.1, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
        pipe = cls(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, randomize(transformer))
        pipe.default_sample_size = 16
        return pipe


class TinyWan(WanPipeline):
    """Wan without a text encoder, for videos of 16x16."""

    def encode_prompt(self, prompt: Any, negative_prompt: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return text(prompt), text(negative_prompt or "")

    def __call__(self, *args: Any, height: int, width: int, num_frames: int, **kwargs: Any) -> Any:
        assert (height, width, num_frames) == (480, 832, 33)
        return super().__call__(*args, height=16, width=16, num_frames=5, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> TinyWan:
        transformer = WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=12, freq_dim=16,
            ffn_dim=24, num_layers=3, rope_max_seq_len=16,
        )  # fmt: skip
        vae = AutoencoderKLWan(base_dim=3, num_res_blocks=1)
        return cls(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), randomize(transformer))


class TinyQwen(QwenImagePipeline):
    """Qwen-Image without a text encoder, for pictures of 16x16."""

    def encode_prompt(self, prompt: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        return text(prompt), None

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> TinyQwen:
        transformer = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=1,
            joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = cls(scheduler, AutoencoderKLQwenImage(base_dim=3, num_res_blocks=1), None, None, randomize(transformer))
        pipe.default_sample_size = 2
        return pipe


TINY: dict[str, Any] = {"FluxPipeline": TinyFlux, "WanPipeline": TinyWan, "QwenImagePipeline": TinyQwen}


def test_there_are_five_lines_for_each() -> None:
    own = [[line for line in part.splitlines() if line and not line.startswith("import")] for part in LINES]
    assert [len(lines) for lines in own if lines] == [5, 5, 5]
    assert [re.search(r"diffusers\.(\w+)", lines[0])[1] for lines in own] == list(TINY)  # type: ignore[index]


@pytest.mark.parametrize("lines", LINES, ids=TINY)
def test_lines(lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for name, tiny in TINY.items():
        monkeypatch.setattr(diffusers, name, tiny)
    names: dict[str, Any] = {}
    exec("import diffusers, zoo\n" + lines, names)
    said = capsys.readouterr().out
    assert re.search(r"skipped", said), said
    assert_clean(names["pipe"].transformer)
    assert ("image" in names) or len(names["frames"]) == 5
