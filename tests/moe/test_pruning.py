"""Experts that leave a trained mixture: what stays is exact, saved, counted; what cannot be is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.denoisers import condition, pixel_dit
from tests.ffn.small_models import batches, vit
from zoo.ffn import parallel
from zoo.ffn.technique import rebuild
from zoo.moe import (
    ExpertPruneConfig,
    MoEConfig,
    SigmaMoEConfig,
    convert,
    expert_layers,
    prune_experts,
    set_top_k,
    sigma_moe,
    to_dense,
)
from zoo.moe.transformers import load_transformer


def mixture(**changes: Any) -> Any:
    torch.manual_seed(0)
    model, _ = convert(pixel_dit(), MoEConfig(**{"scores": "random", "experts": 6, "top_k": 2, **changes}))
    for layer in expert_layers(model).values():
        nn.init.normal_(layer.router.weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    sample, inputs = condition(model, 2)
    return {"hidden_states": sample, "timestep": torch.tensor([900, 300]), **inputs}


@torch.no_grad()
def call(model: Any) -> Tensor:
    return model(**batch(model), return_dict=False)[0]


@pytest.mark.parametrize("gate", ["softmax_renorm", "sigmoid", "unit"])
def test_experts_without_tokens_go_without_a_trace(gate: str) -> None:
    """Those that are used least have none here; the others' weights do not depend on them."""
    model = mixture(gate=gate)
    for layer in expert_layers(model).values():  # two that no token prefers: the others' logits, less 100
        with torch.no_grad():
            layer.router.bias = nn.Parameter(torch.tensor([0.0, -100, 0, 0, -100, 0]))
    before = call(model)
    report = prune_experts(model, ExpertPruneConfig(keep=4), [batch(model)])
    assert torch.allclose(call(model), before, rtol=1e-5, atol=1e-6)
    assert report.error < 1e-5
    assert report.params[1] == sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.params[0] - layer.params[1] for layer in report.layers) == report.params[0] - report.params[1]
    assert report.layers[0].what == "6 -> 4 experts"


@pytest.mark.parametrize("scores", ["usage", "random"])
def test_softmax_runs_over_those_that_stay(scores: Any) -> None:
    model = mixture()
    dense = copy.deepcopy(model)
    prune_experts(model, ExpertPruneConfig(keep=3, scores=scores), [batch(model)])
    for old, new in zip(expert_layers(dense).values(), expert_layers(model).values(), strict=True):
        rows = torch.randn(5, old.dim)
        kept = [int((old.router.weight == row).all(1).nonzero()) for row in new.router.weight]
        wanted = 6 * (rows @ old.router.weight[kept].t()).softmax(1).topk(2).values
        assert torch.allclose(new.router(rows, 2)[0], wanted, atol=1e-5)
        assert torch.equal(new.experts_down, old.experts_down[kept])
        width = old.expert_dim
        places = old.channel_index[old.shared_dim :].view(-1, width)[kept].flatten()
        assert torch.equal(new.channel_index[new.shared_dim :], places)


def test_saved_with_fewer_experts(tmp_path: Path) -> None:
    model = mixture(zero=1)
    for keep in (4, 3):  # twice
        prune_experts(model, ExpertPruneConfig(keep=keep), [batch(model)])
    model.save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path)
    assert {layer.experts for layer in expert_layers(loaded).values()} == {3}
    assert torch.equal(call(loaded.eval()), call(model))


def test_what_cannot_be_pruned_is_said() -> None:
    model = mixture()
    with pytest.raises(ValueError, match=r"6 experts of which a token takes 2: keep must lie in 2 \.\.\. 5, got 1"):
        prune_experts(model, ExpertPruneConfig(keep=1, scores="random"))
    with pytest.raises(ValueError, match="Pruning experts needs data"):
        prune_experts(model, ExpertPruneConfig(keep=3))
    with pytest.raises(ValueError, match="has no experts"):
        prune_experts(nn.Linear(2, 2), ExpertPruneConfig(keep=1))
    with pytest.raises(ValueError, match="scores must be one of reap"):
        ExpertPruneConfig(keep=1, scores="magnitude")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pruned must be less than the 6 experts"):
        MoEConfig(experts=6, pruned=6)
    with pytest.raises(ValueError, match="convert with 0"):
        convert(pixel_dit(), MoEConfig(scores="random", experts=6, pruned=2))
    prune_experts(model, ExpertPruneConfig(keep=3, scores="random"))
    with pytest.raises(ValueError, match="3 experts were pruned: no dense layer holds the others"):
        to_dense(model)
    with pytest.raises(ValueError, match=r"top_k must lie in 0 \.\.\. 3"):
        set_top_k(model, 4)


def sigma() -> nn.Module:
    model = vit()
    sigma_moe.apply(model, SigmaMoEConfig(experts=8, top_k=2, start="channels"))
    return model.eval()


def converted() -> nn.Module:
    model, _ = convert(vit(), MoEConfig(scores="random", experts=6, top_k=2))
    parallel.apply(model)  # what comes later does not make the experts forgotten
    return model.eval()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def adapted(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))


@pytest.mark.parametrize("make", [sigma, converted])
@pytest.mark.parametrize("wrap", [lambda model: model, compiled, adapted], ids=["plain", "compiled", "adapted"])
def test_a_classifier_is_rebuilt_with_what_is_left(make: Any, wrap: Any) -> None:
    model = make()
    x = batches("timm", 1, size=3)[0][0]
    noted = model.ffn_changes
    before = copy.deepcopy(noted)
    whole = wrap(model)
    prune_experts(whole, ExpertPruneConfig(keep=4), [x])
    prune_experts(whole, ExpertPruneConfig(keep=3), [x])
    set_top_k(whole, 1)
    assert noted == before  # records that were made before stay as they are
    model = whole.merge_and_unload() if hasattr(whole, "merge_and_unload") else model
    fresh = vit()
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_the_number_of_chosen_experts_is_saved_whoever_sets_it(tmp_path: Path) -> None:
    for number, choose in enumerate((set_top_k, lambda model, k: model.set_top_k(k))):
        model = mixture()
        choose(model, 1)
        model.save_pretrained(tmp_path / str(number))
        assert torch.equal(call(load_transformer(tmp_path / str(number)).eval()), call(model))
    dense = to_dense(converted())
    assert [change["technique"] for change in dense.ffn_changes] == ["parallel"]
    model = sigma()
    set_top_k(model, 0)  # fewer than one can be trained with
    fresh = vit()
    rebuild(fresh, model.ffn_changes)
    assert {layer.top_k for layer in expert_layers(fresh).values()} == {0}
