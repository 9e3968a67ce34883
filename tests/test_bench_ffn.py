"""`zoo bench ffn`: a small classifier through the whole path, what it says about data, and its goals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoisers import pixel_dit
from diffusers import DDIMScheduler
from PIL import Image
from tiny_folders import denoiser_folder

import zoo
from tests.image_sets import image_folder
from zoo.bench import Entry, Settings, ffn_subjects
from zoo.bench.ffn import TECHNIQUES, TORCH_PRUNING, _to_recover, _told_apart, ffn, goals
from zoo.bench.ffn_subjects import DENSE, LEFT, ClassifierSubject, heading
from zoo.cards import Metric
from zoo.cards.own import write_own_model
from zoo.cli import main
from zoo.data.images import images_for
from zoo.diffusion import PixelDiTPipeline
from zoo.record import attach, record_of

TOP1, RECOVERED = (heading(ffn_subjects.TOP1, when) for when in ("right away", "recovered"))
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 2}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ViT of the user's own, a smaller one beside it, and pictures."""
    place = tmp_path_factory.mktemp("own")
    for name, ratio in (("mine", 4), ("smaller", 2)):
        torch.manual_seed(0)
        model = zoo.create_model("vit_tiny_patch16_224", mlp_ratio=ratio, **SMALL).eval()
        record = record_of(model).of_own_weights().updated(label_names=("circle", "square"), crop_pct=1.0)
        metric = Metric(name="Top-1 accuracy", value=50.0, unit="%", dataset="shapes", protocol="made in a test")
        write_own_model(place / name, model, record, metrics=[metric], training="Not trained.")
    image_folder(place / "data", 12, 6, size=16)
    return place


