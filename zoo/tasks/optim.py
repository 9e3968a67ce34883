"""timm's optimizers and schedules for a LightningModule, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import create_scheduler_v2
from torch import nn

__all__ = ["OptimConfig", "TimmOptimModule"]


@dataclass(kw_only=True)  # not frozen: Lightning's TensorBoard logger copies hyper-parameters field by field
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        opt: timm optimizer name: "adamw", "lamb", "sgd", "muon", ...
        lr: Peak learning rate; not scaled by batch size.
        weight_decay: Decoupled where the optimizer is; not applied to biases, norms and `no_weight_decay()`.
        betas: Of Adam-like optimizers; None keeps theirs.
        layer_decay: Factor per layer from the head down (fine-tuning); None is off.
        sched: "cosine" or "poly" (a straight line) down to `min_lr`, "step" (times `decay_rate` after each 30 % of all
            steps), "multistep" (times `decay_rate` at each of `milestones`), "constant", or "none" (no warm-up either).
        milestones: Steps of "multistep", rising. DAT's 500k steps: `milestones: [250000, 400000, 450000, 475000]` with
            `decay_rate: 0.5`.
        decay_rate: Factor of "step" and "multistep".
        warmup: Share of all steps with linearly rising learning rate.
        warmup_prefix: The schedule starts after the warm-up; otherwise its beginning is replaced. With a `warmup_lr`
            of `lr` the rate is held before it falls, as Restormer's for 92k of 300k steps: `warmup: 0.306667`.
        warmup_lr: Learning rate of the first step.
        min_lr: Learning rate of the last step.
        options: More arguments of timm's `create_optimizer_v2`, for example `fallback_list` of Muon.

    Raises:
        ValueError: A rate is negative, `warmup` is no share, or `milestones` do not rise or belong to another schedule.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    sched: Literal["cosine", "poly", "step", "multistep", "constant", "none"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup: float = 0.05
    warmup_prefix: bool = False
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_lr", "min_lr", "decay_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of all steps and must lie in 0 ... 1, got {self.warmup}.")
        if self.milestones != sorted(set(self.milestones)) or bool(self.milestones) != (self.sched == "multistep"):
            raise ValueError(
                f'milestones are rising steps of the schedule "multistep", got {self.milestones} with "{self.sched}".'
            )


def _orthogonalize_in_float32() -> None:
    """Let timm's Muon iterate in float32: processors without bfloat16 take six times as long for a step otherwise.

    timm fixes the type in a default argument and offers no option.
    """
    function = muon.zeropower_via_newtonschulz
    if not isinstance(function, partial):
        muon.zeropower_via_newtonschulz = partial(function, dtype=torch.float32)


class TimmOptimModule(LightningModule):
    """A LightningModule whose `model` is optimised as its `optim` says."""

    model: nn.Module
    optim: OptimConfig

    def configure_optimizers(self) -> Any:
        cfg = self.optim
        if "muon" in cfg.opt and self.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            _orthogonalize_in_float32()
        options = dict(cfg.options) if cfg.betas is None else {"betas": cfg.betas, **cfg.options}
        optimizer = create_optimizer_v2(
            self.model, cfg.opt, cfg.lr, cfg.weight_decay, layer_decay=cfg.layer_decay, **options
        )
        if cfg.sched == "none":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(cfg.warmup * steps)
        # timm counts epochs, and applies a milestone one epoch early; here one "epoch" is one optimizer step, so that a
        # schedule may be any number of steps
        scheduler, _ = create_scheduler_v2(
            optimizer,
            cfg.sched,
            num_epochs=steps - warmup if cfg.warmup_prefix else steps,
            decay_epochs=max(1, round(0.3 * steps)),
            decay_milestones=[step + 1 for step in cfg.milestones],
            decay_rate=1.0 if cfg.sched == "poly" else cfg.decay_rate,  # for "poly" this is the exponent
            warmup_epochs=warmup,
            warmup_prefix=cfg.warmup_prefix,
            warmup_lr=cfg.warmup_lr,
            min_lr=cfg.min_lr,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedule to the number of optimizer steps taken."""
        scheduler.step(self.global_step, metric)
