"""Graphs that take pictures as they are stored: 8-bit RGB in, probabilities or an 8-bit picture out.

Resampling is Pillow's, which zoo and timm prepare pictures with: two products with a matrix of weights, each rounded to
8 bits. ONNX's own Resize and torch's antialiased one differ from it by several levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim
from zoo.export.network import (
    ExportError,
    Kind,
    Network,
    difference,
    eager_copy,
    kind_of,
    require_normalisation,
    sample_inputs,
)

from zoo.cfg import temperature_of

__all__ = ["compare_pictures", "pictures_of", "preprocessing", "taking_pictures"]


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, as Pillow has it."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


class _Classifier(nn.Module):
    """Turn pictures of any size into what a classifier takes, and its logits into probabilities.

    Args:
        model: Takes (B, 3, side, side), normalised; returns logits, or features.
        facts: Of `preprocessing`.
        resize: Pictures come in any size; else in the network's own, cropped.
        softmax: Return probabilities.
        temperature: Divides the logits before it.

    Shape:
        (B, H, W, 3) uint8 -> (B, classes).
    """

    def __init__(
        self, model: nn.Module, facts: dict[str, Any], *, resize: bool, softmax: bool, temperature: float
    ) -> None:
        super().__init__()
        self.model, self.resize, self.softmax, self.temperature = model, resize, softmax, temperature
        self.side, self.resized = facts["input_size"][-1], math.floor(facts["input_size"][-1] / facts["crop_pct"])
        self.squash = facts["crop_mode"] == "squash"
        self.filter = _FILTERS.get(facts["interpolation"], _triangle)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(facts[name]).view(-1, 1, 1), persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        image = picture.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        if self.resize:
            rows, columns = (torch.arange(picture.shape[axis]) for axis in (1, 2))
            height, width = rows[-1] + 1, columns[-1] + 1
            across = self._weights(columns, width, height)
            down = self._weights(rows, height, width)
            image = (image @ across.T + 0.5).floor().clamp(0, 255)  # Pillow's order, and its rounding
            image = (down @ image + 0.5).floor().clamp(0, 255)
        found = self.model((image / 255 - self.mean) / self.std)
        return (found / self.temperature).softmax(-1) if self.softmax else found

    def _weights(self, pixels: Tensor, size: Tensor, other: Tensor) -> Tensor:
        """Return what each pixel of a side counts for each of the crop, (side, pixels).

        Args:
            pixels: 0, 1, ... of this side.
            size: Length of this side, pixels.
            other: Length of the other side.
        """
        whole = torch.full_like(size, self.resized)  # of the side after scaling
        after = whole if self.squash else torch.maximum(whole, torch.div(whole * size, other, rounding_mode="floor"))
        first = ((after - self.side).float() / 2).round()  # to even, as Python rounds
        scale = size.float() / after.float()
        center = (torch.arange(self.side).float() + first + 0.5) * scale
        weights = self.filter((pixels.float()[None] + 0.5 - center[:, None]) / scale.clamp_min(1))
        return weights / weights.sum(1, keepdim=True)


class _Restorer(nn.Module):
    """Turn 8-bit pictures into what a restorer takes, and what it returns into 8-bit pictures.

    Shape:
        (B, H, W, C) uint8 -> (B, scale * H, scale * W, C) uint8.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: Tensor) -> Tensor:
        restored = self.model(picture.permute(0, 3, 1, 2).float() / 255).clamp(0, 1)
        return (restored * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def preprocessing(model: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """Return timm's facts of how pictures are prepared: input_size, interpolation, mean, std, crop_pct, crop_mode.

    Args:
        model: A classifier.
        image_size: As in `prepare`.

    Raises:
        ValueError: It does not state mean and std.
    """
    require_normalisation(model)
    image = sample_inputs(model, "classifier", image_size, dynamic_size=False)[0]["image"]
    return {**resolve_model_data_config(model), "input_size": tuple(image.shape[1:])}


def _takes_any_size(facts: dict[str, Any]) -> bool:
    return (
        facts["interpolation"] in _FILTERS
        and facts["crop_mode"] in ("center", "squash")
        and facts["input_size"][-1] == facts["input_size"][-2]
    )


def taking_pictures(
    network: Network, model: nn.Module, *, image_size: int | None = None, dynamic_size: bool = True
) -> Network:
    """Return a network that takes pictures of uint8, (batch, height, width, channels).

    Args:
        network: What `prepare` returned for the model.
        model: The model; it is not changed.
        image_size: As in `prepare`.
        dynamic_size: Classifiers take pictures of any size, and scale and crop them; without it, pictures of the
            network's own size. Restorers take what the network takes.

    Raises:
        ValueError: It is neither a classifier of RGB pictures nor a restorer.
    """
    kind = network.metadata["kind"]
    if kind not in ("classifier", "restorer"):
        raise ValueError(
            f"Pictures go into classifiers and restorers; {network.metadata['name']} is exported as {kind}."
        )
    image = network.inputs["image"]
    if kind == "restorer":
        shapes = network.dynamic_shapes["image"]
        return replace(
            network,
            module=_Restorer(network.module).eval(),
            inputs={"picture": _stored(image)},
            output="picture_restored",
            dynamic_shapes={"picture": {{2: 1, 3: 2}.get(axis, axis): dim for axis, dim in shapes.items()}},
            metadata=network.metadata
            | {
                "input": "8-bit picture, uint8, (batch, height, width, channels)",
                "output": "the same, clipped, rounded",
            },
        )
    if image.shape[1] != 3:
        raise ValueError(f"Pictures have 3 channels; {network.metadata['name']} takes {image.shape[1]}.")
    facts = preprocessing(model, image_size)
    resize = dynamic_size and _takes_any_size(facts)
    softmax = network.output == "logits"
    shapes = {0: Dim("batch")} | ({1: Dim("height"), 2: Dim("width")} if resize else {})
    size = (facts["input_size"][-2] + 13, facts["input_size"][-1] + 37) if resize else facts["input_size"][-2:]
    taken = (
        "any size, scaled and cropped inside" if resize else f"{size[1]} x {size[0]} pixels, scaled and cropped before"
    )
    return replace(
        network,
        module=_Classifier(
            network.module, facts, resize=resize, softmax=softmax, temperature=temperature_of(model)
        ).eval(),
        inputs={"picture": torch.zeros(2, *size, 3, dtype=torch.uint8)},
        output="probabilities" if softmax else network.output,
        dynamic_shapes={"picture": shapes},
        metadata=network.metadata | {"input": f"8-bit RGB picture, uint8, (batch, height, width, 3), {taken}"},
    )


def pictures_of(network: Network) -> tuple[int, int] | None:
    """Return height and width of the pictures that a network takes; None for any."""
    shape = network.inputs["picture"].shape
    return None if 1 in network.dynamic_shapes.get("picture", {}) else (int(shape[1]), int(shape[2]))


def _stored(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def compare_pictures(
    run: Callable[[dict[str, Tensor]], Tensor],
    network: Network,
    model: nn.Module,
    *,
    kind: Kind | None = None,
    image_size: int | None = None,
    dynamic_size: bool = True,
) -> float:
    """Return the largest difference between `run` and pictures that go to the model by timm's and zoo's own way.

    Args:
        run: Computes the output of the exported file for inputs by name.
        network: What `taking_pictures` returned.
        model: The model in eager mode, unmerged; it is not changed.
        kind: What it is; None finds out.
        image_size: As in `prepare`.
        dynamic_size: As in `prepare`.

    Returns:
        Of probabilities (features: relative to the largest above one), or of the values of pixels in [0, 1].

    Raises:
        ExportError: An output has another shape or type, or is not finite.
    """
    eager = eager_copy(model).float().cpu()
    worst, is_open = 0.0, 0 in network.dynamic_shapes.get("picture", {})
    if kind_of(model, kind) == "restorer":
        for sample in sample_inputs(model, "restorer", image_size, dynamic_size)[: None if is_open else 1]:
            picture = _stored(sample["image"])
            expected = _Restorer(eager)(picture)
            found = run({"picture": picture})
            if found.dtype != torch.uint8:
                raise ExportError(f"The file returns {found.dtype}, expected uint8.")
            worst = max(worst, difference(found.float() / 255, expected.float() / 255, {"picture": picture}, 1.0))
        return worst
    facts = preprocessing(model, image_size)
    side = network.inputs["picture"].shape[1:3] if pictures_of(network) else None
    transform: Any = create_transform(**facts, is_training=False)
    generator = np.random.default_rng(0)
    for batch, height, width in ((1, 48, 67), (2, 300, 211), (3, 161, 161))[: None if is_open else 1]:
        height, width = side or (height, width)
        pixels = generator.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        if side is None:
            images = torch.stack([transform(Image.fromarray(one)) for one in pixels])
        else:
            mean, std = (torch.tensor(facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
            images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = eager(images)
        expected = (expected / temperature_of(model)).softmax(-1) if network.output == "probabilities" else expected
        picture = torch.from_numpy(pixels)
        worst = max(worst, difference(run({"picture": picture}), expected, {"picture": picture}, 1.0))
    return worst
