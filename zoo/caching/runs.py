"""Notice where one sampling run ends and the next begins, also when the last was aborted, and count its steps."""

from __future__ import annotations

import gc
import inspect
import operator
import re
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.hooks import CacheContext
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from zoo.caching.adapters import are_close, scaled_parts, scales_of
from zoo.caching.branches import Branch, Branches, Conditioning, conditioning, is_control, is_equal, is_repeated
from zoo.caching.hooks import DEFAULT_CONTEXT, ContextStates, PrivateStates, outside_graphs, refuse_copy
from zoo.caching.streams import version
from zoo.caching.summary import Call, RunLog

__all__ = ["RunTracker", "takes_time"]

_TIME = re.compile(r"(^|_)(t|time|timesteps?|timestep_ratio)$")
_LIKENESS = 0.005  # of the training timesteps: a timestep may be rounded to bfloat16
_CHANGES = 3  # branches that took the place of others before a run is warned about
_DEPTH = 24  # frames between a pipeline and its denoiser: hooks, wrappers, decorators


class _Inputs:
    """What a call of the denoiser was given.

    Args:
        names: Of the arguments that it takes.
        args: Given by position.
        kwargs: Given by name.
    """

    def __init__(self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [name for name in (*names, *kwargs) if arguments.get(name) is not None]
        time_name = next(filter(_is_time, given), None)
        sample = next((name for name in given if name != time_name and _is_sample(arguments[name])), None)
        self._given_time: Any = arguments.get(time_name or "")
        self._time: float | None = None
        self._timed = False
        self.sample = list(_tensors(arguments.get(sample or "")))
        self._versions = [version(tensor) for tensor in self.sample]
        self.form = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in self.sample)
        self.conditioning: Conditioning = conditioning(arguments, sample)
        # pipelines switch a ControlNet off by giving zeros, or nothing
        controls = [name for name in given if is_control(name)]
        self.controls = tuple(name for name in controls if any(bool(each.any()) for each in _tensors(arguments[name])))

    @property
    def time(self) -> float | None:
        """The timestep as it was passed, the largest of all tokens; None where there is none."""
        if not self._timed:
            values = [float(tensor.max()) for tensor in _tensors(self._given_time) if tensor.numel()]
            if isinstance(self._given_time, int | float):
                values = [float(self._given_time)]
            self._time, self._timed = max(values, default=None), True
        return self._time

    def has_same_sample(self, other: _Inputs) -> bool:
        """Return whether an earlier call was given the same noisy images."""
        return self.form == other.form and all(
            version(other_tensor) == was and (tensor is other_tensor or torch.equal(tensor, other_tensor))
            for tensor, other_tensor, was in zip(self.sample, other.sample, other._versions, strict=True)
        )

    def has_same_tensors(self, other: _Inputs) -> bool:
        """Return whether an earlier call was given the very tensors for its images; nothing waits for the device."""
        return len(self.sample) == len(other.sample) and all(map(operator.is_, self.sample, other.sample))

    def has_same_time(self, other: _Inputs) -> bool:
        """Return whether an earlier call was given the same timesteps, token by token."""
        ours, theirs = list(_tensors(self._given_time)), list(_tensors(other._given_time))
        return self.time == other.time and len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class _Schedule:
    """The timesteps that a pipeline goes through, and those of a run among them.

    Args:
        pipeline: With a scheduler that has timesteps.
        model: The denoiser, of several perhaps.
    """

    def __init__(self, pipeline: Any, model: nn.Module) -> None:
        self.scheduler = pipeline.scheduler
        self.timesteps: Any = self.scheduler.timesteps
        self.values: list[float] = torch.as_tensor(self.timesteps).flatten().tolist()
        self._training = float(getattr(self.scheduler.config, "num_train_timesteps", None) or 1000)
        ratio = getattr(getattr(pipeline, "config", None), "boundary_ratio", None)
        self._bound = None if ratio is None else ratio * self._training
        second = getattr(pipeline, "transformer_2", None)
        self._is_second = second is not None and unwrap_module(second) is model
        # what the pipeline says of its loop: Stable Cascade leaves out the last timestep, and frames at times of their
        # own take more calls than there are timesteps
        planned = getattr(pipeline, "_num_timesteps", None)
        self.planned: int | None = planned if isinstance(planned, int) and planned > 0 else None
        self.start = 0
        self.own: list[float] = []

    def begin(self, given: float | None) -> bool:
        """Find where a run starts, and return whether its first timestep is of this schedule."""
        found = self._find(given)
        begin = getattr(self.scheduler, "begin_index", None)
        self.start = int(begin) if begin else found or 0
        rest = self.values[self.start :]
        if self._bound is not None:  # Wan 2.2: one denoiser for much noise, another one for little
            rest = [value for value in rest if (value < self._bound) == self._is_second]
        self.own = rest if self.planned is None else rest[: self.planned]
        return found is not None

    def _find(self, given: float | None) -> int | None:
        """Return the position of a timestep, which may be passed as a share of the training timesteps."""
        if given is None or not self.values:
            return None
        candidates = [given]
        if -1e-6 <= given <= 1 + 1e-6:  # also as what is done rather than what is left to do
            candidates += [given * self._training, (1 - given) * self._training]
        tolerance = _LIKENESS * self._training
        best: tuple[float, int] | None = None
        for candidate in candidates:
            distances = [abs(value - candidate) for value in self.values]
            if distances[0] <= min(distances) + tolerance / 10:  # a run begins at the first one if it can
                distances[0] = min(distances)
            found = distances.index(min(distances)), min(distances)
            if found[0] == 0 and found[1] <= tolerance:
                return 0  # 1 of 1000 is also the last one of schedules that end at 1
            if best is None or found[1] < best[0]:
                best = found[1], found[0]
        assert best is not None
        return best[1] if best[0] <= tolerance else None

    def repeats(self, step: int) -> bool:
        """Return whether the timestep after a step of the run is the same again, as of a second-order scheduler."""
        return step + 1 < len(self.own) and self.own[step] == self.own[step + 1]


