"""WebDataset shards: every sample as from its folder, an order that resumes, processes that share nothing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import picture

from zoo.data import shards
from zoo.data.images import ImageClassification
from zoo.data.labelled_images import FolderImages, open_labelled_images
from zoo.data.samplers import BlockSampler
from zoo.data.shards import ShardImages, find_shards
from zoo.files import cache_dir
from zoo.notices import Notice

NAMES = ["ant", "bee", "cat"]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def png(index: int) -> bytes:
    stored = io.BytesIO()
    picture(index, index, 20 + index).save(stored, "PNG")
    return stored.getvalue()


def write_shard(path: Path, samples: list[int], label: str = "cls", mode: Any = "w") -> Path:
    """Write pictures by number; the number decides the class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for index in samples:
            add(archive, f"part/{index:04}.png", png(index))
            if label == "cls":
                add(archive, f"part/{index:04}.cls", str(index % 3).encode())
            elif label == "json":
                add(archive, f"part/{index:04}.json", json.dumps({"label": NAMES[index % 3]}).encode())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shard(root / "mine-train-0000.tar", [0, 1, 2, 3])
    write_shard(root / "mine-train-0001.tar", [4, 5, 6])
    write_shard(root / "mine-val-0000.tar", [7, 8])
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    return root


def test_samples_are_those_of_folders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the pixel; the second opening reads no tar file again, a changed one is read anew."""
    for index in range(7):
        file = tmp_path / "train" / NAMES[index % 3] / f"{index:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(index))
    found, folders = open_labelled_images(str(data), "train"), FolderImages(str(tmp_path / "train"))
    assert isinstance(found, ShardImages)
    assert found.classes == folders.classes == NAMES
    by_name = {Path(folders.name(index)).stem: folders[index] for index in range(7)}
    for index in range(7):
        image, label = found[index]
        assert (image.tobytes(), label) == (by_name[f"{index:04}"][0].tobytes(), by_name[f"{index:04}"][1])
    assert found.name(5) == f"sample 1 of {data / 'mine-train-0001.tar'}"
    validation = open_labelled_images(str(data), "validation", classes=NAMES)
    assert validation.targets == [1, 2]

    def never(path: Path) -> Any:
        raise AssertionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_scan", never)
        assert open_labelled_images(str(data), "train").targets == found.targets
    for kept in (cache_dir() / "shards").glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:60])  # what was kept is damaged: made anew
    assert open_labelled_images(str(data), "train").targets == found.targets
    path = write_shard(tmp_path / "more" / "train" / "a.tar", [0, 1], "json")
    assert open_labelled_images(str(tmp_path / "more"), "train").classes == ["ant", "bee"]
    write_shard(path, [0, 1, 2], "json")
    again = open_labelled_images(str(tmp_path / "more"), "train")
    assert (again.classes, len(again)) == (NAMES, 3)
    again.keep([2])
    assert (again.targets, again.name(0)) == ([2], f"sample 2 of {path}")


@pytest.mark.parametrize("world", [1, 3])
def test_order_of_blocks(world: int) -> None:
    """Processes share nothing, epochs differ, samples stay near each other, and a start in the middle goes on."""
    size = 103
    samplers = [BlockSampler(range(size), 5, rank, world, block=8, window=16) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        epochs.append([[index for _, index in sampler] for sampler in samplers])  # type: ignore[misc]
    first = epochs[0]
    assert all(len(part) == size // world for part in first)
    together = [index for part in first for index in part]
    assert len(set(together)) == len(together) == size // world * world
    assert first != epochs[1]
    assert all(len({index // 8 for index in part[:16]}) <= 4 for part in first), "a window has few blocks"
    samplers[-1].set_epoch(0)
    samplers[-1].start = 7
    assert [index for _, index in samplers[-1]] == first[-1][7:]  # type: ignore[misc]


def test_a_stopped_epoch_goes_on(data: Path) -> None:
    """What a resumed run trains on is what the whole one would have had, augmentation included."""

    def loader() -> Any:
        images = ImageClassification(str(data), image_size=16, batch_size=2, seed=3, auto_augment="rand-m5-mstd0.5")
        return images.train_dataloader()

    whole, resumed = loader(), loader()
    assert isinstance(whole.sampler, BlockSampler)
    resumed.sampler.start = 4
    expected, found = list(whole)[2:], list(resumed)
    assert len(found) == 1
    for (one, labels), (other, others) in zip(expected, found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(labels, others)
    with pytest.raises(ValueError, match="holds shards"):
        ImageClassification(str(data), image_size=16, batch_size=2, repeats=2).train_dataloader()


def test_what_is_wrong_with_a_shard(data: Path, tmp_path: Path) -> None:
    def said(folder: str) -> str:
        with pytest.raises(ValueError, match=folder) as caught:
            open_labelled_images(str(tmp_path / folder), "train", classes=["ant", "bee"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    write_shard(tmp_path / "packed" / "train-0.tar", [0], mode="w:gz")
    assert "train-0.tar is no shard that can be read" in said("packed")
    assert "has to be unpacked" in said("packed")
    write_shard(tmp_path / "bare" / "train-0.tar", [0], label="none")
    assert "The sample part/0000 of" in said("bare")
    assert "has no label (.cls, or label in .json)" in said("bare")
    path = write_shard(tmp_path / "cut" / "train-0.tar", [0, 1])
    path.write_bytes(path.read_bytes()[:700])
    assert "train-0.tar is no shard" in said("cut")
    write_shard(tmp_path / "other" / "train-0.tar", [0, 1, 2], "json")
    assert "has the class 'cat'" in said("other")
    write_shard(tmp_path / "few" / "train-0.tar", [0, 1, 2])
    (tmp_path / "few" / "classes.txt").write_text("ant\n")
    assert "has the label 2, but" in said("few")
    damaged = tmp_path / "damaged" / "train-0.tar"
    damaged.parent.mkdir()
    with tarfile.open(damaged, "w") as archive:
        add(archive, "a.jpg", b"no picture")
        add(archive, "a.cls", b"0")
    with pytest.raises(ValueError, match=r"sample 0 of .*train-0\.tar"):
        open_labelled_images(str(damaged.parent), "train")[0]


def test_shards_without_the_name_of_a_split_are_for_training(tmp_path: Path) -> None:
    """As class folders are; a packed copy beside class folders is none, nor is a shard of another split."""
    first, second = (write_shard(tmp_path / f"{number:06}.tar", [number, number + 1]) for number in range(2))
    write_shard(tmp_path / "mine-val-000.tar", [2])
    write_shard(tmp_path / "testing-000.tar", [2])
    assert find_shards(tmp_path, ("train",)) == [first, second]
    assert len(open_labelled_images(str(tmp_path), "train")) == 4
    assert [path.name for path in find_shards(tmp_path, ("validation", "val"))] == ["mine-val-000.tar"]
    assert not find_shards(tmp_path, ("test",))
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.png").write_bytes(png(0))
    assert not find_shards(tmp_path, ("train",))


def test_classes_under_their_names_in_wordnet(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val-0.tar", "w") as archive:
        for index, name in enumerate(("n03028079", "n01440764")):
            add(archive, f"{index}.png", png(index))
            add(archive, f"{index}.cls", name.encode())
    with pytest.warns(Notice, match="'n01440764' for 'tench'"):
        assert ShardImages([tmp_path / "val-0.tar"], classes=["tench", "church"]).targets == [1, 0]
