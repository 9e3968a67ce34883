"""A checkpoint is written whole, or the run says that it was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.tasks.callbacks import CheckedCheckpointIO, SavePretrained


class Line(LightningModule):
    """The smallest thing that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, plugins: list[CheckedCheckpointIO]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, filename="last")],
        plugins=plugins,
        default_root_dir=folder.parent,
    )
    trainer.fit(Line(), DataLoader(torch.ones(2, 1)))


def test_writes_and_reads(tmp_path: Path) -> None:
    io = CheckedCheckpointIO()
    path = tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    loaded = io.load_checkpoint(path, weights_only=True)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["state_dict"]["a"], torch.ones(2))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_unwritable_folder_stops_the_run(tmp_path: Path) -> None:
    """A file where the folder should be: Lightning alone fails only if the folder cannot be made."""
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises((RuntimeError, OSError), match="checkpoints"):
        fit(tmp_path / "checkpoints", [CheckedCheckpointIO()])
    io = CheckedCheckpointIO()
    with pytest.raises(RuntimeError, match=r"last\.ckpt could not be written: ") as caught:
        io.save_checkpoint({"epoch": 1}, tmp_path / "checkpoints" / "last.ckpt")
    assert "\n" not in str(caught.value)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of writing leaves the previous file, and nothing half-written."""
    path = tmp_path / "last.ckpt"
    io = CheckedCheckpointIO()
    io.save_checkpoint({"epoch": 1}, path)

    def full(checkpoint: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="No space left"):
        io.save_checkpoint({"epoch": 2}, path)
    monkeypatch.undo()
    assert io.load_checkpoint(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_silently_truncated_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that drops the end of a file without an error."""
    save = torch.save

    def truncating(checkpoint: object, target: Path) -> None:
        save(checkpoint, target)
        whole = Path(target).read_bytes()
        Path(target).write_bytes(whole[: len(whole) // 2])

    monkeypatch.setattr(torch, "save", truncating)
    with pytest.raises(RuntimeError, match="could not be written"):
        CheckedCheckpointIO().save_checkpoint({"a": torch.ones(1000)}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_run_writes_through_it(tmp_path: Path) -> None:
    fit(tmp_path / "checkpoints", [CheckedCheckpointIO()])
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_save_pretrained_needs_a_task_that_can(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[SavePretrained(str(tmp_path / "pipeline"))])
    with pytest.raises(TypeError, match="Line has no save_pretrained"):
        trainer.fit(Line(), DataLoader(torch.ones(2, 1)))


def test_save_pretrained_replaces_its_own_folder_alone(tmp_path: Path) -> None:
    class Saving(Line):
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "weights").write_text("new")

    def run(folder: Path) -> None:
        trainer = Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[SavePretrained(str(folder))],
        )  # fmt: skip
        trainer.fit(Saving(), DataLoader(torch.ones(2, 1)))

    run(tmp_path / "own")
    run(tmp_path / "own")
    assert (tmp_path / "own" / "weights").read_text() == "new"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("all of it")
    with pytest.raises(FileExistsError, match="thesis is not of SavePretrained's making"):
        run(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "all of it"
