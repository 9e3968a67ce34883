"""Feed-forward layers of classes that nobody listed: what is found, what is cut exactly, what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import vit
from timm.layers import BatchNormAct2d, ConvMlp, GlobalResponseNormMlp, Mlp, RelPosMlp
from timm.models.metaformer import StarReLU
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from zoo.ffn import depth, inspection, low_rank, matformer, prune, repa, spectrum
from zoo.ffn.compressing import compress, recover, resized
from zoo.ffn.technique import MOST_SAMPLES, every_layer, ffn_layers, listed, rebuild
from zoo.layers.conv_norm import ConvNorm

DIM, HIDDEN = 8, 24


class Functional(nn.Module):
    """Two products, an activation that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.mish(self.w1(x)))


class Gated(nn.Module):
    """Gate first, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Packed(nn.Module):
    """One product for gates and values, as DINOv2's."""

    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 2 * HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Residual(nn.Module):
    """Norm, residual and layer scale inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.scale = nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Inverted(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions with BatchNorm, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle = ConvNorm(DIM, HIDDEN), ConvNorm(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.down = ConvNorm(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.middle(F.relu(self.up(x)))))


class GatedMaps(nn.Module):
    """Packed 1x1 convolution and depthwise one, whose halves gate each other, as Restormer's."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(DIM, 2 * HIDDEN, 1)
        self.dwconv = nn.Conv2d(2 * HIDDEN, 2 * HIDDEN, 3, padding=1, groups=2 * HIDDEN)
        self.project_out = nn.Conv2d(HIDDEN, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(a) * b)


def _sequential(*before: nn.Module) -> nn.Module:
    return nn.Sequential(*before, nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, DIM))


