"""Two processes train as one: the same samples, the same gradients, the same weights."""

from __future__ import annotations

import os
from pathlib import Path

import fresh_process
import pytest
import torch
from image_sets import image_folder

from zoo.cli.train import main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  num_sanity_val_steps: 0
  plugins:
    - class_path: zoo.tasks.callbacks.CheckedCheckpointIO
  callbacks:
    - class_path: zoo.tasks.callbacks.ExactResume
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.8}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "{step}"}
model:
  class_path: zoo.tasks.classification.Classification
  init_args:
    model: repavit_tiny
    num_classes: 2
    # LayerNorm: statistics over a batch would depend on how it is split
    model_args: {img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1, feature_norm: LayerNorm}
    optim: {opt: sgd, lr: 0.1}  # Adam would turn rounding errors of gradients that are zero into steps
data:
  class_path: zoo.data.images.ImageClassification
  init_args: {image_size: 16, auto_augment: rand-m9-mstd0.5, reprob: 0.5, seed: 3}
"""


def words(folder: Path, data: Path) -> list[str]:
    """Prepare a run in a new folder, and return what is typed."""
    folder.mkdir()
    (folder / "run.yaml").write_text(CONFIG)
    words = ["fit", "--config", folder / "run.yaml", "--data.init_args.data_dir", data]
    return [str(word) for word in (*words, "--trainer.default_root_dir", folder)]


def fit_in_parallel(folder: Path, data: Path, strategy: str, *more: str) -> None:
    """Train in two processes: `ddp` starts Python anew for the second, `ddp_fork` forks a process that did no work."""
    code = "import runpy, sys; sys.argv[:1] = []; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [str(ROOT / "train.py"), *words(folder, data), *PARALLEL, strategy, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = fresh_process.run(code, *command, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob(f"step={step}.ckpt")
    loaded = torch.load(path, weights_only=False)
    assert len(loaded["exact_resume"]["rng"]) in (1, 2)
    kinds = ("state_dict", "current_model_state")
    return {f"{kind}.{key}": value for kind in kinds for key, value in loaded[kind].items()}


PARALLEL = ("--trainer.devices", "2", "--data.init_args.batch_size", "2", "--trainer.accumulate_grad_batches", "2",
            "--trainer.strategy")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=8, val=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return the folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("parallel") / "two"
    fit_in_parallel(folder, data, "ddp")
    return folder


def test_two_processes_equal_one(tmp_path: Path, data: Path, two: Path) -> None:
    """2 processes x 2 images x 2 accumulated batches equal 1 process x 8 images; a resumed run equals a whole one."""
    assert main([*words(tmp_path / "one", data), "--data.init_args.batch_size", "8"]) == 0
    one, both = checkpoint(tmp_path / "one", 4), checkpoint(two, 4)
    assert one.keys() == both.keys()
    for key, value in one.items():
        assert torch.allclose(both[key], value, rtol=1e-5, atol=1e-6), key

    (middle,) = two.rglob("step=3.ckpt")  # in the middle of the second epoch
    fit_in_parallel(tmp_path / "resumed", data, "ddp_fork", "--ckpt_path", str(middle))
    resumed = checkpoint(tmp_path / "resumed", 4)
    assert all(torch.equal(resumed[key], value) for key, value in both.items())


def test_processes_draw_different_numbers(two: Path) -> None:
    """Noise, mixing and dropout of two processes are not the same."""
    (path,) = two.rglob("step=1.ckpt")
    first, second = torch.load(path, weights_only=False)["exact_resume"]["rng"]
    assert not torch.equal(first["torch"], second["torch"])
    assert first["python"] != second["python"]
    assert first["numpy"] != second["numpy"]
