"""Lightning's command line, with checkpoints checked before the work and settings that mean what they say."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from timm.layers import set_fused_attn, use_fused_attn

from zoo.notices import Notice, in_one_line
from zoo.processor import tell_of_emulation
from zoo.tasks.arguments import COMMANDS, refuse_nulls
from zoo.tasks.checkpoints import read_training_checkpoint
from zoo.tasks.own_model import SaveOwnModel
from zoo.weights import CheckpointError

__all__ = ["TrainingCLI", "run_lightning"]

_SPECIAL = ("best", "last", "hpc")


class _SaveConfig(SaveConfigCallback):
    """Of trainings alone: a test beside a run needs no config, and is not refused for the one that lies there."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":  # what failed before its first checkpoint is not kept
            self.overwrite = not any(Path(trainer.default_root_dir).rglob("*.ckpt"))
            super().setup(trainer, pl_module, stage)


class TrainingCLI(LightningCLI):
    """LightningCLI that keeps to the settings it is given where a run goes on from a checkpoint."""

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; Lightning would put its settings in the place of those on the command line."""
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        path = config.get("ckpt_path")
        if not path or path in _SPECIAL or "://" in str(path) or str(path).startswith("registry"):
            return
        checkpoint = read_training_checkpoint(path, resume=subcommand == "fit")
        made_by = checkpoint.get("task") or checkpoint.get("hyper_parameters", {}).get("_class_path")
        own = config.get("model", {}).get("class_path")
        if made_by and own and _name(made_by) != _name(own):
            raise CheckpointError(
                f"{path} is of the task {_name(made_by)}, the config of {_name(own)}: take the config it was made with."
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let the caller say what is wrong with the arguments, in place of the usage and ten lines more."""
        return super().init_parser(**{**kwargs, "exit_on_error": False, "allow_abbrev": False})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return those of Lightning without `predict`, which no task has: `zoo classify` and others do it."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in COMMANDS}

    def before_instantiate_classes(self) -> None:
        """Refuse null where nothing takes it, keep a run in one folder, choose the attention that is faster here."""
        config = self.config[self.config.subcommand]
        refuse_nulls(config)
        _follow_root(config)
        if config.trainer.get("enable_progress_bar") is False and (parts := _listed(config.trainer.get("callbacks"))):
            # Lightning refuses a bar where none is wanted
            config.trainer.callbacks = [part for part in parts if not _name(part["class_path"]).endswith("ProgressBar")]
        if _on_cpu(config.trainer):
            _tell_of_emulation(str(config.trainer.precision))
        if _fused_is_slower(config.trainer):
            set_fused_attn(False)
            torch.backends.cuda.enable_flash_sdp(False)  # of a CPU, too
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # or the plain one computes in float32

    def before_fit(self) -> None:
        """Let the run leave the folder of its model."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if hasattr(self.model, "trained_model") and not any(isinstance(entry, SaveOwnModel) for entry in callbacks):
            callbacks.append(SaveOwnModel(Path(self.trainer.default_root_dir) / "model"))


def _follow_root(config: Any) -> None:
    """Move logs, checkpoints and pipelines, which configs put into their `default_root_dir`, along with it."""
    root = config.trainer.default_root_dir
    if root is None:
        return
    parts = [*_listed(config.trainer.get("logger")), *_listed(config.trainer.get("callbacks"))]
    for path in filter(None, config.get("config") or ()):  # None: text in place of a file
        settings = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8")) or {}
        stated = (settings.get("trainer") or {}).get("default_root_dir")
        if stated is None:
            continue
        for part in parts:
            arguments = part.get("init_args") or {}
            for name in ("save_dir", "dirpath", "folder"):
                place = arguments.get(name)
                if place is not None and Path(place).is_relative_to(stated):
                    arguments[name] = str(Path(root) / Path(place).relative_to(stated))


def _listed(parts: Any) -> list[Any]:
    """Return loggers or callbacks that a config lists; one alone, or a switch, names no place of ours."""
    return parts if isinstance(parts, list) else []


def _fused_is_slower(trainer: Any) -> bool:
    """Tell whether torch's fused attention is the slower one for these settings, and nothing else is asked for.

    In bfloat16 on a CPU (torch 2.15, AVX512-BF16) a step of RePaViT-Tiny takes 1.7 times as long with it, one of the
    diffusion policy 2.2 times, of PixelDiT 1.4 times; in float32 both take the same time.
    """
    bfloat16 = str(trainer.precision).startswith("bf16")
    return _on_cpu(trainer) and bfloat16 and "TIMM_FUSED_ATTN" not in os.environ


def _on_cpu(trainer: Any) -> bool:
    return trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())


def _tell_of_emulation(precision: str) -> None:
    """Say before a training what a 16-bit precision costs on a processor without it."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])
    tell_of_emulation(dtype, "cpu", "--trainer.precision 32-true")


def _name(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Drop Lightning's tips to install its makers' services."""
    return "Tip: For seamless cloud" not in record.getMessage()


def run_lightning(arguments: list[str]) -> None:
    """Run Lightning's command line; notices appear as one line each.

    `sys.argv` stays as it is: Lightning starts further processes with it.
    """
    warnings.simplefilter("always", Notice)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # Lightning's own, of torch
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    warnings.showwarning = in_one_line(warnings.showwarning)
    fused = use_fused_attn(), use_fused_attn(experimental=True)
    flash = torch.backends.cuda.flash_sdp_enabled()
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    try:
        TrainingCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            args=arguments,
        )
    finally:
        set_fused_attn(*fused)
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)
