"""Attention and feed-forward layers side by side, and in another order: identities, formulas, records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers.models.attention import BasicTransformerBlock
from small_models import batches, build, vit
from torch import Tensor, nn

import zoo
from zoo.ffn import layout, macaron, parallel, product_key, s2ft
from zoo.ffn.layout import LayoutConfig, par_layout, sandwich_layout
from zoo.ffn.parallel import ParallelConfig
from zoo.ffn.technique import rebuild
from zoo.moe import SigmaMoEConfig, sigma_moe

X = batches("timm", 1, size=3)[0][0].double()


def scaled_vit() -> nn.Module:
    """A ViT with layer scales that differ from block to block."""
    model = vit(init_values=0.5).double()
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            block.ls1.gamma.fill_(0.3 + number)
            block.ls2.gamma.fill_(0.8 - number)
            block.norm2.weight.uniform_(0.5, 2)
    return model


def repavit() -> nn.Module:
    torch.manual_seed(0)
    model = zoo.create_model("repavit_tiny", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "pos_embed" not in name:
                tensor.mul_(4) if tensor.ndim == 2 else tensor.add_(0.3 * torch.rand_like(tensor))
    return model.double().eval()


def run(kind: str, model: nn.Module) -> Tensor:
    if kind != "dit":
        return model(X)
    batch = batches("dit", 1, size=2)[0]
    return model(batch["hidden_states"].double(), batch["timestep"], class_labels=batch["class_labels"])[0]


MODELS: dict[str, Any] = {"timm": scaled_vit, "dit": lambda: build("dit").double(), "repa": repavit}


@pytest.mark.parametrize("norm", ["own", "shared"])
def test_a_block_is_the_formula(norm: parallel.Norm) -> None:
    model = scaled_vit()
    before = copy.deepcopy(model.blocks)
    report = parallel.apply(model, ParallelConfig(norm=norm))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for old, new in zip(before, model.blocks, strict=True):
        second = old.norm2 if norm == "own" else old.norm1
        expected = x + old.ls1(old.attn(old.norm1(x))) + old.ls2(old.mlp(second(x)))
        assert torch.allclose(new(x), expected, rtol=0, atol=1e-10)
    saved = 0 if norm == "own" else 3 * 32
    assert report.params[0] - report.params[1] == saved
    assert report.macs[0] == report.macs[1] == 3 * (4 * 16 * 16 + 2 * 16 * 64)


def test_a_block_of_a_diffusion_transformer_is_the_formula() -> None:
    model = MODELS["dit"]()
    old = copy.deepcopy(model.transformer_blocks[0])
    parallel.apply(model)
    x, condition = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    normed, gate, shift, scale, last_gate = old.norm1(x, condition, None, hidden_dtype=x.dtype)
    given = old.ff(old.norm3(x) * (1 + scale[:, None]) + shift[:, None])
    expected = x + gate[:, None] * old.attn1(normed) + last_gate[:, None] * given
    found = model.transformer_blocks[0](x, timestep=condition)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_a_plain_block_of_diffusers_is_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BasicTransformerBlock(16, 2, 8)).double().eval()
    old = copy.deepcopy(model[0])
    parallel.apply(model)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = x + old.attn1(old.norm1(x)) + old.ff(old.norm3(x))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("silent", ["attention", "ffn"])
def test_where_one_layer_gives_nothing_side_by_side_is_one_after_the_other(kind: str, silent: str) -> None:
    model = MODELS[kind]()
    for name, module in model.named_modules():
        attention = name.endswith(("attn.proj", "attn1.to_out.0"))
        ffn = name.endswith(("mlp.fc2", "ff.net.2", "mlp.active_fc2", "mlp.idle_fc2"))
        if attention if silent == "attention" else ffn:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    dense, keys = copy.deepcopy(model), list(model.state_dict())
    parallel.apply(model)
    assert list(model.state_dict()) == keys
    assert torch.allclose(run(kind, model), run(kind, dense), rtol=0, atol=1e-10)


def test_a_repavit_side_by_side_merges() -> None:
    model = repavit()
    plain = run("repa", model)
    parallel.apply(model)
    beside = run("repa", model)
    assert not torch.allclose(beside, plain, atol=1e-4)
    zoo.reparameterize(model)
    assert torch.allclose(run("repa", model), beside, rtol=0, atol=1e-8)


def test_layouts_of_the_papers() -> None:
    assert par_layout(16) == "sffsfffsffsfffsffs" + "f" * 14  # 6 of 32, all within the first 21
    for depth in range(1, 20):
        word = par_layout(depth)
        assert len(word) == 2 * depth
        assert word.count("s") == max(1, 2 * depth // 5)
        assert 3 * word.rindex("s") < 2 * len(word)
    assert sandwich_layout(4, 0) == "sf" * 4
    assert sandwich_layout(4, 2) == "sssfsfff"
    with pytest.raises(ValueError, match=r"coefficient must lie in 0 \.\.\. 3 for 4 blocks, got 4"):
        sandwich_layout(4, 4)


@pytest.mark.parametrize("word", ["sfsfsf", ("s", "f") * 3])
def test_interleaved_is_the_model_itself(word: Any) -> None:
    model = scaled_vit()
    dense = copy.deepcopy(model)
    report = layout.apply(model, LayoutConfig(layout=word))
    assert report.layers == ()
    assert report.params[0] == report.params[1]
    assert torch.equal(model(X), dense(X))
    assert list(model.state_dict()) == list(dense.state_dict())
    with pytest.raises(ValueError, match="already"):
        layout.apply(model)


@pytest.mark.parametrize("word", ["sandwich", "sssfff", "fsfsfs", "fff", "ssf", "sfsfsff"])
def test_every_order_is_that_of_the_models_own_sublayers(word: str) -> None:
    model = scaled_vit()
    blocks, dense = copy.deepcopy(model.blocks), copy.deepcopy(model)
    report = layout.apply(model, LayoutConfig(layout=word, coefficient=1))
    word = sandwich_layout(3, 1) if word == "sandwich" else word
    assert "".join(layer.what for layer in report.layers) == word
    x = expected = torch.randn(2, 5, 16, dtype=torch.float64)
    done = {"s": 0, "f": 0}
    for letter in word:
        number, block = done[letter], blocks[min(done[letter], 2)]
        if letter == "s":
            expected = expected + block.ls1(block.attn(block.norm1(expected)))
        elif number < 3:
            expected = expected + block.ls2(block.mlp(block.norm2(expected)))
        else:  # new: beyond the model's own
            expected = model.blocks[-1].sublayers[-1](expected)
        done[letter] += 1
    assert torch.allclose(model.blocks(x), expected, rtol=0, atol=1e-10)
    assert len(model.blocks) == 3
    kept = {key: value for key, value in dense.state_dict().items() if not key.startswith("blocks")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_new_sublayers_are_new_and_can_be_refused() -> None:
    model = scaled_vit()
    with pytest.raises(ValueError, match=r"sfffff has 5 feed-forward sub-layers, the model 3: missing='new'"):
        layout.apply(model, LayoutConfig(missing="refuse"))
    report = layout.apply(model)
    assert [layer.what for layer in report.layers] == ["sf", "ff", "ff"]
    first, last = model.blocks[2].sublayers
    assert not torch.equal(first.layer.fc1.weight, last.layer.fc1.weight)
    assert 0.01 < float(last.layer.fc1.weight.detach().std()) < 0.03
    assert bool((last.norm.weight == 1).all())
    assert not last.layer.fc2.bias.any()
    attention, ffn = 4 * 16 * 16 + 2 * 5 * 16, 2 * 16 * 64  # 5 tokens
    assert report.macs == (3 * (attention + ffn), attention + 5 * ffn)


TECHNIQUES: dict[str, Any] = {
    "parallel": (vit, lambda model: parallel.apply(model, ParallelConfig(norm="shared"))),
    "parallel repa": (lambda: repavit().float(), parallel.apply),
    "layout": (vit, layout.apply),
    "interleaved": (vit, lambda model: layout.apply(model, LayoutConfig(layout="sfsfsf"))),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_models_run_train_and_are_rebuilt_from_plain_facts(technique: str) -> None:
    make, change = TECHNIQUES[technique]
    model, fresh = make(), make()
    change(model)
    rebuild(fresh, json.loads(json.dumps(model.ffn_changes)))
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = X.float()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()
    model.train()
    model.set_grad_checkpointing(True)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_models_and_settings_are_one_line() -> None:
    with pytest.raises(ValueError, match="norm must be one of own, shared, got 'none'"):
        ParallelConfig(norm="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"blocks\.0 is a RePaBlock, whose norms .* norm='own'"):
        parallel.apply(repavit(), ParallelConfig(norm="shared"))
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1), embed_dim=12)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0 is a SwinTransformerBlock; known are"):
        parallel.apply(swin)
    with pytest.raises(ValueError, match="SwinTransformer has no ViT blocks of timm"):
        layout.apply(swin)
    with pytest.raises(ValueError, match="no block whose name matches 'nowhere'"):
        parallel.apply(vit(), ParallelConfig(pattern="nowhere"))
    for wrong in ("sfx", "", "parr"):
        with pytest.raises(ValueError, match="layout must be par, sandwich, or letters s and f"):
            LayoutConfig(layout=wrong)
    with pytest.raises(ValueError, match="a letter for each of 3 blocks at least, got 2"):
        layout.apply(vit(), LayoutConfig(layout="sf"))
    with pytest.raises(ValueError, match="ratio must be at least 2"):
        LayoutConfig(ratio=1)
    model = vit()
    s2ft.apply(model)
    with pytest.raises(ValueError, match=r"with an Mlp: blocks\.0 has a SliceLinear"):
        macaron.apply(model)
    model = vit()
    model.blocks.append(nn.Identity())
    with pytest.raises(ValueError, match=r"one list of ViT blocks of timm alone, .* it also holds Identity"):
        layout.apply(model)


def test_work_is_counted_as_other_techniques_count_it() -> None:
    model = vit()
    made = product_key.apply(model, product_key.ProductKeyConfig(keys=6, top_k=4)).macs[1]
    attention = 4 * 16 * 16
    assert parallel.apply(copy.deepcopy(model)).macs == (made + 3 * attention,) * 2
    whole = layout.apply(model, LayoutConfig(layout="sssfff"))
    assert whole.macs == (made + 3 * (attention + 2 * 5 * 16),) * 2
    model = vit()
    made = sigma_moe.apply(model, SigmaMoEConfig(experts=4, top_k=2)).macs[1]
    assert parallel.apply(model).macs == (made + 3 * attention,) * 2


def test_a_diffusion_transformer_is_saved_side_by_side(tmp_path: Path) -> None:
    """Keys of the state dict stay, so that nothing else would tell."""
    model = build("dit")
    parallel.apply(model)
    s2ft.apply(model)
    batch = {key: value[:2] for key, value in batches("dit", 1)[0].items() if key != "target"}
    expected = model(**batch)[0]
    model.save_pretrained(tmp_path)
    for other in (type(model).from_pretrained(tmp_path), model.copy_as(torch.float32), copy.deepcopy(model)):
        assert torch.equal(other.eval()(**batch)[0], expected)
    s2ft.merge(model)
    assert [change["technique"] for change in model.config["ffn_changes"]] == ["parallel"]
