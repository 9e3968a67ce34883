"""timm's optimizers and schedules for a LightningModule, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

__all__ = ["OptimConfig", "TimmOptimModule"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        opt: timm optimizer name: "adamw", "lamb", "sgd", "muon", ...
        lr: Peak learning rate; not scaled by batch size.
        weight_decay: Decoupled where the optimizer is; not applied to biases, norms and `no_weight_decay()`.
        betas: Of Adam-like optimizers; None keeps theirs.
        layer_decay: Factor per layer from the head down (fine-tuning); None is off.
        sched: timm schedule name: "cosine", "linear"-like "poly", "step", or "none".
        warmup: Share of all steps with linearly rising learning rate.
        warmup_lr: Learning rate of the first step.
        min_lr: Learning rate of the last step.
        options: More arguments of timm's `create_optimizer_v2`, for example `fallback_list` of Muon.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup: float = 0.05
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)


class TimmOptimModule(LightningModule):
    """A LightningModule whose `model` is optimised as its `optim` says."""

    model: nn.Module
    optim: OptimConfig

    def configure_optimizers(self) -> Any:
        cfg = self.optim
        options = dict(cfg.options) if cfg.betas is None else {"betas": cfg.betas, **cfg.options}
        optimizer = create_optimizer_v2(
            self.model, cfg.opt, cfg.lr, cfg.weight_decay, layer_decay=cfg.layer_decay, **options
        )
        if cfg.sched == "none":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(cfg.warmup * steps)
        # timm counts epochs; here one "epoch" is one optimizer step, so that a schedule may be any number of steps
        scheduler, _ = create_scheduler_v2(
            optimizer,
            cfg.sched,
            num_epochs=steps,
            decay_epochs=steps,
            warmup_epochs=warmup,
            warmup_lr=cfg.warmup_lr,
            min_lr=cfg.min_lr,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedule to the number of optimizer steps taken."""
        scheduler.step(self.global_step, metric)
