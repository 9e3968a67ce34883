"""Narrow terminals, completion, near names, and what lists say of weights."""

from __future__ import annotations

import pytest

from zoo import catalog
from zoo.cli import main
from zoo.cli.output import print_table, table
from zoo.hub import HubError, check_repo_id

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
        assert (column in drawn.splitlines()[1]) or f"{column}" in out.partition("Left out")[2]
    assert ("Left out" in out) == (width < 120)


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
    assert main(["publish", "repavit_tiny.cifar10", "--repo-id", "no id", "--dry-run"]) != 0
    assert "is no Hub id" in capsys.readouterr().err


def test_info_of_a_model_of_timm(capsys: Captured) -> None:
    assert main(["info", "resnet18.a1_in1k"]) == 0
    out = capsys.readouterr().out
    assert "11.7 M" in out
    assert "1.81 G" in out
