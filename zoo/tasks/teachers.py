"""Teachers of a classifier: trained models whose predictions it learns beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from zoo.data.readable import placed
from zoo.factory import create_model
from zoo.ffn.reparam import reparameterize
from zoo.notices import notice
from zoo.record import record_of

__all__ = ["DistillationKind", "Teachers"]

DistillationKind = Literal["soft", "hard"]
"""The teachers' probabilities (Hinton et al., arXiv 1503.02531), or their decision (DeiT, arXiv 2012.12877, eq. 3)."""


class Teachers:
    """Trained classifiers that see what the student sees, each at its own size and normalisation.

    It is no module: no checkpoint holds the teachers' weights, and no optimizer sees them.

    Args:
        names: As `zoo.create_model` takes them, with published weights: "emov2_1m.cifar10". Several are averaged.
        num_classes: The student's.
        kind: What is learnt of them.
        temperature: Softmax temperature of "soft" on both sides; its loss is multiplied by the square.

    Raises:
        ValueError: A teacher has another number of classes.
        CheckpointError: The weights do not exist or do not fit.
    """

    def __init__(
        self, names: Sequence[str], num_classes: int, kind: DistillationKind = "soft", temperature: float = 1.0
    ) -> None:
        self.kind, self.temperature = kind, temperature
        self.models: list[nn.Module] = []
        self._data = []
        for name in names:
            model = create_model(name, pretrained=True).eval().requires_grad_(False)
            if model.num_classes != num_classes:
                raise ValueError(
                    f"Teacher {name} must tell {num_classes} classes as the student, not {model.num_classes}."
                )
            self._data.append(resolve_model_data_config(model))
            reparameterize(model, measure=False)
            self.models.append(model)
        self.names = list(names)
        self._orders: dict[int, list[int]] = {}

    def match(self, classes: Sequence[str]) -> None:
        """Find the student's classes among those of each teacher, by name: the order of folders may be another.

        Numbers for names are places; a teacher without names is taken in the order of the data.

        Args:
            classes: Of the data, in the order of the labels.

        Raises:
            ValueError: A teacher has no class of a name.
        """
        for place, (name, model) in enumerate(zip(self.names, self.models, strict=True)):
            known = record_of(model).label_names
            if known is None:
                notice(f"Teacher {name} states no names for its classes: those of the data are taken in their order.")
                continue
            found = placed(classes, known, "the data")
            strange = [each for each in found if each not in known]
            if strange:
                some = ", ".join(map(repr, known[:4])) + (", ..." if len(known) > 4 else "")
                raise ValueError(
                    f"Teacher {name} does not tell the class {strange[0]!r} of the data but {some}: call the classes "
                    "so, or leave this teacher out."
                )
            order = [known.index(each) for each in found]
            self._orders[place] = order + [index for index in range(len(known)) if index not in order]

    def to(self, device: torch.device) -> None:
        """Move the teachers."""
        for model in self.models:
            model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the mean of the teachers' probabilities (B, num_classes).

        Args:
            images: (B, 3, H, W), normalised for the student.
            mean: That the student's images were normalised with.
            std: The same.
        """
        pixels = images * _column(std, images) + _column(mean, images)
        found = []
        for place, (model, data) in enumerate(zip(self.models, self._data, strict=True)):
            size = tuple(data["input_size"][-2:])
            own = pixels
            if own.shape[-2:] != size:
                own = F.interpolate(own, size, mode="bilinear", antialias=True)
            own = own.expand(-1, len(data["mean"]), -1, -1)  # gray images of a student
            own = (own - _column(data["mean"], own)) / _column(data["std"], own)
            logits = model(own).float()
            if place in self._orders:
                logits = logits[:, self._orders[place]]
            found.append((logits / self.temperature).softmax(-1))
        return torch.stack(found).mean(0)

    def loss(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Compare a student's logits (B, num_classes) with what the teachers say of the same images."""
        if self.kind == "hard":
            return F.cross_entropy(logits, probabilities.argmax(-1))
        logs = (logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * F.kl_div(logs, probabilities, reduction="batchmean")


def _column(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
