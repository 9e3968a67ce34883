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


def test_what_is_refused(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded, in both commands."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for command in (["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out")], ["classify", str(tmp_path)]):
        for more, said in (
            (["--workers", "2"], "--workers are those of --ray"),
            (["--ray", "local", "--workers", "0"], "--workers must be at least 1, got 0"),
            (["--ray", "local", "--compare", "a.html"], "--ray takes files, and neither - nor --compare"),
        ):
            if command[0] == "restore" or "--compare" not in more:
                assert main([*command, *more]) == 2
                assert said in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name: None)
            assert main([*command, "--ray", "local"]) == 1
        assert "pip install 'ffn-zoo[ray]'" in capsys.readouterr().err


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
    assert dict(spread(args, range(6), make, str(tmp_path), lost=lambda item, why: item)) == {
        number: number**2 for number in range(6)
    }
    assert (tmp_path / "tried 3").exists()


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(300)
def test_what_ends_every_worker_is_given_up(capsys: Captured) -> None:
    """The others are done, and what Ray says about it stays out of the output, which is the report's."""

    def make() -> Callable[[int], int]:
        def work(item: int) -> int:
            if item == 1:
                os._exit(1)
            return item

        return work

    args = argparse.Namespace(ray="local", workers=2, device="cpu")
    found = dict(spread(args, range(4), make, lost=lambda item, why: (item, why)))
    assert {number: found[number] for number in (0, 2, 3)} == {0: 0, 2: 2, 3: 3}
    assert found[1][0] == 1
    assert "every worker that began it died" in found[1][1]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("when", ["made", "at work"])
def test_an_error_in_a_worker_is_the_error(when: str) -> None:
    """Of its own class and words, as without Ray."""

    def make() -> Callable[[int], int]:
        def work(item: int) -> int:
            raise FileExistsError(f"{item} is there.")

        if when == "made":
            raise FileExistsError("0 is there.")
        return work

    args = argparse.Namespace(ray="local", workers=1, device="cpu")
    with pytest.raises(FileExistsError, match=r"^0 is there\.$"):
        dict(spread(args, range(1), make, lost=lambda item, why: item))


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
