"""Models that are ready to be timed: built by name, merged, cast, with an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from zoo import catalog, factory
from zoo.bench.report import Check
from zoo.bench.timing import BenchError, Settings, cast, require_close
from zoo.ffn.reparam import reparameterize
from zoo.profiling import count_macs_of_copy, denoiser_inputs
from zoo.record import record_of
from zoo.sources import Source, find, metrics_of
from zoo.text import first_line

__all__ = ["Subject", "first", "subject"]

_RESTORER_SIZE = 256  # pixels a side, where a network takes any size


@dataclass(kw_only=True)
class Subject:
    """A model that is ready to be timed.

    Args:
        name: What it is called in the table.
        source: The name that it was built from.
        merged: It was re-parameterised.
        task: "classification", "sr", "generation", ...
        model: In evaluation mode.
        inputs: Arguments of `forward` by position.
        named: Arguments of `forward` by name.
        checks: What was compared when it was merged.
        expected: Its output in float32, merged, on the CPU; None where nothing was checked.
        trained: It has weights of its own, not random ones.
    """

    name: str
    source: str
    merged: bool
    task: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    named: dict[str, Any]
    checks: tuple[Check, ...] = ()
    expected: Tensor | None = None
    trained: bool = False

    def __call__(self) -> Any:
        return self.model(*self.inputs, **self.named)

    @property
    def accuracy(self) -> dict[str, float]:
        """Top-1 accuracy in percent by data set: of these weights, or the authors'; empty where none is known."""
        source = find(self.source)
        facts = catalog.load().get(source.architecture or "", {})
        if source.kind == "model" and not source.tag:
            return {"top-1 on ImageNet-1k (%)": facts["top1"]} if facts.get("top1") else {}
        metrics = metrics_of(source)
        found = [metric for metric in metrics if metric["name"] == "Top-1 accuracy"]
        return {f"top-1 on {metric['dataset']} (%)": metric["value"] for metric in found[:1]}

    @property
    def family(self) -> str:
        """Family of the model, "timm" for those of others."""
        return catalog.load().get(find(self.source).architecture or "", {}).get("family", "timm")

    @torch.no_grad()
    def macs(self) -> int:
        """Count multiply-accumulates of one call."""
        return count_macs_of_copy(self.model, *self.inputs, **self.named)


def subject(
    name: str,
    settings: Settings,
    *,
    size: int | None = None,
    merge: bool = True,
    check: bool = True,
    label: str | None = None,
    pretrained: bool = False,
) -> Subject:
    """Build a model with random weights (a denoiser, a file: with its own) and an input for it.

    Args:
        name: Registered name of ours or timm's, or a published denoiser.
        settings: Batch, type and device.
        size: Height and width of the input in pixels; None is the model's own.
        merge: Re-parameterise what can be.
        check: Check in float32 that merging leaves the output as it is.
        label: What it is called in the table; None is its name.
        pretrained: Load the published weights that a tag names.

    Raises:
        ValueError: There is no such model, the message names the nearest; or it takes no input of this size.
        BenchError: Merging changes the output, or the model does not run on its input.
    """
    torch.manual_seed(0)
    source = find(name)
    is_denoiser = source.kind == "pipeline"
    if is_denoiser and settings.model_args:
        raise ValueError(f"Arguments of a model go to one that is built by name; {name} is a pipeline.")
    loaded = pretrained and bool(source.tag)
    task, model, x, named = (
        _denoiser(name, size) if is_denoiser else _network(source, size, loaded, settings.model_args)
    )
    model = model.eval().requires_grad_(False)
    checks: tuple[Check, ...] = ()
    merged = False
    with torch.inference_mode():
        try:
            expected = first(model(x, **named)) if check else None
        except Exception as error:  # of the user's code, of many kinds
            shape = "x".join(map(str, x.shape[1:]))
            raise BenchError(f"{name} does not run on an input of {shape}: {first_line(error)}") from error
        if merge:
            before, merged = expected, bool(reparameterize(model, measure=False).layers)
            if merged and before is not None:
                expected = first(model(x, **named))
                checks = (require_close(f"{name} merged and as it is trained", expected, before),)
    cast(model, settings)
    batch = x.expand(settings.batch, *x.shape[1:]).contiguous().to(settings.device, settings.torch_dtype)
    named = {key: _batch_of(value, settings) if isinstance(value, Tensor) else value for key, value in named.items()}
    return Subject(
        name=label or (f"{name} (merged)" if merged else name),
        source=name,
        merged=merged,
        task=task,
        model=model,
        inputs=(batch,),
        named=named,
        checks=checks,
        expected=expected,
        trained=loaded or source.kind != "model",
    )


def _batch_of(value: Tensor, settings: Settings) -> Tensor:
    """Repeat one sample; timesteps and labels (B,) keep their type."""
    value = value.expand(settings.batch, *value.shape[1:]).to(settings.device)
    return value.to(settings.torch_dtype) if value.ndim > 1 else value


Parts = tuple[str, nn.Module, Tensor, dict[str, Any]]
"""Task, model, one input, arguments by name."""


def _denoiser(name: str, size: int | None) -> Parts:
    model = factory.create_model(name, pretrained=True)
    sample, named = denoiser_inputs(model, size)
    config: Any = model.config
    return (
        "policy" if "observation_dim" in config else "generation",
        model,
        sample,
        {**named, "return_dict": False},
    )


def _network(source: Source, size: int | None, pretrained: bool, given: tuple[tuple[str, Any], ...] = ()) -> Parts:
    name = source.name
    arguments: dict[str, Any] = {"pretrained": True} if pretrained else {}
    if size and source.task == "classification" and source.kind == "model":  # a user's model keeps its own
        arguments |= factory.image_size_args(name, size, **dict(given))
    model: Any = factory.create_model(name, **(arguments | dict(given)))
    task = source.task or record_of(model).task
    if task != "classification":
        side = size or _RESTORER_SIZE
        return task, model, torch.rand(1, model.in_chans, side, side), {}
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return task, model, torch.randn(1, channels, size or height, size or width), {}


def first(output: Any) -> Tensor:
    """Return the output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
