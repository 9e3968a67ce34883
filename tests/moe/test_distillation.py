"""Stages of the distillation: what runs, what learns, what is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.denoisers import condition, flux, pixel_dit
from zoo.moe import BlockGroup, MoBConfig, MoEConfig, block_groups, convert, expert_layers
from zoo.moe.distillation import Distiller, StageSteps

STEPS = StageSteps(shared=2, experts=3, blocks=1)


def pair(make: Any = pixel_dit, mixed: bool = True, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Return a student and its teacher."""
    teacher = make()
    student, _ = convert(teacher, MoEConfig(**{"scores": "random", **changes}))
    if mixed:
        groups = [BlockGroup(first=0, count=2, active=1)]
        if make is flux:
            groups.append(BlockGroup(blocks="single_transformer_blocks", first=0, count=2, active=1))
        student.mix_blocks(MoBConfig(groups=tuple(groups)))
    return student, teacher


def caller(model: nn.Module) -> Any:
    sample, inputs = condition(model, 2)
    timestep = torch.tensor([0.9, 0.3] if "Flux" in type(model).__name__ else [900, 300])
    return lambda model: model(sample, timestep=timestep, **inputs, return_dict=False)[0]


def learning(student: nn.Module) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def test_steps() -> None:
    assert [STEPS.at(step) for step in range(7)] == ["shared"] * 2 + ["experts"] * 3 + ["blocks"] * 2
    assert StageSteps(shared=1, experts=1).at(99) == "experts"
    with pytest.raises(ValueError, match="0 or more"):
        StageSteps(shared=0, experts=0)


def test_what_runs_and_learns() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, STEPS)
    layers, groups = expert_layers(student), block_groups(student)
    distiller.enter(0)
    assert {layer.top_k for layer in layers.values()} == {0}
    assert all(".shared_" in name for name in learning(student))
    distiller.enter(2)
    assert {layer.top_k for layer in layers.values()} == {2}
    assert all(".experts_" in name or ".router." in name for name in learning(student))
    assert {group.active for group in groups.values()} == {2}
    distiller.enter(5)
    assert {group.active for group in groups.values()} == {1}
    assert all(name.startswith("transformer_blocks.0.") for name in learning(student))
    assert not learning(teacher)


def test_shared_experts_may_go_on_learning() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, STEPS, freeze_shared=False)
    distiller.enter(2)
    assert all(any(part in name for name in learning(student)) for part in (".shared_", ".experts_", ".router."))
    distiller.enter(5)
    assert all(name.startswith("transformer_blocks.0.") for name in learning(student))


@pytest.mark.parametrize("make", [pixel_dit, flux])
def test_every_learning_weight_gets_a_gradient(make: Any) -> None:
    student, teacher = pair(make)
    distiller = Distiller(student, teacher, STEPS)
    call = caller(teacher)
    for step in (0, 2, 5):
        distiller.enter(step)
        student.zero_grad()
        losses = distiller.compare(call)
        losses.total.backward()
        touched = {name for name, p in student.named_parameters() if p.grad is not None}
        assert touched <= learning(student)
        routers = {name for name in learning(student) if ".router." in name}
        assert routers <= touched or step == 5
        assert (losses.balance is None) == (step == 0)


def test_lossless_student_has_no_error() -> None:
    student, teacher = pair(mixed=False, top_k=12)
    for layer in expert_layers(student).values():
        nn.init.zeros_(layer.router.weight)
    distiller = Distiller(student, teacher, StageSteps(shared=0, experts=1))
    distiller.enter(0)
    losses = distiller.compare(caller(teacher))
    assert losses.output < 1e-10
    assert max(losses.features.values()) < 1e-10
    assert torch.isfinite(losses.total)


@pytest.mark.parametrize("make", [pixel_dit, flux])
def test_groups_are_compared_with_their_last_block(make: Any) -> None:
    student, teacher = pair(make)
    distiller = Distiller(student, teacher, STEPS)
    call = caller(teacher)
    distiller.enter(2)
    every = set(distiller.compare(call).features)
    distiller.enter(5)
    grouped = set(distiller.compare(call).features)
    assert "transformer_blocks.0.0" in every - grouped
    assert "transformer_blocks.1.0" in grouped


def test_training_lowers_the_error() -> None:
    student, teacher = pair(mixed=False)
    distiller = Distiller(student, teacher, StageSteps(shared=40, experts=40))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    call = caller(teacher)
    errors: list[Tensor] = []
    for step in range(80):
        distiller.enter(step)
        losses = distiller.compare(call)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        errors.append(losses.output.detach())
    assert errors[39] < 0.8 * errors[0]
    assert errors[-1] < 0.8 * errors[39]


def test_what_does_not_fit() -> None:
    student, teacher = pair(mixed=False)
    with pytest.raises(ValueError, match="has no experts"):
        Distiller(pixel_dit(), teacher, STEPS)
    with pytest.raises(ValueError, match="mix_blocks"):
        Distiller(student, teacher, STEPS)
    with pytest.raises(ValueError, match=r"3 blocks and the teacher 2"):
        Distiller(student, pixel_dit(num_layers=2), StageSteps(shared=1))
