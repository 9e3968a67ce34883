"""Training of diffusion policies: windows of demonstrations, the loss, what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from zoo.data.demonstrations import Demonstrations, Windows
from zoo.diffusion import DiffusionPolicyPipeline, DiffusionPolicyTransformer
from zoo.environments import Demonstration, PointTask
from zoo.tasks.optim import OptimConfig
from zoo.tasks.policy import DiffusionPolicy


def model() -> DiffusionPolicyTransformer:
    return DiffusionPolicyTransformer(
        observation_dim=6, num_layers=2, num_attention_heads=2, attention_head_dim=8, dropout=0.0
    )


def data() -> Demonstrations:
    return Demonstrations(PointTask(), episodes=3, val_episodes=2, batch_size=16)


def test_windows_repeat_both_ends() -> None:
    steps = np.arange(4.0)[:, None]
    windows = Windows([Demonstration(steps, 10 * steps), Demonstration(steps[:2], 10 * steps[:2])], 3, 2)
    assert [tuple(window.flatten().tolist()) for window in windows.observations] == [
        (0, 0), (0, 1), (1, 2), (2, 3), (0, 0), (0, 1),
    ]  # fmt: skip
    assert [tuple(window.flatten().tolist()) for window in windows.actions] == [
        (0, 0, 10), (0, 10, 20), (10, 20, 30), (20, 30, 30), (0, 0, 10), (0, 10, 10),
    ]  # fmt: skip
    assert len(windows) == 6
    assert torch.equal(windows[(7, 3)][1], windows.actions[3])
    assert torch.equal(windows[3][0], windows.observations[3])


def test_ranges_are_those_of_the_training_data() -> None:
    module = data()
    module.setup("fit")
    observed, acted = module.ranges()
    assert len(observed[0]) == 6
    assert len(acted[1]) == 2
    assert all(low < high for low, high in zip(*observed, strict=True))
    assert len(module.val_dataloader().dataset) < len(module.train)
    module.batch_size = 100_000
    with pytest.raises(ValueError, match="batch_size 100000 exceeds the"):
        module.train_dataloader()


def test_loss() -> None:
    """The noise is learned, on actions in [-1, 1]; the formula of the paper written out."""
    task = DiffusionPolicy(model()).eval()
    task.ranges = ([[0.0] * 6, [2.0] * 6], [[-1.0, 0.0], [3.0, 1.0]])
    observations, actions = torch.rand(4, 2, 6), torch.rand(4, 16, 2)
    noise, timesteps = torch.randn(4, 16, 2), torch.tensor([0, 30, 70, 99])
    alpha = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2").alphas_cumprod[timesteps].view(-1, 1, 1)
    clean = (actions - torch.tensor([1.0, 0.5])) / torch.tensor([2.0, 0.5])
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    expected = (task.model(noisy, timesteps, observations - 1).sample - noise).square().mean()
    torch.testing.assert_close(task._loss((observations, actions), timesteps, noise), expected)


def test_optimizer_is_the_published_one() -> None:
    """AdamW with betas (0.9, 0.95); weight decay on matrices, not on positions, norms and biases."""
    task = DiffusionPolicy(model(), OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-3, sched="none"))
    optimizer = task.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    decayed = {
        names[id(parameter)]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert decayed.keys() == set(names.values())
    for name, decay in decayed.items():
        parameter = task.model.get_parameter(name)
        assert decay == (1e-3 if parameter.ndim > 1 and "pos_embed" not in name else 0), name


@pytest.mark.slow
def test_training_end_to_end(tmp_path: Path) -> None:
    """Fit with EMA; the checkpoint and the saved pipeline hold the averaged weights and the ranges of the data."""
    task = DiffusionPolicy(model(), OptimConfig(lr=1e-2, warmup=0.0), eval_episodes=2, eval_steps=2)
    average = EMAWeightAveraging(decay=0.5)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        callbacks=[average, ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    first = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    module = data()
    trainer.fit(task, module)
    assert all(not torch.equal(first[name], parameter) for name, parameter in task.model.named_parameters())
    assert {"train/loss", "val/loss", "val/success", "val/score"} <= set(trainer.callback_metrics)
    averaged = average._average_model.module.model.state_dict()
    loaded = DiffusionPolicy.load_from_checkpoint(
        tmp_path / "checkpoints" / "last.ckpt", model=model(), weights_only=False
    )
    assert loaded.ranges == task.ranges == module.ranges()
    loaded.save_pretrained(tmp_path / "pipeline", dtype=torch.float16)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float16)
    assert type(pipe) is DiffusionPolicyPipeline
    assert pipe.config.action_range == task.ranges[1]
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, averaged[name].half()), name
    assert loaded.model.dtype == torch.float32
    results = trainer.test(task, module, verbose=False)[0]
    assert 0 <= results["test/success"] <= 1


def test_what_is_missing_is_said() -> None:
    task = DiffusionPolicy(model())
    with pytest.raises(RuntimeError, match="fit the task, or load a checkpoint"):
        task.pipeline()
    task.trainer = Trainer(logger=False)
    task.trainer.datamodule = LightningDataModule()
    with pytest.raises(ValueError, match=r"trains on zoo\.data\.demonstrations\.Demonstrations, got"):
        task.setup("fit")