TOKENS: dict[str, Callable[[], nn.Module]] = {
    "functional": Functional,
    "gated": Gated,
    "packed": Packed,
    "residual": Residual,
    "sequential": _sequential,
    "norm in front": lambda: _sequential(nn.LayerNorm(DIM)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(DIM, 2, HIDDEN, activation="gelu", batch_first=True),
    "timm, Mish": lambda: Mlp(DIM, HIDDEN, act_layer=nn.Mish),
    "timm, StarReLU": lambda: Mlp(DIM, HIDDEN, act_layer=StarReLU),  # one scale for all channels
}
MAPS: dict[str, Callable[[], nn.Module]] = {
    "norm with activation": lambda: nn.Sequential(
        nn.Conv2d(DIM, HIDDEN, 1), BatchNormAct2d(HIDDEN, act_layer=nn.SiLU), nn.Conv2d(HIDDEN, DIM, 1)
    ),
    "inverted": Inverted,
    "gated maps": GatedMaps,
    "timm, PReLU": lambda: Mlp(DIM, HIDDEN, act_layer=lambda: nn.PReLU(HIDDEN), use_conv=True),
    "timm, maps": lambda: Mlp(DIM, HIDDEN, use_conv=True),
    "timm, ConvMlp with a norm": lambda: ConvMlp(DIM, HIDDEN, norm_layer=nn.BatchNorm2d),
}
WHOLE = (
    "functional",
    "gated",
    "packed",
    "sequential",
    "timm, Mish",
    "timm, StarReLU",
    "gated maps",
    "norm with activation",
    *(k for k in MAPS if "timm" in k),
)


class Trunk(nn.Module):
    """Two layers of a kind, one after the other, between products that are none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.maps = kind in MAPS
        make = (MAPS if self.maps else TOKENS)[kind]
        self.stem = nn.Conv2d(3, DIM, 1) if self.maps else nn.Linear(3, DIM)
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean((2, 3)) if self.maps else x.mean(1))


def own(kind: str) -> tuple[nn.Module, list[Tensor]]:
    """Return a model in float64 with weights that matter, and data for it."""
    torch.manual_seed(0)
    model = Trunk(kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shape = (4, 3, 5, 6) if model.maps else (4, 7, 3)
    return model, [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


def run(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return model(x)


def zero_what_went(dense: nn.Module, pruned: nn.Module) -> None:
    """Zero the columns of the channels that the pruned model lacks."""
    small = ffn_layers(pruned, takes="any")
    for name, ffn in ffn_layers(dense, takes="any").items():
        up, rows = ffn.channels().up, small[name].channels().up
        stays = (up[:, :, None] == rows[:, None]).all(-1).all(0).any(1)
        ffn.write_down(ffn.channels().down * stays)


@pytest.mark.parametrize("kind", [*TOKENS, *MAPS])
def test_cutting_channels_is_zeroing_them(kind: str) -> None:
    """Found in every place, cut exactly, counted exactly, rebuilt from plain facts (float64)."""
    model, data = own(kind)
    dense = copy.deepcopy(model)
    assert len(ffn_layers(model, takes="any")) == 2
    params = sum(p.numel() for p in model.parameters())
    config = prune.PruneConfig(keep=0.5, scores="magnitude", compensation="none", round_to=1)
    report = prune.apply(model, config, data)
    changed = run(model, data[0]) - run(dense, data[0])
    left = sum(p.numel() for p in model.parameters())
    assert report.params == (params, left)
    assert sum(a.params[1] - a.params[0] for a in report.layers) == left - params
    assert report.macs[1] == pytest.approx(report.macs[0] / 2)
    fresh = copy.deepcopy(dense)
    zero_what_went(dense, model)
    assert torch.allclose(run(model, data[0]), run(dense, data[0]), atol=1e-10)
    assert report.error == pytest.approx(float(changed.norm() / (run(model, data[0]) - changed).norm()), rel=0.5)
    rebuild(fresh, model.ffn_changes)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, data[0]), run(model, data[0]))
    third = prune.PruneConfig(keep=DIM / HIDDEN, scores="magnitude", compensation="none", round_to=1)
    prune.apply(dense, third, data)
    assert len(ffn_layers(dense, takes="any")) == 2  # as many hidden channels as others are no other layer


@pytest.mark.parametrize("kind", [*TOKENS, *MAPS])
def test_dead_channels_go_and_all_scores_find_them(kind: str) -> None:
    """Least squares on what stays gives the dense output where the rest adds nothing."""
    model, data = own(kind)
    for ffn in ffn_layers(model, takes="any").values():
        down = ffn.channels().down.clone()
        down[:, ::2] = 0
        ffn.write_down(down)
    before = run(model, data[0])
    pairs = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in data]
    report = prune.apply(model, prune.PruneConfig(keep=0.5, scores="obs", round_to=1), pairs)
    assert report.error < 1e-10
    assert torch.allclose(run(model, data[0]), before, atol=1e-10)


@pytest.mark.parametrize("kind", [*TOKENS, *MAPS])
def test_layers_are_watched_and_left_out(kind: str) -> None:
    """An inspection leaves out what the layer adds, and a spectrum is of its hidden channels."""
    model, data = own(kind)
    facts = inspection.inspect_ffns(model, data)
    assert [layer.hidden_dim for layer in facts.layers] == [HIDDEN, HIDDEN]
    silent = copy.deepcopy(model)
    ffn = next(iter(ffn_layers(silent, takes="any").values()))
    scale = nn.Parameter(torch.zeros_like(ffn.down.weight))
    ffn.down.weight = scale
    if ffn.down.bias is not None:
        nn.init.zeros_(ffn.down.bias)
    change = torch.cat([run(silent, x) - run(model, x) for x in data])
    assert facts.layers[0].error == pytest.approx(
        float(change.norm() / torch.cat([run(model, x) for x in data]).norm()), rel=1e-6
    )
    assert spectrum.spectrum(model, data)


@pytest.mark.parametrize("kind", [*TOKENS, *MAPS])
def test_layers_are_removed_where_the_module_is_nothing_else(kind: str) -> None:
    model, data = own(kind)
    if kind in WHOLE:
        assert depth.apply(model, depth.DepthConfig(remove=1), data).layers
    else:
        with pytest.raises(ValueError, match="no ffn layer that can go"):
            depth.apply(model, depth.DepthConfig(remove=1), data)


@pytest.mark.parametrize("kind", [*TOKENS, *MAPS])
def test_other_techniques_work_or_name_the_layer(kind: str) -> None:
    """Products between tokens become thin and nested; maps, and what is between, are refused by name."""
    for apply, config in (
        (low_rank.apply, low_rank.LowRankConfig(keep=0.99, round_to=10**6)),
        (matformer.apply, matformer.MatFormerConfig(scores="random")),
    ):
        model, data = own(kind)
        before = run(model, data[0])
        if kind in MAPS or kind == "encoder layer":
            with pytest.raises(ValueError, match=r"^layers\.0.*(its products are convolutions|reads the weights)"):
                apply(model, config, data)
        else:
            apply(model, config, data)
        assert torch.allclose(run(model, data[0]), before, atol=1e-9)


@pytest.mark.parametrize("kind", ["sequential", "gated", "packed"])
def test_gates_and_activations_are_told(kind: str) -> None:
    ffn = next(iter(ffn_layers(own(kind)[0]).values()))
    assert ffn.activation == ("gelu" if kind == "sequential" else "silu")
    assert ffn.packed == ("gate first" if kind == "packed" else None)
    assert ffn.gate is None or ffn.gate.weight.shape == (HIDDEN, DIM)
    if kind == "gated":
        model = own(kind)[0]
        assert next(iter(ffn_layers(model).values())).gate is model.layers[0].gate_proj


def test_dead_channels_of_a_response_norm_go() -> None:
    """The mean over channels has fewer terms, and its weight makes up for them."""
    torch.manual_seed(0)
    for maps in (False, True):
        model = nn.Sequential(GlobalResponseNormMlp(DIM, HIDDEN, use_conv=maps)).double().eval()
        x = torch.randn(2, DIM, 4, 5, dtype=torch.float64) if maps else torch.randn(2, 4, 5, DIM, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            for parameter in (model[0].fc1.weight, model[0].fc1.bias, model[0].grn.bias):
                parameter[::2] = 0
        before = run(model, x)
        config = prune.PruneConfig(keep=0.5, compensation="none", scores="activation", round_to=1)
        assert prune.apply(model, config, [x]).error < 1e-5
        assert torch.allclose(run(model, x), before, rtol=1e-5, atol=1e-5)


class SqueezeExcite(nn.Module):
    """Scales maps by a gate of their means: no feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(DIM, HIDDEN, 1), nn.Conv2d(HIDDEN, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Attention(nn.Module):
    """Query and output products: no feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Normed(nn.Module):
    """A norm over all hidden channels, which are no one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(DIM, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


@pytest.mark.parametrize(
    "layer",
    [
        SqueezeExcite(),
        Attention(),
        Normed(),
        nn.Sequential(nn.Linear(DIM, 4), nn.Linear(4, DIM)),  # of low rank
        nn.ModuleDict({"time_embedder": nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM))}),
        nn.Sequential(nn.Linear(DIM, 32), nn.SiLU(), nn.Linear(32, 32)),  # as many as it is given go on
        RelPosMlp((2, 2), 1, 8),
        nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Softmax(-1), nn.Linear(HIDDEN, DIM)),
        nn.ModuleList([nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_feed_forward_layer(layer: nn.Module) -> None:
    assert every_layer(nn.ModuleDict({"layer": layer, "other": nn.Linear(3, 3)}))[0] == {}


def test_a_norm_over_the_hidden_channels_is_named() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.0\.mlp: SwiGLU has a norm between"):
        prune.apply(timm.create_model("eva02_tiny_patch14_224", depth=1, swiglu_mlp=True, scale_mlp=True))


def test_one_module_in_two_blocks_changes_in_both() -> None:
    """Also where it is replaced, and where it is removed."""
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    for technique, config in ((prune, None), (low_rank, None), (repa, None), (depth, depth.DepthConfig(remove=1))):
        model = vit()
        model.blocks[2].mlp = model.blocks[0].mlp
        technique.apply(model, config, data)
        assert model.blocks[2].mlp is model.blocks[0].mlp
        fresh = vit()
        fresh.blocks[2].mlp = fresh.blocks[0].mlp
        rebuild(fresh, model.ffn_changes)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(run(fresh, data[0]), run(model, data[0]))


def test_weights_that_are_not_the_layers_own_are_refused() -> None:
    """Tied to another layer, computed from others, or held in another form: nothing changes."""

    def tied(model: Any) -> None:
        model.blocks[2].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight

    def shared(model: Any) -> None:
        model.blocks[2].mlp.fc1 = model.blocks[0].mlp.fc1

    def normed(model: Any) -> None:
        torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)

    def masked(model: Any) -> None:
        l1_unstructured(model.blocks[0].mlp.fc2, "weight", 0.5)

    for spoil, said in (
        (tied, r"blocks\.0\.mlp shares a weight with blocks\.2\.mlp"),
        (shared, r"blocks\.2\.mlp shares a weight with blocks\.0\.mlp"),
        (normed, r"blocks\.0\.mlp: a weight is computed from others"),
        (masked, r"blocks\.0\.mlp: a weight is computed from others"),
    ):
        model = vit()
        spoil(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            prune.apply(model, prune.PruneConfig(), [torch.randn(4, 3, 16, 16)])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Runtime:
    """Stands in for the forward of a model, as `zoo.engines` does."""

    is_engine = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 5)


@pytest.mark.parametrize("scores", ["activation", "taylor"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "engine"])
def test_calibration_sees_the_layers_of_compiled_models(how: str, scores: prune.PruneScores) -> None:
    """Hooks are unseen by compiled programs and other runtimes, which have no gradients either."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5) for _ in range(2)]
    config = prune.PruneConfig(scores=scores)
    expected, model = vit(), vit()
    report = prune.apply(expected, config, data)
    given: nn.Module = model
    if how == "wrapped":
        given = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = Runtime()
    if how != "engine":
        run(given, data[0][0])
    found = prune.apply(given, config, data)
    assert found.error == pytest.approx(report.error)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs)
    assert model.ffn_changes == expected.ffn_changes
    assert isinstance(model.forward, Runtime) == (how == "engine")
    if how == "wrapped":
        assert torch.allclose(run(given, data[0][0]), run(expected, data[0][0]))


def test_a_layer_that_never_runs_is_named() -> None:
    model = vit()
    model.spare = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with pytest.raises(ValueError, match=r"^spare does not run on the data"):
        prune.apply(model, prune.PruneConfig(), [torch.randn(4, 3, 16, 16)])


def test_batches_by_name() -> None:
    """Arguments of the model, labels aside; names that it lacks are said."""
    model = vit()
    x = torch.randn(4, 3, 16, 16)
    assert prune.apply(model, prune.PruneConfig(), [{"x": x, "labels": torch.zeros(4)}]).error is not None
    with pytest.raises(ValueError, match=r"A batch has 'image', 'label', and VisionTransformer takes \(x"):
        prune.apply(vit(), prune.PruneConfig(), [{"image": x, "label": torch.zeros(4)}])


def test_all_maps_of_a_backbone_count() -> None:
    """The error on the data is of every map that features_only gives, not of the first."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", features_only=True, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before = torch.cat([part.flatten() for part in run(model, x)])
    report = prune.apply(model, prune.PruneConfig(keep=0.5, scores="magnitude", compensation="none"), [x])
    after = torch.cat([part.flatten() for part in run(model, x)])
    assert report.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert len(report.layers) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_are_found_whatever_type_new_tensors_have(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert len(ffn_layers(Trunk("inverted"), takes="any")) == 2
    finally:
        torch.set_default_dtype(before)


def test_sizes_for_a_budget_are_of_layers_of_all_kinds() -> None:
    """What depth can remove are whole layers, of maps too."""
    assert resized(depth.DepthConfig(), 0.5, own("timm, maps")[0]).remove == 1


def test_facts_are_of_the_model_inside_an_adapters_wrapper() -> None:
    """Adapters on attention stay out of the way, and go with their wrapper; what was changed is known afterwards."""
    peft = pytest.importorskip("peft")
    model, fresh = vit(), vit()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    x = torch.randn(4, 3, 16, 16)
    prune.apply(wrapped, prune.PruneConfig(), [x])
    merged = wrapped.merge_and_unload()
    rebuild(fresh, merged.ffn_changes)
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(run(fresh, x), run(merged, x))


class Labelled(nn.Module):
    """Makes a loss of labels, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Functional(), nn.Linear(DIM, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.layer(x).mean(1))
        found = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**found, "logits": logits}


def test_models_that_make_a_loss_of_labels() -> None:
    """Taylor scores are of that loss, and the error is of the logits."""
    batch = {"x": torch.randn(4, 5, DIM), "labels": torch.tensor([0, 1, 2, 0])}
    report = prune.apply(Labelled(), prune.PruneConfig(scores="taylor"), [batch])
    assert report.error is not None
    assert 0 < report.error < 1


def test_data_and_weights_that_nothing_can_be_measured_on() -> None:
    """Without end, not finite, on the meta device, frozen: a stop, or one line."""
    x = torch.randn(8, 3, 16, 16)
    assert len(listed(itertools.repeat(x), "A test")) == MOST_SAMPLES // 8
    for technique in (prune, low_rank, repa):
        model = vit()
        with pytest.raises(ValueError, match=r"^blocks\.0\.mlp.* gives values on the data that are not finite"):
            technique.apply(model, None, [x * torch.nan])
        assert not hasattr(model, "ffn_changes")
    with pytest.raises(ValueError, match="on the meta device"):
        compress(vit().to("meta"), "prune", [x])
    with pytest.raises(ValueError, match="is frozen"):
        recover(vit().requires_grad_(False), vit(), [x])
