"""Backbones in the formulations of their authors, with the weights of ours: rivals in benchmarks, oracles of tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.affnet import ConvNormAct, InvertedResidual
from zoo.backbones.efficientvit_msra import EfficientViTMSRA
from zoo.backbones.emov2 import InvertedBlock
from zoo.backbones.ffnet import FFBlock, FFStage
from zoo.backbones.lsnet import LSStage
from zoo.kernels.dispatch import no_autocast
from zoo.layers.cascaded_attention import CascadedGroupAttention
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.ffn import RePaFFN
from zoo.layers.frequency_filter import AdaptiveFrequencyFilter
from zoo.layers.residual import Residual, ResidualConv
from zoo.layers.ska import LSConv, swap_axes
from zoo.layers.window import HybridAttention

__all__ = [
    "PLAIN",
    "PlainRePaFFN",
    "plain_cascaded_attention",
    "plain_filter",
    "plain_hybrid_attention",
    "plain_ls_conv",
    "plain_residual",
    "plain_ska",
]


class PlainRePaFFN(nn.Module):
    """The training form as the paper writes it: GELU on all channels, a mask that keeps it on the active ones.

    It is the oracle of the tests and the rival of `zoo bench`; models use `RePaFFN`.

    Args:
        layer: A BatchNorm layer in training form without layer scale; its weights are copied.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: `layer` has another norm or form, or a layer scale.
    """

    def __init__(self, layer: RePaFFN) -> None:
        super().__init__()
        if layer.form != "training" or layer.feature_norm != "BatchNorm" or layer.layer_scale is not None:
            raise ValueError("PlainRePaFFN needs a RePaFFN with BatchNorm, in training form, without layer scale.")
        kept = layer.state_dict()
        like = dict(device=kept["norm.weight"].device, dtype=kept["norm.weight"].dtype)
        self.active_dim = layer.active_dim
        self.norm1 = nn.BatchNorm1d(layer.dim, **like)
        self.fc1 = nn.Linear(layer.dim, layer.hidden_dim, **like)
        self.norm2 = nn.BatchNorm1d(layer.hidden_dim, **like)
        self.fc2 = nn.Linear(layer.hidden_dim, layer.dim, **like)
        joined = {"fc2.bias": kept.get("active_fc2.bias", kept.get("idle_fc2.bias"))}
        for own, key, axis in (("fc1", "fc1.weight", 0), ("fc1", "fc1.bias", 0), ("fc2", "fc2.weight", 1)):
            parts = [kept[f"{branch}_{key}"] for branch in ("active", "idle") if f"{branch}_{key}" in kept]
            joined[f"{own}.{key.split('.')[1]}"] = torch.cat(parts, axis)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            parts = [kept[f"{branch}_norm.{leaf}"] for branch in ("active", "idle") if f"{branch}_norm.{leaf}" in kept]
            joined |= {f"norm1.{leaf}": kept[f"norm.{leaf}"], f"norm2.{leaf}": torch.cat(parts)}
        for norm in ("norm1", "norm2"):
            joined[f"{norm}.num_batches_tracked"] = kept["norm.num_batches_tracked"]
        self.load_state_dict(joined)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(self.norm1(x.transpose(1, 2)).transpose(1, 2))
        mask = torch.zeros_like(hidden, dtype=torch.bool)
        mask[..., : self.active_dim] = True
        hidden = torch.where(mask, F.gelu(hidden), hidden)
        return x + self.fc2(self.norm2(hidden.transpose(1, 2)).transpose(1, 2))


def plain_cascaded_attention(attn: CascadedGroupAttention, x: Tensor) -> Tensor:
    """Compute `CascadedGroupAttention` head by head as the paper's code does: oracle of tests, rival in benchmarks.

    Args:
        attn: In training or merged form.
        x: (B, C, r, r).
    """
    batch, _, height, width = x.shape
    bias = attn.attention_biases[:, attn.attention_bias_idxs.view(height * width, -1)]  # type: ignore[operator]
    groups = x.chunk(attn.num_heads, 1)
    out, outs = groups[0], []
    for i, (qkv, dw) in enumerate(zip(attn.qkvs, attn.dws, strict=True)):
        if i > 0:
            out = out + groups[i]
        q, k, v = qkv(out).split((attn.key_dim, attn.key_dim, attn.value_dim), 1)
        q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)
        scores = (q.transpose(1, 2) @ k) * (1.0 if attn.merged else attn.scale) + bias[i]
        out = (v @ scores.softmax(-1).transpose(1, 2)).view(batch, -1, height, width)
        outs.append(out)
    return attn.proj(torch.cat(outs, 1))


def plain_residual(layer: Residual | ResidualConv, x: Tensor) -> Tensor:
    """Compute a branch and an addition, as EfficientViT's code does: oracle of tests, rival in benchmarks.

    Args:
        layer: In training or merged form; a merged convolution is taken apart at the first call.
        x: (B, C, H, W).
    """
    if not isinstance(layer, ResidualConv) or not layer.merged:
        return x + layer.drop_path(layer.m(x))
    if not hasattr(layer, "plain_weight"):
        weight = layer.m.conv.weight.detach().clone()
        weight[:, :, 1, 1] -= 1
        layer.plain_weight = weight
    return x + F.conv2d(x, layer.plain_weight, layer.m.conv.bias, padding=1, groups=x.shape[1])  # type: ignore[arg-type]


def plain_efficientvit(model: EfficientViTMSRA, x: Tensor) -> Tensor:
    """Run the model in channels-first memory, as the paper's code does; its weights are stored so by the first call."""
    if not cast(Any, model.patch_embed).conv1.conv.weight.is_contiguous():
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.forward_head(model.stages(model.patch_embed(x)))


