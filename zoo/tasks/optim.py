"""timm's optimizers and schedules for a LightningModule, counted in optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2, list_optimizers, muon
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from zoo.catalog import did_you_mean
from zoo.notices import notice
from zoo.record import KEY, ModelRecord
from zoo.tasks.blockwise import block_groups, require_factors
from zoo.tasks.freezing import freeze
from zoo.tasks.plain import differences, plain
from zoo.weights import CheckpointError

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
        block_lr: Factors of the learning rate by kind of block, "embedding", "attention", "ffn", "norm", see
            `zoo.tasks.blockwise`; kinds that are not named keep 1. Not together with `layer_decay`.
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
        ValueError: There is no such optimizer, a rate is negative, `warmup` is no share, or `milestones` do not rise or
            belong to another schedule.
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    block_lr: dict[str, float] | None = None
    sched: Literal["cosine", "poly", "step", "multistep", "constant", "none"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup: float = 0.05
    warmup_prefix: bool = False
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [str(name) for name in list_optimizers()]
        if (opt := self.opt.lower().removeprefix("lookahead_")) not in known:
            raise ValueError(f"timm has no optimizer {self.opt!r}.{did_you_mean(opt, known)}")
        for name in ("lr", "weight_decay", "warmup_lr", "min_lr", "decay_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        require_factors(self.block_lr or {})
        if self.block_lr and self.layer_decay is not None:
            raise ValueError("block_lr and layer_decay both scale learning rates: give one of them.")
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


_FIXED = ("model", "backbone", "num_classes", "experts", "freeze", "optim.opt")
"""Settings with which a run cannot go on in another form: the checkpoint would not fit, or mean something else."""


class TimmOptimModule(LightningModule):
    """A LightningModule whose `model` is optimised as its `optim` says.

    Its checkpoints hold plain data. A resumed run takes the settings that it is given, not those of the checkpoint, and
    says which differ.
    """

    model: nn.Module
    optim: OptimConfig

    def __init__(self) -> None:
        super().__init__()
        self._still: list[nn.Module] = []  # norms in frozen parts
        self._made: dict[str, Any] = {}  # settings of optimizer and schedule as configured, before a checkpoint's come
        self._resumed: dict[str, Any] | None = None
        self._shift = 0  # steps that the schedule is ahead of the optimizer

    def keep_plain(self) -> None:
        """Turn the saved hyper-parameters into plain data; call after `save_hyperparameters`."""
        values = {key: plain(value) for key, value in self.hparams.items()}
        self.hparams.clear()
        self.hparams.update(values)
        self._hparams_initial = copy.deepcopy(self._hparams)

    def model_record(self) -> ModelRecord | None:
        """Return what the model is, with the classes and the preprocessing of the data; None where nobody knows."""
        return None

    def freeze_parts(self, model: nn.Module, prefixes: Sequence[str] | None, name: str) -> None:
        """Fix parts of a model, with the statistics of their norms, see `zoo.tasks.freezing.freeze`."""
        self._still = freeze(model, prefixes or (), name)

    def train(self, mode: bool = True) -> Self:
        """Change the mode of all but norms in frozen parts."""
        super().train(mode)
        for norm in self._still:
            norm.eval()
        return self

    def configure_optimizers(self) -> Any:
        cfg = self.optim
        if "muon" in cfg.opt and self.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            _orthogonalize_in_float32()
        options = dict(cfg.options) if cfg.betas is None else {"betas": cfg.betas, **cfg.options}
        if cfg.block_lr:
            options["param_group_fn"] = lambda model: block_groups(
                model, cfg.block_lr or {}, cfg.weight_decay, None if cfg.sched != "none" else cfg.lr
            )
        optimizer = create_optimizer_v2(
            self.model, cfg.opt, cfg.lr, cfg.weight_decay, layer_decay=cfg.layer_decay, **options
        )
        self._require_same_groups(optimizer)
        self._made["groups"] = _settings_of(optimizer)
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
        self._made["groups"] = _settings_of(optimizer)  # the schedule has added the rates it starts from
        self._made["schedule"] = copy.deepcopy(cast(Any, scheduler).state_dict())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedule to the number of optimizer steps taken."""
        scheduler.step(self.schedule_step, metric)

    @property
    def schedule_step(self) -> int:
        """Place in the schedule, in optimizer steps; not their number where an epoch has had others of them."""
        return self.global_step + self._shift

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = f"{type(self).__module__}.{type(self).__qualname__}"
        record = self.model_record()
        if record is not None:
            checkpoint[KEY] = record.to_config()
        checkpoint["schedule_shift"] = self._shift

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, in one line, and say which settings are others than its own."""
        trainer = self._trainer
        source = str(trainer.ckpt_path) if trainer is not None and trainer.ckpt_path else "The checkpoint"
        own, made_by = f"{type(self).__module__}.{type(self).__qualname__}", checkpoint.get("task")
        if made_by not in (None, own) and trainer is not None:
            raise CheckpointError(
                f"{source} is of the task {made_by}, this is {own}: take the config it was made with."
            )
        _require_fit(self, checkpoint.get("state_dict", {}), source)
        self._shift = int(checkpoint.get("schedule_shift", 0))
        if trainer is None or not trainer.training:
            return
        saved = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if not key.startswith("_")}
        changed = differences(plain(saved), plain(dict(self.hparams)))
        for name, (old, new) in changed.items():
            if any(name == fixed or name.startswith(f"{fixed}.") for fixed in _FIXED):
                raise ValueError(
                    f"{source} was made with {name} {old}, not {new}: a run cannot go on with another one."
                )
        if changed:
            listed = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            notice(f"Going on from {source} with other settings than before: {listed}.")
        self._resumed = {"groups": [len(group["params"]) for group in _groups_in(checkpoint)], "source": source}

    def _require_same_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a checkpoint whose optimizer has other groups of parameters: its state would be dealt out wrongly."""
        if self._resumed is None:
            return
        sizes, own = self._resumed["groups"], [len(group["params"]) for group in optimizer.param_groups]
        if sizes and sizes != own:
            raise ValueError(
                f"{self._resumed['source']} has other groups of parameters: a run cannot go on with another "
                "layer_decay or block_lr, with weight_decay switched on or off, or with other parts frozen."
            )

    def on_train_start(self) -> None:
        """Put the settings that this run was given where the checkpoint has put its own."""
        if self._resumed is None:
            return
        self._resumed = None
        optimizer, scheduler = self.trainer.optimizers[0], cast(Any, self.lr_schedulers())
        changed = False
        for group, made in zip(optimizer.param_groups, self._made["groups"], strict=True):
            for key, value in made.items():
                if key != "lr" and group.get(key) != value:
                    group[key], changed = value, True
            if scheduler is None and group["lr"] != made["lr"]:
                group["lr"] = made["lr"]
        if scheduler is None:
            return
        if self._shift or changed or scheduler.state_dict() != self._made["schedule"]:
            scheduler.load_state_dict(copy.deepcopy(self._made["schedule"]))
            scheduler.step(self.schedule_step)

    def keep_place_in_schedule(self) -> None:
        """Let the schedule stand where the epochs stand, once an epoch has another number of steps than before."""
        epochs = self.trainer.max_epochs
        if epochs and epochs > 0 and self.trainer.max_steps == -1:
            steps = int(self.trainer.estimated_stepping_batches)
            self._shift = round(steps * self.trainer.current_epoch / epochs) - self.global_step


def _require_fit(module: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Say in one line what Lightning says in hundreds."""
    own = module.state_dict()
    wrong = {
        "lacks": [key for key in own if key not in given],
        "has in another shape": [key for key in own if key in given and own[key].shape != given[key].shape],
        "has besides": [key for key in given if key not in own],
    }
    found = [
        f"it {how} {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "")
        for how, keys in wrong.items()
        if keys
    ]
    if found:
        raise CheckpointError(f"{source} does not fit this {type(module).__name__}: {', '.join(found)}.")


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _groups_in(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    states = checkpoint.get("optimizer_states") or [{}]
    return states[0].get("param_groups", [])
