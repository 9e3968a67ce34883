"""The diffusion policy: its network against PyTorch's own decoder layer, what sees what, and its pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import denoise, diffusion_policy
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.caching import BACConfig, CGTaylorConfig, TaylorSeerConfig, cached
from zoo.diffusion import DiffusionPolicyPipeline, DiffusionPolicyTransformer
from zoo.diffusion.diffusion_policy import DiffusionPolicyBlock, normalize
from zoo.weights import CheckpointError

OBSERVED = [[-1.0, 0.0, 5.0], [1.0, 10.0, 5.0]]
ACTED = [[0.0, -2.0], [4.0, 2.0]]


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 6, 2), torch.tensor([99, 50, 3])[:batch], torch.randn(batch, 2, 3)


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


def pipeline(**changes: Any) -> DiffusionPolicyPipeline:
    pipe = DiffusionPolicyPipeline(diffusion_policy(), scheduler(), **{"n_action_steps": 4, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_published_size() -> None:
    """The defaults are the published sizes; 9 M parameters, as the authors' network for Push-T."""
    with torch.device("meta"):
        model = DiffusionPolicyTransformer()
    layer = 4 * 256 * 257 + 4 * 256 * 257 + 256 * 1024 * 2 + 1024 + 256 + 3 * 512
    rest = (2 + 1) * 256 + (20 + 1) * 256 + (16 + 3) * 256 + 256 * 1024 * 2 + 1024 + 256 + 512 + 257 * 2
    assert sum(parameter.numel() for parameter in model.parameters()) == 8 * layer + rest
    assert model.config.dropout == 0.3


def test_state_dict_keys_are_published_api() -> None:
    keys = set(diffusion_policy(num_layers=1).state_dict())
    block = "transformer_blocks.0."
    assert {key.removeprefix(block) for key in keys if key.startswith(block)} == {
        f"{name}.{leaf}"
        for name in (
            *("attn1.norm", "attn1.to_qkv", "attn1.to_out"),
            *("attn2.norm", "attn2.to_q", "attn2.to_kv", "attn2.to_out"),
            *("ff.0", "ff.1", "ff.4"),
        )
        for leaf in ("weight", "bias")
    }
    assert {key for key in keys if not key.startswith(block)} == {
        *("pos_embed", "cond_pos_embed"),
        *(
            f"{name}.{leaf}"
            for name in ("action_embed", "observation_embed", "encoder.0", "encoder.2", "norm_out", "proj_out")
            for leaf in ("weight", "bias")
        ),
    }


