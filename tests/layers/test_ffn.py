"""RePaFFN: the branch form is the paper's mask form, and merging is exact for any size, ratio and statistics."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.bench.plain_backbones import PlainRePaFFN
from zoo.layers.ffn import RePaFFN, active_channels, convert_ffn_keys, ffn_facts, idle_ratio_of


def filled(layer: RePaFFN) -> RePaFFN:
    """Give every parameter and statistic a random value: zeros and ones would hide what is not folded."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 3.0)
    return layer


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


layers = st.tuples(st.integers(1, 12), st.integers(1, 40)).flatmap(
    lambda dims: st.tuples(st.just(dims[0]), st.just(dims[1]), st.integers(0, dims[1]))
)


@settings(max_examples=40, deadline=None)
@given(dims=layers, scale=st.sampled_from([None, 1e-5, 2.0]), seed=st.integers(0, 1000))
def test_merging_is_exact(dims: tuple[int, int, int], scale: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    dim, hidden, active = dims
    layer = filled(RePaFFN(dim, hidden, active, layer_scale=scale, dtype=torch.float64)).eval()
    x = torch.randn(2, 5, dim, dtype=torch.float64)
    expected = layer(x)
    said = layer.reparameterize()
    assert "BatchNorms" in said[0]
    assert ("layer scale" in said) == (scale is not None)
    assert relative(layer(x), expected) < 1e-12
    with torch.no_grad():  # the in-place path
        assert relative(layer(x), expected) < 1e-12
    idle = hidden - active
    products = dim * dim + 2 * active * dim if dim < 2 * idle else 2 * dim * hidden
    weights = sum(value.numel() for name, value in layer.named_parameters() if name.endswith("weight"))
    assert weights == products <= 2 * dim * hidden  # never more work than before
    assert layer.form == ("merged" if dim < 2 * idle else "folded")
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert layer.reparameterize() == ()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    built = RePaFFN(dim, hidden, active, layer_scale=scale, merged=True, dtype=torch.float64)
    built.load_state_dict(state)
    assert torch.equal(built.eval()(x), layer(x))


@settings(max_examples=15, deadline=None)
@given(dims=layers, training=st.booleans(), seed=st.integers(0, 1000))
def test_branches_equal_the_mask_form(dims: tuple[int, int, int], training: bool, seed: int) -> None:
    """Outputs, all gradients and the running statistics, in training and in evaluation."""
    torch.manual_seed(seed)
    layer = filled(RePaFFN(*dims, dtype=torch.float64)).train(training)
    plain = PlainRePaFFN(layer)
    x = torch.randn(3, 4, dims[0], dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(ours), plain(theirs)
    assert relative(out, expected) < 1e-12
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    scale = max(float(parameter.grad.abs().max()) for parameter in plain.parameters() if parameter.grad is not None)
    assert float((ours.grad - theirs.grad).abs().max()) < 1e-10 * scale

    def joined(kind: str) -> Tensor:
        parts = [getattr(layer, f"{branch}_{kind}") for branch in ("active", "idle")]
        return torch.cat([part.weight.grad for part in parts if part is not None], 1 if kind == "fc2" else 0)

    for kind, other in (("fc1", plain.fc1), ("fc2", plain.fc2), ("norm", plain.norm2)):
        assert float((joined(kind) - other.weight.grad).abs().max()) < 1e-10 * scale, kind
    means = [norm.running_mean for norm in (layer.active_norm, layer.idle_norm) if norm is not None]
    assert torch.allclose(torch.cat(means), plain.norm2.running_mean, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merging_in_the_layers_own_type(dtype: torch.dtype) -> None:
    layer = filled(RePaFFN(16, 64, 16)).to(dtype).eval()
    x = torch.randn(2, 9, 16).to(dtype)
    expected = layer(x).float()
    layer.reparameterize()
    assert layer(x).dtype == dtype
    assert relative(layer(x).float(), expected) < (1e-5 if dtype == torch.float32 else 4e-2)


@torch.no_grad()
def test_autocast_after_merging() -> None:
    layer = filled(RePaFFN(16, 64, 16)).eval()
    x = torch.randn(2, 9, 16)
    layer.reparameterize()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(layer(x).float(), layer(x)) < 2e-2


def test_gradients_flow_through_the_merged_form() -> None:
    """Fine-tuning merged weights gives the gradients of the plain expression."""
    layer = filled(RePaFFN(6, 24, 6, dtype=torch.float64)).eval()
    layer.reparameterize()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 3, 3, 8)])
