"""CG-Taylor: forecast the last block, and trust the forecast where that of the first block was right.

Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor (2025),
https://arxiv.org/abs/2508.02240. Authors' code: https://github.com/liuxiao-guan/CG-Taylor-DiT.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState
from torch import Tensor, nn

from zoo.caching.blocks import block_stack
from zoo.caching.hooks import ContextStates, outside_graphs
from zoo.caching.registry import is_count, is_threshold, place, require, require_evaluation
from zoo.caching.runs import RunTracker
from zoo.caching.stack import BlockStack, Role
from zoo.caching.streams import PlacedBlock
from zoo.caching.summary import FIRST_BLOCK, GateError
from zoo.caching.taylor import TaylorFactors

__all__ = ["CGTaylorConfig", "Forecast", "Gate", "relative_error"]

_HOOK = "zoo_cg_taylor"
_OTHER_BLOCKS = "other blocks"


@dataclass(kw_only=True)
class CGTaylorConfig:
    """Leave out all blocks but the first wherever the first block's forecast shows that forecasts hold.

    At every step the first block is computed and compared with its own Taylor forecast. Where they agree, the output of
    the last block is forecast too and the blocks between are left out; where not, the step is computed in full and both
    forecasts learn from it. Thresholds differ from model to model: `zoo.cache_summary` shows the errors that were met.

    Of a control signal that enters behind the first block (ControlNet residuals) the gate sees only whether it is on.

    Differs from the paper: `max_consecutive_skips` and `cfg_gate="own"` are ours.

    Args:
        threshold: Relative error of the first block's forecast below which a step is skipped. 0 never skips.
        first_order: Order of the first block's forecast.
        last_order: Order of the last block's forecast.
        warmup_steps: Full steps at the start of a run.
        force_last: Compute the last step in full, where the number of steps is known: from the pipeline's scheduler or
            from the cache context.
        max_consecutive_skips: Compute in full after so many skips; 0 is no limit.
        cfg_gate: Where guidance calls the denoiser in two contexts a step: "first" lets the first one decide for both,
            and the second then leaves out its first block too; "own" lets each decide for itself.
        factors_dtype: Type in which forecasts are stored and summed; None is the model's.
        track_per_sample: Show the error of each sample in the summary. One gate serves the whole batch all the same.
    """

    threshold: float = 0.05
    first_order: int = 1
    last_order: int = 1
    warmup_steps: int = 3
    force_last: bool = True
    max_consecutive_skips: int = 0
    cfg_gate: Literal["first", "own"] = "first"
    factors_dtype: torch.dtype | None = None
    track_per_sample: bool = False

    def check(self) -> None:
        """Raise ValueError where a value is out of range."""
        require(is_threshold(self.threshold), self, "threshold", "a number from 0")
        for name in ("first_order", "last_order", "max_consecutive_skips"):
            require(is_count(getattr(self, name), 0), self, name, "a whole number from 0")
        # nothing can be forecast before a first full step
        require(is_count(self.warmup_steps, 1), self, "warmup_steps", "a whole number from 1")
        require(self.cfg_gate in ("first", "own"), self, "cfg_gate", "'first' or 'own'")
        floating = isinstance(self.factors_dtype, torch.dtype) and self.factors_dtype.is_floating_point
        require(self.factors_dtype is None or floating, self, "factors_dtype", "None or a floating-point type")


def relative_error(forecast: Tensor, actual: Tensor) -> Tensor:
    """Return the mean absolute error of a forecast over the mean absolute feature; NaN where both are zero."""
    dtype = torch.promote_types(actual.dtype, torch.float32)
    norm = torch.linalg.vector_norm
    return norm(forecast - actual, 1, dtype=dtype) / norm(actual, 1, dtype=dtype)


class Forecast(BaseState):
    """What is stored for one context: factors of the first and of the last block.

    Args:
        config: Orders and type.
    """

    def __init__(self, config: CGTaylorConfig) -> None:
        self.first = TaylorFactors(config.first_order, config.factors_dtype)
        self.last = TaylorFactors(config.last_order, config.factors_dtype)
        self.updates = 0  # full steps
        self.skips_in_a_row = 0

    @property
    def features(self) -> int:
        """Tensors held, each as large as the feature of a block."""
        return len(self.first.factors) + len(self.last.factors)

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return self.first.nbytes + self.last.nbytes

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Let go of everything."""
        self.first.factors, self.last.factors = [], []
        self.first.step = self.last.step = None
        self.updates = 0


