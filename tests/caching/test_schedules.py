"""Schedules of BAC: the golden cases, what they are beside brute force, and the file format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import cases

from zoo.caching.schedules import (
    BACSchedule,
    adjacent_steps,
    anchor_steps,
    block_error,
    bubbling_union,
    similarity,
    top_errors,
    uniform_steps,
)


@pytest.mark.parametrize("case", cases("acs_anchor"))
def test_anchor_golden(case: dict[str, Any]) -> None:
    found = anchor_steps(case["matrix"], case["num_updates"], case["direction"])
    assert list(found) == case["update_steps"]
    value, anchor = 0.0, 0
    for step in range(case["num_steps"]):
        anchor = step if step in found else anchor
        value += case["matrix"][anchor][step]
    assert value == case["optimal_value"]


@pytest.mark.parametrize("case", cases("acs_adjacent"))
def test_adjacent_golden(case: dict[str, Any]) -> None:
    assert list(adjacent_steps(case["s"], case["num_updates"])) == case["update_steps"]


@pytest.mark.parametrize("case", cases("block_error"))
def test_block_error_golden(case: dict[str, Any]) -> None:
    features = torch.tensor(case["features"], dtype=torch.float64)
    assert block_error(features) == pytest.approx(case["mean_abs_over_pairs"], rel=1e-12)


@pytest.mark.parametrize("case", cases("bua"))
def test_union_golden(case: dict[str, Any]) -> None:
    order = case["forward_order"]
    kinds = {unit: "attention" if case["kind"][unit] == "attention" else "feed_forward" for unit in order}
    selected = top_errors({unit: case["error"][unit] for unit in order}, case["top_n"])
    assert list(selected) == case["selected"]
    found = bubbling_union({unit: case["schedule"][unit] for unit in order}, kinds, selected)
    assert {unit: list(steps) for unit, steps in found.items()} == case["result"]


def test_counts() -> None:
    for function in (
        lambda m: anchor_steps([[1.0]], m),
        lambda m: adjacent_steps([None], m),
        lambda m: uniform_steps(1, m),
    ):
        assert function(7) == (0,)
        with pytest.raises(ValueError, match="updates must be at least 1"):
            function(0)
    with pytest.raises(ValueError, match="at least 1 step"):
        anchor_steps([], 1)
    assert uniform_steps(10, 3) == (0, 3, 6)
    assert uniform_steps(4, 4) == (0, 1, 2, 3)


def test_similarity() -> None:
    features = torch.randn(5, 40)
    features[1] = features[3] = 0
    cosine = similarity(features)
    assert torch.equal(cosine.diagonal(), torch.ones(5))
    assert cosine[1, 3] == 1
    assert cosine[0, 1] == 0
    torch.testing.assert_close(cosine[0, 2], torch.cosine_similarity(features[0], features[2], dim=0))
    l1, mse = similarity(features, "l1"), similarity(features, "mse")
    torch.testing.assert_close(l1[0, 4], (features[0] - features[4]).abs().mean())
    torch.testing.assert_close(mse[0, 4], (features[0] - features[4]).square().mean())


def schedule(**changes: Any) -> BACSchedule:
    values: dict[str, Any] = dict(
        model="DiT", num_steps=10, units={"a": (0, 4), "b": (0, 2, 9)}, kinds={"a": "attention", "b": "feed_forward"},
        errors={"a": 0.5, "b": 0.25}, scheduler="DDIMScheduler", timesteps=tuple(range(900, -100, -100)), guidance=3.0,
        updates=2, union=("b",),
    )  # fmt: skip
    return BACSchedule(**{**values, **changes})


def test_a_write_that_stops_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = schedule()
    file = first.save(tmp_path / "own.json")
    write = Path.write_text

    def stop(path: Path, text: str, **kwargs: Any) -> int:
        write(path, text[:9], **kwargs)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(OSError, match="No space left"):
        schedule(guidance=5.5).save(file)
    assert BACSchedule.load(file) == first
    assert list(tmp_path.iterdir()) == [file]


def test_file(tmp_path: Path) -> None:
    """A schedule comes back equal, and is found in a folder by what it is for."""
    first, second = schedule(), schedule(guidance=5.5)
    assert first.save(tmp_path).name == "bac_DiT_DDIMScheduler_10_3.json"
    assert second.save(tmp_path).name == "bac_DiT_DDIMScheduler_10_5.5.json"
    assert BACSchedule.load(tmp_path, guidance=5.5) == second
    assert BACSchedule.load(first.save(tmp_path / "own.json")) == first
    with pytest.raises(ValueError, match=r"2 BAC schedules in .* fit"):
        BACSchedule.load(tmp_path, num_steps=10)
    with pytest.raises(FileNotFoundError, match=r"0 BAC schedules in .* fit \(num_steps=50\); there are: bac_DiT"):
        BACSchedule.load(tmp_path, num_steps=50)
    assert str(first) == "BAC schedule of DiT for 10 steps: 2 units, 2.5 of 10 steps computed on average"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "another version"),
        ({"units": {"a": [0, 10]}, "kinds": {"a": "attention"}}, "stay below 10"),
        ({"units": {"a": [1]}, "kinds": {"a": "attention"}}, "must rise from 0"),
        ({"kinds": {}}, "no kind"),
        ({"foreign": 1}, "foreign"),
    ],
)
def test_broken_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"version": 1, **dataclasses.asdict(schedule()), **change}))
    with pytest.raises(ValueError, match=message):
        BACSchedule.load(file)
    file.write_text("no JSON")
    with pytest.raises(ValueError, match="is no BAC schedule"):
        BACSchedule.load(file)


def test_resampled() -> None:
    """Equal steps give the same schedule, others that of the nearest timesteps; without matrices only uniform ones."""
    likeness = torch.tensor([[1.0 if (a < 3) == (b < 3) else 0.0 for b in range(6)] for a in range(6)])  # two phases
    matrices = {unit: tuple(map(tuple, likeness.tolist())) for unit in "ab"}
    units, times = dict.fromkeys("ab", (0, 3)), (1000.0, 800.0, 600.0, 400.0, 200.0, 0.0)
    made = schedule(num_steps=6, timesteps=times, units=units, union=(), matrices=matrices)
    assert made.resampled(6, times).units == units
    twice = made.resampled(12, [1000.0 - 90 * step for step in range(12)])
    assert twice.num_steps == 12
    assert twice.updates == 4
    assert all(0 in steps and 6 in steps for steps in twice.units.values())  # step 6 is the first nearest to 400
    half = made.resampled(3, [1000.0, 450.0, 0.0])
    assert half.units == dict.fromkeys("ab", (0,))
    last = dataclasses.replace(made, units=dict.fromkeys("ab", (0, 3, 5)))
    assert last.resampled(3).units == dict.fromkeys("ab", (0, 2))
    with pytest.raises(ValueError, match="holds no matrices"):
        schedule().resampled(5)
    uniform = dataclasses.replace(made, objective="uniform", matrices={})
    assert uniform.resampled(12).units == dict.fromkeys("ab", (0, 3, 6, 9))
