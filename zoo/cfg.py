"""What a published weight is: timm's `PretrainedCfg` with the few fields that a model zoo of three tasks needs more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from timm.models import PretrainedCfg

__all__ = ["CIFAR10", "IMAGENETTE", "ModelCfg", "RestorationCfg", "temperature_of"]

CIFAR10: dict[str, Any] = dict(
    num_classes=10,
    label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    license="apache-2.0",
    notes=None,
)
"""Fields of the weights that we trained on CIFAR-10."""

IMAGENETTE: dict[str, Any] = dict(
    num_classes=10,
    label_names=(
        "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
        "gas pump", "golf ball", "parachute",
    ),
    crop_pct=0.89,
    license="apache-2.0",
    notes=None,
)  # fmt: skip
"""Fields of the weights that we trained on the photographs of Imagenette, ten classes of ImageNet."""


@dataclass
class ModelCfg(PretrainedCfg):
    """One published weight (`NAME.TAG`) of a registered model.

    Args:
        task: What the model does: "classification", "sr", "denoise", ...
        sha256: Digest of the weight file; a file with another digest is refused. Shipped weights may leave it
            to the front matter of their card.
        model_args: Constructor arguments that belong to the weights and cannot be read from tensor shapes,
            for example `img_size`, `patch_size` or `idle_ratio`. Arguments of the caller win over them.
        top1: The authors' top-1 accuracy on ImageNet-1k at `input_size`, percent; not measured by us.
        parity: How closely the family's code agrees with the authors', and how that was measured.
        temperature: By which logits are divided, so that probabilities are true on held-out images; None is 1.
        threshold: Probability below which no class is likely, chosen on held-out images; None is none.
        hub_search: The authors' repository `hf_hub_id` is known, the name of the file in it is not: the one that names
            the variant is taken, and checked by strict loading.
    """

    task: str = "classification"
    sha256: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    top1: float | None = None
    parity: str | None = None
    temperature: float | None = None
    threshold: float | None = None
    hub_search: bool = False


@dataclass
class RestorationCfg(ModelCfg):
    """A published weight of an image restorer: no classes, no input normalisation.

    Args:
        scale: Output pixels per input pixel along each side.
        multiple_of: Height and width are padded to a multiple of this, in input pixels.
        value_range: Smallest and largest pixel value that the network expects.
        sigma: Standard deviation of the noise the weights were trained for, of 255; a pair is a range.
    """

    task: str = "sr"
    scale: int = 1
    multiple_of: int = 1
    value_range: tuple[float, float] = (0.0, 1.0)
    sigma: float | tuple[float, float] | None = None
    num_classes: int = 0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def temperature_of(model: Any) -> float:
    """Return what the logits of a classifier are divided by before softmax, as its weights state it; else 1."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return float(cfg.get("temperature") or 1.0)
