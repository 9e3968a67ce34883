"""A step of any diffusion pipeline: how a run calls its denoisers, ready to be written in every format."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path
from zoo.export.network import ExportError, Network, call_network, difference

__all__ = ["Step", "compare_step", "record_steps"]

Run = Callable[[dict[str, Tensor]], Sequence[Tensor]]
"""Inputs by name -> outputs."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A denoiser as a run called it.

    Args:
        component: Its name in the pipeline.
        network: Ready to be written; shapes and arguments that are no tensors are those of the run.
        calls: Inputs by name and outputs of the first and the last call.
    """

    component: str
    network: Network
    calls: Sequence[tuple[dict[str, Tensor], tuple[Tensor, ...]]]


@dataclass
class _Call:
    names: list[str]
    leaves: list[Any]
    spec: Any
    outputs: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in zip(self.names, self.leaves, strict=True) if isinstance(leaf, Tensor)}

    def unlike(self, other: _Call) -> str | None:
        """Return what differs but the values of tensors; None where nothing does."""
        if self.names != other.names:
            return ", ".join(sorted(set(self.names) ^ set(other.names))) or "the order of its arguments"
        for name, one, two in zip(self.names, self.leaves, other.leaves, strict=True):
            if isinstance(one, Tensor) != isinstance(two, Tensor):
                return name
            if one.shape != two.shape if isinstance(one, Tensor) else one != two:
                return name
        return None


def record_steps(pipe: Any, denoisers: dict[str, nn.Module], run: Callable[[], object]) -> list[Step]:
    """Run a pipeline and describe how its denoisers are called.

    Args:
        pipe: The pipeline, on the CPU and without a cache.
        denoisers: Those of its components that may be called, by name.
        run: Makes one run of at least two steps.

    Raises:
        ExportError: No denoiser is called, or one with other arguments at each step, which no file could hold.
        ValueError: A cache is enabled.
    """
    calls: dict[str, list[_Call]] = {name: [] for name in denoisers}
    handles = []
    for name, model in denoisers.items():
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                "A cache is enabled on the model, and a file cannot hold it: call zoo.disable_cache first."
            )

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name].append(_call(module, args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            found = tuple(leaf.clone() for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
            calls[name][-1].outputs = found

        handles += [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not any(calls.values()):
        raise ExportError(f"{type(pipe).__name__} did not call {' or '.join(denoisers)} in a run: nothing to export.")
    return [_step(pipe, name, denoisers[name], found) for name, found in calls.items() if found]


def _call(module: nn.Module, args: Any, kwargs: Any) -> _Call:
    keys = [key for key in inspect.signature(module.forward).parameters if key != "self"]
    paths, spec = tree_flatten_with_path((args, kwargs))
    names = []
    for path, _ in paths:
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
        if path[0].idx == 0 and int(parts[0]) < len(keys):
            parts[0] = keys[int(parts[0])]
        names.append(re.sub(r"\W", "_", "_".join(parts)))
    leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for _, leaf in paths]
    return _Call(names, leaves, spec)


def _step(pipe: Any, component: str, model: nn.Module, calls: list[_Call]) -> Step:
    first, last = calls[0], calls[-1]
    for other in calls[1:]:
        if (what := first.unlike(other)) is not None:
            raise ExportError(
                f"{component} is called with another {what} at each step or branch of guidance, which one file cannot "
                "hold; try --guidance 1."
            )
    network = call_network(model, first.leaves, first.spec)
    facts = {
        "name": f"{component} of {type(pipe).__name__}",
        "kind": "step",
        "class": type(model).__name__,
        "producer": network.metadata.get("producer", ""),
        "input": "as the pipeline calls it; shapes, and arguments that are no tensors, are those of the recorded run",
    }
    network = replace(
        network,
        inputs=first.inputs,
        output="denoised" if len(first.outputs) == 1 else "",  # "sample" is an input of some
        metadata={key: value for key, value in facts.items() if value},
    )
    return Step(component=component, network=network, calls=[(call.inputs, call.outputs) for call in (first, last)])


def compare_step(run: Run, step: Step) -> float:
    """Return the largest difference between a file and the denoiser over the recorded calls.

    Differences are relative to the denoiser's largest output of the call.

    Args:
        run: Computes the file's outputs.
        step: What `record_steps` returned.

    Raises:
        ExportError: Outputs are of another number or shape, or are not finite.
    """
    worst = 0.0
    for inputs, expected in step.calls:
        found = run(inputs)
        if len(found) != len(expected):
            raise ExportError(f"The file returns {len(found)} outputs, {step.component} {len(expected)}.")
        pairs = zip(found, expected, strict=True)
        worst = max(worst, *(difference(one, right, inputs) for one, right in pairs))
    return worst
