"""PixelDiT: the network itself."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import dit, pixel_dit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.diffusion import PixelDiT
from zoo.weights import CheckpointError


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.tensor([999, 500, 3])[:batch], torch.tensor([0, 3, 4])[:batch]


def output(model: nn.Module, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    return model(images, timestep=timesteps, class_labels=labels).sample


def test_published_size() -> None:
    """pixeldit.cifar10 has as many parameters as its card says, on the meta device too."""
    with torch.device("meta"):
        model = PixelDiT(num_attention_heads=4, attention_head_dim=48, num_layers=6)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_179_888


def test_state_dict_keys_are_published_api() -> None:
    keys = set(pixel_dit(num_layers=2).state_dict())
    block = "transformer_blocks.1."
    assert {key.removeprefix(block) for key in keys if key.startswith(block)} == {
        f"{name}.{leaf}"
        for name in (
            "norm1.linear",
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "ff.net.0.proj",
            "ff.net.2",
        )
        for leaf in ("weight", "bias")
    }
    assert {key for key in keys if not key.startswith("transformer_blocks.")} == {
        "pos_embed.proj.weight",
        "pos_embed.proj.bias",
        "conditioning.timestep_embedder.linear_1.weight",
        "conditioning.timestep_embedder.linear_1.bias",
        "conditioning.timestep_embedder.linear_2.weight",
        "conditioning.timestep_embedder.linear_2.bias",
        "conditioning.class_embedder.embedding_table.weight",
        "proj_out_1.weight",
        "proj_out_1.bias",
        "proj_out_2.weight",
        "proj_out_2.bias",
    }


def test_starts_as_zero() -> None:
    """adaLN-Zero: an untrained model predicts 0, and its blocks pass their input on."""
    model = PixelDiT(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_classes=4).eval()
    assert not output(model, *inputs()).any()
    tokens = torch.randn(1, 4, 16)
    conditioning = torch.randn(1, 16)
    assert torch.equal(model.transformer_blocks[0](tokens, timestep=conditioning), tokens)


def test_samples_do_not_mix() -> None:
    model, (images, timesteps, labels) = pixel_dit(), inputs()
    whole = output(model, images, timesteps, labels)
    alone = output(model, images[1:2], timesteps[1:2], labels[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-5)


def unexplained(model: nn.Module, drop_label: int) -> int:
    """Count samples whose output in training is neither that of their label nor that of no label."""
    batch = 32
    images, timesteps = torch.randn(batch, model.config.in_channels, 8, 8), torch.full((batch,), 500)
    labels = torch.zeros(batch, dtype=torch.long)
    with torch.no_grad():
        kept = output(model.eval(), images, timesteps, labels)
        dropped = output(model.eval(), images, timesteps, torch.full_like(labels, drop_label))
        trained = output(model.train(), images, timesteps, labels)
    is_kept = torch.isclose(trained, kept, atol=1e-5).flatten(1).all(1)
    is_dropped = torch.isclose(trained, dropped, atol=1e-5).flatten(1).all(1)
    if isinstance(model, PixelDiT):
        assert is_kept.any()
        assert is_dropped.any()
    return int((~is_kept & ~is_dropped).sum())


def test_label_is_dropped_once_a_sample() -> None:
    assert unexplained(pixel_dit(class_dropout_prob=0.5), drop_label=4) == 0


def test_diffusers_dit_drops_labels_block_by_block() -> None:
    """The reason for PixelDiT's own embedder; if this fails, diffusers has changed and the embedder may go."""
    model = dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.5
    assert unexplained(model, drop_label=4) > 0


def test_no_label_is_dropped_in_evaluation() -> None:
    model = pixel_dit(class_dropout_prob=1.0)
    batch = inputs()
    assert torch.equal(output(model, *batch), output(model, *batch))
    assert not torch.equal(output(model, *batch)[1], output(model, batch[0], batch[1], torch.full((3,), 4))[1])


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = pixel_dit(class_dropout_prob=0.5).train()
    saving = copy.deepcopy(plain)
    saving.enable_gradient_checkpointing()
    batch = inputs()
    for model in (plain, saving):
        torch.manual_seed(1)
        output(model, *batch).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None, name
        assert one.grad.isfinite().all(), name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_save_and_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = pixel_dit(patch_size=4, dropout=0.1)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        loaded = PixelDiT.from_pretrained(tmp_path)
    assert not caplog.records
    assert not {"norm_num_groups", "num_embeds_ada_norm", "upcast_attention"} & set(loaded.config)
    assert loaded.config.num_classes == 4
    assert loaded.config.dropout == 0.1
    batch = inputs()
    assert torch.equal(output(model, *batch), output(loaded, *batch))


def spoiled(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """Return what is said when a saved model with changed weights is loaded."""
    pixel_dit().save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as info:
        PixelDiT.from_pretrained(folder)
    return str(info.value)


def test_loading_is_strict(tmp_path: Path) -> None:
    """diffusers alone only warns, and leaves a missing weight random."""
    message = spoiled(tmp_path / "missing", lambda weights: weights.pop("proj_out_2.bias"))
    assert message.endswith("missing keys: ['proj_out_2.bias'].")
    message = spoiled(tmp_path / "more", lambda weights: weights.update(proj_out_3=torch.zeros(1)))
    assert message.endswith("unexpected keys: ['proj_out_3'].")
    message = spoiled(tmp_path / "nan", lambda weights: weights["proj_out_1.bias"].fill_(torch.nan))
    assert message.endswith("not finite in ['proj_out_1.bias'].")
    _, info = PixelDiT.from_pretrained(tmp_path / "missing", output_loading_info=True)
    assert list(info["missing_keys"]) == ["proj_out_2.bias"]


def test_half_precision() -> None:
    model, batch = pixel_dit(), inputs()
    exact = output(model, *batch)
    half = output(model.to(torch.bfloat16), batch[0].bfloat16(), *batch[1:])
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.slow
def test_compiles_whole() -> None:
    model, batch = pixel_dit(), inputs()
    expected = output(model, *batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output(compiled, *batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": 30, "patch_size": 4}, "multiple of patch_size 4, got 30"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "multiple of 4, got 1 \\* 6"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must lie in \\[0, 1\\], got 1.5"),
    ],
)
def test_wrong_sizes(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelDiT(**arguments)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="num_clases"):
        PixelDiT(num_clases=3)


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 4, 8, 8), "B, 3, H, W"), ((1, 3, 8, 4), "equal"), ((1, 3, 7, 7), "multiple of 2")]
)
def test_wrong_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixel_dit()(torch.zeros(shape), timestep=torch.tensor([1]), class_labels=torch.tensor([0]))


def test_condition_is_needed() -> None:
    with pytest.raises(ValueError, match="timestep and class_labels"):
        pixel_dit()(torch.zeros(1, 3, 8, 8))


def test_no_unconditional_label_without_dropping() -> None:
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        _ = pixel_dit(class_dropout_prob=0.0).null_label


def test_unknown_configuration_is_an_error() -> None:
    """diffusers warns and builds another network."""
    with pytest.raises(CheckpointError, match=r"PixelDiT has no 'num_layer'\. Did you mean 'num_layers'"):
        PixelDiT.from_config({"num_layer": 2})
