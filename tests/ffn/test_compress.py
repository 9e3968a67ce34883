"""Pruning, low rank, depth and RePa from pretrained models: identities in float64, errors on data, reloading."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_models import KINDS, batches, build, vit
from torch import nn

import zoo.backbones  # noqa: F401  registers repavit
from zoo.ffn import depth, low_rank, prune, repa
from zoo.ffn.depth import DepthConfig
from zoo.ffn.low_rank import LowRankConfig
from zoo.ffn.prune import PruneConfig
from zoo.ffn.repa import RePaConfig
from zoo.ffn.technique import ffn_layers, model_output, rebuild, thinned


def _output(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model_output(
            model, _double(batches(kind, 1)[0]) if _dtype(model) == torch.float64 else batches(kind, 1)[0]
        )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _double(batch: object) -> object:
    if isinstance(batch, dict):
        return {k: v.double() if v.is_floating_point() and k != "timestep" else v for k, v in batch.items()}
    return (batch[0].double(), batch[1])


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_go_without_a_trace(kind: str) -> None:
    """Channels that are zero on all data are the ones that go, and nothing changes (float64)."""
    model = build(kind).double()
    for ffn in ffn_layers(model).values():
        with torch.no_grad():
            channels = ffn.channels()
            down = channels.down.clone()
            up, bias = channels.up.clone(), None if channels.up_bias is None else channels.up_bias.clone()
            up[:, 1::2] = 0
            if bias is not None:
                bias[:, 1::2] = 0
            ffn.write(type(channels)(up=up, up_bias=bias, down=down))
    before = _output(model, kind)
    config = PruneConfig(keep=0.5, round_to=1, compensation="least_squares")
    report = prune.apply(model, config, [_double(batch) for batch in batches(kind)])
    assert torch.allclose(_output(model, kind), before, rtol=0, atol=1e-10 * float(before.abs().max()))
    assert report.macs[1] == pytest.approx(report.macs[0] / 2, rel=0.01)
    assert report.error is not None
    assert report.error < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_the_identity(kind: str) -> None:
    model = build(kind)
    before = _output(model, kind)
    prune.apply(model, PruneConfig(keep=1.0), batches(kind))
    assert torch.equal(_output(model, kind), before)


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_equals_masked(kind: str) -> None:
    """Without compensation the pruned model is the dense one with some activations zeroed."""
    model = build(kind).double()
    dense = copy.deepcopy(model)
    data = [_double(batch) for batch in batches(kind)]
    prune.apply(model, PruneConfig(keep=0.5, scores="magnitude", compensation="none"), data)
    for (name, ffn), small in zip(ffn_layers(dense).items(), ffn_layers(model).values(), strict=True):
        rows = small.channels().up
        kept = [int((ffn.channels().up == rows[:, [j]]).all(-1).all(0).nonzero()[0]) for j in range(small.hidden_dim)]
        with torch.no_grad():
            gone = [j for j in range(ffn.hidden_dim) if j not in kept]
            ffn.down.weight[:, [ffn.first_column + j for j in gone]] = 0
        assert name
    assert torch.allclose(_output(model, kind), _output(dense, kind), atol=1e-12)


@pytest.mark.parametrize("scores", ["activation", "cfsp", "obs", "taylor", "magnitude", "random"])
def test_scores_follow_a_permutation(scores: str) -> None:
    """Permuted channels are pruned alike: the output is the same (all scores but random ones)."""
    model, data = vit(depth=1).double(), [_double(batch) for batch in batches("timm")]
    shuffled = copy.deepcopy(model)
    (ffn,) = ffn_layers(shuffled).values()
    prune.keep_channels(ffn, torch.randperm(ffn.hidden_dim))
    for each in (model, shuffled):
        prune.apply(each, PruneConfig(keep=0.5, scores=scores), data)
    same = torch.allclose(_output(model, "timm"), _output(shuffled, "timm"), atol=1e-9)
    assert same == (scores != "random")


def test_least_squares_beats_bias_beats_nothing() -> None:
    errors = []
    for compensation in ("none", "bias", "least_squares"):
        model = vit(depth=1)
        report = prune.apply(model, PruneConfig(keep=0.5, compensation=compensation), batches("timm"))
        errors.append(report.error)
    assert errors[2] < errors[1] < errors[0]


def test_obs_scores_are_what_least_squares_loses() -> None:
    """The first channel to go costs exactly its fit's error, and the choice of many beats that by activation."""
    torch.manual_seed(0)
    hidden = torch.randn(400, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    down = torch.randn(5, 20, dtype=torch.float64)
    gram = hidden.t() @ hidden / len(hidden)

    def loss(kept: list[int]) -> float:
        wanted = hidden @ down.t()
        fitted = hidden[:, kept] @ torch.linalg.lstsq(hidden[:, kept], wanted).solution
        return float((fitted - wanted).square().sum() / len(hidden))

    scores = prune.obs_scores(gram, down, damping=0.0)
    without = [loss([j for j in range(20) if j != gone]) for gone in range(20)]
    assert int(scores.argmin()) == without.index(min(without))
    assert float(scores.min()) == pytest.approx(min(without), rel=1e-8)
    by_activation = gram.diagonal().argsort(descending=True)[:10].tolist()
    assert loss(scores.argsort(descending=True)[:10].tolist()) < 0.7 * loss(by_activation)


def test_moments_of_much_data_are_taken_from_part_of_it() -> None:
    """8 rows a channel over all batches, the same places for equal numbers of rows; few rows all stay."""
    rows = torch.arange(1000.0)[:, None]
    part = thinned(rows, channels=10, parts=4)
    assert len(part) == 20
    assert len(set(part.flatten().tolist())) == 20
    assert torch.equal(thinned(2 * rows, channels=10, parts=4), 2 * part)
    assert thinned(rows, channels=500, parts=4) is rows


@pytest.mark.parametrize("allocation", ["uniform", "global", "cfsp"])
def test_budget_is_met(allocation: str) -> None:
    model = vit(depth=3)
    before = sum(ffn.macs() for ffn in ffn_layers(model).values())
    prune.apply(model, PruneConfig(keep=0.5, allocation=allocation), batches("timm"))
    after = sum(ffn.macs() for ffn in ffn_layers(model).values())
    assert after / before == pytest.approx(0.5, abs=0.05)
    assert all(ffn.hidden_dim % 8 == 0 for ffn in ffn_layers(model).values())


@pytest.mark.parametrize("kind", ["timm", "glu", "swiglu", "dit"])
def test_full_rank_is_exact_and_merges_back(kind: str) -> None:
    """At full rank the thin products give the dense layer, also through `to_dense` (float64)."""
    model = build(kind).double()
    before = _output(model, kind)
    data = [_double(batch) for batch in batches(kind)]
    assert low_rank.apply(model, LowRankConfig(keep=0.99, round_to=10**6), data).error < 1e-10
    assert torch.allclose(_output(model, kind), before, atol=1e-10 * float(before.abs().max()))
    assert low_rank.to_dense(model)
    assert torch.allclose(_output(model, kind), before, atol=1e-10 * float(before.abs().max()))
    assert ffn_layers(model)


def test_whitened_rank_is_better_on_the_data() -> None:
    """The rank-r product on inputs of uneven size: the error on them is that of Eckart and Young, and least."""
    torch.manual_seed(0)
    dense = nn.Linear(16, 64).double()
    x = torch.randn(500, 16, dtype=torch.float64) * torch.logspace(0, -3, 16, dtype=torch.float64)
    second = x.t() @ x / len(x)
    errors = [
        float((low_rank.LowRankLinear.from_dense(dense, 6, moment)(x) - dense(x)).square().sum(1).mean())
        for moment in (second, None)
    ]
    values, vectors = torch.linalg.eigh(second)
    singular = torch.linalg.svdvals(dense.weight.detach() @ (vectors * values.clamp_min(0).sqrt()))
    assert errors[0] == pytest.approx(float(singular[6:].square().sum()), rel=1e-3)
    assert errors[0] < 0.5 * errors[1]


def test_low_rank_keeps_to_its_budget() -> None:
    report = low_rank.apply(vit(depth=1, embed_dim=64), LowRankConfig(keep=0.5), batches("timm", 1))
    assert report.macs[1] <= 0.5 * report.macs[0]


@pytest.mark.parametrize("kind", ["timm", "dit"])
def test_linear_channels_become_idle_exactly(kind: str) -> None:
    """Where half of the channels never leave the linear part of their activation, merging them changes nothing."""
    model = build(kind).double()
    for ffn in ffn_layers(model).values():
        with torch.no_grad():
            half = ffn.hidden_dim // 2
            ffn.up.weight[:half] *= 1e-3
            ffn.up.bias[:half] = 40.0  # far in the linear part of GELU
    before = _output(model, kind)
    report = repa.apply(model, RePaConfig(idle=0.5, damping=1e-14), [_double(batch) for batch in batches(kind)])
    assert torch.allclose(_output(model, kind), before, atol=1e-7 * float(before.abs().max()))
    assert report.macs[1] == report.macs[0] * 5 // 8


def test_repa_beats_pruning_to_the_same_active_channels() -> None:
    merged = repa.apply(vit(depth=1), RePaConfig(idle=0.5), batches("timm"))
    pruned = prune.apply(vit(depth=1), PruneConfig(keep=0.5), batches("timm"))
    assert merged.error < pruned.error


def test_depth_takes_what_is_missed_least() -> None:
    """A layer that adds nothing goes first, without any change."""
    model = vit(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()
        model.blocks[1].mlp.fc2.bias.zero_()
        model.blocks[2].attn.proj.weight.zero_()
        model.blocks[2].attn.proj.bias.zero_()
    report = depth.apply(model, DepthConfig(remove=2, units="both"), batches("timm"))
    assert [layer.name for layer in report.layers] == ["blocks.1.mlp", "blocks.2.attn"]
    assert report.error < 1e-6


def test_attention_removals_are_the_papers() -> None:
    """2, 3 and 5 of 12 for a ViT-B at 25, 37.5 and 50 % (the spec's check of the authors' code)."""
    assert [depth.attention_removals(12, s, 2, 1) for s in (0.25, 0.375, 0.5)] == [2, 3, 5]


TECHNIQUES = {
    "prune": lambda model, data: prune.apply(model, PruneConfig(keep=0.5), data),
    "low_rank": lambda model, data: low_rank.apply(model, LowRankConfig(keep=0.5), data),
    "repa": lambda model, data: repa.apply(model, RePaConfig(idle=0.5), data),
    "depth": lambda model, data: depth.apply(model, DepthConfig(remove=1), data),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_structure_is_rebuilt_from_plain_facts(technique: str) -> None:
    """A fresh dense model takes the changes and then the weights strictly, and gives the same output."""
    import json

    model = vit()
    report = TECHNIQUES[technique](model, batches("timm"))
    changes = json.loads(json.dumps(model.ffn_changes))
    fresh = vit()
    rebuild(fresh, changes)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(_output(fresh, "timm"), _output(model, "timm"))
    assert fresh.ffn_changes == changes
    assert "MACs" in str(report)
    with pytest.raises(ValueError, match="already"):
        TECHNIQUES[technique](model, batches("timm"))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_changed_models_train_export_and_run_in_bfloat16(technique: str) -> None:
    model = vit()
    TECHNIQUES[technique](model, batches("timm"))
    images = batches("timm")[0][0]
    expected = _output(model, "timm")
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(images), expected, atol=1e-5)
        assert copy.deepcopy(model).bfloat16()(images.bfloat16()).isfinite().all()
    model(images).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if f"{_removed(model)}." not in name)


def _removed(model: nn.Module) -> str:
    """Return the norm in front of a layer that was removed, which nothing depends on any more."""
    gone = [name for change in model.ffn_changes if change["technique"] == "depth" for name in change["layers"]]
    return gone[0].replace("mlp", "norm2") if gone else "nothing"


def test_wrapped_products_are_refused_by_name() -> None:
    model = vit()
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp: its first product is a torch\S*Sequential"):
        prune.apply(model, PruneConfig(scores="random", compensation="none"))


def test_repa_layers_are_left_to_reparameterize() -> None:
    model = timm.create_model(
        "repavit_tiny", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    with pytest.raises(ValueError, match=r"blocks\.0\.\w+ is a RePaFFN"):
        prune.apply(model.eval(), PruneConfig(), batches("timm"))


def test_bad_input_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="has no feed-forward layer"):
        prune.apply(timm.create_model("resnet18", num_classes=2), PruneConfig(), batches("timm"))
    with pytest.raises(ValueError, match="needs data"):
        prune.apply(vit(), PruneConfig())
    with pytest.raises(ValueError, match="keep is the share"):
        PruneConfig(keep=0)
    with pytest.raises(ValueError, match="remove must be at most 3"):
        depth.apply(vit(), DepthConfig(remove=4), batches("timm"))
    with pytest.raises(ValueError, match="take idle above"):
        repa.apply(vit(), RePaConfig(idle=0.1), batches("timm"))
    with pytest.raises(ValueError, match="gated"):
        repa.apply(build("glu"), RePaConfig(), batches("glu"))
    with pytest.raises(ValueError, match="round_to must be at most"):
        prune.apply(vit(mlp_ratio=0.25), PruneConfig(), batches("timm"))
