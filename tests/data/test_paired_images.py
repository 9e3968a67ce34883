"""Pairs of degraded and clean images: aligned, reproducible, and refused where they are no pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import photo_folder
from PIL import Image

from zoo.data import paired_images
from zoo.data.paired_images import (
    BicubicDownscale,
    Degradation,
    EvaluationPairs,
    GaussianNoise,
    PairedImages,
    Phase,
    TrainingPatches,
)
from zoo.data.photos import Pair, find_pairs, pair_folders
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
    patches = TrainingPatches(find_pairs(folder / "train"), BicubicDownscale(scale), 10, patches_per_image=8)
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
    pairs = find_pairs(folder / "train")
    first, second = (SeededDataset(TrainingPatches(pairs, BicubicDownscale(2), 8), seed=3) for _ in range(2))
    second[0, 1]  # what was read before does not matter
    assert all(torch.equal(a, b) for a, b in zip(first[0, 0], second[0, 0], strict=True))
    assert not torch.equal(first[1, 0][1], first[0, 0][1])


def test_noise(folder: Path) -> None:
    """White noise of the asked strength, neither clipped nor rounded, new for every patch, fixed in evaluation."""
    pairs = find_pairs(folder / "train")
    patches = TrainingPatches(pairs, GaussianNoise(50), 40, patches_per_image=20)
    noise = torch.stack([source - target for source, target in (patches[i] for i in range(60))]) * 255
    assert float(noise.std()) == pytest.approx(50, rel=0.02)
    assert abs(float(noise.mean())) < 1
    assert float((patches[0][0]).max()) > 1
    blind = TrainingPatches(pairs, GaussianNoise((0, 50)), 40, patches_per_image=20)
    spread = torch.stack([(s - t).std() * 255 for s, t in (blind[i] for i in range(60))])
    assert float(spread.min()) < 10 < 40 < float(spread.max())
    tested = EvaluationPairs(pairs, GaussianNoise((0, 50), test_sigma=25))
    for source, target in (tested[0], tested[1]):  # the protocol's noise, the same for each image
        np.random.seed(0)
        clean = target.permute(1, 2, 0).numpy().copy()
        clean += np.random.normal(0, 25 / 255.0, clean.shape)
        assert np.array_equal(source.permute(1, 2, 0).numpy(), clean)


def test_evaluation_pairs(folder: Path) -> None:
    """Made or read, the pairs are the same; clean images are cut to a multiple of the scale."""
    clean, both = find_pairs(folder / "val"), pair_folders(folder / "val", [folder / "low"], 2)
    made, read = EvaluationPairs(clean, BicubicDownscale(2)), EvaluationPairs(both, BicubicDownscale(2))
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
    pairs = find_pairs(folder / "train")[:1]
    patches, whole = TrainingPatches(pairs, Reach(), 20), EvaluationPairs(pairs, Reach())[0][0]
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
    patches = TrainingPatches(find_pairs(folder / "train"), BicubicDownscale(2), 12, 4)
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


def paired(root: Path, names: str, size: tuple[int, int] = (40, 30)) -> Path:
    """Write clean photos, and views of them that are darker by 10, 20, ... levels, in a folder a name."""
    photo_folder(root / "target", 3, size)
    for path in sorted((root / "target").iterdir()):
        pixels = np.asarray(Image.open(path)) // 2 + 100
        Image.fromarray(pixels).save(path)
        for step, name in enumerate(names.split(), 1):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray((pixels - 10 * step).astype(np.uint8)).save(root / name / f"{path.stem}.png")
    return root


@pytest.mark.parametrize("phases", [None, PHASES], ids=["one size", "phases"])
@pytest.mark.parametrize("views", ["input", "inputL inputR"])
def test_degraded_folders(views: str, phases: list[Phase] | None, tmp_path: Path) -> None:
    """Training and validation read files; both versions of a patch are cut, flipped and turned alike."""
    folder = paired(tmp_path, views)
    degraded = views.split() if " " in views else views
    data = PairedImages(
        str(folder), train_folders=["target"], train_degraded_folders=[degraded], val_folder="target",
        val_degraded_folder=degraded, patch_size=12, batch_size=4, phases=phases,
    )  # fmt: skip
    expected = 10 * torch.arange(1, len(views.split()) + 1).repeat_interleave(3).view(1, -1, 1, 1)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert len(batches) > 6
    for source, target in batches:
        darker = (target.repeat(1, source.shape[1] // 3, 1, 1) - source) * 255
        assert torch.allclose(darker, expected.expand_as(darker).float(), atol=1e-3)
    assert batches[-1][0].shape == (1, 3 * len(views.split()), 30, 40)


def test_small_pairs_are_mirrored(tmp_path: Path) -> None:
    """Photos smaller than a patch go on as their mirror image, as in Restormer's training on Rain13K."""
    folder = paired(tmp_path, "input", (11, 9))
    pairs = pair_folders(folder / "target", [folder / "input"])
    source, target = TrainingPatches(pairs, Degradation(), 16).patch(0, 16)
    assert source.shape == target.shape == (3, 16, 16)
    assert torch.allclose(target - source, torch.full((), 10 / 255), atol=1e-6)
    whole = EvaluationPairs(pairs, Degradation())[0][1]
    mirrored = torch.cat([whole, whole.flip(2)], 2)[..., :16]
    mirrored = torch.cat([mirrored, mirrored.flip(1)], 1)[:, :16]
    turned = [torch.rot90(image, turns, (1, 2)) for image in (target, target.flip(2)) for turns in range(4)]
    assert any(torch.equal(image, mirrored) for image in turned)