class RunTracker:
    """Watch the calls of a denoiser, call `on_new_run` before the first one of each run, and count steps.

    `on_call` is called before each one, when its step and branch are known.

    In a pipeline, which is found as the caller, a run begins where its scheduler has got new timesteps. A denoiser that
    another program calls has begun a new run where its timestep turns back, or comes to the first one again. A denoiser
    in training mode begins one at every call, so that nothing is reused.

    A step is what `CacheContext.step_index` says. Without it, a new step begins where the timestep is another one, the
    scheduler has made a step, or a branch comes up again with other images. Calls of one step are of different branches
    of guidance: of different cache contexts, or told apart by what they are conditioned on. A call that fits no known
    branch opens one, and has nothing stored. Where the form of the images changes, or a ControlNet is switched on or
    off, what its branch has stored is dropped, and the count of steps goes on. Where another program gives several
    images to its first step in turns, so it does to all others, and each image has a branch.

    It is a pair of forward hooks of PyTorch, not of diffusers: accelerate's offloading exchanges the forward of whole
    models and drops hooks of the latter kind from it.

    Args:
        model: The denoiser.
        pipeline: The pipeline that it was taken from, if there is one.
    """

    __reduce__ = refuse_copy

    def __init__(self, model: nn.Module, pipeline: DiffusionPipeline | None = None) -> None:
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._model = weakref.ref(model)
        self._scaled: list[nn.Module] = []  # LoRA layers and IP-Adapters, for a run
        self._given = None if pipeline is None else weakref.ref(pipeline)
        # of the run
        self._pipeline: Callable[[], Any] = lambda: None
        self._schedule: _Schedule | None = None
        self._is_called_by_pipeline = False
        self._trained = False
        self._branches: dict[str, Branches] = {}
        self._first_time: float | None = None
        self._direction = 0.0
        self._follows_one_step = False
        self._first_index: int | None = None
        self.step = -1
        self.num_steps: int | None = None
        # of the last call
        self._last: _Inputs | None = None
        self._index: int | None = None
        self._scheduler_step: Any = None
        self._begun = 0.0
        self.branch = DEFAULT_CONTEXT.name
        self.begins_branch = True
        self.began = 0
        # who calls
        self._timesteps: Any = None
        self._holder: dict[str, int] = {}
        self._thread: int | None = None
        self._ousted: dict[int, _Left] = {}
        self.log = RunLog()
        self.states: list[ContextStates] = []
        self.observed: list[ContextStates] = []
        self.private = PrivateStates(())
        self.tuned_steps: int | None = None
        self.on_new_run: Callable[[], None] = lambda: None
        self.on_call: Callable[[], None] = lambda: None

    def attach(self, model: nn.Module) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        """Begin to watch."""
        return (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        )

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline that calls, or None."""
        return getattr(self._pipeline(), "scheduler", None)

    @property
    def start(self) -> int:
        """Position of the run's first step among the timesteps of the scheduler."""
        return self._schedule.start if self._schedule else 0

    @property
    def timesteps(self) -> list[float] | None:
        """All timesteps of the scheduler, or None where it does not drive the run."""
        return self._schedule.values if self._schedule else None

    def planned_fits(self, steps: int) -> bool:
        """Return whether a schedule of so many calls may be for this run: not where both have more calls than there are
        timesteps, and other ones.
        """
        planned, own = self._schedule.planned if self._schedule else None, len(self.own_timesteps)
        return planned is None or planned == steps or min(planned, steps) <= own

    @property
    def own_timesteps(self) -> list[float]:
        """Timesteps of the denoiser in this run; empty where no scheduler drives it."""
        return self._schedule.own if self._schedule else []

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the last step of the run."""
        return self.num_steps is not None and self.step >= self.num_steps - 1

    @property
    def sample(self) -> list[Tensor]:
        """The noisy images of the current call: one tensor, or a list of them."""
        return self._last.sample if self._last else []

    def current_timestep(self) -> float:
        """Return the timestep of the current call: that of the scheduler, or else the largest of all tokens."""
        if self.step < len(self.own_timesteps):
            return self.own_timesteps[self.step]
        given = (self._last.time if self._last else None) or 0.0
        # passed as a share of the training timesteps
        is_share = self._first_time is not None and 0 <= self._first_time <= 1
        return 1000 * given if is_share else given

    def forget(self) -> None:
        """Take the next call for the first one of a run."""
        self._branches.clear()
        self._schedule = self._last = None
        self._first_time = self._first_index = self._index = None
        self._direction = 0.0
        self._replaced = 0
        self.step = -1

    @outside_graphs
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model():
            refuse_copy()
        self._hold(module)
        inputs = _Inputs(self._names, args, kwargs)
        context = self.states[0].context if self.states else DEFAULT_CONTEXT
        if module.training:
            self._is_called_by_pipeline, self._trained = False, True
            self._begin(None, inputs, context)
        else:
            self._follow(_find_pipeline(), inputs, context)
        for states in self.states:
            states.branch = self.branch
        self.private.enter(self.branch)
        self.log.calls.append(Call(self.branch, self.step))
        self.on_call()
        self._begun = time.perf_counter()

    @outside_graphs
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        form = self._last.form if self._last else ()
        if form and form[0][2].type == "cpu" and self.log.calls:
            self.log.calls[-1].seconds = time.perf_counter() - self._begun
        if self.observed:
            self._observe()
        self._holder.pop("thread", None)

    def _observe(self) -> None:
        """Note what diffusers' caches did in this call."""
        for states in self.observed:
            skipped = states.left_out(self.branch)
            if skipped is not None:
                self.log.note(self.branch, (states.unit,), self.step, skipped=skipped)
        if self.is_last:  # afterwards pipelines have everything dropped
            self.log.bytes_held = max(self.log.bytes_held, sum(states.nbytes for states in self.observed))

    # who calls

    def _hold(self, module: nn.Module) -> None:
        """Refuse a call while one of another thread is under way."""
        own = threading.get_ident()
        other = self._holder.setdefault("thread", own)
        if other != own:
            if _is_calling(other, module):
                self._refuse_thread(module)
            self._holder["thread"] = own

    def _refuse_thread(self, module: nn.Module) -> None:
        raise RuntimeError(
            f"Two threads run one {type(module).__name__} with a cache at the same time: give each thread a model of "
            f"its own, or take turns by whole runs."
        )

    def _check_thread(self, timesteps: Any, time: float | None, begins: bool) -> None:
        """Refuse a run that goes on after another thread has begun one, or in another thread.

        What looks like a beginning beside the other thread's calls may go on from the thread's own last one.
        """
        own, owner, module = threading.get_ident(), self._thread, self._model()
        assert module is not None
        left = self._ousted.get(own)
        goes_on = not begins or (left is not None and left.goes_on(timesteps, time))
        taken = left is not None or (owner not in (None, own) and owner in _frames())
        if goes_on and taken:
            self._holder.pop("thread", None)
            self._refuse_thread(module)
        self._ousted.pop(own, None)
        if begins and owner is not None and owner != own and self.step >= 0:
            by_pipeline, last = self._is_called_by_pipeline, self._last.time if self._last else None
            self._ousted[owner] = _Left(
                self._timesteps if by_pipeline else None, self._first_time, last, self._direction
            )
        self._thread = own

    # which run, which step, which branch

    def _follow(self, pipeline: Any, inputs: _Inputs, context: CacheContext) -> None:
        """Find run, step and branch of a call; `pipeline` is the one that calls, if any."""
        by_pipeline = pipeline is not None
        if pipeline is None and self._given is not None:
            pipeline = self._given()
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        renewed = timesteps is not None and timesteps is not self._timesteps
        fresh = renewed or self._trained or pipeline is not self._pipeline()
        fresh = fresh or by_pipeline != self._is_called_by_pipeline
        place = "run" if fresh or self._last is None else self._place(self._last, inputs, context)
        self._check_thread(timesteps if by_pipeline else None, inputs.time, place == "run")
        if place == "run":
            self._follows_one_step = not fresh and self._is_another(inputs, context)
            self._is_called_by_pipeline, self._timesteps, self._trained = by_pipeline, timesteps, False
            self._begin(pipeline, inputs, context, drives=by_pipeline or renewed)
            return
        assert self._last is not None
        if place == "step":
            self.step += 1
            if not by_pipeline and self._direction == 0 and inputs.time is not None and self._last.time is not None:
                self._direction = inputs.time - self._last.time
        if context.step_index is not None and self._first_index is not None:
            self.step = context.step_index - self._first_index
        if self.num_steps is not None and self.step >= self.num_steps:
            # there are more than the scheduler has
            planned = self._schedule.planned if self._schedule else None
            self.num_steps = self.log.num_steps = planned if planned is not None and self.step < planned else None
        self._enter(inputs, context)

    def _place(self, last: _Inputs, inputs: _Inputs, context: CacheContext) -> Literal["run", "step", "same"]:
        """Return whether a call begins a run, begins a step, or is of the step of the call before."""
        # a pipeline without a schedule is like any other program
        alone, index = not self._is_called_by_pipeline or self._schedule is None, context.step_index
        if index is not None and self._index is not None:
            if index < self._index or (index == self._index and alone and self._is_repeated(inputs, context)):
                return "run"
            return "step" if index > self._index else "same"
        moved = None if alone else self._has_scheduler_moved()
        if moved:
            return "step"
        if moved is False and (inputs.has_same_tensors(last) or inputs.time == last.time):
            return "same"
        if inputs.time != last.time:
            return "run" if self._has_turned_back(inputs) else "step"
        if alone and self._is_repeated(inputs, context):
            return "run"
        used = self._find_used(inputs, context)
        if used is None:
            # another branch, which may take the images in another form; without contexts they are the same ones
            other = context.name == DEFAULT_CONTEXT.name and alone and inputs.form == last.form
            other = other and not inputs.has_same_sample(last)
            if not other:
                return "same"
        elif inputs.has_same_sample(used.call):
            return "same"
        # a branch comes up again with other images: a scheduler of second order, or images or parts of one in turns
        if alone:
            if inputs.time == self._first_time:
                return "run"
            if not self._follows_one_step:  # no scheduler begins with the same timestep twice
                return "step"
            self._unmix()
            return "same"
        parts = self._schedule is not None and not self._schedule.repeats(self.step)
        return "same" if parts and inputs.has_same_time(last) else "step"

    def _is_another(self, inputs: _Inputs, context: CacheContext) -> bool:
        """Return whether a call is given other images in place of those of the only step so far, and nothing else."""
        if self._last is None or self.step != 0 or inputs.time != self._last.time or inputs.has_same_sample(self._last):
            return False
        branches = self._branches.get(context.name)
        return branches is not None and branches.find(inputs.conditioning, branches.known) is not None

    def _unmix(self) -> None:
        """Let branches begin anew whose first step may be of other images: these take turns, and it was of the last."""
        for branch in (branch for branches in self._branches.values() for branch in branches.known):
            if branch.began == 0:
                branch.form = ()

    def _find_used(self, inputs: _Inputs, context: CacheContext) -> Branch | None:
        """Return the branch of a call if it was called in this step before, and is no other one of the same inputs."""
        branches = self._branches.get(context.name)
        if branches is None or branches.find(inputs.conditioning, branches.unused(self.step)):
            return None
        used = [branch for branch in branches.known if branch.step == self.step]
        found = branches.find(inputs.conditioning, used)
        return found or (used[-1] if used and context.name != DEFAULT_CONTEXT.name else None)

    def _has_scheduler_moved(self) -> bool | None:
        """Return whether the scheduler has made a step since the last call, None where it does not tell."""
        before, now = self._scheduler_step, self._read_scheduler_step()
        return None if before is None or now is None else now != before

    def _read_scheduler_step(self) -> int | None:
        step = getattr(self.scheduler, "step_index", None)
        return int(step) if step is not None else None

    def _has_turned_back(self, inputs: _Inputs) -> bool:
        """Return whether the timestep is the first one again, or went against the direction of the run."""
        goes_on = self.num_steps is not None and self.step + 1 < self.num_steps
        if self._last is None or inputs.time is None:
            return False
        now, last = inputs.time, self._last.time
        if self._is_called_by_pipeline and goes_on:  # its schedule says what comes next, which may go back and forth
            begins_again = now == self._first_time and self._schedule is not None
            own, after = self.own_timesteps, self.step + 1
            return begins_again and (after >= len(own) or own[after] != own[0])
        return now == self._first_time or (last is not None and (now - last) * self._direction < 0)

    def _is_repeated(self, inputs: _Inputs, context: CacheContext) -> bool:
        """Return whether a call repeats one of this step: at the first step, or with the very same arguments."""
        used = self._find_used(inputs, context)
        if used is None or not inputs.has_same_sample(used.call):
            return False
        at_first = self.step == 0 and self._branches[context.name].find(inputs.conditioning, [used]) is not None
        return at_first or is_repeated(inputs.conditioning, used.inputs)

    def _begin(self, pipeline: Any, inputs: _Inputs, context: CacheContext, drives: bool = False) -> None:
        """Begin a run with its first call; `drives` says that the scheduler is known to be its own."""
        self.forget()
        self.on_new_run()
        self._pipeline = (lambda: None) if pipeline is None else weakref.ref(pipeline)
        model = self._model()
        self._scaled = [] if model is None or self._trained else scaled_parts(model)  # in training each call is a run
        if pipeline is not None and model is not None and self._timesteps is not None:
            schedule = _Schedule(pipeline, model)
            if schedule.begin(inputs.time) or drives:
                self._schedule = schedule
        self.step, self._first_time, self._first_index = 0, inputs.time, context.step_index
        self.num_steps = len(self.own_timesteps) or None
        if self.num_steps is None and context.num_inference_steps is not None:
            self.num_steps = context.num_inference_steps - (context.step_index or 0)
        self.log = RunLog(num_steps=self.num_steps)
        planned = len(self.timesteps) - self.start if self.timesteps else self.num_steps
        if self.tuned_steps is not None and planned not in (None, self.tuned_steps):
            warnings.warn(
                f"The cache was tuned for {self.tuned_steps} steps, this run has {planned}: `zoo tune-cache` finds a "
                f"setting for them.",
                stacklevel=2,
            )
            self.tuned_steps = None  # said once
        self._enter(inputs, context)

    def _enter(self, inputs: _Inputs, context: CacheContext) -> None:
        """Find the branch of a call, or open one."""
        scales = scales_of(self._scaled)
        branches = self._branches.get(context.name)
        if branches is None:
            branches = self._branches[context.name] = Branches(context.name)
        branch = self._find_branch(branches, inputs, context)
        if branch is None:
            if self.step > 0:
                self._drop_idle(branches)
            branch = branches.open(inputs.conditioning, inputs.form, self.step)
            self.begins_branch = True
        else:
            self.begins_branch = branch.form != inputs.form or branch.controls != inputs.controls
            self.begins_branch = self.begins_branch or not are_close(scales, branch.scales)
            if context.name != DEFAULT_CONTEXT.name:
                # it names the branch, which a callback may give another prompt; what changes at every step is none
                repeated, branch.repeats = branch.repeats, is_equal(inputs.conditioning, branch.inputs)
                self.begins_branch = self.begins_branch or (repeated and not branch.repeats)
            if self.begins_branch:
                self._drop(branch)
        if self.begins_branch:
            branch.began = self.step
        branch.inputs, branch.form, branch.step, branch.call = inputs.conditioning, inputs.form, self.step, inputs
        branch.controls, branch.scales = inputs.controls, scales
        self.branch, self.began = branch.name, branch.began
        self._last, self._index, self._scheduler_step = inputs, context.step_index, self._read_scheduler_step()

    def _find_branch(self, branches: Branches, inputs: _Inputs, context: CacheContext) -> Branch | None:
        unused = branches.unused(self.step)
        only = unused[0] if len(branches.known) == len(unused) == 1 else None
        # a context that names a single branch needs no other proof, and a batch that changes is no other branch
        if only and (context.name != DEFAULT_CONTEXT.name or only.form != inputs.form):
            return only
        return branches.find(inputs.conditioning, unused)

    def _drop(self, branch: Branch) -> None:
        """Let go of what is stored for a branch."""
        for states in self.states:
            states.drop(branch.name)
        self.private.drop(branch.name)

    def _drop_idle(self, branches: Branches) -> None:
        """Let go of branches that were not called in this step or the one before: another one takes their place."""
        idle = [branch for branch in branches.known if branch.step < self.step - 1]
        for branch in idle:
            self._drop(branch)
            branches.known.remove(branch)
        if idle:
            self._replaced += 1
            if self._replaced == _CHANGES:
                warnings.warn(
                    f"What {type(self._model()).__name__} is conditioned on changes from step to step, so that nothing "
                    f"is reused: call it in `model.cache_context(name)` to say which branch of guidance a call is of.",
                    stacklevel=2,
                )


