"""The catalogue behind `zoo list`: current, searchable, and helpful about wrong names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
from registered import FAMILIES, smallest
from timm.models import model_entrypoint

from zoo import catalog
from zoo.cards import catalog_writer
from zoo.catalog import entry, load, nearest, select, unknown

SAMPLE = {
    "repavit_tiny": {"task": "classification", "params": 6e6, "weights": {"cifar10": {"license": "apache-2.0"}}},
    "repavit_base": {"task": "classification", "params": 90e6, "weights": {}},
    "cfsr_x2": {"task": "sr", "params": 3e5, "weights": {"df2k": {"license": None}, "bsds": {"license": "MIT"}}},
}


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small catalogue in place of the real one."""
    monkeypatch.setattr(catalog, "load", lambda: SAMPLE)


def test_every_registered_model_is_listed() -> None:
    ours = {
        name
        for name in timm.list_models()
        if model_entrypoint(name).__module__.startswith(("zoo.backbones.", "zoo.restoration."))
    }
    assert ours
    assert ours == {name for name, facts in load().items() if facts["task"] not in catalog.PIPELINE_TASKS}


@pytest.mark.slow
def test_catalog_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts are those of the registry and the cards, or `make catalog` has to be run.

    Work is counted anew for the smallest model of each family. The others' parameters are counted where every model is
    built (`test_registry_build.py`), and everything by `make check-catalog`.
    """
    stored, counts = load(), catalog_writer._counts
    counted = [smallest(family) for family in FAMILIES]

    def count(name: str, shape: tuple[int, int, int]) -> dict[str, int]:
        architecture, _, tag = name.partition(".")
        if architecture in counted:
            return counts(name, shape)
        facts = stored[architecture]["weights"][tag] if tag else stored[architecture]
        return {key: facts[key] for key in ("params", "macs", "merged_params", "merged_macs") if key in facts}

    monkeypatch.setattr(catalog_writer, "_counts", count)
    current = catalog_writer.build_catalog()
    assert current.keys() == stored.keys()
    for name, facts in current.items():
        assert stored[name] == facts, f"{name}: run `make catalog`"
    assert list(current) == list(stored)


@pytest.mark.parametrize("name", list(load()))
def test_facts_are_complete(name: str) -> None:
    """Every model has a task, a source, a size and, merged, less work than before."""
    facts = load()[name]
    assert facts["summary"]
    assert facts["paper_ids"]
    assert facts["params"] > 0
    assert facts["macs"] > 0
    assert len(facts["input_size"]) == (2 if facts["task"] == "policy" else 3)
    if "merged_params" in facts:
        assert facts["merged_params"] < 1.01 * facts["params"]  # channels of zeros may be added, to align the others
        assert facts["merged_macs"] < 1.01 * facts["macs"]
    for weight in facts["weights"].values():
        assert weight["source"] == "shipped" or "://" in weight["source"] or weight["source"].startswith("hf-hub:")


@pytest.mark.usefixtures("sample")
@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, ["repavit_tiny", "repavit_base", "cfsr_x2"]),
        ({"pattern": "repa*"}, ["repavit_tiny", "repavit_base"]),
        ({"pattern": "*.cifar10"}, ["repavit_tiny"]),
        ({"pattern": "repa"}, []),
        ({"task": "sr"}, ["cfsr_x2"]),
        ({"max_params": 6e6}, ["repavit_tiny", "cfsr_x2"]),
        ({"license": "mit"}, ["cfsr_x2"]),
        ({"pattern": "*tiny", "task": "classification", "license": "Apache-2.0"}, ["repavit_tiny"]),
    ],
)
def test_select(conditions: dict[str, object], expected: list[str]) -> None:
    assert list(select(**conditions)) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("sample")
def test_wrong_names_get_the_nearest_right_one() -> None:
    assert "Did you mean repavit_tiny" in unknown("repavit_tinny")
    assert "Did you mean repavit_tiny.cifar10" in unknown("repavit_tinny.cifar10")
    assert "It has cfsr_x2.bsds, cfsr_x2.df2k." in unknown("cfsr_x2.div2k")
    assert "None are published" in unknown("repavit_base.in1k")
    assert "Did you mean vit_base" in unknown("vit_bas", ["vit_base"])
    assert unknown("qqqq") == "No model is called 'qqqq'. `zoo list` shows all names."
    with pytest.raises(ValueError, match="Did you mean classification"):
        select(task="clasification")
    with pytest.raises(ValueError, match="Did you mean"):
        entry("cfsr_x22")
    assert entry("cfsr_x2.bsds")["tag"] == "bsds"
    assert nearest("cfsr", ["cfsr_x2", "dat"]) == ["cfsr_x2"]


_IMPORT = """
import sys, time, warnings
start = time.process_time()
import timm, torch
middle = time.process_time()
there = set(sys.modules)
before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.benchmark)
warnings.simplefilter("error", UserWarning)
begin = time.process_time()
import zoo
print((time.process_time() - begin) / (middle - start))
heavy = {"diffusers", "lightning", "transformers", "triton", "rich", "matplotlib", "onnx", "datasets"}
assert not heavy & (set(sys.modules) - there), heavy & set(sys.modules)
after = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.benchmark)
assert before == after and not torch.cuda.is_initialized()
assert set(zoo.__all__) <= set(dir(zoo))
"""


@pytest.mark.slow
def test_importing_zoo_is_quiet_and_light() -> None:
    """No optional library is imported, no device is asked, no thread or gradient setting changes.

    It costs at most a tenth of what importing timm costs in the same process; once in three fresh ones is enough.
    """
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        share = float(done.stdout)  # and nothing else is printed
        if share <= 0.1:
            return
    pytest.fail(f"importing zoo costs {share:.2f} of what timm costs")
