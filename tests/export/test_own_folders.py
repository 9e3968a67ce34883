"""What is exported of a user's own folder, in every family: network and metadata tell what `zoo classify` tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exported import own_folder, told, told_by_graph
from image_sets import picture
from registered import BACKBONES
from zoo.export import export
from zoo.export.network import prepare

import zoo
from zoo.cli import main


@pytest.mark.parametrize("family", BACKBONES)
def test_own_models_of_all_families(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is exported of a user's folder, the merged network and its metadata, tells pictures as zoo classify does.

    That the file computes what the network does is tested beside this; one family goes through the file here, too.
    """
    folder, files = own_folder(family, tmp_path / "mine"), [tmp_path / f"{index}.png" for index in range(2)]
    for index, file in enumerate(files):
        picture(index, index, 70).save(file)
    network = prepare(zoo.create_model(folder))
    answers = [told(network.module, network.metadata, files)]
    if family == "repavit":
        answers.append(told_by_graph(export(zoo.create_model(folder), tmp_path / "model.onnx", format="onnx"), files))
    assert main(["classify", *map(str, files), "--model", str(folder), "--topk", "3", "--json"]) == 0
    for result in json.loads(capsys.readouterr().out)["results"]:
        expected = {entry["label"]: entry["probability"] for entry in result["top"]}
        for answer in answers:
            assert answer[result["file"]] == pytest.approx(expected, abs=3e-5)
