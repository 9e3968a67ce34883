"""Narrow terminals, completion, near names, and what lists say of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from zoo import catalog
from zoo.cli import main
from zoo.cli.output import print_table, table
from zoo.hub import HubError, check_repo_id
from zoo.sources import find

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_narrow_terminals_leave_columns_out_and_break_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list", "repavit*"]) == 0
    out = capsys.readouterr().out
    drawn = out.partition("Weights are called")[0]
    assert "repavit_small" in drawn
    assert "classification" in drawn
    for column in ("name", "params", "MACs", "licence"):
        assert column in drawn.partition("─")[0] or column in out.partition("Left out")[2]
    assert ("Left out" in out) == (width < 120)


@pytest.mark.parametrize("width", [30, 40, 50, 60])
def test_no_letters_are_folded(width: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Not even where two columns are too wide for the terminal; a label keeps what it says."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list", "eff*"]) == 0
    drawn = capsys.readouterr().out.partition("Left out")[0]
    assert "efficientvit_msra_m0_det" in drawn
    assert all("classification" in line for line in drawn.splitlines() if "classif" in line)
    assert "ication" not in drawn.replace("classification", "")
    rows = table("", "")
    rows.add_row("a label of many words", "what it says")
    print_table(rows)
    assert "says" in capsys.readouterr().out


def test_a_long_path_costs_no_column(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = table("picture", "class", "probability", right=("probability",))
    rows.add_row("folder/" * 30, "a cat", "99.1 %")
    print_table(rows)
    out = capsys.readouterr().out
    assert "a cat" in out
    assert "99.1 %" in out
    assert max(map(len, out.splitlines())) <= 60


def test_lists_say_which_weights_are_shipped(capsys: Captured) -> None:
    assert main(["list", "cfsr_x2"]) == 0
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    row = next(line for line in lines if line.strip().startswith("cfsr_x2"))
    shipped, authors = head.index("shipped"), head.index("authors' weights")
    assert "bsds" in row[shipped:authors]
    assert "authors" in row[authors:]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert {word for word in ("restore", "finetune", "app") if word in out} == {"restore", "finetune", "app"}
    if shell != "tcsh":
        assert "--quality" in out


def test_completion_of_an_unknown_shell(capsys: Captured) -> None:
    assert main(["--print-completion", "dosh"]) == 2
    assert "bash" in capsys.readouterr().err


def test_near_names_come_once() -> None:
    assert catalog.nearest("repavit_tinny", ["repavit_tiny", "repavit_tiny"]) == ["repavit_tiny"]


@pytest.mark.parametrize(
    "command", [["export", "lsnet_tt", "--format", "onnx"], ["generate", "pixeldit.cifar1"], ["info", "resnet188"]]
)
def test_near_names_are_said(command: list[str], capsys: Captured) -> None:
    assert main(command + (["-o", "x.png"] if command[0] == "generate" else [])) == 2
    err = capsys.readouterr().err
    assert "Did you mean" in err or "It has pixeldit.cifar10" in err


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/mine!", "-me/x", "me/..", ""])
def test_repository_ids_are_checked_without_the_hub(name: str) -> None:
    with pytest.raises(HubError, match="is no Hub id"):
        check_repo_id(name)
    check_repo_id("org/repavit_tiny.cifar10")


def test_a_dry_run_refuses_a_wrong_id(capsys: Captured) -> None:
    assert main(["publish", "repavit_tiny.cifar10", "--repo-id", "no id", "--dry-run"]) == 2
    assert "is no Hub id" in capsys.readouterr().err


def test_info_of_a_model_of_timm(capsys: Captured) -> None:
    assert main(["info", "resnet18.a1_in1k"]) == 0
    out = capsys.readouterr().out
    assert "11.7 M" in out
    assert "1.81 G" in out


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("repavit_smal", ["repavit_small"]),  # not again with its weights
        ("repavit_tinny.cifar10", ["repavit_tiny.cifar10"]),
        ("repavit_tiny_cifar10", ["repavit_tiny.cifar10"]),
        ("RepaViT_tiny", ["repavit_tiny"]),
        ("ResNet50", ["resnet50"]),
        ("lsnet", ["lsnet_t", "lsnet_s", "lsnet_b"]),
        ("crop_mod", []),  # a setting in timm's files is no model
    ],
)
def test_near_models_come_once_and_far_ones_not_at_all(given: str, near: list[str]) -> None:
    with pytest.raises(ValueError, match="No model is called") as said:
        find(given)
    found = re.findall(r"Did you mean (.*?)\?", str(said.value))
    named = found[0].split(" or ") if found else []
    assert named[: max(1, len(near))] == near
    assert len({name.partition(".")[0] for name in named}) == len(named)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("classify DIR/cat.jgp", "cat.jpg?"),
        ("restore DIR/cat.jgp -o DIR/out.png -q", "cat.jpg?"),
        ("evaluate cfsr_x2.bsds --data Set5=DIRR", "photos?"),
        ("compress repavit_tiny.cifar10 --method prune --data DIRR -o DIR/c", "photos?"),
        ("inspect repavit_tinny.cifar10 --data DIR", "repavit_tiny.cifar10?"),
        ("finetune DIRR --model emov2_1m.cifar10 -o DIR/m", "photos?"),
        ("generate pixeldit.cifar10 --classes caat -o DIR/x.png", "'cat'? The classes are airplane,"),
        ("tune-cache repavit_tiny.cifar10", "not a diffusion pipeline"),
        ("convert-moe pixeldt.cifar10 -o DIR/moe", "pixeldit.cifar10"),
        ("bench repavit_tinny", "repavit_tiny?"),
        ("verify repavit_tinny.cifar10", "repavit_tiny.cifar10?"),
        ("verify DIRR", "photos?"),
        ("publish DIRR --repo-id me/x --dry-run", "photos?"),
        ("publish repavit_tinny.cifar10 --repo-id me/x --dry-run", "repavit_tiny.cifar10?"),
        ("info repavit_tiny.cifr10", "Did you mean repavit_tiny.cifar10? It has"),
        ("info resnet18.a1_in1", "Did you mean resnet18.a1_in1k? There are"),
        ("list --license apache2", "Did you mean apache-2.0?"),
    ],
)
def test_every_command_names_the_nearest(command: str, said: str, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"")
    words = [word.replace("DIRR", f"{tmp_path}/photoss").replace("DIR", str(folder)) for word in command.split()]
    assert main(words) in (1, 2)
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


def test_what_is_missing_is_told_beside_what_is_there(tmp_path: Path, capsys: Captured) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "there.png")
    assert main(["classify", f"{tmp_path}/ther.png", f"{tmp_path}/there.png", "-q"]) == 1
    out, err = capsys.readouterr()
    assert "there.png\t" in out
    assert "no such file. Did you mean" in err
