"""`--ray` on two local workers: the results of one process, also where a worker dies; what is refused."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_folders import restorer_folder

from zoo.cli import main
from zoo.cli.cluster import spread

Captured = pytest.CaptureFixture[str]


def test_what_is_refused(capsys: Captured, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]
    for more, said in (
        (["--workers", "2"], "--workers are those of --ray"),
        (["--ray", "local", "--compare", "a.html"], "--ray takes files, and neither - nor --compare"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
        next(spread(argparse.Namespace(ray="local", workers=0, device="cpu"), [1], str))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_loses_nothing(tmp_path: Path) -> None:
    def make(folder: str) -> Callable[[int], int]:
        def work(item: int) -> int:
            mark = Path(folder) / f"tried {item}"
            if item == 3 and not mark.exists():
                mark.touch()
                os._exit(1)
            return item * item

        return work

    args = argparse.Namespace(ray="local", workers=2, device="cpu")
    assert dict(spread(args, range(6), make, str(tmp_path))) == {number: number**2 for number in range(6)}
    assert (tmp_path / "tried 3").exists()


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("cluster")
def test_restore_as_in_one_process(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files and report, paths as typed; a second call finds all done."""
    monkeypatch.chdir(tmp_path)
    model = str(restorer_folder(tmp_path / "restorer"))
    (tmp_path / "in").mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "4.png").write_text("no picture")
    command = ["restore", "in", "--model", model, "--device", "cpu", "--json"]
    reports = []
    for words in (["-o", "one"], ["-o", "two", "--ray", "local", "--workers", "2"]):
        assert main([*command, *words]) == 1
        reports.append(json.loads(capsys.readouterr().out))
    for number in range(3):
        assert (tmp_path / "one" / f"{number}.png").read_bytes() == (tmp_path / "two" / f"{number}.png").read_bytes()
    assert [entry["file"] for entry in reports[0]["restored"]] == [entry["file"] for entry in reports[1]["restored"]]
    assert reports[0]["failed"] == reports[1]["failed"]
    (tmp_path / "in" / "4.png").unlink()  # with nothing left to do, no worker loads the model again
    assert main([*command, "-o", "two", "--ray", "local", "--skip-existing"]) == 0
    assert len(json.loads(capsys.readouterr().out)["skipped"]) == 3