def _plain_relu(layer: nn.ReLU, x: Tensor) -> Tensor:
    return x.relu()


def plain_hybrid_attention(module: HybridAttention, x: Tensor) -> Tensor:
    """Compute `HybridAttention` the authors' way: two convolutions, both patterns in full, channels first.

    Args:
        module: Its weights are used.
        x: (B, C, H, W).

    Returns:
        (B, M, H, W).
    """
    batch, dim, height, width = x.shape
    side, heads, hidden = module.window_size, module.num_heads, module.hidden_dim
    tall, wide = (side, side) if side > 0 else (height, width)
    if height % tall or width % wide:
        x = F.pad(x, (0, -width % wide, 0, -height % tall))
    rows, cols = x.shape[2] // tall, x.shape[3] // wide
    weight, bias = module.qkv.weight[..., None, None], module.qkv.bias
    qk = F.conv2d(x, weight[: 2 * dim], bias[: 2 * dim])
    v = module.act(F.conv2d(x, weight[2 * dim :], bias[2 * dim :]))
    patterns = []
    for remote in (True, False):
        if module.partition not in ("both", "remote" if remote else "close"):
            continue
        if remote:
            cut, axes, back = (tall, rows, wide, cols), (0, 3, 5, 1, 2, 4), (0, 3, 4, 1, 5, 2)
        else:
            cut, axes, back = (rows, tall, cols, wide), (0, 2, 4, 1, 3, 5), (0, 3, 1, 4, 2, 5)
        q, k = _channels_first_windows(qk, cut, axes, (2, heads, dim // heads)).unbind(1)
        values = _channels_first_windows(v, cut, axes, (heads, hidden // heads))
        attn = ((q @ k.transpose(-2, -1)) * module.scale).softmax(-1)
        out = (attn @ values).transpose(-2, -1).reshape(batch, rows, cols, hidden, tall, wide)
        patterns.append(out.permute(back).reshape(batch, hidden, rows * tall, cols * wide))
    total = patterns[0] if len(patterns) == 1 else patterns[0] + patterns[1]
    return total[:, :, :height, :width].contiguous()


def _channels_first_windows(
    x: Tensor, cut: tuple[int, ...], axes: tuple[int, ...], channels: tuple[int, ...]
) -> Tensor:
    """Cut a map (B, C, H, W) into windows (B * n1 * n2, *channels, tokens) and put the last axis of channels last."""
    x = x.view(*x.shape[:2], *cut).permute(axes)
    return x.reshape(-1, *channels, x.shape[4] * x.shape[5]).transpose(-2, -1).contiguous()


def plain_inverted_block(module: nn.Module, x: Tensor) -> Tensor:
    """Compute an `InvertedBlock` the authors' way: channels first, with `plain_hybrid_attention`; oracle and rival.

    Args:
        module: An `InvertedBlock`, trained or merged.
        x: (B, dim, H, W).
    """
    block = cast(InvertedBlock, module)
    x = x.contiguous()
    hidden = block.norm(x).contiguous()
    if isinstance(block.expand, HybridAttention):
        hidden = plain_hybrid_attention(block.expand, hidden)
    else:
        hidden = block.expand(hidden)
    local = block.act(block.local(hidden))
    if not block.skip:
        return block.ls(block.proj(local))
    return x + block.drop_path(block.ls(block.proj(hidden + local)))


def plain_ska(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `zoo.kernels.ska` from all neighbourhoods, side by side in memory: oracle of tests, rival elsewhere."""
    batch, chans, height, width = x.shape
    sets, taps = weight.shape[1:3]
    side = math.isqrt(taps)
    windows = F.unfold(x, side, padding=side // 2).view(batch, chans // sets, sets, taps, height, width)
    return (windows * weight.unsqueeze(1)).sum(3).view(batch, chans, height, width)


def plain_ls_conv(layer: LSConv, x: Tensor) -> Tensor:
    """Compute `LSConv` as a port of the authors' code does: group norm, unfolded neighbourhoods, scale, residual.

    Args:
        layer: In training or merged form.
        x: (B, C, H, W).
    """
    predictor, sets = layer.lkp, layer.lkp.sets
    if layer.bn is not None:
        kernels = predictor.norm(predictor(x))
        return x + layer.bn(plain_ska(x, kernels.unflatten(1, (sets, predictor.taps))))
    assert layer.scale is not None
    assert layer.shift is not None
    hidden = predictor.act(predictor.cv3(predictor.cv2(predictor.act(predictor.cv1(x)))))
    cv4, norm = predictor.cv4, predictor.norm
    assert cv4.bias is not None
    weight, bias, gamma, beta = (
        swap_axes(v, predictor.taps, sets) for v in (cv4.weight, cv4.bias, norm.weight, norm.bias)
    )
    kernels = F.group_norm(F.conv2d(hidden, weight, bias), sets, gamma, beta, norm.eps)
    out = plain_ska(x, kernels.unflatten(1, (sets, predictor.taps)))
    return x + (out * layer.scale.view(-1, 1, 1) + layer.shift.view(-1, 1, 1))


def plain_ls_stage(stage: LSStage, x: Tensor) -> Tensor:
    """Compute `LSStage` channels first, as the authors' code does: rival in benchmarks, with `plain_ls_conv`."""
    return stage.blocks(stage.downsample(x.contiguous()))


def plain_ff_stage(stage: FFStage, x: Tensor) -> Tensor:
    """Compute `FFStage` as the authors' code does, channels first and on the whole batch at once: oracle and rival."""
    x = stage.downsample(x.contiguous())
    for block in cast(list[FFBlock], list(stage.blocks)):
        for mixer, scale in ((block.token_mixer, block.layer_scale1), (block.channel_mixer, block.layer_scale2)):
            mixed = mixer(x)
            x = x + (mixed if scale is None else mixed * scale)
    return x


def plain_filter(module: AdaptiveFrequencyFilter, x: Tensor) -> Tensor:
    """Compute `AdaptiveFrequencyFilter` as the paper's code does, by FFT and einsums.

    Oracle of tests, rival in benchmarks. Right on a CPU only: the spectrum handed to `irfft2` is not Hermitian.

    Args:
        module: Holds the weights.
        x: (B, C, H, W).
    """
    z = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    with no_autocast(z):
        w1, b1, w2, b2 = (value.to(z.dtype) for value in (module.w1, module.b1, module.w2, module.b2))
        spectrum = torch.fft.rfft2(z, norm="ortho")
        grouped = spectrum.reshape(len(z), module.groups, -1, *spectrum.shape[-2:])

        def layer(re: Tensor, im: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            def product(values: Tensor, part: Tensor) -> Tensor:
                return torch.einsum("bkihw,kio->bkohw", values, part)

            bias = bias[..., None, None]
            return (
                product(re, weight[0]) - product(im, weight[1]) + bias[0],
                product(im, weight[0]) + product(re, weight[1]) + bias[1],
            )

        re, im = layer(grouped.real, grouped.imag, w1, b1)
        re, im = layer(F.silu(re), F.silu(im), w2, b2)
        mask = torch.stack((re, im), -1)
        if module.sparsity_threshold:
            mask = F.softshrink(mask, module.sparsity_threshold)
        filtered = (torch.view_as_complex(mask) * grouped).reshape(spectrum.shape)
        out = torch.fft.irfft2(filtered, s=z.shape[-2:], norm="ortho") + z
    return out.to(x.dtype)


def plain_activation(module: ConvNormAct, x: Tensor) -> Tensor:
    """Compute `ConvNormAct` as the paper's code does, with the activation out of place."""
    x = module.conv(x)
    return F.silu(x if module.bn is None else module.bn(x))


def plain_inverted_residual(module: InvertedResidual, x: Tensor) -> Tensor:
    """Compute `InvertedResidual` as the paper's code does, all images at once."""
    expand, depthwise, project = cast(tuple[ConvNormAct, ConvNormAct, ConvNorm], tuple(module.block))
    out = project(plain_activation(depthwise, plain_activation(expand, x)))
    return x + out if module.residual else out


PLAIN: dict[str, dict[type[nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "affnet": {
        AdaptiveFrequencyFilter: plain_filter,
        ConvNormAct: plain_activation,
        InvertedResidual: plain_inverted_residual,
    },
    "efficientvit_msra": {
        CascadedGroupAttention: plain_cascaded_attention,
        Residual: plain_residual,
        ResidualConv: plain_residual,
        nn.ReLU: _plain_relu,
        EfficientViTMSRA: plain_efficientvit,
    },
    "emov2": {InvertedBlock: plain_inverted_block},
    "ffnet": {FFStage: plain_ff_stage},
    "lsnet": {LSConv: plain_ls_conv, LSStage: plain_ls_stage, nn.ReLU: _plain_relu},
}
"""Family -> class of a block -> the block as its authors compute it, a function of the block and its input."""