def test_only_some_photos_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the limit is read again, and gives the same patches."""
    pairs = find_pairs(folder / "train")
    kept = SeededDataset(TrainingPatches(pairs, BicubicDownscale(2), 8), seed=3)
    expected = [kept[0, index] for index in range(3)]
    monkeypatch.setattr(paired_images, "_KEPT_BYTES", 12_000)
    data = TrainingPatches(pairs, BicubicDownscale(2), 8)
    read = SeededDataset(data, seed=3)
    for _ in range(2):
        found = [read[0, index] for index in range(3)]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))
    assert len(data._photos) == 1


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
    with pytest.raises(ValueError, match="batch_size 64 is more than the 12 patches"):
        module(folder, batch_size=64).train_dataloader()
    with pytest.raises(ValueError, match=r"has \d+x4[68] pixels, a patch needs 80x80"):
        next(iter(module(folder, patch_size=40).train_dataloader()))
    with pytest.raises(FileNotFoundError, match="No image"):
        module(tmp_path, train_folders=["."]).train_dataloader()
    with pytest.raises(ValueError, match=r"has 33x31 pixels and .* 16x15: not a pair at scale 2"):
        next(iter(module(folder, val_folder="low", val_degraded_folder="val").val_dataloader()))
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "val" / "photo0.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.png is damaged"):
        EvaluationPairs([Pair(broken)], BicubicDownscale(2))[0]
    with pytest.raises(ValueError, match="must have one entry for each of the 2 train_folders, got 1"):
        module(folder, train_folders=["train", "val"], train_degraded_folders=["low"])
    unmade = PairedImages(str(folder), train_folders=["train"], val_folder="val")
    for loader in (unmade.train_dataloader, unmade.val_dataloader):
        with pytest.raises(ValueError, match="has no folder of degraded versions, and there is no degradation"):
            loader()
    with pytest.raises(ValueError, match="scale must be at least 2, got 1"):
        BicubicDownscale(1)
    with pytest.raises(ValueError, match="sigma must be at least 0, a pair in rising order"):
        GaussianNoise((50, 10))
    with pytest.raises(ValueError, match="test_sigma must be at least 0, got -1"):
        GaussianNoise(25, test_sigma=-1)
    with pytest.raises(ValueError, match="batch_size of a phase must be at least 1, got 0"):
        Phase(batches=1, patch_size=8, batch_size=0)
