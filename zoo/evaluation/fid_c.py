"""FID-C: the Frechet distance between generated and real images in the features of a CIFAR-10 classifier of ours.

It is not FID, whose features are Inception's, and its numbers are on another scale. The features are those of
`emov2_1m.cifar10` after pooling: the best CIFAR-10 classifier here, and with 180 numbers one for which a sample of a
few hundred images is not too small. The statistics of the 10 000 real test images are shipped; this makes them anew,
from a folder of images or Parquet files, after the classifier has changed:

    python -m zoo.evaluation.fid_c DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.evaluation.metrics import FeatureStatistics, frechet_distance, square_root
from zoo.files import whole
from zoo.weights import sha256_of, shipped

__all__ = [
    "CLASSIFIER",
    "FEWEST",
    "FID_C",
    "FID_C_ERROR",
    "RECOGNISED",
    "STATISTICS",
    "Judge",
    "Reference",
    "SampleJudge",
    "judge_of",
    "load_judge",
    "load_reference",
    "write_reference",
]

FID_C = "FID-C"
FID_C_ERROR = "± of FID-C"
RECOGNISED = "recognised (%)"

CLASSIFIER = "emov2_1m.cifar10"
"""Whose features count."""
STATISTICS = Path(__file__).with_name("fid_c.safetensors")
"""Mean and covariance of these features of the CIFAR-10 test images."""
FEWEST = 4
"""Images of which halves have a distance, so that its error is known."""
_BATCH = 250
_CLASSES = 10
_HALVES = 40


class Judge:
    """A classifier that tells features and classes of images; on the CPU, in evaluation mode.

    Args:
        model: From timm's registry, or of its kind; with `forward_features` and `forward_head`.
        device: Where it runs.
    """

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        from timm.data import resolve_model_data_config

        self.model: Any = model.to(device).eval()
        self.device = device
        data = resolve_model_data_config(model)
        self._size = tuple(data["input_size"][-2:])
        self._mean, self._std = (torch.tensor(data[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Judge images (B, C, H, W) in [0, 1].

        Returns:
            Features after pooling (B, features), and predicted class numbers (B,), on the CPU.
        """
        features, classes = [], []
        for batch in images.float().split(_BATCH):
            if batch.shape[-2:] != self._size:
                batch = F.interpolate(batch, self._size, mode="bicubic", antialias=True).clamp(0, 1)
            maps = self.model.forward_features((batch.to(self.device) - self._mean) / self._std)
            features.append(self.model.forward_head(maps, pre_logits=True).flatten(1).cpu())
            classes.append(self.model.forward_head(maps).argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)

    def classes(self, images: Tensor) -> Tensor:
        """Return predicted class numbers (B,)."""
        return self(images)[1]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images.

    Args:
        mean: (features,).
        covariance: (features, features).
        count: Real images.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    def distance(self, features: Tensor) -> float:
        """Return FID-C of images with these features (B, features), at least two of them."""
        return frechet_distance(features.cpu(), self.mean, self._root)

    @cached_property
    def _root(self) -> Tensor:
        return square_root(self.covariance)


def load_judge(device: str = "cpu") -> Judge:
    """Return the classifier whose features count; not merged, so that they do not depend on what merging folds."""
    return Judge(zoo.create_model(CLASSIFIER, pretrained=True), device)


def load_reference(path: str | Path = STATISTICS) -> Reference:
    """Return the shipped statistics.

    Raises:
        ValueError: They were made with other weights of the classifier than those that are shipped.
    """
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        mean, packed = file.get_tensor("mean"), file.get_tensor("covariance")
    digest = sha256_of(shipped(CLASSIFIER))
    if facts["classifier_sha256"] != digest:
        raise ValueError(
            f"{path} was made with other weights of {CLASSIFIER} than those that are here: make it anew with "
            f"`python -m zoo.evaluation.fid_c DIR`, DIR with the CIFAR-10 test images."
        )
    size = len(mean)
    covariance = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size)
    covariance[rows, columns] = covariance[columns, rows] = packed.double()
    return Reference(mean=mean.double(), covariance=covariance, count=int(facts["images"]))


def judge_of(names: Mapping[int, str] | None, labels: Sequence[int] | None, device: str = "cpu") -> SampleJudge | None:
    """Return a judge of images of classes; None where these are not the ten of CIFAR-10, which alone it knows.

    Args:
        names: Of the classes, by number; None where they have none.
        labels: The class that was asked for, one an image; None where images are of something else.
        device: Where the classifier runs.
    """
    if labels is None or not names or len(names) != _CLASSES:
        return None
    judge = SampleJudge(labels, device)
    return judge if [names.get(index) for index in range(_CLASSES)] == list(judge.class_names) else None