class Gate:
    """Decide which calls are computed in full, and keep what forecasts need; the hooks of a model share one.

    Args:
        config: Checked.
        run: Tells the step.
    """

    def __init__(self, config: CGTaylorConfig, run: RunTracker) -> None:
        self.config = config
        self.run = run
        self.states = ContextStates(Forecast, (config,))
        self.skips = False  # what is done with the current call
        self._decided: tuple[int, bool, int | None] | None = None  # step, decision and anchor of the leading branch
        self.tokens: int | None = None  # length of the image stream, by which it is found in a joined sequence
        self._warned = False

    def reset(self) -> None:
        """Forget all contexts."""
        self.run.log.bytes_held = max(self.run.log.bytes_held, self.nbytes)
        self.states.reset()
        self._decided = None
        self.skips = False

    @property
    def nbytes(self) -> int:
        """Memory held for all contexts, bytes."""
        return sum(state.nbytes for state in self.states.stored())

    def follows(self) -> bool:
        """Return whether another context has led this step; then take over its decision."""
        if self.config.cfg_gate == "own" or self._decided is None or self._decided[0] != self.run.step:
            return False
        _, skips, anchor = self._decided
        last = self.states.get_state().last
        # a branch that starts late, or was not there at the leader's last full step, is computed nevertheless
        up_to_date = last.step is not None and anchor is not None and last.step >= anchor
        self.skips = skips and up_to_date and not self._is_young(self.config.last_order)
        return True

    def _is_young(self, order: int) -> bool:
        """Return whether a branch has stored nothing, or began within the run and lacks full steps for this order."""
        state = self.states.get_state()
        return not state.last.ready or (self.run.began > 0 and state.updates <= order)

    def decide(self, feature: Tensor, *, computed: bool = False) -> None:
        """Judge a step by the first block's output, and learn from it if the step is to be computed in full.

        Args:
            feature: The output.
            computed: The step has been computed in full already.
        """
        step, state = self.run.step, self.states.get_state()
        self.skips = False
        if state.first.ready and not state.first.fits(feature):
            state.reset()
        judges = computed or self._forced(state)
        able = state.first.ready and not self._is_young(max(self.config.first_order, self.config.last_order))
        if able and not judges:
            self.skips = self._holds(state, feature)
            judges = True
        if judges:  # a branch that is not able to leaves it to the next one
            self._decided = step, self.skips, state.last.step
        if self.skips:
            state.skips_in_a_row += 1
        else:
            state.skips_in_a_row = 0
            state.first.update(feature, step)

    def learn(self, feature: Tensor) -> None:
        """Learn the first block's output of a full step in which another branch leads; of use if this one has led."""
        state = self.states.get_state()
        if state.first.ready:
            state.first.update(feature, self.run.step)

    def _forced(self, state: Forecast) -> bool:
        config, run = self.config, self.run
        if run.num_steps is not None and run.num_steps <= config.warmup_steps + 2 and not self._warned:
            self._warned = True
            warnings.warn(
                f"CGTaylorConfig: {run.num_steps} steps, of which {config.warmup_steps} for warm-up, leave next to "
                f"nothing to skip.",
                stacklevel=2,
            )
        cap = config.max_consecutive_skips
        return (
            run.step < config.warmup_steps
            or (config.force_last and run.is_last)
            or (cap > 0 and state.skips_in_a_row >= cap)
        )

    def _holds(self, state: Forecast, feature: Tensor) -> bool:
        forecast = state.first.predict(self.run.step)
        error = float(relative_error(forecast, feature))
        skips = error < self.config.threshold  # False for NaN
        samples = None
        if self.config.track_per_sample:
            samples = torch.stack([relative_error(*pair) for pair in zip(forecast, feature, strict=True)])
        name = self.run.branch
        self.run.log.errors.append(GateError(name, self.run.step, error, skips, samples))
        return skips

    def keep(self, feature: Tensor) -> None:
        """Learn the last block's output of a step that was computed in full."""
        state = self.states.get_state()
        state.last.update(feature, self.run.step)
        state.updates += 1

    def forecast(self) -> Tensor:
        """Return the last block's output as it is expected to be."""
        return self.states.get_state().last.predict(self.run.step)

    def take_in(self, first: Tensor, last: Tensor) -> None:
        """Take in a step that was computed before anything was known of the blocks."""
        if self.follows():
            self.learn(first)
        else:
            self.decide(first, computed=True)
        self.skips = False
        self.tokens = first.shape[1] if first.ndim > 1 else None
        self.note(FIRST_BLOCK)
        self.note(_OTHER_BLOCKS)
        self.keep(last)

    def note(self, unit: str, skipped: bool | None = None) -> None:
        """Note what is done with blocks; None is what the gate has decided."""
        skipped = self.skips if skipped is None else skipped
        self.run.log.note(self.run.branch, (unit,), self.run.step, skipped=skipped)


