"""Turn the feed-forward layers of a trained model into mixtures of experts, exactly, and back.

Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation (ICCV 2025),
https://arxiv.org/abs/2510.09094. No authors' code was found; readings of our own are marked in the docstrings.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from zoo.ffn.dense_ffn import DenseFFN, read_ffn
from zoo.ffn.importance import Deal, Loss, Scores, deal_channels, default_loss, score_channels
from zoo.ffn.technique import amend_mixtures, forget_change, note_mixture, require_types
from zoo.layers.ffn import RePaFFN
from zoo.moe.blocks import MixtureOfBlocks
from zoo.moe.experts import LinearPlusMoE, MoEFFN
from zoo.moe.router import Gate
from zoo.profiling import count_params
from zoo.text import table_lines

__all__ = [
    "MoEConfig",
    "MoEReport",
    "activated_parameters",
    "amend_record",
    "expert_layers",
    "ffn_layers",
    "restructure",
    "set_top_k",
    "to_dense_layers",
    "to_experts",
]

_LAYOUT = re.compile(r"(\d+(?:\.\d+)?)S(\d+)E(\d+)A", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How a dense feed-forward layer is divided, and how its experts are chosen.

    Args:
        shared: Width of the shared expert in units of the layer's input width; the paper's layout 1S12E2A has 1.
        experts: Normal experts, which share the other hidden channels evenly.
        top_k: Normal experts that a token takes.
        gate: How a chosen expert is weighted, see `zoo.moe.Router`.
        scores: By what channels are ranked: "taylor", "taylor_sum", "activation" (all need calibration), "random".
        deal: How the channels behind the shared ones are dealt: "snake", "contiguous", "random".
        zero: Experts that give nothing (MoE++).
        copies: Experts that give their input back (MoE++).
        constants: Experts that give a learned mix of the input and a learned vector (MoE++).
        seed: Of random scores and deals.
        pruned: Experts of these that `zoo.moe.prune_experts` has dropped from every layer afterwards.

    Raises:
        ValueError: A number is negative, top_k is above the number of experts, or a word is unknown.
    """

    shared: float = 1.0
    experts: int = 12
    top_k: int = 2
    gate: Gate = "softmax_n"
    scores: Scores = "taylor"
    deal: Deal = "snake"
    zero: int = 0
    copies: int = 0
    constants: int = 0
    seed: int = 0
    pruned: int = 0

    def __post_init__(self) -> None:
        require_types(type(self), vars(self))
        for name in ("shared", "zero", "copies", "constants", "pruned"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, got {self.experts}.")
        if self.pruned >= self.experts:
            raise ValueError(f"pruned must be less than the {self.experts} experts, got {self.pruned}.")
        every = self.experts - self.pruned + self.zero + self.copies + self.constants
        if not 0 <= self.top_k <= every:
            raise ValueError(f"top_k must lie in 0 ... {every} (all experts), got {self.top_k}.")

    @classmethod
    def from_layout(cls, layout: str, **kwargs: Any) -> MoEConfig:
        """Read the paper's notation: "1S12E2A" is 1 shared width, 12 experts, 2 activated.

        Raises:
            ValueError: The text has another form.
        """
        found = _LAYOUT.fullmatch(layout.strip())
        if found is None:
            raise ValueError(f"layout must look like 1S12E2A (shared widths, experts, activated), got {layout!r}.")
        return cls(shared=float(found[1]), experts=int(found[2]), top_k=int(found[3]), **kwargs)

    @property
    def layout(self) -> str:
        """The paper's notation."""
        return f"{self.shared:g}S{self.experts}E{self.top_k}A"

    def widths(self, dim: int, hidden_dim: int) -> tuple[int, int]:
        """Return the hidden channels of the shared expert and of a normal one.

        Args:
            dim: Input width of the layer.
            hidden_dim: Its hidden channels.

        Raises:
            ValueError: They do not come out whole; the message names layouts that do.
        """
        shared = round(self.shared * dim)
        rest = hidden_dim - shared
        if abs(shared - self.shared * dim) < 1e-6 and rest > 0 and rest % self.experts == 0:
            return shared, rest // self.experts
        raise ValueError(
            f"Layout {self.layout} does not divide {hidden_dim} hidden channels of a layer of width {dim}; "
            f"{_fitting(dim, hidden_dim, self)}"
        )


def _fitting(dim: int, hidden_dim: int, config: MoEConfig) -> str:
    """Name the layouts that fit, those nearest to a wish first."""
    found = [
        (abs(shared - config.shared) + abs(experts - config.experts) / 4, f"{shared:g}S{experts}E{config.top_k}A")
        for shared in (0, 0.5, 1, 1.5, 2, 3)
        for experts in range(max(2, config.top_k), 65)
        if (shared * dim) % 1 == 0 and hidden_dim > shared * dim and (hidden_dim - int(shared * dim)) % experts == 0
    ]
    best = [name for _, name in sorted(found)[:4]]
    return f"nearest that fit: {', '.join(best)}." if best else "no layout of up to 64 experts does."


@dataclass(frozen=True, kw_only=True)
class MoEReport:
    """What a conversion did; `print` shows it as a table.

    Args:
        layout: The paper's notation.
        layers: Feed-forward layers that were divided.
        params_before: Parameters of the dense model.
        params_after: All parameters of the model.
        params_activated: Parameters that one token uses.
        ffn_before: Parameters of the dense feed-forward layers.
        ffn_activated: Parameters of the feed-forward layers that one token uses, routers left out.
        macs_before: Multiply-accumulates of the feed-forward layers for one token of each, before.
        macs_activated: The same after, with routers.
        stability: Rank correlation of the scores of two halves of the calibration; None if it is not known.
    """

    layout: str
    layers: int
    params_before: int
    params_after: int
    params_activated: int
    ffn_before: int
    ffn_activated: int
    macs_before: int
    macs_activated: int
    stability: float | None = None

    def __str__(self) -> str:
        rows = [
            ("", "before", "after", "activated"),
            (
                "parameters",
                *(f"{n / 1e6:,.2f} M" for n in (self.params_before, self.params_after, self.params_activated)),
            ),
            ("of feed-forward layers", f"{self.ffn_before / 1e6:,.2f} M", "", f"{self.ffn_activated / 1e6:,.2f} M"),
            ("their MACs a token", f"{self.macs_before / 1e6:,.2f} M", "", f"{self.macs_activated / 1e6:,.2f} M"),
        ]
        lines = table_lines(rows, right=range(4))
        saved = 100 * (1 - self.ffn_activated / self.ffn_before)
        lines.append(f"{self.layers} feed-forward layers as {self.layout}: {saved:.1f} % fewer parameters activated")
        if self.stability is not None:
            warning = "" if self.stability > 0.95 else "; take more calibration samples, 0.95 is advised"
            lines.append(f"rank correlation of the scores of two halves: {self.stability:.3f}{warning}")
        return "\n".join(lines)


class MoEFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """Flux's single block with experts beside attention: `proj_out` keeps attention's columns and the bias.

    Args:
        dense: The block that this is made from; its parts are taken over.
        moe: Takes the place of `proj_mlp`, the activation and the other columns of `proj_out`.
    """

    def __init__(self, dense: FluxSingleTransformerBlock, moe: MoEFFN) -> None:
        nn.Module.__init__(self)
        old = dense.proj_out
        attention = old.in_features - dense.mlp_hidden_dim
        self.mlp_hidden_dim = dense.mlp_hidden_dim
        self.norm, self.attn, self.moe = dense.norm, dense.attn, moe
        self.proj_out = nn.Linear(attention, old.out_features, device="meta")
        self.proj_out.weight = nn.Parameter(old.weight.detach()[:, :attention].clone())
        self.proj_out.bias = nn.Parameter(old.bias.detach().clone())
        self.train(dense.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the text stream and the image stream, as diffusers' block does."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(joint, emb=temb)
        attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        joint = joint + gate.unsqueeze(1) * (self.proj_out(attention) + self.moe(normed))
        if joint.dtype == torch.float16:
            joint = joint.clip(-65504, 65504)
        return joint[:, :text], joint[:, text:]

    def to_dense(self, example: FluxSingleTransformerBlock) -> FluxSingleTransformerBlock:
        """Return the dense block; `example` is one on the meta device."""
        block = example
        block.norm, block.attn = self.norm, self.attn
        first = self.proj_out.in_features
        channels = self.moe.channels()
        with torch.no_grad():
            block.proj_out.weight[:, :first] = self.proj_out.weight
            block.proj_out.bias.copy_(self.proj_out.bias)
            ffn = read_ffn(block)
            assert ffn is not None
            ffn.write(channels)
        return block.train(self.training)


def ffn_layers(model: nn.Module) -> dict[str, DenseFFN]:
    """Return the dense feed-forward layers of a model by the names of the modules that hold them.

    Raises:
        ValueError: There is none, or one cannot be split.
    """
    found = {name: ffn for name, module in model.named_modules() if (ffn := read_ffn(module)) is not None}
    if not found:
        if any(isinstance(module, MoEFFN) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has experts already; zoo.moe.to_dense leads back.")
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layer that is known: FeedForward and Flux's single blocks of "
            "diffusers, Mlp, GluMlp and SwiGLU of timm, merged RePaFFN of zoo."
        )
    return found


def expert_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """Return the mixtures of experts of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}


@torch.no_grad()
def to_experts(
    model: nn.Module,
    config: MoEConfig,
    calibration: Iterable[Any] | None = None,
    loss: Loss = default_loss,
) -> MoEReport:
    """Replace every feed-forward layer of a model by experts, in place.

    Args:
        model: Of diffusers, timm or zoo.
        config: The layout.
        calibration: Batches for the scores; not needed where they are random.
        loss: The model's training loss of a batch.

    Raises:
        ValueError: A layer is unknown or not divisible, or calibration is missing.
    """
    if config.pruned:
        raise ValueError("pruned is what zoo.moe.prune_experts has dropped: convert with 0, prune what was trained.")
    ffns = ffn_layers(model)
    widths = {name: config.widths(ffn.dim, ffn.hidden_dim) for name, ffn in ffns.items()}
    generator = torch.Generator().manual_seed(config.seed)
    stability = None
    if config.scores == "random":
        scores = {name: torch.rand(ffn.hidden_dim, generator=generator) for name, ffn in ffns.items()}
    elif calibration is None:
        raise ValueError(
            f"scores={config.scores!r} needs calibration=..., batches with the training target; 'random' needs none."
        )
    else:
        scores, stability = score_channels(model, ffns, calibration, method=config.scores, loss=loss)
    before = count_params(model)
    ffn_before = sum(_ffn_parameters(ffn) for ffn in ffns.values())
    macs_before = sum(ffn.macs() for ffn in ffns.values())
    for name, ffn in ffns.items():
        order = deal_channels(scores[name], widths[name][0], config.experts, config.deal, generator)
        _replace(model, name, _experts(ffn, config, widths[name][0], order))
    _note(model, config)
    after = expert_layers(model)
    return MoEReport(
        layout=config.layout,
        layers=len(ffns),
        params_before=before,
        params_after=count_params(model),
        params_activated=activated_parameters(model),
        ffn_before=ffn_before,
        ffn_activated=sum(_activated(layer) for layer in after.values()),
        macs_before=macs_before,
        macs_activated=sum(layer.macs for layer in after.values()),
        stability=stability,
    )


def _experts(ffn: DenseFFN, config: MoEConfig, shared_dim: int, order: Tensor | None) -> MoEFFN:
    moe = MoEFFN.from_dense(
        ffn,
        shared_dim=shared_dim,
        experts=config.experts,
        top_k=config.top_k,
        order=order,
        gate=config.gate,
        zero=config.zero,
        copies=config.copies,
        constants=config.constants,
    )
    if config.pruned:
        moe.keep_experts(torch.arange(config.experts - config.pruned))
    return moe


def _replace(model: nn.Module, name: str, moe: MoEFFN) -> None:
    """Put experts in the place of a dense module, and remember its kind."""
    dense = model.get_submodule(name)
    moe.train(dense.training)
    replacement: nn.Module = moe
    if isinstance(dense, FluxSingleTransformerBlock):
        moe.remember(_flux_skeleton(dense))
        replacement = MoEFluxSingleTransformerBlock(dense, moe)
    elif isinstance(dense, RePaFFN):
        assert dense.linear is not None
        moe.remember(dense)
        replacement = LinearPlusMoE(dense.linear, moe)
    else:
        moe.remember(dense)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement)


def _flux_skeleton(block: FluxSingleTransformerBlock) -> FluxSingleTransformerBlock:
    """Return a block without norm and attention, which the block with experts has."""
    empty = copy.copy(block)
    empty.__dict__["_modules"] = {k: v for k, v in block._modules.items() if k not in ("norm", "attn")}
    return empty


@torch.no_grad()
def to_dense_layers(model: nn.Module) -> None:
    """Turn every mixture of experts of a model back into the dense layer that it was, in place; weights count 1.

    Raises:
        ValueError: A layer was not made from a dense one.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, MoEFluxSingleTransformerBlock):
            skeleton = copy.deepcopy(module.moe.dense)
            assert isinstance(skeleton, FluxSingleTransformerBlock)
            example = skeleton.to_empty(device=module.proj_out.weight.device).to(module.proj_out.weight.dtype)
            dense: nn.Module = module.to_dense(example)
        elif isinstance(module, LinearPlusMoE):
            dense = module.moe.to_dense()
            dense.linear = module.linear
        elif isinstance(module, MoEFFN) and not name.endswith(".moe"):
            dense = module.to_dense()
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    forget_change(model, "moe")


def set_top_k(model: nn.Module, k: int) -> None:
    """Set the number of chosen experts of every mixture of a model, saved with the model; no weight changes.

    Raises:
        ValueError: The model has no experts, or k does not fit one of the layers; then nothing is changed.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts: zoo.moe.convert makes some.")
    before = {layer: layer.top_k for layer in layers.values()}
    try:
        for layer in layers.values():
            layer.set_top_k(k)
    except ValueError:
        for layer, old in before.items():
            layer.top_k = old
        raise
    amend_record(model, lambda facts: facts.update(top_k=k))


def activated_parameters(model: nn.Module) -> int:
    """Return how many parameters one token uses.

    Left out are normal experts that it does not take and, in the mean over the blocks of a group, blocks that its
    sample does not run.
    """
    return round(_used(model))


def _used(module: nn.Module) -> float:
    if isinstance(module, MoEFFN):
        every = count_params(module)
        return every - _expert_parameters(module) * _idle_share(module)
    if isinstance(module, MixtureOfBlocks):
        share = module.active / len(module.blocks)
        return share * _used(module.blocks) + _used(module.tokens) + _used(module.condition)
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(map(_used, module.children()))


def _idle_share(layer: MoEFFN) -> float:
    return max(0, layer.experts - layer.top_k) / layer.experts


def _expert_parameters(layer: MoEFFN) -> int:
    """Return the parameters of all normal experts of a layer."""
    parts = (layer.experts_up, layer.experts_up_bias, layer.experts_down)
    return sum(part.numel() for part in parts if part is not None)


def _activated(layer: MoEFFN) -> int:
    """Return the parameters of a layer that one token uses, the router left out."""
    router = count_params(layer.router)
    every = count_params(layer) - router
    return round(every - _expert_parameters(layer) * _idle_share(layer))


def _ffn_parameters(ffn: DenseFFN) -> int:
    every = ffn.num_parameters - ffn.out_dim * ffn.first_column
    return every + (ffn.out_dim if ffn.owns_output_bias else 0)


def build_experts(model: nn.Module, config: MoEConfig) -> None:
    """Give a new dense model the layers that `to_experts` makes, in place, for weights to be loaded into."""
    for name, ffn in ffn_layers(model).items():
        _replace(model, name, _experts(ffn, config, config.widths(ffn.dim, ffn.hidden_dim)[0], None))
    _note(model, config)


def restructure(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give a model the same experts, as `zoo.ffn.technique.rebuild` asks for; weights are loaded after."""
    build_experts(model, MoEConfig(**config))


def _note(model: nn.Module, config: MoEConfig) -> None:
    if not isinstance(model, ModelMixin):  # those of diffusers have it in their configuration
        note_mixture(model, asdict(config))


def amend_record(model: nn.Module, amend: Callable[[dict[str, Any]], None]) -> None:
    """Keep what is saved with a model about its mixtures true.

    Args:
        model: Its layers have just changed.
        amend: Changes the facts of one layer, or of all, in place.
    """
    saved: Any = model
    config = getattr(getattr(model, "config", None), "moe", None)
    if config is not None:
        facts = dict(config)
        amend(facts)
        saved.register_to_config(moe=asdict(MoEConfig(**facts)))
    amend_mixtures(model, amend)