def test_a_small_classifier_through_the_whole_path(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every technique has a line at its budget, the best are recovered, rivals stand beside, a plot is drawn."""
    pytest.importorskip("torch_pruning")
    call = ["bench", "ffn", "--model", str(own / "mine"), "--data", str(own / "data"), "--rival", str(own / "smaller")]
    call += ["--budgets", "0.5", "--samples", "16", "--count", "8", "--batch", "2", "--rounds", "1", "--recover", "1"]
    assert main([*call, "--json", "-o", str(tmp_path)]) in (0, 1)  # goals are for trained weights
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    lines = {entry["name"]: entry["values"] for entry in found["entries"]}
    assert list(lines) == [DENSE, *(f"{name}, 0.5" for name in TECHNIQUES), str(own / "smaller")]
    assert all(0 <= values[TOP1] <= 100 for values in lines.values())
    left = {name.removesuffix(", 0.5"): values[LEFT] for name, values in lines.items() if LEFT in values}
    assert left.pop(DENSE) == 100
    widths = {name: value for name, value in left.items() if name.startswith(("prune", TORCH_PRUNING, "RePa", "depth"))}
    assert widths == pytest.approx(dict.fromkeys(widths, 50), abs=3)
    assert all(
        value <= 50 for name, value in left.items() if name not in widths
    )  # ranks and features are whole numbers
    recovered = [name for name, values in lines.items() if RECOVERED in values]
    assert len(recovered) == 4
    assert sum(name.startswith(TORCH_PRUNING) for name in recovered) == 1
    assert found["conditions"]["validation images"] == 8
    assert len(found["goals"]) == 2
    assert (tmp_path / "ffn.png").read_bytes()[:4] == b"\x89PNG"
    assert "Smaller feed-forward layers" in (tmp_path / "ffn.md").read_text(encoding="utf-8")


def test_random_weights_give_times_only() -> None:
    settings = Settings(batch=2, rounds=1, warmup=0, threads=1)
    (found,) = ffn(settings, model="vit_tiny_patch16_224", model_args=SMALL, techniques=["RePa"], budgets=[0.5, 0.05])
    assert [entry.name for entry in found.entries] == [DENSE, "RePa, 0.5"]
    assert not any(TOP1 in entry.values for entry in found.entries)
    assert "The weights are random: times only." in found.notes
    assert any("Not measured: RePa at 0.05. RePa cannot keep 0.05" in note for note in found.notes)
    assert found.goals == ()


def test_checkpoints_of_one_name_are_told_apart_in_the_plot() -> None:
    def named(*names: str) -> list[str]:
        entries: Any = [SimpleNamespace(name=name) for name in names]
        return [_told_apart(name, entries) for name in names]

    assert named("runs/a/checkpoints/last.ckpt", "runs/b/checkpoints/last.ckpt") == ["a", "b"]
    assert named("runs/a/checkpoints/last.ckpt") == ["last.ckpt"]
    assert named("smaller", "zoo/lsnet_t.mine") == ["smaller", "zoo/lsnet_t.mine"]


def test_engine_beside_eager(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    settings = Settings(batch=2, rounds=1, warmup=0, threads=1)
    asked: dict[str, Any] = dict(model="vit_tiny_patch16_224", model_args=SMALL, techniques=["RePa"], budgets=[0.5])
    (found,) = ffn(settings, engine="onnxruntime", **asked)
    for entry in found.entries:
        assert entry.values["on onnxruntime (ms)"] > 0
        assert entry.values["one image on onnxruntime (ms)"] > 0
    assert found.entries[1].values["one image on onnxruntime, times as fast"] > 0
    with pytest.raises(ValueError, match=r"Did you mean onnxruntime\?"):
        ffn(settings, engine="onxruntime", **asked)
    with pytest.raises(ValueError, match="runs float32 on the CPU, not bfloat16 on cpu"):
        ffn(replace(settings, dtype="bfloat16"), engine="onnxruntime", **asked)
    assert main(["bench", "ffn", "--model", str(own / "mine"), "--engine", "openvino,onnxruntime"]) == 2
    assert "--engine takes one name for ffn, beside eager, got openvino,onnxruntime" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small pipeline of the classes of CIFAR-10."""
    folder = tmp_path_factory.mktemp("pipeline")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    model = pixel_dit(num_classes=10, sample_size=32, patch_size=8)
    PixelDiTPipeline(model, DDIMScheduler(), id2label=dict(enumerate(names))).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("known", [True, False])
def test_a_denoiser_through_the_whole_path(
    known: bool, pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is judged by its images: beside the dense model's of the same noise, and real ones where these are known."""
    pytest.importorskip("torch_pruning")
    made = pipeline if known else str(denoiser_folder(tmp_path / "own"))
    names = [
        "prune, Taylor",
        "prune, no compensation",
        "depth",
        f"{TORCH_PRUNING}, magnitude",
        f"{TORCH_PRUNING}, Taylor",
    ]
    call = ["bench", "ffn", "--model", made, "--techniques", "; ".join(names), "--budgets", "0.5", "--samples", "8"]
    assert main([*call, "--count", "4", "--batch", "4", "--rounds", "1", "--json", "-o", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["benchmarks"]
    lines = {entry["name"]: entry["values"] for entry in found["entries"]}
    assert list(lines) == [DENSE, *(f"{name}, 0.5" for name in names)]
    assert all(("FID-C right away" in values) == known for values in lines.values())
    assert ["PSNR right away (dB)" in values for values in lines.values()] == [False, *[True] * len(names)]
    assert [values[LEFT] for values in lines.values()] == pytest.approx([100, 50, 50, 33, 50, 50], abs=2)
    assert found["conditions"]["images made"] == 4
    assert (tmp_path / "ffn.png").read_bytes()[:4] == b"\x89PNG"


def test_a_denoiser_recovers_on_images_of_its_classes(tmp_path: Path) -> None:
    folder = denoiser_folder(tmp_path / "own")
    for place, name in enumerate(("cat", "dog", "ship", "truck")):
        for split in ("train", "val"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (60 * place, 90 * number, 0)).save(
                    tmp_path / "data" / split / name / f"{number}.png"
                )
    settings = Settings(batch=2, rounds=1, warmup=0, threads=1, count=4)
    (found,) = ffn(settings, model=str(folder), data=tmp_path / "data", techniques=["prune, random"], budgets=[0.5],
                   recovery=40)  # fmt: skip
    values = found.entries[1].values
    assert values["PSNR recovered (dB)"] > values["PSNR right away (dB)"] + 0.5


def test_recovered_are_those_that_lost_most() -> None:
    """At the smallest budget, one of each kind: three of ours, and the rival."""
    made = [
        SimpleNamespace(series=series, budget=budget, values={TOP1: top1 * budget})
        for series, top1 in (
            ("prune, activation", 90.0), ("prune, Taylor", 80.0), ("RePa", 70.0), ("low rank, whitened", 60.0),
            ("depth", 50.0), (f"{TORCH_PRUNING}, Taylor", 40.0), ("plain SVD", 99.0),
        )
        for budget in (0.5, 0.2)
    ]  # fmt: skip
    chosen: Any = _to_recover(made, ClassifierSubject)  # type: ignore[arg-type]
    assert {each.budget for each in chosen} == {0.2}
    kinds = ["prune, activation", "RePa", "low rank, whitened", f"{TORCH_PRUNING}, Taylor"]
    assert [each.series for each in chosen] == kinds


def test_goals_compare_the_best_at_half_of_the_work() -> None:
    def entry(name: str, top1: float, recovered: float | None = None) -> Entry:
        return Entry(name=name, values={TOP1: top1} | ({} if recovered is None else {RECOVERED: recovered}))

    entries = [
        entry(DENSE, 80),
        entry("prune, activation, 0.5", 70, 78),
        entry("prune, CFSP, 0.5", 71),
        entry("prune, CFSP, 0.75", 79),
        entry("RePa, 0.5", 75, 79),
        entry(f"{TORCH_PRUNING}, Taylor, 0.5", 60),
        entry(f"{TORCH_PRUNING}, magnitude, 0.5", 40),
    ]
    above, below = goals(entries)
    assert (above.value, above.reached) == (11, True)
    assert above.what.startswith(f"prune, CFSP, 0.5: points of top-1 above {TORCH_PRUNING}, Taylor, 0.5")
    assert (below.value, below.reached) == (2, False)
    assert below.what.endswith("below dense, recovered")
    (alone,) = goals([entries[0], entries[2]])
    assert (alone.value, alone.what) == (9, "prune, CFSP, 0.5: points of top-1 below dense, right away")
    assert goals(entries[:1]) == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ffn"], "needs a classifier and labelled images: --model"),
        (["ffn", "--model", "MINE"], "is measured on labelled images: --data DIR"),
        (["ffn", "--model", "MINE", "--data", "no"], "--data names no folder: no"),
        (["ffn", "--model", "MINE", "--data", "DATA", "--techniques", "prune, CFPS"], "Did you mean 'prune, CFSP'?"),
        (["ffn", "--model", "MINE", "--data", "DATA", "--budgets", "half"], "--budgets takes shares such as 0.75,0.5"),
        (["ffn", "--model", "MINE", "--data", "DATA", "--budgets", "1.5"], "A budget is a share"),
        (["ffn", "--model", "pixeldit.cifar10", "--recover", "1"], "Recovery of pixeldit.cifar10 learns from images"),
        (
            ["ffn", "--model", "PIPE", "--data", "DATA"],
            "has the classes 'circle', 'square', which are none of the known ones, 'airplane'",
        ),
        (["cfsr", "--budgets", "0.5"], "--budgets is for `zoo bench ffn`"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], said: str, own: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PIPE": pipeline, "MINE": str(own / "mine"), "DATA": str(own / "data")}
    assert main(["bench", *(places.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_rival_with_its_classes_in_another_order(own: Path) -> None:
    mine = zoo.create_model(str(own / "mine")).eval()
    rival = zoo.create_model(str(own / "mine")).eval()
    head = rival.get_classifier()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.flip(0))
    attach(rival, record_of(mine).updated(label_names=("square", "circle")))
    subject = object.__new__(ffn_subjects.ClassifierSubject)
    subject.images = images_for(mine, str(own / "data"), 4)
    subject.seen, subject.validation = 12, list(subject.images.val_dataloader())
    assert subject.judged(rival) == subject.judged(mine) != {ffn_subjects.TOP1: 0.0}
