"""Pairs of degraded and clean images: aligned, reproducible, and refused where they are no pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import photo_folder
from PIL import Image

from zoo.data.paired_images import (
    BicubicDownscale,
    Degradation,
    EvaluationPairs,
    GaussianNoise,
    PairedImages,
    Phase,
    TrainingPatches,
    find_images,
)
from zoo.data.resize import imresize
from zoo.data.samplers import PhasedSampler, SeededDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write clean photos in two subfolders, and low-resolution ones beside them."""
    root = tmp_path_factory.mktemp("photos")
    photo_folder(root / "train" / "a", 2)
    photo_folder(root / "train" / "b", 1, (61, 47))
    photo_folder(root / "val", 2, (33, 31))
    (root / "low").mkdir()
    for path in (root / "val").iterdir():
        Image.fromarray(imresize(np.asarray(Image.open(path))[:30, :32], 0.5)).save(root / "low" / path.name)
    return root


@pytest.mark.parametrize("scale", [2, 3])
def test_patches_are_aligned(scale: int, folder: Path) -> None:
    """The low-resolution patch is that of its photo, whatever flip and turn."""
    patches = TrainingPatches(find_images(folder / "train"), BicubicDownscale(scale), 10, patches_per_image=8)
    assert len(patches) == 24
    variants = set()
    for index in range(24):
        low, high = patches[index]
        assert (low.shape, high.shape) == ((3, 10, 10), (3, 10 * scale, 10 * scale))
        assert 0 <= float(low.min()) <= float(low.max()) <= 1
        pixels = (high * 255).round().byte().permute(1, 2, 0).numpy()
        again = imresize(pixels, 1 / scale)[2:-2, 2:-2].astype(int)  # the border of a patch has other neighbours
        assert np.abs(again - (low * 255).round().int().permute(1, 2, 0).numpy()[2:-2, 2:-2]).max() <= 1
        variants.add(high[0, 0, 0].item())
    assert len(variants) > 12


def test_patches_depend_on_seed_epoch_and_index_only(folder: Path) -> None:
    files = find_images(folder / "train")
    first, second = (SeededDataset(TrainingPatches(files, BicubicDownscale(2), 8), seed=3) for _ in range(2))
    second[0, 1]  # what was read before does not matter
    assert all(torch.equal(a, b) for a, b in zip(first[0, 0], second[0, 0], strict=True))
    assert not torch.equal(first[1, 0][1], first[0, 0][1])


def test_noise(folder: Path) -> None:
    """White noise of the asked strength, neither clipped nor rounded, new for every patch, fixed in evaluation."""
    files = find_images(folder / "train")
    patches = TrainingPatches(files, GaussianNoise(50), 40, patches_per_image=20)
    noise = torch.stack([source - target for source, target in (patches[i] for i in range(60))]) * 255
    assert float(noise.std()) == pytest.approx(50, rel=0.02)
    assert abs(float(noise.mean())) < 1
    assert float((patches[0][0]).max()) > 1
    blind = TrainingPatches(files, GaussianNoise((0, 50)), 40, patches_per_image=20)
    spread = torch.stack([(s - t).std() * 255 for s, t in (blind[i] for i in range(60))])
    assert float(spread.min()) < 10 < 40 < float(spread.max())
    tested = EvaluationPairs(files, GaussianNoise((0, 50), test_sigma=25))
    for source, target in (tested[0], tested[1]):  # the protocol's noise, the same for each image
        np.random.seed(0)
        clean = target.permute(1, 2, 0).numpy().copy()
        clean += np.random.normal(0, 25 / 255.0, clean.shape)
        assert np.array_equal(source.permute(1, 2, 0).numpy(), clean)


def test_evaluation_pairs(folder: Path) -> None:
    """Made or read, the pairs are the same; clean images are cut to a multiple of the scale."""
    clean, low = find_images(folder / "val"), find_images(folder / "low")
    made, read = EvaluationPairs(clean, BicubicDownscale(2)), EvaluationPairs(clean, BicubicDownscale(2), low)
    for index in range(2):
        assert made[index][1].shape == (3, 30, 32)
        for a, b in zip(made[index], read[index], strict=True):
            assert torch.equal(a, b)
    gray = EvaluationPairs(clean, BicubicDownscale(2), mode="L")
    assert gray[0][0].shape == (1, 15, 16)


class Reach(Degradation):
    """The mean over rows and columns at most `margin` away: a patch needs its surroundings."""

    random, margin = True, 3

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        padded = np.pad(image / np.float32(255), ((3, 3), (3, 3), (0, 0)), mode="edge")
        shifts = [padded[dy : dy + image.shape[0], dx : dx + image.shape[1]] for dy in range(7) for dx in range(7)]
        return np.mean(shifts, axis=0, dtype=np.float32)


