"""Folders with tiny models of random weights, laid out as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from denoisers import pixel_dit
from diffusers import DDIMScheduler

import zoo  # noqa: F401  registers the models
from zoo.diffusion import PixelDiTPipeline
from zoo.weights import save_checkpoint


def classifier_folder(folder: Path) -> Path:
    """Write a RePaViT of two blocks for 16x16 pictures of 3 classes."""
    size = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=8)
    return _write(folder, "repavit_tiny", 3, size, dict(first_conv="patch_embed.proj", classifier="head"))


def restorer_folder(folder: Path) -> Path:
    """Write a CFSR x2 of one block."""
    return _write(folder, "cfsr_x2", 0, dict(embed_dim=8, depths=[1]), {})


def denoiser_folder(folder: Path) -> Path:
    """Write a PixelDiT pipeline for 8x8 pictures of 4 classes."""
    names = {0: "cat", 1: "dog", 2: "ship", 3: "truck"}
    torch.manual_seed(0)
    PixelDiTPipeline(pixel_dit(), DDIMScheduler(), id2label=names).save_pretrained(folder)
    return folder


def _write(folder: Path, name: str, classes: int, size: dict[str, Any], cfg: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **size)
    digest = save_checkpoint(model.state_dict(), folder / "model.safetensors")
    side = size.get("img_size", 64)
    config = {
        "architecture": name,
        "num_classes": classes,
        "label_names": ["red", "green", "blue"][:classes],
        "model_args": size,
        "pretrained_cfg": {"input_size": [3, side, side], **cfg},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(f"---\nsha256: {{model.safetensors: {digest}}}\n---\n\n# {name}\n")
    return folder