class SampleJudge:
    """Judge samples of CIFAR-10 classes: the share of recognised ones and, from two images, FID-C.

    Args:
        labels: The class that was asked for, one an image.
        device: Where the classifier runs.
    """

    def __init__(self, labels: Sequence[int], device: str = "cpu") -> None:
        self._judge, self._reference, self._asked = load_judge(device), load_reference(), torch.tensor(list(labels))
        self.notes = (
            f"FID-C: Frechet distance in the features of {CLASSIFIER} between {len(labels)} images and the "
            f"{self._reference.count} test images of CIFAR-10; not FID, and too large with few images (--count), so "
            "that only numbers of equally many images compare.",
            "± of FID-C: standard error of its difference to the first line, from the same noise (delete-half "
            "jackknife); smaller differences mean nothing.",
            f"Recognised: share of images that {CLASSIFIER} takes for the class that was asked for.",
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that it knows, by number."""
        return tuple(self._judge.model.pretrained_cfg["label_names"])

    def __call__(self, images: Tensor, original: Tensor | None = None) -> dict[str, float]:
        """Return values by heading.

        Args:
            images: (B, C, H, W) in [0, 1], in the order of the labels.
            original: Images from the same noise that these are compared with; adds the error of the difference.
        """
        features, found = self._judge(images)
        values = {FID_C: self._reference.distance(features)} if len(features) > 1 else {}
        if original is not None and len(features) >= FEWEST:
            values[FID_C_ERROR] = self._difference_error(features, self._judge(original)[0])
        return values | {RECOGNISED: 100 * float((found == self._asked).float().mean())}

    def difference_error(self, images: Tensor, others: Tensor) -> float:
        """Return the standard error of the difference in FID-C between two sets of images from the same noise.

        By the delete-half jackknife (Shao and Wu, 1989): how the difference varies among random halves of the images
        is how the whole's varies among samples.

        Args:
            images: (B, C, H, W) in [0, 1], at least four.
            others: Likewise, image by image of the same label and noise.
        """
        return self._difference_error(self._judge(images)[0], self._judge(others)[0])

    def _difference_error(self, features: Tensor, other: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        halves = [torch.randperm(len(features), generator=generator)[: len(features) // 2] for _ in range(_HALVES)]
        found = [self._reference.distance(features[half]) - self._reference.distance(other[half]) for half in halves]
        return float(torch.tensor(found, dtype=torch.float64).std())


def write_reference(images: Iterable[Tensor], judge: Judge, path: str | Path = STATISTICS) -> int:
    """Write the statistics of real images, whole or not at all, and return how many images there were.

    Args:
        images: Batches (B, C, H, W) in [0, 1].
        judge: The classifier of `load_judge`.
        path: The file.

    Raises:
        ValueError: There are fewer than two images.
    """
    found: FeatureStatistics | None = None
    for batch in images:
        features = judge(batch)[0]
        found = found or FeatureStatistics(features.shape[1])
        found.update(features)
    if found is None:
        raise ValueError("There are no images to take statistics of.")
    size = len(found.mean)
    rows, columns = torch.triu_indices(size, size)
    # the upper triangle alone: the other half repeats it
    tensors = {"mean": found.mean.float(), "covariance": found.covariance[rows, columns].float().contiguous()}
    facts = {"classifier": CLASSIFIER, "classifier_sha256": sha256_of(shipped(CLASSIFIER)), "images": str(found.count)}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata=facts)
    return found.count


def main(argv: list[str] | None = None) -> int:
    """Write the statistics of a data set's test images."""
    from torch.utils.data import DataLoader
    from torchvision.transforms.functional import to_tensor

    from zoo.data.images import open_labelled_images

    parser = argparse.ArgumentParser(prog="python -m zoo.evaluation.fid_c", description=main.__doc__)
    parser.add_argument("data", metavar="DIR", help="folder of images or Parquet files, or a data set on the Hub")
    args = parser.parse_args(argv)
    images = DataLoader(open_labelled_images(args.data, "test", to_tensor), batch_size=_BATCH)
    count = write_reference((batch for batch, _ in images), load_judge())
    print(f"Statistics of {count} images written to {STATISTICS}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