def test_a_patch_is_degraded_with_its_surroundings(folder: Path) -> None:
    """Patches of every size are parts of the degraded photo, also where its blur comes from beyond the patch."""
    files = find_images(folder / "train")[:1]
    patches, whole = TrainingPatches(files, Reach(), 20), EvaluationPairs(files, Reach())[0][0]
    windows = whole.unfold(1, 8, 1).unfold(2, 8, 1)
    for index in range(12):
        low, high = patches.patch(index, 8)
        assert (low.shape, high.shape) == ((3, 8, 8), (3, 8, 8))
        turned = [torch.rot90(image, turns, (1, 2)) for image in (low, low.flip(2)) for turns in range(4)]
        distances = [(windows - image[:, None, None]).abs().amax((0, 3, 4)).min() for image in turned]
        assert float(min(distances)) < 1e-5


PHASES = [Phase(batches=3, patch_size=8, batch_size=4), Phase(batches=2, patch_size=12, batch_size=2)]


def test_phases_make_patches_grow(folder: Path) -> None:
    """Each phase has its number, size and batch; every patch of the data comes once before one comes again."""
    data = module(folder, phases=PHASES)
    loader = data.train_dataloader()
    assert len(loader) == 5
    shapes = [tuple(low.shape) for low, _ in loader]
    assert shapes == [(4, 3, 8, 8)] * 3 + [(2, 3, 12, 12)] * 2
    keys = [key for batch in loader.sampler for key in batch]
    assert sorted(key[1] for key in keys[:12]) == list(range(12))
    assert {key[0] for key in keys[12:]} == {1}
    loader.sampler.set_epoch(1)  # after the phases the last one goes on
    assert [tuple(low.shape) for low, _ in loader] == [(2, 3, 12, 12)] * 5


def test_phases_start_anywhere_and_split_over_processes(folder: Path) -> None:
    """A resumed sampler, workers and two processes take the samples that one uninterrupted process takes."""
    patches = TrainingPatches(find_images(folder / "train"), BicubicDownscale(2), 12, 4)
    whole = list(PhasedSampler(patches, PHASES, seed=5))
    for start in range(6):
        resumed = PhasedSampler(patches, PHASES, seed=5)
        resumed.start = start
        assert list(resumed) == whole[start:]
        assert list(resumed) == whole  # the next epoch is complete
    halves = [list(PhasedSampler(patches, PHASES, seed=5, rank=rank, world_size=2)) for rank in (0, 1)]
    together = {key for half in halves for batch in half[:3] for key in batch}
    assert len(together) == 24
    alone, helped = (list(module(folder, phases=PHASES, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def module(folder: Path, **kwargs: object) -> PairedImages:
    options = dict(train_folders=["train"], val_folder="val", patch_size=8, patches_per_image=4, batch_size=4)
    return PairedImages(str(folder), BicubicDownscale(2), **{**options, **kwargs})


def test_loaders(folder: Path) -> None:
    data = module(folder)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert batches[0][0].shape == (4, 3, 8, 8)
    assert batches[0][1].shape == (4, 3, 16, 16)
    again = list(module(folder).train_dataloader())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    assert len(list(data.val_dataloader())) == 2
    assert len(list(data.test_dataloader())) == 2
    assert module(folder, val_folder=None).val_dataloader() == []
    low, high = next(iter(module(folder, val_degraded_folder="low").val_dataloader()))
    assert (low.shape, high.shape) == ((1, 3, 15, 16), (1, 3, 30, 32))


def test_workers_give_the_same_patches(folder: Path) -> None:
    alone, helped = (list(module(folder, num_workers=n).train_dataloader()) for n in (0, 2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, helped, strict=True))


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No folder"):
        module(folder, train_folders=["nowhere"]).train_dataloader()
    with pytest.raises(FileNotFoundError, match="No image"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="batch_size 64 is more than the 12 patches"):
        module(folder, batch_size=64).train_dataloader()
    with pytest.raises(ValueError, match=r"has \d+x4[78] pixels, a patch needs 80x80"):
        next(iter(module(folder, patch_size=40).train_dataloader()))
    files = find_images(folder / "val")
    with pytest.raises(ValueError, match="2 clean images have 1 degraded ones"):
        EvaluationPairs(files, BicubicDownscale(2), find_images(folder / "low")[:1])
    with pytest.raises(ValueError, match=r"times 2 is larger than .*: not a pair"):
        EvaluationPairs(find_images(folder / "low"), BicubicDownscale(2), files)[0]
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.png is not a readable image"):
        EvaluationPairs([tmp_path / "broken.png"], BicubicDownscale(2))[0]
    with pytest.raises(ValueError, match="scale must be at least 2, got 1"):
        BicubicDownscale(1)
    with pytest.raises(ValueError, match="sigma must be at least 0, a pair in rising order"):
        GaussianNoise((50, 10))
    with pytest.raises(ValueError, match="test_sigma must be at least 0, got -1"):
        GaussianNoise(25, test_sigma=-1)
    with pytest.raises(ValueError, match="batch_size of a phase must be at least 1, got 0"):
        Phase(batches=1, patch_size=8, batch_size=0)