def torch_layer(block: DiffusionPolicyBlock, dim: int, heads: int) -> nn.TransformerDecoderLayer:
    """Return PyTorch's layer, which the authors use, with the weights of a block."""
    layer = nn.TransformerDecoderLayer(
        dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    own = block.state_dict()
    names = {
        "norm1": "attn1.norm", "self_attn.out_proj": "attn1.to_out", "norm2": "attn2.norm", "norm3": "ff.0",
        "multihead_attn.out_proj": "attn2.to_out", "linear1": "ff.1", "linear2": "ff.4",
    }  # fmt: skip
    state = {f"{theirs}.{leaf}": own[f"{ours}.{leaf}"] for theirs, ours in names.items() for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        state[f"self_attn.in_proj_{leaf}"] = own[f"attn1.to_qkv.{leaf}"]
        state[f"multihead_attn.in_proj_{leaf}"] = torch.cat([own[f"attn2.to_q.{leaf}"], own[f"attn2.to_kv.{leaf}"]])
    layer.load_state_dict(state)
    return layer.eval()


@torch.no_grad()
def test_block_equals_pytorch_layer() -> None:
    """With the masks written as the authors write them, in float64."""
    model = diffusion_policy(horizon=7, n_obs_steps=3).double()
    hidden, memory = torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    steps, tokens = torch.meshgrid(torch.arange(7), torch.arange(4), indexing="ij")
    forbidden = ~(steps >= tokens - 1)
    assert torch.equal(model.memory_mask, ~forbidden)
    for block in model.transformer_blocks:
        expected = torch_layer(block, 16, 2)(
            hidden,
            memory,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64),
            memory_mask=forbidden,
        )
        ours = block(hidden, memory, model.memory_mask)
        assert (ours - expected).norm() / expected.norm() < 1e-14


@torch.no_grad()
def test_an_action_depends_on_no_later_one() -> None:
    model, (noisy, timesteps, observations) = diffusion_policy(), inputs()
    changed = noisy.clone()
    changed[:, 3] += 1
    before, after = (model(each, timesteps, observations).sample for each in (noisy, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(-1).any()
    free = diffusion_policy(causal=False)
    before, after = (free(each, timesteps, observations).sample for each in (noisy, changed))
    assert not torch.isclose(before, after).all(-1).any()


@torch.no_grad()
def test_an_action_depends_on_no_later_observation() -> None:
    """Action 0 is of the time of observation 0; all depend on time."""
    model, (noisy, timesteps, observations) = diffusion_policy(), inputs()
    output = model(noisy, timesteps, observations).sample
    changed = observations.clone()
    changed[:, 1] += 1
    other = model(noisy, timesteps, changed).sample
    assert torch.equal(output[:, 0], other[:, 0])
    assert not torch.isclose(output[:, 1:], other[:, 1:]).all(-1).any()
    assert not torch.isclose(output, model(noisy, timesteps - 1, observations).sample).all(-1).any()
    swapped = model(noisy, timesteps, observations.flip(1)).sample
    assert not torch.isclose(output, swapped).all(-1).any()


@torch.no_grad()
def test_samples_do_not_mix() -> None:
    model, (noisy, timesteps, observations) = diffusion_policy(), inputs()
    whole = model(noisy, timesteps, observations).sample
    alone = model(noisy[1:2], timesteps[1:2], observations[1:2]).sample
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_cond_layers", [0, 2])
def test_gradient_checkpointing_changes_nothing(num_cond_layers: int) -> None:
    """And every parameter gets a gradient."""
    plain = diffusion_policy(num_cond_layers=num_cond_layers, embedding_dropout=0.1).train()
    saving = copy.deepcopy(plain)
    saving.enable_gradient_checkpointing()
    batch = inputs()
    for model in (plain, saving):
        torch.manual_seed(1)
        model(*batch).sample.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None, name
        assert one.grad.any(), name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_starts_as_published() -> None:
    model = DiffusionPolicyTransformer(num_layers=2)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std() < 0.03, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name


def test_loading_is_strict(tmp_path: Path) -> None:
    diffusion_policy().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: \['proj_out.bias'\]"):
        DiffusionPolicyTransformer.from_pretrained(tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_whole() -> None:
    model, batch = diffusion_policy(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch).sample, model(*batch).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"num_cond_layers": -1}, "num_cond_layers must be at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_attention_heads": 1, "attention_head_dim": 7}, r"even, got 1 \* 7"),
    ],
)
def test_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion_policy(**changes)


def test_wrong_inputs() -> None:
    model, (noisy, timesteps, observations) = diffusion_policy(), inputs()
    with pytest.raises(ValueError, match=r"hidden_states must be \(B, 6, 2\), got \(3, 5, 2\)"):
        model(noisy[:, :5], timesteps, observations)
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be \(B, 2, 3\), got \(3, 3\)"):
        model(noisy, timesteps, observations[:, 0])


# --- pipeline


