"""The documents: pages that follow from the code are up to date, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from zoo.cli import parse
from zoo.cli.errors import KINDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted((DOCS / "benchmarks").glob("*.md"))]
KEPT = [*PAGES, ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]
GENERATED = ("reference", "families", "configuration.md", "diagrams")  # made when the site is built


def module(name: str) -> ModuleType:
    """Return a script of docs/."""
    spec = importlib.util.spec_from_file_location(f"zoo_docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_pages_from_the_code_are_up_to_date() -> None:
    """`python docs/pages.py` writes them."""
    pages = module("pages")
    assert (DOCS / "errors.md").read_text(encoding="utf-8") == pages.errors()
    assert (DOCS / "models.md").read_text(encoding="utf-8") == pages.models()


def test_the_reference_has_every_package() -> None:
    """That of exports stands beside the others in a checkout."""
    listed = module("pages").modules()
    packages = {path.parent.name for path in (ROOT / "zoo").glob("*/__init__.py")}
    assert packages - set(listed) <= {"backbones", "restoration", "cli"}  # families have pages of their own
    assert {"zoo.export.onnx", "zoo.export.artefact"} <= set(listed["export"])


def test_every_error_code_has_an_anchor() -> None:
    anchors = re.findall(r"^\((z\d{3})\)=$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.M)
    assert sorted(anchors) == sorted(kind.code.lower() for kind in KINDS)


@pytest.mark.parametrize("page", KEPT, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if not path or re.match(r"[a-z]+:", target):
            continue
        place = (page.parent / path).resolve()
        made = place.is_relative_to(DOCS) and place.relative_to(DOCS).parts[0] in GENERATED
        assert made or place.exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [DOCS / "start.md", *sorted((DOCS / "tutorials").glob("*.ipynb"))], ids=lambda p: p.stem
)
def test_commands_exist(page: Path) -> None:
    """Every `zoo` line of the shell is one that the command takes."""
    text = page.read_text(encoding="utf-8").replace("\\n", "\n").replace('\\"', '"')
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["zoo"] and words[1] not in ("train", "--print-completion"):
                parse(words[1:])


def test_diagrams_are_pictures() -> None:
    for draw in module("diagrams").DIAGRAMS.values():
        svg = draw().svg()
        assert svg.startswith("<svg")
        assert "<title>" in svg


def test_citation() -> None:
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "version"} <= facts.keys()
