"""Every public name says what it is, and exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import zoo

PACKAGE = Path(zoo.__file__).parent


def modules() -> list[str]:
    """Return the names of all modules of the package, exports included; the command line has no public names."""
    names = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "zoo.")]
    exports = importlib.import_module("zoo.export")
    names += ["zoo.export", *(info.name for info in pkgutil.iter_modules(exports.__path__, "zoo.export."))]
    return [name for name in names if not name.endswith(".__main__")]


def test_modules_are_found() -> None:
    assert {"zoo.weights", "zoo.tasks.callbacks", "zoo.export.onnx"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_public_names_are_documented(name: str) -> None:
    """`__all__` names what exists; classes, their public methods and functions have docstrings that say it in words."""
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    public = getattr(module, "__all__", [])
    for item in public:
        value = getattr(module, item, None)
        assert value is not None, f"{name}.__all__ names {item}, which does not exist"
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert value.__doc__, f"{name}.{item} has no docstring"
        assert not value.__doc__.startswith(f"{item}("), f"{name}.{item} has only the docstring that dataclass makes"
        if inspect.isfunction(value):
            _check_arguments(f"{name}.{item}", value)


def _check_arguments(name: str, function: object) -> None:
    """An "Args" section describes the arguments that exist, and all of them."""
    documented = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", documented, re.M)
    if section is None:
        return
    described = set(re.findall(r"^ {4}\*{0,2}(\w+)(?:, \*{0,2}(\w+))*:", section[1], re.M) and
                    re.findall(r"\w+", " ".join(re.findall(r"^ {4}([\w*, ]+):", section[1], re.M))))  # fmt: skip
    given = {parameter.lstrip("*") for parameter in inspect.signature(function).parameters}  # type: ignore[arg-type]
    assert described == given, f"{name}: Args describes {sorted(described)}, the signature has {sorted(given)}"


def test_lazy_names() -> None:
    """Everything in `zoo.__all__` can be had from `zoo`, and nothing else is promised."""
    assert set(zoo.__all__) <= set(dir(zoo))
    for name in zoo.__all__:
        assert callable(getattr(zoo, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        zoo.no_such_name  # noqa: B018
