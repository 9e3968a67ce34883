"""Stored latents and embedded prompts, for training latent diffusion transformers without their encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.samplers import ResumableSampler, SeededDataset, training_loader

__all__ = ["LatentFiles", "Latents"]

_NEEDED = ("latents", "encoder_hidden_states", "pooled_projections")


class LatentFiles(Dataset[dict[str, Tensor]]):
    """Samples of a folder, one safetensors file each.

    A file holds what Flux's transformer takes: `latents` (N, C), packed; `encoder_hidden_states` (M, D), the embedded
    prompt; `pooled_projections` (P,); optionally `height`, in latent tokens. Positions are made from the grid.

    Args:
        folder: Searched for *.safetensors, subfolders included.

    Raises:
        ValueError: There is no file, or a file lacks an entry; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{folder} holds no .safetensors file of latents.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self.files[index]
        try:
            sample = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        missing = [key for key in _NEEDED if key not in sample]
        if missing:
            raise ValueError(f"{file} lacks {', '.join(missing)}; it holds {', '.join(sorted(sample))}.")
        count = len(sample["latents"])
        height = int(sample.pop("height", torch.tensor(round(count**0.5))))
        if height < 1 or count % height:
            raise ValueError(f"{file} has {count} latent tokens, which are no grid of height {height}.")
        return sample | {"img_ids": _grid(height, count // height)}


def _grid(height: int, width: int) -> Tensor:
    """Return positions (height * width, 3): 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class Latents(LightningDataModule):
    """Batches of stored latents; all samples of a folder have the same size.

    Args:
        data_dir: Folder with `train/` and `val/`, see `LatentFiles`; without `val/` there is no validation.
        batch_size: Samples of a step and process.
        num_workers: Loader processes.
        seed: Of the order.

    Raises:
        ValueError: There is no `train/`, or a file does not fit.
    """

    def __init__(self, data_dir: str, batch_size: int = 1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.data_dir, self.batch_size, self.num_workers, self.seed = Path(data_dir), batch_size, num_workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        data = SeededDataset(LatentFiles(self.data_dir / "train"), self.seed)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler = ResumableSampler(data, self.seed, rank, world)
        return training_loader(self, data, sampler, "latents", collate_fn=collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        folder = self.data_dir / "val"
        if not folder.is_dir():
            return []
        data = LatentFiles(folder)
        return [DataLoader(data, self.batch_size, num_workers=self.num_workers, collate_fn=collate)]


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of Flux's arguments: samples stacked, positions once for all.

    Raises:
        ValueError: The samples have different sizes.
    """
    shapes = {tuple(sample["latents"].shape) for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"Samples of one batch must have the same size, got latents of {sorted(shapes)}.")
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in _NEEDED}
    text = batch["encoder_hidden_states"]
    return batch | {"img_ids": samples[0]["img_ids"], "txt_ids": text.new_zeros(text.shape[1], 3)}
