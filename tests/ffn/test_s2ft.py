"""Sparse fine-tuning of feed-forward channels: an exact start, an exact end, and nothing else learns."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import batches, build, vit

from zoo.ffn import prune, s2ft
from zoo.ffn.technique import ffn_layers, rebuild


@pytest.mark.parametrize("kind", ["timm", "glu", "swiglu"])
@pytest.mark.parametrize("part", ["down", "both"])
def test_only_the_slice_learns_and_it_merges_exactly(kind: str, part: s2ft.Slice) -> None:
    model = build(kind).double()
    dense, fresh = copy.deepcopy(model), copy.deepcopy(model)
    data = batches(kind, 1)
    x = data[0][0].double()
    config = s2ft.S2FTConfig(share=0.1, scores="activation", slice=part)
    report = s2ft.apply(model, config, [(x, data[0][1])])
    assert torch.allclose(model(x), dense(x), rtol=0, atol=1e-12)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learned) == report.params[1] - report.params[0]
    optimizer = torch.optim.SGD(learned, lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    trained = model(x)
    assert not torch.allclose(trained, dense(x))
    rebuild(fresh, model.ffn_changes)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), trained)
    assert len(s2ft.merge(model)) == len(report.layers) * (1 if part == "down" else 3 if kind == "swiglu" else 2)
    assert torch.allclose(model(x), trained, rtol=0, atol=1e-12)
    assert model.state_dict().keys() == dense.state_dict().keys()
    old, new = (next(iter(ffn_layers(each).values())).channels() for each in (dense, model))
    moved = (old.down != new.down).any(0)
    assert int(moved.sum()) <= -(-old.down.shape[1] // 10)
    assert torch.equal(old.up, new.up) == (part == "down")
    if part == "both":
        assert not ((old.up != new.up).any(-1).any(0) & ~moved).any()


@pytest.mark.parametrize("scores", ["activation", "idle", "obs", "cfsp", "taylor"])
def test_channels_are_chosen_as_pruning_keeps_them(scores: s2ft.SliceScores) -> None:
    """Those with the largest scores learn; "idle" takes the other end of "activation"."""
    data = batches("timm", 2)
    whole, pruned = vit(), vit()
    s2ft.apply(whole, s2ft.S2FTConfig(share=0.25, scores=scores), data)
    dense = ffn_layers(vit(), takes="any")
    method: prune.PruneScores = "activation" if scores == "idle" else scores
    config = prune.PruneConfig(keep=0.75 if scores == "idle" else 0.25, scores=method, compensation="none", round_to=16)
    prune.apply(pruned, config, data)
    for name, ffn in ffn_layers(pruned, takes="any").items():
        before, after = dense[name].up.weight.detach(), ffn.up.weight.detach()
        kept = (before[:, None] == after[None]).all(-1).any(1)
        chosen = torch.zeros_like(kept)
        chosen[whole.get_submodule(f"{name}.fc2").channels] = True
        assert torch.equal(chosen, ~kept if scores == "idle" else kept)


def test_wrong_shares_and_missing_data_are_named() -> None:
    with pytest.raises(ValueError, match="share is of the hidden channels"):
        s2ft.S2FTConfig(share=0)
    with pytest.raises(ValueError, match="scores must be one of random"):
        s2ft.S2FTConfig(scores="gradient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs data"):
        s2ft.apply(vit(), s2ft.S2FTConfig(scores="idle"))
    model = vit()
    s2ft.apply(model)
    with pytest.raises(ValueError, match=r"has been through zoo\.ffn\.s2ft already"):
        s2ft.apply(model)
