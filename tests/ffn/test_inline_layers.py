"""Feed-forward layers written into the forward of a block, in the habits of users: found, cut exactly, or named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_own_models import zero_what_went
from torch import Tensor, nn

from zoo.ffn import inspection, low_rank, prune, repa
from zoo.ffn.technique import ffn_layers, rebuild

DIM, HIDDEN = 8, 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Inline(nn.Module):
    """Attention and products in one block; what follows changes one habit of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.drop = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention(), nn.Dropout()
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM)
        self.build()

    def build(self) -> None:
        """Add or replace parts."""

    def ffn(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))

    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PostNorm(Inline):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm1(x + self.ffn(x))  # one norm for both


class Parallel(Inline):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.attn(h) + self.ffn(h)


class Several(Inline):
    def build(self) -> None:
        self.b1, self.b2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b2(F.silu(self.b1(x)))
        return super().forward(x)


class Reshaped(Inline):
    def build(self) -> None:
        self.hidden = HIDDEN

    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)).view(-1, self.hidden)).view(x.shape)


class Grouped(Inline):
    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)).unflatten(-1, (4, -1)).flatten(-2))


class Listed(Inline):
    def build(self) -> None:
        self.ffns = nn.ModuleList([self.fc1, self.fc2])
        del self.fc1, self.fc2

    def ffn(self, x: Tensor) -> Tensor:
        return self.ffns[1](F.relu(self.ffns[0](x)))


class Chunked(Inline):
    def ffn(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc2(F.gelu(self.fc1(part))) for part in x.split(2, 1)], 1)


class Fused(Inline):
    def build(self) -> None:
        self.fc1 = nn.Linear(DIM, 2 * HIDDEN, bias=False)

    def ffn(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Convolved(Inline):
    def build(self) -> None:
        self.fc1, self.fc2 = nn.Conv1d(DIM, HIDDEN, 1), nn.Conv1d(HIDDEN, DIM, 1)

    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


class Conditioned(Inline):
    def build(self) -> None:
        self.shift = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x) + self.shift(c)[:, None])


class MixFFN(nn.Module):
    """SegFormer's: a depthwise convolution between, which needs the height and width of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.depthwise = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803
        x = self.fc1(x).transpose(1, 2).unflatten(2, (H, W))
        return self.fc2(F.gelu(self.depthwise(x)).flatten(2).transpose(1, 2))


class Sized(Inline):
    def build(self) -> None:
        self.mlp = MixFFN()
        del self.fc1, self.fc2

    def ffn(self, x: Tensor) -> Tensor:
        return self.mlp(x, x.shape[1], 1)


class Split(Inline):
    """BERT's: hidden channels and outputs are made in modules of their own, and a tuple is returned."""

    def build(self) -> None:
        self.intermediate, self.output = nn.ModuleDict({"dense": self.fc1}), nn.ModuleDict({"dense": self.fc2})
        del self.fc1, self.fc2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        x = x + self.attn(x)
        return (self.norm1(x + self.output["dense"](F.gelu(self.intermediate["dense"](x)))),)


class Mixer(nn.Module):
    """Products over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(7, HIDDEN), nn.Linear(HIDDEN, 7)
        self.c1, self.c2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.c2(F.gelu(self.c1(x)))


class MapsToTokens(nn.Module):
    """ConvNeXt's as torchvision writes it: maps are turned inside, products are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc2(F.gelu(self.fc1(self.norm(self.depthwise(x).movedim(1, -1))))).movedim(-1, 1)
        return x + h


class Trunk(nn.Module):
    """Two blocks of a kind between products that are no layer."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, DIM), nn.Linear(DIM, 5)
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.kind is MapsToTokens:
                x = block(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
            else:
                x = block(x, x.mean(1)) if self.kind is Conditioned else block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(1))


def own(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Trunk(kind).double().eval()
    return model, torch.randn(4, 7, 3, dtype=torch.float64)


KINDS = (Inline, PostNorm, Parallel, Several, Reshaped, Grouped, Listed, Chunked, Fused, Convolved, Conditioned, Sized)


@pytest.mark.parametrize("kind", [*KINDS, Split, Mixer, MapsToTokens])
def test_layers_in_the_forward_of_a_block(kind: type[nn.Module]) -> None:
    """Cut exactly and counted exactly (float64), rebuilt from plain facts, watched; low rank where they are linear."""
    model, x = own(kind)
    dense, fresh = copy.deepcopy(model), copy.deepcopy(model)
    count = 4 if kind in (Several, Mixer) else 2
    assert len(ffn_layers(model, takes="any")) == count
    config = prune.PruneConfig(keep=0.5, scores="magnitude", compensation="none", round_to=1)
    report = prune.apply(model, config, [x])
    left = sum(p.numel() for p in model.parameters())
    assert report.params[1] == left
    assert sum(layer.params[0] - layer.params[1] for layer in report.layers) == report.params[0] - left
    zero_what_went(dense, model)
    assert torch.allclose(model(x), dense(x), atol=1e-10)
    rebuild(fresh, model.ffn_changes)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", [Several, MapsToTokens])
def test_layers_in_a_block_are_watched_and_made_thin(kind: type[nn.Module]) -> None:
    model, x = own(kind)
    before = model(x)
    assert all(layer.error > 0 for layer in inspection.inspect_ffns(model, [x], spectra=False).layers)
    assert torch.equal(model(x), before)
    low_rank.apply(model, low_rank.LowRankConfig(keep=0.99, round_to=10**6), [x])
    assert torch.allclose(model(x), before, atol=1e-9)


class Functional(Inline):
    def ffn(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.fc1.weight)), self.fc2.weight, self.fc2.bias)


class Bare(Inline):
    def build(self) -> None:
        self.w1, self.w2 = nn.Parameter(torch.randn(DIM, HIDDEN)), nn.Parameter(torch.randn(HIDDEN, DIM))
        del self.fc1, self.fc2

    def ffn(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1) @ self.w2


class Normed(Inline):
    def build(self) -> None:
        self.norm3 = nn.LayerNorm(HIDDEN)

    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm3(F.gelu(self.fc1(x))))


class Argued(Inline):
    def forward(self, x: Tensor, extra: Any) -> Tensor:
        return super().forward(x + extra.shift)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            Functional,
            r"^blocks\.0: fc1 and fc2 look like .* the forward of Functional does not call them: call the mod",
        ),
        (Bare, r"^blocks\.0: its weights w1 and w2 are parameters of Bare itself: hold them in two nn\.Linear"),
        (Normed, r"^blocks\.0: fc1 and fc2 look like .*: a norm, a softmax or a mixing of them is between"),
        (Argued, r"^blocks\.0: fc1 and fc2 look like .* Argued does not run by itself on tokens or maps"),
    ],
)
def test_what_cannot_be_cut_is_named(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prune.apply(own(kind)[0], prune.PruneConfig(), [own(kind)[1]])


def test_layers_that_cannot_be_replaced_are_named() -> None:
    with pytest.raises(ValueError, match=r"^blocks\.0: its module does more than this layer: move the layer into a"):
        repa.apply(own(Inline)[0], None, [own(Inline)[1]])


class GatedAttention(Inline):
    """A gate and a product, around what all tokens give: no layer."""

    def ffn(self, x: Tensor) -> Tensor:
        return self.attn.o(self.attn(x) * self.attn.q(x).sigmoid())


def test_gates_of_attention_are_no_layers() -> None:
    with pytest.raises(ValueError, match="fc1 and fc2 look like"):
        ffn_layers(own(GatedAttention)[0], takes="any")
