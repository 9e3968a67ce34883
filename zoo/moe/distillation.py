"""The three stages in which a converted model learns from the dense one (Dense2MoE, https://arxiv.org/abs/2510.09094)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.moe.blocks import MixtureOfBlocks, block_groups
from zoo.moe.dense2moe import expert_layers
from zoo.moe.losses import feature_loss, record_balance

__all__ = ["DistillationLoss", "Distiller", "Stage", "StageSteps"]

Stage = Literal["shared", "experts", "blocks"]


@dataclass(kw_only=True)
class StageSteps:
    """How many optimizer steps each stage takes; 0 leaves it out.

    Args:
        shared: Only the shared experts run and learn: a pruned model that sets a floor.
        experts: Normal experts and routers learn beside them, the shared ones are frozen.
        blocks: Groups of blocks run some of their blocks; routers and blocks in groups learn, all else is frozen.
    """

    shared: int = 2000
    experts: int = 8000
    blocks: int = 0

    def __post_init__(self) -> None:
        if min(self.shared, self.experts, self.blocks) < 0 or self.total == 0:
            raise ValueError(f"Stages take 0 or more steps, and at least one in all, got {self}.")

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return self.shared + self.experts + self.blocks

    def at(self, step: int) -> Stage:
        """Return the stage of an optimizer step, the last one from its end on."""
        if step < self.shared:
            return "shared"
        if step < self.shared + self.experts or not self.blocks:
            return "experts"
        return "blocks"


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """What a batch costs.

    Args:
        total: The sum that is minimised.
        output: Mean squared error of the outputs.
        features: Mean squared error of each layer's features, unweighted: the weighted ones only mirror `output`.
        balance: Mean of the routers' balance losses; None where none ran.
    """

    total: Tensor
    output: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    balance: Tensor | None = None


class Distiller:
    """Compare a student with the frozen dense teacher, and say which of its weights learn.

    Args:
        student: A converted model, in training mode or not; its number of experts and blocks is what stages lead to.
        teacher: The dense model; it is put into evaluation mode and frozen.
        steps: Of each stage.
        balance: Weight of the balance loss.
        freeze_shared: Shared experts learn in the stage "shared" alone, as published; otherwise in "experts" too.

    Raises:
        ValueError: The student has no experts, its blocks are not the teacher's, or there is a stage of blocks without
            groups of blocks.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        steps: StageSteps,
        balance: float = 1e-2,
        freeze_shared: bool = True,
    ) -> None:
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.steps, self.balance, self.freeze_shared = steps, balance, freeze_shared
        self.layers, self.groups = expert_layers(student), block_groups(student)
        if not self.layers:
            raise ValueError(
                f"{type(student).__name__} has no experts: zoo.moe.convert, or zoo convert-moe, makes some."
            )
        if steps.blocks and not self.groups:
            raise ValueError("A stage of blocks needs groups of blocks: call mix_blocks on the student first.")
        self._top_k = max(layer.top_k for layer in self.layers.values())
        self._active = {name: group.active for name, group in self.groups.items()}
        ours, theirs = _blocks(student), _blocks(teacher)
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"The student has {len(ours)} blocks and the teacher {len(theirs)}: they must be the same."
            )
        self.stage: Stage | None = None
        self._set_features()

    def enter(self, step: int) -> Stage:
        """Set what runs and what learns for an optimizer step."""
        stage = self.steps.at(step)
        if stage == self.stage:
            return stage
        self.stage = stage
        self.student.requires_grad_(False)
        for layer in self.layers.values():
            layer.set_top_k(0 if stage == "shared" else self._top_k)
            layer.requires_grad_(stage == "experts")
            for part in (layer.shared_up, layer.shared_down):
                part.requires_grad_(stage == "shared" or (stage == "experts" and not self.freeze_shared))
        for name, group in self.groups.items():
            group.active = self._active[name] if stage == "blocks" else len(group.blocks)
            if stage == "blocks":
                group.requires_grad_(True)
        self._set_features()
        return stage

    def compare(self, call: Callable[[nn.Module], Tensor]) -> DistillationLoss:
        """Return the losses of a batch.

        Args:
            call: Runs a model, student or teacher, on the same inputs and returns its output.
        """
        with torch.no_grad(), _record(self._teacher_features) as theirs:
            target = call(self.teacher).detach().float()
        with record_balance(self.student) as balances, _record(self._student_features) as ours:
            output = F.mse_loss(call(self.student).float(), target)
        features, errors = feature_loss(output, ours, theirs)
        total = output + features
        balance = torch.stack(balances).mean() if balances else None
        if balance is not None:
            total = total + self.balance * balance
        return DistillationLoss(total=total, output=output, features=errors, balance=balance)

    def _set_features(self) -> None:
        """Choose what is compared: every block's output, or where groups choose, that of a group and its last block."""
        ours, theirs = _blocks(self.student), _blocks(self.teacher)
        for name, group in self.groups.items() if self.stage == "blocks" else ():
            *inner, last = _members(self.student, name)
            for member in inner:
                del ours[member], theirs[member]
            ours[last] = group
        self._student_features, self._teacher_features = ours, theirs


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a transformer by list and number in the dense model, groups opened."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList) or "blocks" not in name:
            continue
        opened = [
            inner for block in child for inner in (block.blocks if isinstance(block, MixtureOfBlocks) else [block])
        ]
        found |= {f"{name}.{number}": block for number, block in enumerate(opened)}
    return found


def _members(model: nn.Module, group: str) -> list[str]:
    """Return the names of the blocks of a group as `_blocks` gives them."""
    inside = set(map(id, model.get_submodule(group).blocks))  # type: ignore[arg-type]
    return [name for name, block in _blocks(model).items() if id(block) in inside]


@contextmanager
def _record(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect outputs by name; a pair of text and image tokens becomes two entries."""
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            streams = output if isinstance(output, tuple) else (output,)
            for number, stream in enumerate(stream for stream in streams if stream is not None):
                features[f"{name}.{number}"] = stream

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(keep(name)).remove)
        yield features