def test_group_norm_is_over_channels_and_tokens(shape: tuple[int, ...]) -> None:
    layer = filled(RePaFFN(8, 16, 4, feature_norm="GroupNorm")).eval()
    x = torch.randn(shape)
    axes = tuple(range(1, x.ndim))
    normal = (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, correction=0) + 1e-5).sqrt()
    u = normal * layer.norm.weight + layer.norm.bias
    z = layer.active_fc2(nn.functional.gelu(layer.active_fc1(u))) + layer.idle_fc2(layer.idle_fc1(u))
    assert relative(layer(x), x + z) < 1e-5


@pytest.mark.parametrize("feature_norm", ["LayerNorm", "GroupNorm"])
def test_norms_that_depend_on_the_input_stay(feature_norm: str) -> None:
    layer = RePaFFN(8, 16, 4, feature_norm=feature_norm, merged=True).eval()
    keys = set(layer.state_dict())
    assert layer.reparameterize() == ()
    assert set(layer.state_dict()) == keys


def test_training_mode_is_refused() -> None:
    layer = RePaFFN(8, 32, 8)
    keys = set(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        layer.reparameterize()
    layer.eval().idle_norm.train()  # one norm alone is enough to change what the layer computes
    with pytest.raises(RuntimeError, match="training mode"):
        layer.reparameterize()
    assert set(layer.state_dict()) == keys


def test_norm_without_statistics_is_refused() -> None:
    layer = RePaFFN(8, 32, 8).eval()
    layer.idle_norm = nn.BatchNorm1d(24, track_running_stats=False).eval()
    with pytest.raises(RuntimeError, match="idle_norm"):
        layer.reparameterize()


def test_synchronised_norms_merge_too() -> None:
    layer = filled(RePaFFN(8, 32, 8)).eval()
    expected = copy.deepcopy(layer)
    expected.reparameterize()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(synchronised.idle_norm, nn.SyncBatchNorm)
    synchronised.reparameterize()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in synchronised.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [(dict(active_dim=33), "0 ... 32"), (dict(active_dim=-1), "0 ... 32"), (dict(feature_norm="RMSNorm"), "RMSNorm")],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RePaFFN(**{**dict(dim=8, hidden_dim=32, active_dim=8), **kwargs})


def test_drop_path_skips_whole_samples() -> None:
    layer = filled(RePaFFN(8, 32, 8, drop_path=0.5)).train()
    x = torch.randn(64, 3, 8)
    kept = (layer(x) != x).flatten(1)
    assert torch.equal(kept.any(1), kept.all(1))
    assert 10 < int(kept.any(1).sum()) < 54


def test_active_channels_are_exact() -> None:
    """In floating point 1000 * (1 - 0.7) is 300.00000000000006, whose ceiling is 301."""
    assert active_channels(1000, 0.7) == 300
    assert active_channels(1000, 0.7, "down") == 300
    assert active_channels(768, 0.75) == 192
    assert active_channels(768, 0.9) == 77
    assert active_channels(768, 0.9, "down") == 76
    assert active_channels(768, 1.0) == 0
    assert active_channels(10, Fraction(1, 3)) == 7
    with pytest.raises(ValueError, match=r"0 \.\.\. 1"):
        active_channels(768, 1.1)


@given(ratio=st.integers(0, 1000), hidden=st.integers(4, 4096), rounding=st.sampled_from(["up", "down"]))
def test_idle_ratio_is_recovered(ratio: int, hidden: int, rounding: str) -> None:
    dims = [(width, active_channels(width, ratio / 1000, rounding)) for width in (hidden, 2 * hidden)]
    found = idle_ratio_of(dims, rounding)
    assert found is not None
    assert [active_channels(width, found, rounding) for width, _ in dims] == [active for _, active in dims]


def test_no_single_idle_ratio() -> None:
    assert idle_ratio_of([(768, 192), (768, 384)]) is None


def authors(plain: PlainRePaFFN, *, conv: bool = False) -> dict[str, Tensor]:
    """Return the plain form's weights under the authors' keys."""
    state = dict(plain.state_dict())
    if conv:
        state = {key: value[:, :, None, None] if value.ndim == 2 else value for key, value in state.items()}
    return {f"ffn.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("active", [0, 8, 32])
@pytest.mark.parametrize("conv", [False, True])
def test_authors_keys(active: int, conv: bool) -> None:
    source = filled(RePaFFN(8, 32, active, dtype=torch.float64)).eval()
    state = authors(PlainRePaFFN(source), conv=conv)
    target = nn.ModuleDict({"ffn": RePaFFN(8, 32, active, dtype=torch.float64)}).eval()
    converted = convert_ffn_keys(state, target)
    target.load_state_dict(converted)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert relative(target["ffn"](x), source(x)) < 1e-12
    again = convert_ffn_keys(converted, target)
    assert again.keys() == converted.keys()
    assert all(torch.equal(again[key], value) for key, value in converted.items())
    inference = nn.ModuleDict({"ffn": RePaFFN(8, 32, active, merged=True, dtype=torch.float64)}).eval()
    inference.load_state_dict(convert_ffn_keys(state, inference))  # trained weights, merged on the way
    assert relative(inference["ffn"](x), source(x)) < 1e-12


@pytest.mark.parametrize("active", [0, 8])
def test_authors_merged_keys(active: int) -> None:
    source = filled(RePaFFN(8, 32, active)).eval()
    source.reparameterize()
    own = source.state_dict()
    names = {"fc1": "linear", "fc2": "active_fc1", "fc3": "active_fc2"}
    state = {
        f"{theirs}.{leaf}": own[f"{ours}.{leaf}"]
        for theirs, ours in names.items()
        for leaf in ("weight", "bias")
        if f"{ours}.{leaf}" in own
    }
    facts = ffn_facts(state, "")
    assert facts is not None
    assert (facts.merged, facts.active_dim) == (True, active)
    target = RePaFFN(8, 32, active, merged=True).eval()
    target.load_state_dict(convert_ffn_keys(state, target))
    x = torch.randn(2, 3, 8)
    assert torch.equal(target(x), source(x))
    with pytest.raises(ValueError, match="merged=True"):
        convert_ffn_keys(state, RePaFFN(8, 32, active))


def test_authors_merge_where_nothing_is_idle() -> None:
    """Their linear heuristic merges the last layer too: an identity matrix, that is, our folded form."""
    source = filled(RePaFFN(8, 32, 32)).eval()
    source.reparameterize()
    own = source.state_dict()
    state = {"fc1.weight": torch.eye(8), "fc1.bias": own["active_fc2.bias"], "fc3.weight": own["active_fc2.weight"]}
    state |= {"fc2.weight": own["active_fc1.weight"], "fc2.bias": own["active_fc1.bias"]}
    target = RePaFFN(8, 32, 32, merged=True).eval()
    target.load_state_dict(convert_ffn_keys(state, target))
    x = torch.randn(2, 3, 8)
    assert torch.equal(target(x), source(x))


def test_facts() -> None:
    own = RePaFFN(8, 32, 8)
    facts = ffn_facts({f"a.{key}": value for key, value in own.state_dict().items()}, "a.")
    assert facts is not None
    assert (facts.merged, facts.feature_norm, facts.active_dim) == (False, "BatchNorm", 8)
    facts = ffn_facts(authors(PlainRePaFFN(own)), "ffn.")
    assert facts is not None
    assert (facts.merged, facts.active_dim) == (False, None)
    facts = ffn_facts(RePaFFN(8, 32, 32, feature_norm="LayerNorm").state_dict(), "")
    assert facts is not None
    assert (facts.merged, facts.feature_norm) == (False, "LayerNorm")
    assert ffn_facts({"conv.weight": torch.zeros(1)}, "") is None


def test_plain_form_needs_a_training_layer() -> None:
    with pytest.raises(ValueError, match="training form"):
        PlainRePaFFN(RePaFFN(8, 32, 8, merged=True))


@pytest.mark.parametrize(
    ("hidden", "active", "collapses"), [(12, 8, False), (12, 7, True), (12, 9, False), (4, 0, False), (5, 0, True)]
)
def test_a_branch_that_costs_the_same_is_kept(hidden: int, active: int, collapses: bool) -> None:
    """Width 8: four idle channels cost 2 x 8 x 4 multiplications, as a matrix of 8 x 8 does; then nothing is merged."""
    layer = RePaFFN(8, hidden, active).eval()
    assert layer.collapses is collapses
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        layer.reparameterize()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer.form == ("merged" if collapses else "folded")
    assert (layer.linear is not None) is collapses
    other = RePaFFN(8, hidden, active, merged=True)
    assert other.form == layer.form
    assert other.state_dict().keys() == layer.state_dict().keys()
