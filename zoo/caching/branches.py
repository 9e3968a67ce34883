"""Which branch of guidance a call of the denoiser is of, where its pipeline enters no cache context that says so.

Branches of one step are told apart by what they are conditioned on: prompts, labels, masks, numbers. Most pipelines
give the same tensors at every step, and where they build them anew, their contents are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.caching.adapters import Scale

__all__ = ["Branch", "Branches", "Conditioning", "conditioning", "is_control", "is_equal", "is_repeated"]

Conditioning = Mapping[str, Any]

# Arguments that change from step to step within a branch: times, other samples, residuals of a ControlNet, stores of
# keys and values.
_CONTROL = re.compile(r"control|residual|block_samples")
_CHANGING = re.compile(
    rf"(^|_)(t|r|time|timesteps?|sigmas?)(_|$)|{_CONTROL.pattern}|audio_hidden_states|latents|kv_cache|noise"
)


@cache
def is_control(name: str) -> bool:
    """Return whether an argument of this name brings what a ControlNet gives."""
    return _CONTROL.search(name) is not None


@cache
def _is_changing(name: str) -> bool:
    return _CHANGING.search(name) is not None


def conditioning(arguments: Mapping[str, Any], sample: str | None) -> Conditioning:
    """Return those arguments of a denoiser that tell one branch from another.

    Args:
        arguments: By name.
        sample: Name of the noisy images.
    """
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and name not in (sample, "return_dict") and not _is_changing(name)
    }


@dataclass
class Branch:
    """A branch of guidance in one cache context.

    Args:
        name: Under which its features are stored: that of the context, numbered from the second branch on.
        inputs: What its last call was conditioned on.
        form: Shape, type and device of the images of its last call.
        step: Of its last call.
        began: Step at which it began to store.
        controls: Which ControlNets were on in its last call.
        scales: Of LoRA and IP-Adapters in its last call.
        repeats: Its last call was conditioned as the one before.
        call: All that its last call was given.
    """

    name: str
    inputs: Conditioning
    form: tuple[Any, ...]
    step: int
    began: int = 0
    controls: tuple[str, ...] = ()
    scales: Sequence[Scale] = ()
    repeats: bool = False
    call: Any = None


class Branches:
    """The branches of one cache context.

    Args:
        name: Of the context.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: list[Branch] = []

    def unused(self, step: int) -> list[Branch]:
        """Return the branches that were not called in a step."""
        return [branch for branch in self.known if branch.step != step]

    def find(self, inputs: Conditioning, candidates: list[Branch]) -> Branch | None:
        """Return the branch of a call, of equal ones the first; None where none of them was conditioned like that."""
        fitting = [branch for branch in candidates if is_equal(inputs, branch.inputs)]
        if len(fitting) > 1:  # two branches of equal prompts
            fitting = [branch for branch in fitting if is_repeated(inputs, branch.inputs)] or fitting
        return fitting[0] if fitting else None

    def open(self, inputs: Conditioning, form: tuple[Any, ...], step: int) -> Branch:
        """Add a branch."""
        taken = {branch.name for branch in self.known}
        names = (self.name if number == 1 else f"{self.name} {number}" for number in range(1, len(taken) + 2))
        branch = Branch(next(name for name in names if name not in taken), inputs, form, step)
        self.known.append(branch)
        return branch


def is_repeated(ours: Conditioning, theirs: Conditioning) -> bool:
    """Return whether two calls were given not only equal tensors, but the very same ones."""
    return ours.keys() == theirs.keys() and all(
        value is theirs[name] or not isinstance(value, Tensor | list | tuple | Mapping) for name, value in ours.items()
    )


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two calls, or parts of them, are conditioned alike."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        likes = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return likes and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, bool | int | float | str) and isinstance(other, bool | int | float | str):
        return one == other
    return False