def takes_time(model: nn.Module) -> bool:
    """Return whether a model is called with a time, as denoisers are."""
    return any(map(_is_time, inspect.signature(type(model).forward).parameters))


@cache
def _is_time(name: str) -> bool:
    return _TIME.search(name) is not None


def _is_sample(value: Any) -> bool:
    """Return whether it may be the noisy images: a tensor of real numbers, or a list of them."""
    parts = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield a tensor, or those in a list."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _find_pipeline() -> Any:
    """Return the pipeline that calls the denoiser, None where another program does.

    A denoiser may be shared by pipelines with schedulers of their own, and only the frame of the caller says which one
    it is.
    """
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if not names or names[0] != "self" or frame.f_globals.get("__name__", "").startswith("torch."):
            continue
        if "components" in names:  # a block of a modular pipeline
            found = frame.f_locals.get("components")
            if hasattr(found, "scheduler"):
                return found
        elif isinstance(found := frame.f_locals.get("self"), DiffusionPipeline):
            return found
    return None


@dataclass(frozen=True)
class _Left:
    """Where a thread's run was when another thread began one.

    Args:
        timesteps: Of its scheduler, where a pipeline called.
        first: Timestep of its first call.
        last: Of its last call.
        direction: In which they went; 0 where there was one step.
    """

    timesteps: Any
    first: float | None
    last: float | None
    direction: float

    def goes_on(self, timesteps: Any, time: float | None) -> bool:
        """Return whether a call of this thread belongs to that run."""
        if timesteps is not None or self.timesteps is not None:
            return timesteps is self.timesteps
        if time is None or self.last is None or time == self.first:
            return False
        return self.direction == 0 or (time - self.last) * self.direction >= 0


def _frames() -> dict[int, FrameType]:
    """Return what each thread is at.

    The garbage collector is off meanwhile: run inside, it may wait for ever for a lock that is held there
    (https://github.com/python/cpython/issues/106883).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if was_on:
            gc.enable()


def _is_calling(thread: int, model: nn.Module) -> bool:
    """Return whether a thread is inside a call of a model."""
    frame = _frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
