"""What a wheel holds: everything that the commands need away from a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).parents[1]
FOLDERS = {"zoo": "zoo", "export": "zoo/export", "model_cards": "zoo/model_cards", "configs": "zoo/configs"}


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """Return the files that a build puts into the wheel, by setuptools' own account; nothing is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = Distribution({"script_name": "setup.py"})
        apply_configuration(distribution, ROOT / "pyproject.toml")
        distribution.set_defaults()
        build = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        library = Path(build.build_lib)
        return {Path(path).relative_to(library).as_posix() for path in build.get_outputs(include_bytecode=False)}


@pytest.mark.parametrize("folder", [*FOLDERS, "zoo_command"])
def test_every_file_is_in_the_wheel(packed: set[str], folder: str) -> None:
    inside = FOLDERS.get(folder, folder)
    files = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert files
    assert files <= packed, sorted(files - packed)


def test_what_the_commands_need_is_among_them(packed: set[str]) -> None:
    """Configs by name, weights with their facts, exporters, the catalogue, the start of the command."""
    needed = (
        "zoo/configs/classification/repavit_tiny_cifar10.yaml",
        "zoo/model_cards/emov2_1m.cifar10/model.safetensors",
        "zoo/model_cards/emov2_1m.cifar10/config.json",
        "zoo/benchmarks/models.json",
        "zoo/export/onnx.py",
        "zoo/catalog.json",
        "zoo/py.typed",
        "zoo_command/__init__.py",
    )
    assert not set(needed) - packed
    assert not [path for path in packed if path.startswith(("tests/", "docs/"))]
