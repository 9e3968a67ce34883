"""`zoo generate` on saved pipelines of every kind: prompts, classes, pictures, videos; one line for what is wrong."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipeline_folders import PIPELINES, saved
from torch import nn

import zoo
from zoo.caching.saved import SavedSetting, fingerprint
from zoo.cli import main, showing
from zoo.cli.pipelines import Plan, add_request, check_request, plan_calls
from zoo.cli.showing import plan_target
from zoo.diffusion import DiTPipeline
from zoo.loading import CheckpointError

Captured = pytest.CaptureFixture[str]
SIZE = ("--height", "16", "--width", "16")
OPTIONS = {
    "dit": ["--classes", "tabby,2"],
    "flux": ["--prompt", "a cat", *SIZE],
    "flux_image": ["--prompt", "a cat", *SIZE, "--image", "red.png", "--pipeline-args", "strength=0.7"],
    "sd3": ["--prompt", "a cat", "--negative-prompt", "a dog", *SIZE],
    "pixart": ["--prompt", "a cat", *SIZE, "--pipeline-args", "use_resolution_binning=False"],
    "sd": ["--prompt", "a cat", "--negative-prompt", "a dog", *SIZE],
    "wan": ["--prompt", "a cat", *SIZE, "--frames", "5"],
    "wan_image": ["--prompt", "a cat", *SIZE, "--frames", "5", "--image", "red.png"],
    "qwen": ["--prompt", "a cat", *SIZE, "--guidance", "4"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the folder of a pipeline, written when it is first asked for."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda kind: str(root / kind) if (root / kind).exists() else saved(kind, root / kind)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a picture, and no terminal or graphics card."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save("red.png")
    return tmp_path


def run(capsys: Captured, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*argv, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_pipeline(capsys: Captured, folder: Callable[[str], str], here: Path, kind: str) -> None:
    """Pictures and videos are written as asked for, and nothing else is printed."""
    output = "out.mp4" if kind.startswith("wan") else "out.png"
    code, out, err = run(capsys, "generate", folder(kind), *OPTIONS[kind], "--steps", "2", "-o", output, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["size"] == [16, 16]
    if kind.startswith("wan"):
        assert report["frames"] == 5
        assert (here / output).read_bytes()[4:8] == b"ftyp"
    elif kind == "dit":
        assert report["classes"] == ["cat", "ship"]
        assert Image.open(output).height > 96
    else:
        assert Image.open(output).size == (16, 16)  # a single picture of a prompt is written as it is


def test_many_prompts(capsys: Captured, folder: Callable[[str], str], here: Path) -> None:
    """A file of prompts, one a line; a picture does not depend on the others; the seed of each is the next number."""
    Path("prompts.txt").write_text("\ufeffa cat\n\n  a dog  \n", encoding="utf-8")
    common = [folder("flux"), *SIZE, "--steps", "2"]
    assert run(capsys, "generate", *common, "--prompts", "prompts.txt", "-o", "all")[0] == 0
    assert sorted(path.name for path in Path("all").iterdir()) == ["0000_a_cat.png", "0001_a_dog.png"]
    assert run(capsys, "generate", *common, "--prompt", "a dog", "--seed", "1", "-o", "one.png")[0] == 0
    assert np.array_equal(np.array(Image.open("all/0001_a_dog.png")), np.array(Image.open("one.png")))


def test_videos_without_an_encoder(
    capsys: Captured, folder: Callable[[str], str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames are written, and that is said; an animation needs no encoder."""
    monkeypatch.setattr("zoo.cli.generate.has_encoder", lambda: False)
    monkeypatch.setattr(showing, "has_encoder", lambda: False)
    common = ["generate", folder("wan"), *OPTIONS["wan"], "--steps", "1"]
    code, _, err = run(capsys, *common, "-o", "fox.mp4")
    assert code == 0
    assert "no encoder of videos" in err
    assert sorted(path.name for path in Path("fox").iterdir()) == [f"{index:04d}.png" for index in range(5)]
    assert "fox exists" in run(capsys, *common, "-o", "fox.mp4")[2]
    assert run(capsys, *common, "-o", "fox.gif")[0] == 0
    assert Image.open("fox.gif").n_frames > 1


