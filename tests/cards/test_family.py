"""The cards of the families: current, complete, and their code runs."""

from __future__ import annotations

import re

import pytest

from zoo import catalog
from zoo.cards.family import family_card, family_names
from zoo.weights import cards_dir

FAMILIES = family_names()


@pytest.mark.parametrize("family", FAMILIES)
def test_card_is_current_and_complete(family: str) -> None:
    text = (cards_dir() / f"{family}.md").read_text(encoding="utf-8")
    assert text == family_card(family), "run `make catalog`"
    for name, facts in catalog.load().items():
        if facts["family"] == family:
            assert f"| `{name}` |" in text
            assert all(f"| `{name}.{tag}` |" in text for tag in facts["weights"])
            assert facts["parity"]
            assert facts["parity"] in text


def test_every_card_has_a_family() -> None:
    assert {path.stem for path in cards_dir().glob("*.md")} == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_code_runs(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (cards_dir() / f"{family}.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    assert len(code) == 1
    if "restore(" in code[0]:
        compile(code[0], family, "exec")  # the README's tests restore a picture
        return
    exec(code[0], {})
    assert "MACs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ([0.0] * 3, [1.0] * 3, "none: pixels in [0, 1]"),
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225"),
    ],
)
def test_normalisation(mean: list[float], std: list[float], words: str) -> None:
    assert catalog.normalisation({"mean": mean, "std": std}) == words
    assert catalog.normalisation({}) == ""
