"""Stored latents: batches as Flux takes them, files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.denoisers import flux
from zoo.data.latents import LatentFiles, Latents
from zoo.data.samplers import ResumableSampler


def sample(tokens: int = 12, **more: Tensor) -> dict[str, Tensor]:
    return {
        "latents": torch.randn(tokens, 4),
        "encoder_hidden_states": torch.randn(3, 12),
        "pooled_projections": torch.randn(12),
        "height": torch.tensor(3),
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 5), ("val", 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            save_file(sample(), tmp_path / split / f"{number}.safetensors")
    return tmp_path


def test_batches_fit_flux(folder: Path) -> None:
    batch = next(iter(Latents(str(folder), batch_size=2).train_dataloader()))
    hidden = batch.pop("latents")
    out = flux()(hidden, timestep=torch.tensor([0.1, 0.9]), **batch, return_dict=False)[0]
    assert out.shape == (2, 12, 4)
    assert batch["img_ids"].tolist()[5] == [0, 1, 1]  # 3 rows of 4


def test_order_is_the_seeds(folder: Path) -> None:
    def first(seed: int) -> Tensor:
        return next(iter(Latents(str(folder), batch_size=2, seed=seed).train_dataloader()))["latents"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_an_epoch_that_is_told_late_is_that_of_the_batches(folder: Path) -> None:
    """Lightning makes the iterator, then restores a checkpoint and tells the epoch: workers had read epoch 0."""

    def first(epoch: int, late: bool) -> Tensor:
        loader = Latents(str(folder), batch_size=2, num_workers=1).train_dataloader()
        sampler = loader.sampler
        assert isinstance(sampler, ResumableSampler)
        if not late:
            sampler.set_epoch(epoch)
        batches = iter(loader)
        sampler.set_epoch(epoch)
        return next(batches)["latents"]

    assert torch.equal(first(3, late=True), first(3, late=False))
    assert not torch.equal(first(3, late=True), first(0, late=True))


def test_a_batch_larger_than_the_data_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 6 exceeds the 5 training latents of a process"):
        Latents(str(folder), batch_size=6).train_dataloader()


def test_validation_is_optional(folder: Path) -> None:
    assert len(Latents(str(folder)).val_dataloader()) == 1
    for file in (folder / "val").iterdir():
        file.unlink()
    (folder / "val").rmdir()
    assert Latents(str(folder)).val_dataloader() == []


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no"):
        LatentFiles(tmp_path)
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        LatentFiles(tmp_path)[0]
    save_file({"latents": torch.zeros(4, 2)}, broken)
    with pytest.raises(ValueError, match="lacks encoder_hidden_states, pooled_projections"):
        LatentFiles(tmp_path)[0]
    save_file(sample(height=torch.tensor(5)), broken)
    with pytest.raises(ValueError, match="no grid of height 5"):
        LatentFiles(tmp_path)[0]


def test_sizes_must_agree(folder: Path) -> None:
    save_file(sample(15), folder / "val" / "9.safetensors")
    with pytest.raises(ValueError, match="same size"):
        list(Latents(str(folder), batch_size=3).val_dataloader()[0])
