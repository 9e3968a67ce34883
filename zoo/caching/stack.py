"""The run of blocks that a cache may leave out, found and checked in the first call of the user's own model.

The first call is computed in full and watched. Then the model is called again with its blocks passed through and the
output of the last one put in its place: what it returns has to be the same. A third time, with another image: the
first block has to see the difference. Neither call computes a block, so that both together cost little.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.caching.hooks import outside_graphs
from zoo.caching.streams import PlacedBlock, View, leaves, rebuilt, tensors, version
from zoo.profiling import count_params

__all__ = ["BlockStack", "Role"]

Role = Literal["watched", "beside", "first", "middle", "last", "passed"]

_ROUNDING = 16  # units of the last place by which two calls of the same model may differ
_SIMPLE = (bool, int, str, type(None))
_TRIES = 3  # calls to watch where features are changed in place


class _Plan(NamedTuple):
    """Which calls of blocks may be left out.

    Args:
        first: Number of the first call, which is computed and judged by.
        last: Number of the last call, whose output is forecast.
        first_view: Part of the first call's output to judge by.
        last_view: Part of the last call's output to forecast.
    """

    first: int
    last: int
    first_view: View
    last_view: View


@dataclass
class _Held:
    """An output and what it was when it was returned."""

    number: int
    block: PlacedBlock
    output: Any
    versions: list[int | None] = field(default_factory=list)

    def is_intact(self) -> bool:
        return self.versions == _versions(self.output)


def _versions(value: Any) -> list[int | None]:
    return [version(tensor) for _, tensor in tensors(value)]


def _copied(value: Any) -> Any:
    return rebuilt(value, {path: tensor.clone() for path, tensor in tensors(value)})


class BlockStack:
    """The blocks of a model that run one after the other, and what is done with each in the current call.

    Args:
        model: The denoiser.
        method: The cache, for messages.
        blocks: Of all lists that may be of the run.
    """

    def __init__(self, model: nn.Module, method: str, blocks: Sequence[PlacedBlock]) -> None:
        self.method = method
        self.blocks = list(blocks)
        self.learn: Callable[[Tensor, Tensor], None] = lambda first, last: None
        self.watches = False  # the current call is the first of its kind: it is computed in full
        self.copies = False  # the model changes features in place
        self.follows = False  # another context has decided on this step
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._plan: _Plan | None = None
        self._key: tuple[Any, ...] = ()
        self._number = -1
        self._calls: list[PlacedBlock] = []
        self._ends: dict[str, tuple[_Held, _Held]] = {}  # by list: its first and last call
        self._replay: tuple[Any, int] | None = None  # in a trial: what to put in place of a call, and its number
        self._first_number = 0
        self._entered: dict[int, list[Any]] = {}  # streams that came into calls of the replay
        self._tries = 0
        self._random: dict[torch.device, Tensor] = {}  # states of the generators before the call
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._model = model
        self._handles: tuple[torch.utils.hooks.RemovableHandle, ...] = ()

    def attach(self) -> None:
        """Begin to watch the calls of the model."""
        model = self._model
        self._handles = (
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
        )

    def remove(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    @outside_graphs
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._number = -1
        self._key = _kind_of_call(args, kwargs)
        self._plan = self._plans.get(self._key)
        self.watches = self._plan is None and not model.training
        self._calls, self._ends = [], {}
        if self.watches:
            self._random = _random_states(args, kwargs)

    @outside_graphs
    def enter(self, block: PlacedBlock) -> Role:
        """Return the role of a block in this call of it."""
        self._number += 1
        if self._replay is not None:
            return "passed" if self._first_number <= self._number <= self._replay[1] else "beside"
        if self.watches:
            return "watched"
        plan = self._plan
        if plan is None or not plan.first <= self._number <= plan.last:
            return "beside"
        return "first" if self._number == plan.first else "last" if self._number == plan.last else "middle"

    @outside_graphs
    @torch.no_grad()
    def watch(self, block: PlacedBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at a call of a block that was computed."""
        block.learn(args, kwargs, output)
        self.copies = self.copies or _is_inference(output)  # what changes in place is not counted there
        held = _Held(self._number, block, _copied(output) if self.copies else output)
        held.versions = _versions(held.output)
        self._calls.append(block)
        first, _ = self._ends.get(block.group, (held, held))
        self._ends[block.group] = (first, held)

    @outside_graphs
    def replayed(self, block: PlacedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a block that is passed through returns in the trial."""
        assert self._replay is not None
        if self._number == self._first_number:
            self._entered[self._number] = [_comparable(each) for each in block.inputs(args, kwargs)]
        if self._number < self._replay[1]:
            return block.passed(args, kwargs)
        feature, view = self._replay[0]
        return block.replaced(feature, view, args, kwargs)

    def first_feature(self, block: PlacedBlock, output: Any) -> Tensor:
        """Return what a step is judged by."""
        assert self._plan is not None
        feature = block.feature(output, self._plan.first_view)
        return feature.clone() if self.copies else feature

    def last_feature(self, block: PlacedBlock, output: Any, tokens: int | None) -> Tensor:
        """Return what is forecast."""
        assert self._plan is not None
        feature = block.feature(output, self._plan.last_view, tokens)
        return feature.clone() if self.copies else feature

    def replaced(self, block: PlacedBlock, feature: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the last block returns where a forecast takes its place."""
        assert self._plan is not None
        return block.replaced(feature.clone() if self.copies else feature, self._plan.last_view, args, kwargs)

    @outside_graphs
    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.watches:
            return
        self.watches = False
        if not all(held.is_intact() for ends in self._ends.values() for held in ends):
            self._tries += 1
            if self._tries < _TRIES:
                self.copies = True
                return
        with torch.no_grad():
            plan = self._find(model, args, kwargs, output)
        self._plan = self._plans[self._key] = plan
        first = self._held(plan.first)
        feature = first.block.feature(first.output, plan.first_view)
        tokens = feature.shape[1] if feature.ndim > 1 else None
        last = self._held(plan.last)
        self.learn(feature, last.block.feature(last.output, plan.last_view, tokens))
        self._calls, self._ends = [], {}

    def _held(self, number: int) -> _Held:
        return next(held for ends in self._ends.values() for held in ends if held.number == number)

    def _find(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Plan:
        """Return the longest run that may be left out.

        Raises:
            ValueError: There is none.
        """
        name = type(model).__name__
        if len(self._calls) < 2:
            raise ValueError(
                f"{self.method} needs at least 2 transformer blocks to skip any, {name} called {len(self._calls)}."
            )
        reason = "nothing in it follows its blocks"
        for first, last in self._runs():
            inside = self._calls[first : last + 1]
            unmapped = next((block.unmapped for block in inside if block.unmapped), None)
            if unmapped is not None:
                reason = unmapped
                continue
            reason = "what comes after its blocks also takes what they give on the way"
            for views in self._views(self._held(first), self._held(last)):
                plan = _Plan(first, last, *views)
                if self._is_exact(plan, model, args, kwargs, output):
                    if self._sees_the_image(plan, model, args, kwargs):
                        return plan
                    reason = "its first block does not see the image"
        raise ValueError(
            f"{self.method} cannot skip blocks of {name}: {reason}. TaylorSeerConfig and BACConfig work on it."
        )

    def _runs(self) -> list[tuple[int, int]]:
        """Return first and last calls of runs to try, the longest first; each holds a whole list at least."""
        sizes = {group: 0 for group in self._ends}
        for block in self._calls:
            sizes[block.group] += count_params(block.module)
        ends = {group: (first.number, last.number) for group, (first, last) in self._ends.items()}
        found = {
            (ends[one][0], max(ends[other][1] for other in (one, another)))
            for one in ends
            for another in ends
            for other in (one, another)
            if ends[one][0] <= ends[another][0] and self._joins(one, another)
        }

        def work(run: tuple[int, int]) -> int:
            return sum(sizes[group] for group, (first, last) in ends.items() if run[0] <= first and last <= run[1])

        runs = [run for run in found if run[1] > run[0]]
        return sorted(runs, key=lambda run: (-work(run), run[1] - run[0]))

    def _joins(self, one: str, another: str) -> bool:
        """Return whether a run may go on from one list into another: their streams are equally wide."""
        widths = []
        for group in (one, another):
            held = self._ends[group][1]
            streams = [stream for stream in held.block.streams(held.output) if stream is not None]
            order = held.block.order()
            if not streams or not order:
                return one == another
            widths.append(held.block.streams(held.output)[order[0]].shape[-1])
        return widths[0] == widths[1]

    def _views(self, first: _Held, last: _Held) -> list[tuple[View, View]]:
        """Return what to judge by and what to forecast, the likeliest first."""
        streams = last.block.streams(last.output)
        present = [at for at in last.block.order() if streams[at] is not None]
        seen = first.block.streams(first.output)
        judged = [at for at in first.block.order() if seen[at] is not None]
        if not present or not judged:
            return []
        own = {slot.taken: at for at, slot in enumerate(first.block.slots or []) if at in judged}

        def beside(at: int) -> View:
            """Return the stream of the first block that goes by the name of one of the last."""
            return View((own.get((last.block.slots or [])[at].taken, judged[0]) if len(judged) > 1 else judged[0],))

        image = seen[beside(present[0]).slots[0]]
        views: list[tuple[View, View]] = []
        whole = streams[present[0]]
        if (
            whole.ndim == image.ndim == 3
            and len(present) == 1 < len(judged)
            and whole.shape[1] > image.shape[1]
            and whole.shape[2] == image.shape[2]
        ):
            views += [(beside(present[0]), View((present[0],), part)) for part in ("last", "first")]
        views += [(beside(at), View((at,))) for at in present]
        if len(present) > 1:
            views.append((View(tuple(sorted(judged))), View(tuple(sorted(present)))))
        return views

    def _is_exact(
        self, plan: _Plan, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> bool:
        """Return whether the model gives the same with its blocks passed through and the last output in its place."""
        try:
            again = self._trial(plan, model, args, kwargs)
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
            return False  # what comes between or after the blocks cannot do without them
        return _is_same(output, again)

    def _sees_the_image(self, plan: _Plan, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        before = self._entered[plan.first]
        changed = self._other_image(args, kwargs)
        if changed is None:
            return True
        try:
            self._trial(plan, model, *changed)
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
            return True
        after = self._entered.get(plan.first, before)
        pairs = [(before[at], after[at]) for at in plan.first_view.slots]
        return any(one.shape != other.shape or not torch.equal(one, other) for one, other in pairs)

    def _other_image(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with another image: the first tensor, or list of them; None where there is none."""
        given = {name: value for name, value in zip(self._names, args, strict=False)} | kwargs
        for least in (3, 2):
            for name in [*self._names, *given]:
                if (new := _other(given.get(name), least)) is None:
                    continue
                if name in kwargs:
                    return args, {**kwargs, name: new}
                at = self._names.index(name)
                return (*args[:at], new, *args[at + 1 :]), kwargs
        return None

    def _trial(self, plan: _Plan, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        first, last = self._held(plan.first), self._held(plan.last)
        tokens = first.block.feature(first.output, plan.first_view)
        feature = last.block.feature(last.output, plan.last_view, tokens.shape[1] if tokens.ndim > 1 else None)
        self._first_number, self._number, self._entered = plan.first, -1, {}
        self._replay = ((feature.clone(), plan.last_view), plan.last)
        with torch.random.fork_rng([device for device in self._random if device.type == "cuda"]):
            for device, state in self._random.items():
                torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
            try:
                return model.forward(*args, **kwargs)
            finally:
                self._replay = None


def _is_inference(output: Any) -> bool:
    return any(tensor.is_inference() for _, tensor in tensors(output))


def _random_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[torch.device, Tensor]:
    """Return the states of the generators that a call may draw from."""
    devices = {tensor.device for _, tensor in tensors((args, kwargs)) if tensor.device.type == "cuda"}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def _comparable(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _kind_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what may change the way that a call takes through the model: which arguments there are, and switches."""
    found: list[Any] = []
    for path, leaf in leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            found.append((path, leaf.ndim))
        elif isinstance(leaf, _SIMPLE) and not any(str(key) in ("timestep", "t", "timesteps") for key in path):
            found.append((path, leaf))
    return tuple(found)


def _other(value: Any, least: int) -> Any:
    """Return another image for an image of `least` dimensions or more, or a list of them; None for anything else."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= least:
        return value * 0.5 + 1
    if isinstance(value, list) and value:
        new = [_other(each, least) for each in value]
        return None if any(each is None for each in new) else new
    return None


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two outputs of a model are equal but for rounding."""
    pairs = [tensors(one), tensors(other)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    for (_, ours), (_, theirs) in zip(*pairs, strict=True):
        if ours.shape != theirs.shape:
            return False
        if torch.equal(ours, theirs):
            continue
        if not ours.is_floating_point():
            return False
        limit = _ROUNDING * torch.finfo(ours.dtype).eps * float(ours.nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(ours, theirs, rtol=0, atol=limit, equal_nan=True):
            return False
    return True