class Oracle(nn.Module):
    """Predict the noise of which one sequence of actions is the clean version."""

    def __init__(self, model: DiffusionPolicyTransformer, truth: Tensor) -> None:
        super().__init__()
        self.config, self.dtype, self.device, self.truth = model.config, torch.float32, torch.device("cpu"), truth
        self.cache_context = model.cache_context
        self.alphas, self.seen = scheduler().alphas_cumprod, []

    def forward(self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        alpha = self.alphas[timestep.long()].view(-1, 1, 1)
        self.seen.append(encoder_hidden_states)
        return ((noisy - alpha.sqrt() * self.truth) / (1 - alpha).sqrt(),)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_plans_what_the_denoiser_knows(cls: type) -> None:
    """In the environment's units, from the time of the last observation on."""
    pipe = pipeline(observation_range=OBSERVED, action_range=ACTED)
    truth = torch.linspace(-0.9, 0.9, 12).view(1, 6, 2)
    oracle = Oracle(pipe.transformer, truth)
    pipe.register_modules(transformer=oracle, scheduler=cls.from_config(scheduler().config))
    observations = torch.tensor([[[-1.0, 5.0, 5.0], [1.0, 10.0, 5.0]]])
    found = pipe(observations, num_inference_steps=50)
    expected = truth * 2 + torch.tensor([2.0, 0.0])
    assert (found.prediction - expected).abs().max() < 0.02
    assert torch.equal(found.actions, found.prediction[:, 1:5])
    torch.testing.assert_close(oracle.seen[0], torch.tensor([[[-1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]))


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, HeunDiscreteScheduler])
def test_schedulers_without_noise_of_their_own(cls: type) -> None:
    """Their `step` takes no generator; the plan starts from it all the same."""
    pipe = pipeline()
    pipe.register_modules(scheduler=cls.from_config(scheduler().config))
    plans = [
        pipe(torch.zeros(1, 2, 3), num_inference_steps=3, generator=torch.manual_seed(seed)).prediction
        for seed in (0, 0, 1)
    ]
    assert torch.equal(plans[0], plans[1])
    assert not torch.equal(plans[0], plans[2])


def test_ranges() -> None:
    values = torch.tensor([[0.0, -2.0], [4.0, 2.0], [2.0, 0.0]])
    assert torch.equal(normalize(values, ACTED), torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert normalize(values, None) is values


def test_a_plan_depends_on_its_generator_only() -> None:
    pipe, observations = pipeline(), torch.randn(2, 2, 3)
    both = pipe(observations, 5, [torch.Generator().manual_seed(seed) for seed in (1, 2)]).actions
    alone = pipe(observations[1:], 5, torch.Generator().manual_seed(2)).actions
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    other = pipe(observations[1:], 5, torch.Generator().manual_seed(3)).actions
    assert not torch.allclose(alone, other, atol=1e-2)
    latents = torch.randn(2, 6, 2)
    first, second = (pipe(observations, 5, torch.Generator().manual_seed(0), latents).prediction for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(pipe(observations, 5, torch.Generator().manual_seed(0), latents, False)[0], first[:, 1:5])


@pytest.mark.parametrize(
    "config",
    [
        CGTaylorConfig(threshold=0.0),
        TaylorSeerConfig(interval=1),
        FirstBlockCacheConfig(threshold=0.0),
        "bac",
    ],
    ids=["cg-taylor", "taylorseer", "first-block", "bac"],
)
def test_exact_caches_change_nothing(config: Any) -> None:
    """Bit for bit, in every plan and afterwards; and a cache that skips gives something else, twice the same."""
    pipe, observations = pipeline(), torch.randn(2, 2, 3)

    def plan() -> Tensor:
        return pipe(observations, 8, torch.Generator().manual_seed(0)).actions

    expected = plan()
    if config == "bac":
        config = zoo.calibrate_cache(pipe, BACConfig(updates=8), plan)
    zoo.enable_cache(pipe, config)
    assert torch.equal(plan(), expected)
    assert torch.equal(plan(), expected)
    zoo.disable_cache(pipe)
    lossy = zoo.calibrate_cache(pipe, BACConfig(updates=2, union=1), plan)
    with cached(pipe, lossy):
        skipped = plan()
        assert torch.equal(plan(), skipped)
        (summary,) = zoo.cache_summary(pipe).denoisers
    assert not torch.equal(skipped, expected)
    assert len(summary.units) == 9
    assert summary.calls == {"cond": 8}
    assert torch.equal(plan(), expected)


def test_units_are_branches_with_their_norm() -> None:
    """What a schedule names; reusing all of them leaves the embedding and the head."""
    model = diffusion_policy()
    with pytest.warns(UserWarning, match="updates=1"):
        config = zoo.calibrate_cache(model, BACConfig(updates=1, always_update_last=False), lambda: denoise(model))
    assert list(config.schedule.units)[:3] == [f"transformer_blocks.0.{name}" for name in ("attn1", "attn2", "ff")]
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    with cached(model, config):
        denoise(model)
    assert called.count("norm_out") == 6
    assert all(called.count(name) == 1 for name in set(called) - {"norm_out"})


def test_save_and_load(tmp_path: Path) -> None:
    pipe, observations = pipeline(observation_range=OBSERVED, action_range=ACTED), torch.randn(2, 2, 3)
    pipe.save_pretrained(tmp_path)
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), zoo.create_pipeline(str(tmp_path))):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is DiffusionPolicyPipeline
        assert type(loaded.transformer) is DiffusionPolicyTransformer
        plans = [each(observations, 5, torch.Generator().manual_seed(0)).actions for each in (pipe, loaded)]
        assert torch.equal(*plans)
    half = zoo.create_pipeline(str(tmp_path), dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    planned = half(observations, 5, torch.Generator().manual_seed(0)).actions
    assert half.transformer.dtype == torch.bfloat16
    assert planned.dtype == torch.float32
    assert planned.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observations": torch.zeros(1, 3, 3)}, r"observations must be \(B, 2, 3\), got \(1, 3, 3\)"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"latents": torch.zeros(1, 4, 2)}, r"latents must be \(1, 6, 2\), got \(1, 4, 2\)"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"observations": torch.zeros(1, 2, 3), **arguments})


def test_wrong_parts() -> None:
    with pytest.raises(ValueError, match=r"n_action_steps must lie in 1 ... 5, got 6"):
        pipeline(n_action_steps=6)
    with pytest.raises(ValueError, match="action_range must be two rows of 2 numbers"):
        pipeline(action_range=[[0.0, 1.0, 2.0]] * 2)
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'epsilon', but the DDIMScheduler is for 'v_prediction'"):
        pipe(torch.zeros(1, 2, 3))
