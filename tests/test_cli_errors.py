"""Every error line ends with a code; the documents list every code, and every message of zoo has one."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import zoo
from zoo.cli import main
from zoo.cli.errors import KINDS, UNEXPECTED, code_for, code_of, with_code

ROOT = Path(zoo.__file__).resolve().parents[1]
FOREIGN = {"Z900", "Z101"}  # of what argparse and libraries say


def raised() -> dict[str, list[str]]:
    """Return the messages of all `raise` statements of zoo and its exports, by the code that they get."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder, prefix in ((ROOT / "zoo", ""), (ROOT / "export", "export.")):
        for path in sorted(folder.rglob("*.py")):
            module = prefix + ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix("__init__")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    said = words_of(node.exc.args[0])
                    found[code_for(said, module.strip("."))].append(f"{module}: {said}")
    return found


def words_of(node: ast.expr) -> str:
    """Return a message with 5 in place of each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return words_of(node.left) + words_of(node.right)
    return "5"


def test_every_message_has_a_code_and_every_code_a_message() -> None:
    found = raised()
    assert not found.get(UNEXPECTED), found[UNEXPECTED]
    assert {kind.code for kind in KINDS} - FOREIGN <= set(found)


def test_codes_are_distinct_and_explained() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    for kind in KINDS:
        assert re.fullmatch(r"Z\d{3}", kind.code)
        assert len(kind.cure) > 40
        for page in re.findall(r"\]\(([^)#]+)\)", kind.cure):
            assert (ROOT / "docs" / page).is_file(), page


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["lst"], "Z101"),
        (["list", "--tsk", "sr"], "Z101"),
        (["info", "repavit_tinny"], "Z201"),
        (["classify", "x.png", "--topk", "0"], "Z102"),
        (["classify", "x.png", "--model", "cfsr_x2.bsds"], "Z207"),
        (["classify", "x.png", "--model", "repamlpmixer_s16"], "Z202"),
        (["classify", "x.png", "--model", "gone.safetensors"], "Z104"),
        (["restore", "x.png", "-o", "out.psd"], "Z306"),
        (["finetune", "gone", "--model", "emov2_1m.cifar10", "-o", "mine"], "Z104"),
        (["train", "fit", "--config", "no_such_config"], "Z104"),
    ],
)
def test_lines_end_with_the_code_of_their_kind(
    words: list[str], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    assert main(words) > 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f" [{code}]"), last


def test_failed_pictures_have_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.png").write_text("<html>")
    assert main(["classify", str(tmp_path / "page.png"), str(tmp_path / "gone.png")]) == 1
    err = capsys.readouterr().err
    assert re.search(r"page\.png.* \[Z301\]\n", err)
    assert re.search(r"gone\.png.* \[Z\d{3}\]\n", err)


def test_what_nothing_tells_is_unexpected() -> None:
    assert code_of(KeyError("key")) == UNEXPECTED
    assert code_of(MemoryError()) == "Z307"
    assert code_of(OSError(28, "No space left on device")) == "Z103"
    assert with_code("line [Z101]", "Z900") == "line [Z101]"
