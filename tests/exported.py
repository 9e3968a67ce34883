"""Tiny models of every kind that can be exported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnxruntime
import timm
import torch
from registered import BACKBONES, RESTORERS, TINY, build, randomize, small_graph
from timm.data import create_transform
from torch import nn

from zoo.pictures.eight_bit import read_eight_bit
from zoo.record import record_of, write_config
from zoo.weights import save_checkpoint


def _denoiser() -> nn.Module:
    from zoo.diffusion import PixelDiT

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=2, num_classes=4)
    return randomize(PixelDiT(**sizes)).eval()


class MultipleOfFour(nn.Module):
    """A restorer that halves twice and doubles twice, and so wants sides that are a multiple of four."""

    scale = 1
    multiple_of = 4
    in_chans = 3

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 48, 4, stride=4)
        self.up = nn.PixelShuffle(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.up(self.down(x))


class Restorer(MultipleOfFour):
    """Three layers: the first and the last stay in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.middle, self.last = nn.Conv2d(48, 48, 1), nn.Conv2d(48, 48, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.up(self.last(self.middle(self.down(x)).relu()))


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    **{family: partial(small_graph, family) for family in (*BACKBONES, *RESTORERS)},
    "pixel_dit": _denoiser,
    "multiple_of_four": lambda: MultipleOfFour().eval(),
}
"""One model of each registered family, a denoiser, and a restorer whose sides must be a multiple of four."""


def size_of(name: str) -> int | None:
    """Return the side at which a classifier of any size is exported here; the published one would take long."""
    if name not in BACKBONES:
        return None
    model = timm.create_model(BACKBONES[name][0], device="meta")
    return None if model.pretrained_cfg["fixed_input_size"] else 64


def own_folder(family: str, folder: Path) -> Path:
    """Write the folder of a user's model: random weights, classes, size and normalisation of its own."""
    model, side = build(family, num_classes=3), size_of(family) or TINY[family].size or 224
    record = (
        record_of(model)
        .of_own_weights()
        .updated(
            label_names=("ant", "bee", "cat"), input_size=(3, side, side), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
            crop_pct=0.8, interpolation="bilinear",
        )
    )  # fmt: skip
    folder.mkdir(parents=True)
    save_checkpoint(model.state_dict(), folder / "model.safetensors", record=record)
    write_config(folder, record)
    return folder


def told_by_graph(graph: str | Path, files: Sequence[str | Path]) -> dict[str, dict[str, float]]:
    """Return the probabilities that an ONNX classifier gives pictures, which go in and come out as its metadata say."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name

    def run(image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {entry: image.numpy()})[0])

    return told(run, session.get_modelmeta().custom_metadata_map, files)


@torch.no_grad()
def told(
    run: Callable[[torch.Tensor], torch.Tensor], facts: Mapping[str, str], files: Sequence[str | Path]
) -> dict[str, dict[str, float]]:
    """Return the probabilities of each file's classes by a network and the metadata of its exported file."""
    transform = create_transform(
        tuple(json.loads(facts["input_size"])),
        mean=json.loads(facts["mean"]),
        std=json.loads(facts["std"]),
        crop_pct=float(facts["crop_pct"]),
        crop_mode=facts.get("crop_mode"),
        interpolation=facts["interpolation"],
    )
    labels, found = json.loads(facts["labels"]), {}
    for file in files:
        scores = run(transform(read_eight_bit(file))[None])[0]
        found[str(file)] = dict(zip(labels, scores.softmax(0).tolist(), strict=True))
    return found
