"""DiffusionPolicyTransformer: a diffusion model of action sequences, conditioned on what a robot observes.

The transformer variant of Diffusion Policy: Visuomotor Policy Learning via Action Diffusion (Chi et al., RSS 2023),
https://arxiv.org/abs/2303.04137; the network that Block-wise Adaptive Caching (https://arxiv.org/abs/2506.13456) is
measured on. Authors' code: https://github.com/real-stanford/diffusion_policy (MIT).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from zoo.diffusion.strict_loading import StrictModelMixin

# `DiffusionPipeline.from_pretrained` looks for the name ModelMixin here to learn how the class is loaded.
__all__ = [
    "DiffusionPolicyOutput",
    "DiffusionPolicyPipeline",
    "DiffusionPolicyTransformer",
    "ModelMixin",
    "normalize",
]


class SelfAttention(nn.Module):
    """Self-attention branch of a block, its norm included, so that a cache that reuses the branch saves the norm too.

    Shape:
        (B, T, D) -> (B, T, D); with `causal`, position t sees positions up to t.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(hidden_states)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),  # (B, heads, T, D / heads)
            is_causal=self.causal,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.to_out(mixed.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Branch of a block that attends from actions to observations, its norm included.

    Shape:
        (B, T, D), memory (B, S, D), mask (T, S), True where a position may look -> (B, T, D).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        q = self.to_q(self.norm(hidden_states)).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(encoder_hidden_states).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.dropout(self.to_out(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    """Feed-forward branch of a block, its norm included."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(dropout),
        )


class DiffusionPolicyBlock(nn.Module):
    """Pre-norm decoder layer: self-attention over actions, cross-attention to observations, feed-forward.

    Shape:
        (B, T, D), memory (B, S, D), mask (T, S) or None -> (B, T, D).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.attn1 = SelfAttention(dim, num_heads, dropout, causal)
        self.attn2 = CrossAttention(dim, num_heads, dropout)
        self.ff = FeedForward(dim, dropout)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        hidden_states = hidden_states + self.attn1(hidden_states)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, attention_mask)
        return hidden_states + self.ff(hidden_states)


class DiffusionPolicyTransformer(StrictModelMixin, ConfigMixin, CacheMixin):
    """A diffusion model of action sequences, conditioned on what a robot observes.

    Predicts the noise in a sequence of actions, given the last observations.
    Defaults are the published sizes of the simulated tasks. Step 0 of the sequence is the time of the first of the
    observations, so the action to take now is number `n_obs_steps - 1`.

    Args:
        action_dim: Numbers of an action, D_a.
        observation_dim: Numbers of an observation, D_o.
        horizon: Actions in a sequence, T_p.
        n_obs_steps: Observations, T_o.
        num_layers: Decoder layers.
        num_attention_heads: Heads of each attention.
        attention_head_dim: Channels of a head; heads times this is the width, an even number.
        num_cond_layers: Transformer layers over time and observations; 0 takes a two-layer perceptron.
        dropout: Dropout rate of attention weights, attention output and feed-forward.
        embedding_dropout: Dropout rate of the embedded actions and observations.
        causal: Action t sees no later action, and no observation made after it.
        init_std: Standard deviation of the initial weights. At narrow widths, observations reach the actions sooner in
            training with about `1 / sqrt(width)` than with the published 0.02.

    Shape:
        (B, T_p, D_a), timestep (B,) and observations (B, T_o, D_o) -> (B, T_p, D_a).

    Raises:
        ValueError: A size is below 1, or a rate outside [0, 1).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiffusionPolicyBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiffusionPolicyBlock"]

    @register_to_config
    def __init__(
        self,
        action_dim: int = 2,
        observation_dim: int = 20,
        horizon: int = 16,
        n_obs_steps: int = 2,
        num_layers: int = 8,
        num_attention_heads: int = 4,
        attention_head_dim: int = 64,
        num_cond_layers: int = 0,
        *,
        dropout: float = 0.3,
        embedding_dropout: float = 0.0,
        causal: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        sizes = dict(
            action_dim=action_dim,
            observation_dim=observation_dim,
            horizon=horizon,
            n_obs_steps=n_obs_steps,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
        )
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if num_cond_layers < 0:
            raise ValueError(f"num_cond_layers must be at least 0, got {num_cond_layers}.")
        for name, rate in (("dropout", dropout), ("embedding_dropout", embedding_dropout)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}.")
        dim = num_attention_heads * attention_head_dim
        if dim % 2:
            raise ValueError(f"The width must be even, got {num_attention_heads} * {attention_head_dim}.")
        self.gradient_checkpointing = False
        self.action_embed = nn.Linear(action_dim, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, horizon, dim))
        self.time_embed = Timesteps(dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.observation_embed = nn.Linear(observation_dim, dim)
        self.cond_pos_embed = nn.Parameter(torch.empty(1, 1 + n_obs_steps, dim))
        self.embed_drop = nn.Dropout(embedding_dropout)
        self.encoder: nn.Module
        if num_cond_layers:
            layer = nn.TransformerEncoderLayer(
                dim, num_attention_heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, num_cond_layers, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.transformer_blocks = nn.ModuleList(
            [DiffusionPolicyBlock(dim, num_attention_heads, dropout, causal) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, action_dim)
        # the first memory token is the time, which all actions see
        seen = torch.arange(horizon)[:, None] >= torch.arange(1 + n_obs_steps) - 1
        self.memory_mask: Tensor | None
        self.register_buffer("memory_mask", seen if causal else None, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as published: a normal distribution, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's optimizers are not to decay, norms and biases apart."""
        return {"pos_embed", "cond_pos_embed"}

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy actions.

        Args:
            hidden_states: Noisy actions (B, T_p, D_a), clean ones in [-1, 1].
            timestep: Timesteps (B,) in the training schedule's unit, 0 to 99 as published.
            encoder_hidden_states: Observations (B, T_o, D_o), oldest first, in [-1, 1].
            return_dict: Return a `Transformer2DModelOutput` instead of a tuple.

        Raises:
            ValueError: Actions or observations have another shape than the model was built for.
        """
        config = self.config
        for what, given, wanted in (
            ("hidden_states", hidden_states, (config.horizon, config.action_dim)),
            ("encoder_hidden_states", encoder_hidden_states, (config.n_obs_steps, config.observation_dim)),
        ):
            if given.ndim != 3 or given.shape[1:] != wanted:
                raise ValueError(f"{what} must be (B, {wanted[0]}, {wanted[1]}), got {tuple(given.shape)}.")
        time = self.time_embed(timestep).to(hidden_states.dtype).unsqueeze(1)  # (B, 1, D)
        memory = torch.cat([time, self.observation_embed(encoder_hidden_states)], dim=1)
        memory = self.encoder(self.embed_drop(memory + self.cond_pos_embed))  # (B, 1 + T_o, D)
        hidden_states = self.embed_drop(self.action_embed(hidden_states) + self.pos_embed)  # (B, T_p, D)
        mask = self.memory_mask  # an attribute of diffusers' models takes 5 us to look up
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, memory, mask)
            else:
                hidden_states = block(hidden_states, memory, mask)
        output = self.proj_out(self.norm_out(hidden_states))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


@dataclass
class DiffusionPolicyOutput(BaseOutput):
    """What a policy plans.

    Args:
        actions: Actions to take from now on (B, T_a, D_a), in the environment's units.
        prediction: The whole sequence (B, T_p, D_a), which begins at the time of the first observation.
    """

    actions: Tensor
    prediction: Tensor


class DiffusionPolicyPipeline(DiffusionPipeline):
    """Plan actions from observations with a `DiffusionPolicyTransformer`.

    Args:
        transformer: The denoiser; it predicts the noise.
        scheduler: A scheduler with `prediction_type="epsilon"`. To change it later, build the new one from the old
            one's configuration: `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`.
        n_action_steps: Actions returned, T_a: those to be taken before the next call.
        observation_range: Smallest and largest value of each number of an observation, brought to [-1, 1] for the
            network; None leaves observations as they are.
        action_range: The same for actions.

    Raises:
        ValueError: The sizes do not fit the transformer, or the scheduler is set up for another prediction.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: DiffusionPolicyTransformer,
        scheduler: KarrasDiffusionSchedulers,
        n_action_steps: int = 8,
        observation_range: Sequence[Sequence[float]] | None = None,
        action_range: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        config = transformer.config
        longest = config.horizon - config.n_obs_steps + 1
        if not 1 <= n_action_steps <= longest:
            raise ValueError(f"n_action_steps must lie in 1 ... {longest}, got {n_action_steps}.")
        for name, given, size in (
            ("observation_range", observation_range, config.observation_dim),
            ("action_range", action_range, config.action_dim),
        ):
            if given is not None and (len(given) != 2 or any(len(row) != size for row in given)):
                raise ValueError(f"{name} must be two rows of {size} numbers, the smallest and the largest values.")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            n_action_steps=n_action_steps, observation_range=observation_range, action_range=action_range
        )

    def _denormalize_actions(self, actions: Tensor) -> Tensor:
        if self.config.action_range is None:
            return actions
        low, high = torch.tensor(self.config.action_range, device=actions.device)
        return actions * ((high - low) / 2) + (high + low) / 2

    def _check(self, observations: Tensor, num_inference_steps: int) -> None:
        config, scheduler = self.transformer.config, self.scheduler
        wanted = (config.n_obs_steps, config.observation_dim)
        if observations.ndim != 3 or observations.shape[1:] != wanted:
            raise ValueError(f"observations must be (B, {wanted[0]}, {wanted[1]}), got {tuple(observations.shape)}.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if (found := scheduler.config.get("prediction_type")) != "epsilon":
            raise ValueError(f"The policy predicts 'epsilon', but the {type(scheduler).__name__} is for {found!r}.")

    @torch.no_grad()
    def __call__(
        self,
        observations: Tensor,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> DiffusionPolicyOutput | tuple[Tensor]:
        """Plan the next actions.

        Args:
            observations: The last observations (B, T_o, D_o), oldest first, in the environment's units.
            num_inference_steps: Steps of the scheduler.
            generator: Random generator, or one for each sample, whose plan then does not depend on the others.
            latents: Initial standard normal noise (B, T_p, D_a), in place of random noise.
            return_dict: Return a `DiffusionPolicyOutput` instead of a tuple with the actions.

        Raises:
            ValueError: A shape or number that cannot be; the message says what fits.
        """
        self._check(observations, num_inference_steps)
        device, dtype, config = self._execution_device, self.transformer.dtype, self.transformer.config
        observed = normalize(observations.to(device, torch.float32), self.config.observation_range).to(dtype)
        batch, first = len(observed), config.n_obs_steps - 1
        shape = (batch, config.horizon, config.action_dim)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters  # not all schedulers draw noise
        step_arguments: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
        try:
            with self.transformer.cache_context("cond"):  # one for the whole run: a step is a call
                for timestep in self.progress_bar(self.scheduler.timesteps):
                    prediction = self.transformer(
                        self.scheduler.scale_model_input(latents, timestep).to(dtype),
                        timestep=timestep.to(device).expand(batch),
                        encoder_hidden_states=observed,
                        return_dict=False,
                    )[0].float()
                    latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **step_arguments)[0]
        finally:
            self.maybe_free_model_hooks()  # also resets the caches, so an aborted call leaves nothing behind
        planned = self._denormalize_actions(latents)
        actions = planned[:, first : first + self.config.n_action_steps]
        return DiffusionPolicyOutput(actions=actions, prediction=planned) if return_dict else (actions,)


def normalize(values: Tensor, value_range: Sequence[Sequence[float]] | None) -> Tensor:
    """Bring values to [-1, 1].

    Args:
        values: Observations or actions (..., D).
        value_range: Smallest and largest value of each of the D numbers, two rows; a number that never changed becomes
            0. None leaves everything as it is.
    """
    if value_range is None:
        return values
    low, high = torch.tensor(value_range, device=values.device)
    half = (high - low) / 2
    return (values - (high + low) / 2) / torch.where(half > 0, half, 1.0)


# where DiffusionPipeline.from_pretrained looks for the class named in model_index.json
diffusers.DiffusionPolicyPipeline = DiffusionPolicyPipeline
# and, for Hub ids, where it looks for the module of a component that is not diffusers' own
setattr(diffusers.pipelines, DiffusionPolicyTransformer.__module__, sys.modules[DiffusionPolicyTransformer.__module__])