class _BlockHook(ModelHook):
    """Leave the block out where the gate says so, and put the forecast in place of the last one's output."""

    def __init__(self, gate: Gate, stack: BlockStack, block: PlacedBlock) -> None:
        super().__init__()
        self.cache = gate
        self._stack = stack
        self._block = block
        self._role: Role = "beside"

    @outside_graphs
    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Return whether the block is left out, and what it returns then."""
        role = self._role = self._stack.enter(self._block)
        if role == "passed":
            return True, self._stack.replayed(self._block, args, kwargs)
        if role in ("watched", "beside"):
            return False, None
        if role == "first":
            self._stack.follows = self.cache.follows()
            skips = self._stack.follows and self.cache.skips
            self.cache.note(FIRST_BLOCK, skips)
            if skips:
                self.cache.note(_OTHER_BLOCKS)
            return skips, self._block.passed(args, kwargs) if skips else None
        if not self.cache.skips:
            return False, None
        if role == "middle":
            return True, self._block.passed(args, kwargs)
        return True, self._stack.replaced(self._block, self.cache.forecast(), args, kwargs)

    @outside_graphs
    @torch.no_grad()
    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._role == "watched":
            self._stack.watch(self._block, args, kwargs, output)
        elif self._role == "first":
            feature = self._stack.first_feature(self._block, output)
            self.cache.tokens = feature.shape[1] if feature.ndim > 1 else None
            if self._stack.follows:
                self.cache.learn(feature)
            else:
                self.cache.decide(feature)
            self.cache.note(_OTHER_BLOCKS)
        elif self._role == "last":
            self.cache.keep(self._stack.last_feature(self._block, output, self.cache.tokens))

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_left_out, output = self._before(args, kwargs)
        if is_left_out:
            return output
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._after(args, kwargs, output)
        return output


class _ContextHook(_BlockHook):
    """The hook through which contexts and resets reach the gate: one is enough."""

    _is_stateful = True

    def __init__(self, gate: Gate, stack: BlockStack, block: PlacedBlock) -> None:
        super().__init__(gate, stack, block)
        self._states = gate.states  # diffusers looks for it here to say which context is entered

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.cache.reset()
        self.cache.run.forget()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        self._stack.remove()
        return module


@place.register
def _cg_taylor(config: CGTaylorConfig, model: nn.Module, run: RunTracker) -> None:
    config.check()
    require_evaluation(config, model)
    stack, gate = block_stack(model, "CGTaylorConfig"), Gate(config, run)
    stack.learn = gate.take_in
    stack.attach()
    for block in stack.blocks:
        hook = (_ContextHook if block is stack.blocks[0] else _BlockHook)(gate, stack, block)
        HookRegistry.check_if_exists_or_initialize(block.module).register_hook(hook, _HOOK)
