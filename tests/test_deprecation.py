"""Deprecated names warn, and expire."""

from __future__ import annotations

import pytest

from zoo import deprecation


def old() -> None:
    deprecation.deprecate("old", "0.3.0", "new")


def test_it_warns_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "__version__", "0.2.9")
    with pytest.warns(FutureWarning, match=r"old is removed in 0\.3\.0: use new\.") as said:
        old()
    assert said[0].filename == __file__


@pytest.mark.parametrize("version", ["0.3.0", "0.10.0", "1.0.0"])
def test_it_expires(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "__version__", version)
    with pytest.raises(RuntimeError, match="was to be removed"):
        old()