def test_caches(capsys: Captured, folder: Callable[[str], str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method, the file that tune-cache saves, or "auto"; without the comparison where it is not wanted."""
    monkeypatch.setenv("ZOO_CACHE", str(here / "settings"))
    pipe = zoo.create_pipeline(folder("flux"))
    setting = SavedSetting(
        model="FluxTransformer2DModel", fingerprint=fingerprint(pipe.transformer), num_steps=6, guidance=3.5,
        scheduler="FlowMatchEulerDiscreteScheduler", name="x", config=zoo.TaylorSeerConfig(interval=2),
    )  # fmt: skip
    file = str(setting.save(here / "settings"))
    common = ["generate", folder("flux"), *OPTIONS["flux"], "--no-compare", "--json", "--force", "-o", "a.png"]
    for cache in ("taylorseer", "taylorseer=2", file, "auto"):
        code, out, err = run(capsys, *common, "--steps", "6", "--cache", cache)
        assert code == 0, err
        assert "computed" in json.loads(out)["summary"]
        assert "speedup" not in json.loads(out)
        if cache.startswith("taylorseer"):
            assert json.loads(out)["cache_config"]["interval"] == (2 if "=" in cache else 3)
    assert "found for FluxTransformer2DModel with 6 steps" in run(capsys, *common, "--steps", "5", "--cache", file)[2]
    assert "Did you mean taylorseer" in run(capsys, *common, "--cache", "taylorsear")[2]
    unet = ["generate", folder("sd"), *OPTIONS["sd"], "--steps", "6", "-o", "b.png", "--cache"]
    code, _, err = run(capsys, *unet, "cg-taylor")
    assert (code, err.count("\n")) == (2, 1)
    assert "UNet2DConditionModel" in err
    assert not Path("b.png").exists()


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """Return pipelines in memory."""
    return {kind: make() for kind, make in PIPELINES.items()}


def plan(pipe: Any, *options: str, **changes: Any) -> Plan:
    parser = argparse.ArgumentParser()
    add_request(parser)
    args = parser.parse_args(list(options))
    check_request(args)
    return plan_calls(args, pipe, name="mine", **changes)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("flux", [], "mine is a FluxPipeline, which needs --prompt TEXT"),
        ("flux", ["--classes", "cat"], "mine makes pictures of prompts: give --prompt TEXT instead of --classes"),
        ("dit", ["--prompt", "a cat"], "mine makes pictures of classes: give --classes instead of --prompt"),
        ("dit", ["--classes", "cta"], "No class is called 'cta'. Did you mean 'cat'?"),
        ("dit", ["--classes", "4"], "Class numbers go from 0 to 3, got 4"),
        ("dit", ["--classes", ","], "--classes names no class"),
        ("dit", ["--width", "16"], "DiTPipeline does not take --width"),
        ("dit", ["--negative-prompt", "x"], "DiTPipeline does not take --negative-prompt"),
        ("flux", ["--prompt", "x", "--image", "red.png"], "FluxPipeline does not take --image"),
        ("flux", ["--prompt", "x", "--frames", "5"], "FluxPipeline does not take --frames"),
        ("flux", ["--prompt", "x", "--mask", "red.png"], "FluxPipeline does not take --mask"),
        ("flux", ["--prompt", "x", "--negative-prompt", "y"], "--negative-prompt does nothing in FluxPipeline"),
        ("flux", ["--prompt", "x", "--pipeline-args", "sigma=1"], "takes no 'sigma' here. Did you mean 'sigmas'?"),
        ("flux", ["--prompt", "x", "--pipeline-args", "output_type=np"], "takes no 'output_type' here"),
        ("flux_image", ["--prompt", "x"], "FluxImg2ImgPipeline needs --image FILE"),
        ("wan_image", ["--prompt", "x"], "WanImageToVideoPipeline needs --image FILE"),
        ("wan", ["--prompt", "x", "--video", "red.png"], "WanPipeline does not take --video"),
        ("wan", ["--prompt", "x", "--height", "0"], "--height must be at least 1, got 0"),
        ("wan", ["--prompts", "none.txt"], "There is no file none.txt for --prompts"),
        ("wan", ["--prompts", "empty.txt"], "empty.txt holds no prompts"),
        ("wan", ["--prompts", "red.png"], "red.png is no text file"),
        ("wan", ["--prompts", "."], "is no text file"),
    ],
)
def test_what_does_not_fit(pipes: dict[str, Any], here: Path, kind: str, options: list[str], said: str) -> None:
    """Every mistake names the option, before anything is computed."""
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        plan(pipes[kind], *options)
    assert "\n" not in str(caught.value)


def test_what_fits(pipes: dict[str, Any], here: Path) -> None:
    """Counts, turns, batches and the arguments that options become."""
    flux = plan(pipes["flux"], "--prompt", "a", "--prompt", "b", "--negative-prompt", "c", "--guidance", "3", count=3)
    assert [item["prompt"] for item in flux.items] == ["a", "b", "a"]
    assert flux.fixed == {"negative_prompt": "c", "true_cfg_scale": 3.0}
    assert (flux.batch, flux.is_video) == (1, False)
    assert plan(pipes["qwen"], "--prompt", "a", "--guidance", "4").fixed["negative_prompt"] == " "
    assert plan(pipes["sd"], "--prompt", "a", "--guidance", "4").fixed == {"guidance_scale": 4.0}
    image = plan(pipes["flux_image"], "--prompt", "a", "--image", "red.png", "--image", "red.png")
    assert len(image.items) == 2
    assert all(item["image"].size == (16, 16) for item in image.items)
    wan = plan(pipes["wan"], "--prompt", "a", "--frames", "5", batch=4)
    assert (wan.fixed, wan.batch, wan.is_video) == ({"num_frames": 5}, 1, True)
    dit = plan(pipes["dit"], classes=6)
    assert [item["class_labels"] for item in dit.items] == [0, 1, 2, 3, 0, 1]
    assert dit.names[:2] == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_progress_by_steps(pipes: dict[str, Any], here: Path, kind: str) -> None:
    """Every step is told, by the pipeline's callback or, where it has none, by its scheduler; nothing stays."""
    told: list[None] = []
    options = ["--classes", "1,2"] if kind == "dit" else ["--prompt", "a", *SIZE]
    pipe = pipes[kind]
    pipe.set_progress_bar_config(disable=True)
    made = plan(pipe, *options, classes=2).run(3, lambda: told.append(None))
    assert len(told) == 3
    assert "step" not in vars(pipe.scheduler)
    assert {tuple(picture.shape) for picture in made} == {(1, 3, 16, 16)}


def test_where_to_write(tmp_path: Path) -> None:
    video, picture = dict(video=True, grid=False, force=False), dict(video=False, grid=False, force=False)
    assert plan_target(tmp_path / "a", ["x/../y: z"], **picture).files == [tmp_path / "a" / "0000_x_.._y_z.png"]
    assert plan_target(tmp_path / "a.png", ["x"], **picture).kind == "picture"
    assert plan_target(tmp_path / "a.png", ["x", "y"], **picture).kind == "grid"
    assert plan_target(tmp_path / "a.gif", ["x"], **video).kind == "video"
    with pytest.raises(ValueError, match="makes pictures"):
        plan_target(tmp_path / "a.mp4", ["x"], **picture)
    with pytest.raises(ValueError, match="makes videos"):
        plan_target(tmp_path / "a.png", ["x"], **video)
    with pytest.raises(ValueError, match="2 videos: give -o FOLDER"):
        plan_target(tmp_path / "a.gif", ["x", "y"], **video)


def test_null_class_of_the_model(pipes: dict[str, Any]) -> None:
    """Guidance against the model's own null class, as diffusers does where there are 1000 classes."""
    pipe: DiTPipeline = pipes["dit"]
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.id2label["0"] == "cat, tabby"

    def made(pipe: Any, labels: Any) -> torch.Tensor:
        return pipe(labels, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images

    ours = made(pipe, ["tabby", 3])
    larger = PIPELINES["dit"]()
    larger.set_progress_bar_config(disable=True)
    larger.transformer.load_state_dict(pipe.transformer.state_dict())
    larger.vae.load_state_dict(pipe.vae.state_dict())
    for block in larger.transformer.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(1001, 16)
        block.norm1.emb.class_embedder.embedding_table.weight.data[:4] = table.weight.data[:4]
        block.norm1.emb.class_embedder.embedding_table.weight.data[1000] = table.weight.data[4]
    larger.transformer.register_to_config(num_embeds_ada_norm=1000)
    assert torch.equal(ours, made(larger, [0, 3]))
    assert not pipe.transformer._forward_pre_hooks


def test_scheduler_that_does_not_fit_is_refused(
    folder: Callable[[str], str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flow under a scheduler of noise, or the reverse, would make pictures of nothing, in silence."""
    flux, dit = folder("flux"), folder("dit")
    asked = ("generate", flux, *OPTIONS["flux"], "--steps", "2", "-o", "a.png")
    code, _, err = run(capsys, *asked, "--scheduler", "euler")
    assert code == 2
    assert "predicts a flow; give one of flow-euler." in err
    code, _, err = run(
        capsys, "generate", dit, *OPTIONS["dit"], "--steps", "2", "--scheduler", "flow-euler", "-o", "a.png"
    )
    assert code == 2
    assert "give one of ddim, ddpm, dpm, euler, heun, unipc." in err
    assert not Path("a.png").exists()
    wan = ("generate", folder("wan"), *OPTIONS["wan"], "--steps", "2", "-o", "frames/")
    code, _, err = run(capsys, *wan, "--scheduler", "dpm")
    assert code == 0, err


def test_broken_index_is_named(folder: Callable[[str], str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken").mkdir()
    (here / "broken" / "model_index.json").write_text('{"a": ')
    code, _, err = run(capsys, "generate", "broken", "--prompt", "a cat", "-o", "a.png")
    assert code == 2
    assert "broken/model_index.json does not say what the pipeline is made of" in err


def test_a_pipeline_without_a_transformer_is_named(
    folder: Callable[[str], str], here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its weights are read, wherever a transformer is taken out of a pipeline."""
    path = folder("sd")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    said = r"has no transformer: a StableDiffusionPipeline has scheduler, text_encoder, tokenizer, unet, vae\.$"
    with pytest.raises(CheckpointError, match=said):
        zoo.create_model(path)
    capsys.readouterr()
    code = main(["convert-moe", path, "-o", "moe", "--scores", "random"])
    err = capsys.readouterr().err
    assert code != 0
    assert "has no transformer: a StableDiffusionPipeline has " in err
    assert err.endswith(" [Z207]\n")
    assert err.count("\n") == 1
    assert not Path("moe").exists()
