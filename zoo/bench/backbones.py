"""Merged backbones against their authors' formulation of the hot block, one family after the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from zoo.bench.memory import in_fresh_process, map_large_blocks, resident_peak
from zoo.bench.plain_backbones import PLAIN
from zoo.bench.report import Benchmark, Entry, Goal
from zoo.bench.subjects import subject
from zoo.bench.timing import Progress, Settings, compare, environment, require_close, torch_threads
from zoo.profiling import count_params

__all__ = ["backbones", "with_plain_blocks"]

_FAMILIES = {
    "efficientvit_msra_m0": "efficientvit_msra",
    "ffnet_1": "ffnet",
    "affnet_et": "affnet",
    "lsnet_t": "lsnet",
    "emov2_1m": "emov2",
}
_WANTED = {1: 1.15, 16: 1.3}  # batch -> geometric mean over the families
_TIMM = {"efficientvit_msra_m0": "efficientvit_m0"}  # who else has it
_PLAIN = "plain formulation"


def with_plain_blocks(model: nn.Module, plain: dict[type[nn.Module], Any]) -> nn.Module:
    """Return a copy of a model whose hot blocks compute as their authors wrote them, with the same weights.

    Args:
        model: In either form.
        plain: Class of a block -> function of the block and its input; a family's of `PLAIN`.
    """
    rival = copy.deepcopy(model)
    for module in rival.modules():
        if type(module) in plain:
            module.forward = MethodType(plain[type(module)], module)
    return rival


def backbones(
    settings: Settings,
    progress: Progress | None = None,
    *,
    models: Sequence[str] = tuple(_FAMILIES),
    batches: Sequence[int] = tuple(_WANTED),
) -> list[Benchmark]:
    """Time each family at batch 1 and 16; wanted: 1.15 and 1.3 times as fast in the geometric mean, none slower."""
    found = []
    for batch in batches:
        at_batch = Settings(**{**vars(settings), "batch": batch})
        with torch_threads(settings.threads):
            results = [_family(name, at_batch, progress) for name in models]
        ratios = [result.entries[0].speedup for result in results]
        medians = [ratio.median for ratio in ratios if ratio is not None]
        mean = math.prod(medians) ** (1 / len(medians))
        goals = (
            Goal(what=f"geometric mean at batch {batch}, times as fast", value=mean, wanted=_WANTED.get(batch, 1.0)),
            Goal(what=f"slowest family at batch {batch}, times as fast", value=min(medians), wanted=1.0),
        )
        last = results[-1]
        results[-1] = Benchmark(**{**vars(last), "goals": (*last.goals, *goals)})
        found += results
    return found


def _family(name: str, settings: Settings, progress: Progress | None) -> Benchmark:
    """Compare one family's small model, merged, with plain blocks and, where timm has it, with timm's merged form."""
    ours = subject(name, settings)
    x = ours.inputs[0]
    plain = with_plain_blocks(ours.model, PLAIN[_FAMILIES[name]])
    models: dict[str, nn.Module] = {ours.name: ours.model, _PLAIN: plain}
    goals = []
    if name in _TIMM:
        theirs = f"timm {_TIMM[name]} (fused)"
        models[theirs] = reparameterize_model(subject(_TIMM[name], settings, merge=False).model)
    with torch.inference_mode():
        check = require_close(f"{name} with plain blocks, logits", ours(), plain(x), 1e-3)
        calls = {label: partial(model, x) for label, model in models.items()}
        timed = compare(calls, settings, reference=_PLAIN, progress=progress)
    peaks: dict[str, int] = {}
    if settings.device == "cpu":
        for label, is_plain in ((ours.name, False), (_PLAIN, True)):
            peaks[label] = in_fresh_process(_peak, name, settings, is_plain)
        share = peaks[ours.name] / max(1, peaks[_PLAIN])
        goals.append(Goal(what=f"{ours.name}, peak memory over {_PLAIN}", value=share, wanted=1.0, at_most=True))
    if name in _TIMM:
        faster = timed[theirs][0].median / timed[ours.name][0].median
        goals.append(Goal(what=f"{ours.name} against {theirs}, times as fast", value=faster, wanted=1.1))
    entries = tuple(
        Entry.of(label, timed[label], params=count_params(model), peak_bytes=peaks.get(label))
        for label, model in models.items()
    )
    return Benchmark(
        name=f"backbones_{name}_batch{settings.batch}",
        title=f"Merged {name} against the plain formulation of its hot block, inference",
        conditions=settings.conditions(input="x".join(map(str, x.shape[1:]))),
        environment=environment(settings.device),
        reference=_PLAIN,
        entries=entries,
        checks=(*ours.checks, check),
        goals=tuple(goals),
        notes=("Random weights: they do not change the time.", "The plain formulation has the same merged weights."),
    )


def _peak(name: str, settings: Settings, plain: bool) -> int:
    """Return the bytes by which memory grows in one call, in this process."""
    map_large_blocks()
    with torch_threads(settings.threads):
        ours = subject(name, settings, check=False)
        model = with_plain_blocks(ours.model, PLAIN[_FAMILIES[name]]) if plain else ours.model
        with torch.inference_mode():
            model(*ours.inputs)  # what libraries keep for ever after their first use is not the model's
        before, peak = resident_peak(lambda: model(*ours.inputs))
    return peak - before
