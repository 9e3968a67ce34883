"""What `zoo export` leaves: files of every precision that do what their model does, READMEs that run, or nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fresh_process
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
from exported import Restorer
from image_sets import picture
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from zoo.export import ExportError, aoti, check, target
from zoo.export.artefact import Artefact, check_runtime, write_artefact
from zoo.export.network import Network, compare, fixed, prepare
from zoo.export.openvino import metadata, runner
from zoo.export.readme import readme

from zoo.cli import main
from zoo.engines import ENGINES
from zoo.pictures.eight_bit import read_eight_bit


class Classifier(nn.Module):
    """As small as a classifier with timm's facts can be; takes images of any size."""

    num_classes = 3
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(
        input_size=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_pct=0.8, interpolation="bicubic",
        fixed_input_size=False, label_names=("ant", "bee", "cat"),
    )  # fmt: skip

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        if channels == 1:
            gray: dict[str, Any] = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))
            self.pretrained_cfg = {**self.pretrained_cfg, **gray}  # type: ignore[misc]
        self.stem, self.body = nn.Conv2d(channels, 16, 4, stride=4), nn.Conv2d(16, 16, 3, padding=1)
        self.mixer, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu()).relu()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(x.mean((2, 3))).relu() * 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        picture(index, index, 40 + index).save(folder / f"{index}.png")
    return folder


def run_snippet(artefact: Artefact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the Python of a README in the folder of the file, and return what it prints."""
    (code,) = re.findall(r"^```python\n(.*?)^```", artefact.readme.read_text(), re.M | re.S)
    monkeypatch.chdir(artefact.path.parent)
    script = artefact.path.parent / "snippet.py"
    script.write_text(code)
    capsys.readouterr()
    runpy.run_path(str(script))
    return capsys.readouterr().out


def test_pictures_go_in_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any size of uint8 in, probabilities out: what timm's own preparation and the model give, at its temperature."""
    model = Classifier()
    model.pretrained_cfg = {**model.pretrained_cfg, "temperature": 0.5}
    found = write_artefact(model, tmp_path / "pictures.onnx", format="onnx", with_preprocess=True, name="mine")
    session = onnxruntime.InferenceSession(str(found.path), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("picture", "tensor(uint8)", ["batch", "height", "width", 3])
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    for size in ((70, 45), (31, 33), (32, 400)):
        photo = picture(1, 2, max(size)).resize(size)
        with torch.no_grad():
            expected = (model(transform(photo)[None]) / 0.5).softmax(-1).numpy()
        assert session.run(None, {"picture": np.asarray(photo)[None]})[0] == pytest.approx(expected, abs=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == ["ant", "bee", "cat"]
    text = found.readme.read_text()
    assert "Labels: 3" in text
    assert "any size, scaled and cropped inside" in text
    probability = float(run_snippet(found, monkeypatch, capsys).split()[1])
    with torch.no_grad():
        expected = (model(transform(Image.new("RGB", (69, 45), "gray"))[None]) / 0.5).softmax(-1).numpy()
    assert probability == pytest.approx(expected.max(), abs=1e-4)


@pytest.mark.parametrize("way", ["center", "gray", "gray border", "fixed border"])
def test_probabilities_of_a_readme_are_those_of_the_weights(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits leave a file as they are; the weights' temperature and threshold stand in its metadata and README.

    A photo that its camera turned is read as zoo reads it.
    """
    model = Classifier(1 if "gray" in way else 3)
    crop = {"crop_mode": "border" if "border" in way else "center"}
    model.pretrained_cfg = {**model.pretrained_cfg, "temperature": 0.25, "threshold": 0.9, **crop}
    inside: dict[str, Any] = {"with_preprocess": True} if "fixed" in way else {}
    found = write_artefact(model, tmp_path / "logits.pt2", format="torch-export", check=False, **inside)
    facts = target("torch-export").metadata(found.path)
    assert (facts["temperature"], facts["threshold"]) == ("0.25", "0.9")
    text = found.readme.read_text()
    assert inside or "before softmax, to be divided by 0.25 first" in text
    assert "Below a probability of 0.9 none of the classes is likely" in text
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    turned = picture(1, 2, 90).resize((90, 60))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "photo.jpg", exif=exif)
    (yours,) = re.findall(r"# yours, of 8 bits: (.*)", text)
    found.readme.write_text(re.sub(r'Image.new\(.*, "gray"\)', yours, text))
    with torch.no_grad():
        seen = read_eight_bit(tmp_path / "photo.jpg", "L" if "gray" in way else "RGB")
        expected = (model(transform(seen)[None]) / 0.25).softmax(-1)
    probability = float(run_snippet(found, monkeypatch, capsys).split()[1])
    assert probability == pytest.approx(float(expected.max()), abs=1e-4)


def test_maps_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backbone with `features_only`: all its maps, at any size, with channels and reductions in the metadata."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2), in_chans=1).eval()
    artefact = write_artefact(model, tmp_path / "maps.pt2", format="torch-export")
    facts, run = target("torch-export").metadata(artefact.path), target("torch-export").runner(artefact.path)
    assert (facts["kind"], facts["channels"], facts["reductions"]) == ("features", "[32, 48]", "[4, 8]")
    assert facts["input"].startswith("gray image in [0, 1]")
    x = torch.rand(2, 1, 64, 96)
    with torch.no_grad():
        for found, expected in zip(run({"image": x}), model(x), strict=True):
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert "maps of features, one after the other; channels 32, 48; reductions 4, 8." in artefact.readme.read_text()
    assert run_snippet(artefact, monkeypatch, capsys).startswith("[(1, 32, ")


def test_the_number_of_outputs_counts() -> None:
    model = Classifier().eval()
    with pytest.raises(ExportError, match="The file returns 2 outputs, the model 1"):
        compare(lambda inputs: [torch.zeros(1, 3)] * 2, model)


class Several(Classifier):
    """Returns more than logits, in whatever it is told."""

    kind: ClassVar[Any] = dict

    def forward(self, x: Tensor) -> Any:
        logits = self.forward_head(self.forward_features(x))
        return {"out": logits, "aux": x.mean()} if self.kind is dict else self.kind((logits, x.mean()))


class Plain(nn.Module):
    """A user's own: no facts about its images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def test_what_a_model_does_not_say_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    """Size and normalisation are the user's; timm's usual crop and scaling are those of `zoo classify`."""
    model, options = Plain().eval(), dict(format="torch-export", kind="classifier")
    with pytest.raises(ValueError, match="Plain does not say which images it is for: give image_size"):
        write_artefact(model, tmp_path / "x.pt2", **options)
    for more in (dict(with_preprocess=True), dict(format="onnx", precision="int8", data=photos)):
        with pytest.raises(ValueError, match="does not say how its images are normalised: set its pretrained_cfg"):
            write_artefact(model, tmp_path / "x.pt2", **{**options, "image_size": 32, **more})
    assert not list(tmp_path.iterdir())
    plain = write_artefact(model, tmp_path / "x.pt2", image_size=32, **options)
    assert "normalised as in training" in plain.readme.read_text()
    assert run_snippet(plain, monkeypatch, capsys).strip() == "[(1, 3)]"
    model.pretrained_cfg = dict(input_size=(3, 32, 32), mean=(0.4,) * 3, std=(0.2,) * 3)
    facts = prepare(model, kind="classifier").metadata
    usual = resolve_model_data_config(model)
    assert (facts["crop_pct"], facts["interpolation"]) == (str(usual["crop_pct"]), usual["interpolation"])


class Counted(Restorer):
    """Counts images as a number, as SwinIR does its windows: a graph holds that of its example."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(int(x.shape[0] / 1), *x.shape[1:]))


@pytest.mark.parametrize("pictures", [True, False])
def test_a_graph_for_one_image_where_more_cannot_be(
    pictures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options = Counted().eval(), dict[str, Any](format="torch-export", with_preprocess=pictures)
    with pytest.raises(ExportError, match="images of one size it may take"):
        write_artefact(model, tmp_path / "x.pt2", **options)
    assert not list(tmp_path.iterdir())
    found = write_artefact(model, tmp_path / "x.pt2", dynamic_size=False, image_size=24, **options)
    assert found.note == "The file takes one image at a time: the network cannot leave their number open."
    assert f"(1, {'24, 24, 3' if pictures else '3, 24, 24'})" in found.readme.read_text()
    run_snippet(found, monkeypatch, capsys)
    assert Image.open(tmp_path / "restored.png").size == (24, 24)
    assert not write_artefact(Restorer(), tmp_path / "y.pt2", dynamic_size=False, image_size=24, **options).note


@pytest.mark.parametrize("kind", [dict, tuple, list])
@pytest.mark.parametrize("restores", [True, False])
def test_several_outputs_are_refused_before_they_are_compiled(tmp_path: Path, kind: Any, restores: bool) -> None:
    model = Several()
    model.kind = kind
    with pytest.raises(ExportError, match=rf"^Several returns a {kind.__name__}, not one tensor: export a module"):
        write_artefact(model, tmp_path / "a.pt2", format="torch-export", kind="restorer" if restores else "classifier")
    assert not (tmp_path / "a.pt2").exists()


def test_a_model_that_changes_with_its_calls_is_found_at_one_size() -> None:
    class Counting(Classifier):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    model = Counting().eval()
    assert compare(lambda inputs: [super(Counting, model).forward(inputs["image"])], model, one=True) > 0.1
    plain = Classifier().eval()
    assert compare(lambda inputs: [plain(inputs["image"])], plain, one=True) == 0


def test_squashed_and_fixed(tmp_path: Path) -> None:
    """Another way to crop; with one size only, pictures come as the network sees them."""
    model = Classifier()
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash", "interpolation": "bilinear"}
    options: dict[str, Any] = {"format": "torch-export", "with_preprocess": True}
    found = write_artefact(model, tmp_path / "squashed.pt2", **options)
    assert found.max_error is not None
    assert found.max_error < 1e-4
    fixed = write_artefact(model, tmp_path / "fixed.pt2", dynamic_size=False, **options)
    program = torch.export.load(fixed.path).module()
    assert program(picture=torch.zeros(3, 32, 32, 3, dtype=torch.uint8)).shape == (3, 3)
    assert "32 x 32 pixels, scaled and cropped before" in fixed.readme.read_text()


def test_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files and a README; the facts are in it; the file does what the model does at other sizes."""
    model = Restorer()
    found = write_artefact(model, tmp_path / "new" / "restorer.xml", format="openvino", precision="fp16", name="mine")
    names = ["restorer.bin", "restorer.xml", "restorer.xml.md"]
    assert sorted(path.name for path in found.path.parent.iterdir()) == names
    assert metadata(found.path)["name"] == "mine"
    assert check(found.path, model, format="openvino") < 2e-3
    other = Restorer()
    with torch.no_grad():
        other.last.bias += 5.0
    assert check(found.path, other, format="openvino") > 1e-2, "the check can fail"
    with pytest.raises(ExportError, match="cannot be run on") as caught:
        runner(found.path)({"image": torch.zeros(1, 4, 8, 8)})
    assert "\n" not in str(caught.value)
    run_snippet(found, monkeypatch, capsys)
    assert Image.open(found.path.parent / "restored.png").size[0] % 4 == 0
    plain = openvino.Core().read_model(str(found.path))
    kinds = {str(op.get_element_type()) for op in plain.get_ops() if op.get_type_name() == "Constant"}
    assert any("float16" in kind or "f16" in kind for kind in kinds)


def test_compiled_library_is_for_what_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"format": "aoti", "image_size": 24}
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        write_artefact(Restorer(), tmp_path / "library.so", **options)
    with pytest.raises(ValueError, match="must be a multiple of 4, 4 or more; got 22"):
        write_artefact(Restorer(), tmp_path / "library.pt2", **{**options, "image_size": 22})
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ImportError, match=r"C\+\+ compiler"):
        write_artefact(Restorer(), tmp_path / "library.pt2", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiled_library(tmp_path: Path) -> None:
    """For one image of one size: the library itself would compute nonsense from another.

    In a process of its own: compiled code that fails ends the process, and says nothing here.
    """
    done = fresh_process.run(COMPILED, str(Path(__file__).parent), cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert Image.open(tmp_path / "restored.png").size == (24, 24)


COMPILED = """
import re, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from exported import Restorer
from zoo.export import ExportError, aoti
from zoo.export.artefact import write_artefact

found = write_artefact(Restorer(), "library.pt2", format="aoti", image_size=24, name="mine", with_preprocess=True)
assert found.max_error <= 1 / 255, found.max_error
facts = aoti.metadata(found.path)
assert facts["name"] == "mine", facts
try:
    aoti.runner(found.path)({"picture": torch.zeros(2, 24, 24, 3, dtype=torch.uint8)})
except ExportError as error:
    assert "takes {'picture': [1, 24, 24, 3]}, got picture (2, 24, 24, 3)" in str(error), error
else:
    raise AssertionError("another shape was taken")
(code,) = re.findall(r"^```python\\n(.*?)^```", found.readme.read_text(), re.M | re.S)
exec(code, {})
aoti.instructions = lambda: ("sse2",)  # a processor of before
try:
    aoti.runner(found.path)
except ExportError as error:
    assert re.search("was compiled for a processor with .*avx.*, unlike this one", str(error)), error
else:
    assert not any("avx" in name for name in facts["instructions"].split()), "code that this processor cannot run"
"""


@pytest.mark.parametrize("format", ["aoti", "executorch"])
@pytest.mark.parametrize("kind", ["classifier", "restorer"])
def test_a_readme_gives_memory_as_these_runtimes_read_it(
    format: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read a picture's channels from where the example's were, whatever the strides, and compute nonsense."""
    given: list[Tensor] = []

    def program(*tensors: Tensor, **named: Tensor) -> list[Tensor]:
        (tensor,) = (*tensors, *named.values())
        given.append(tensor)
        return [torch.zeros(1, 3, 24, 24)]

    method = SimpleNamespace(execute=lambda tensors: program(*tensors))
    runtime = SimpleNamespace(load_program=lambda path: SimpleNamespace(load_method=lambda name: method))
    stub = SimpleNamespace(Runtime=SimpleNamespace(get=lambda: runtime))
    monkeypatch.setitem(sys.modules, "executorch", SimpleNamespace(runtime=stub))
    monkeypatch.setitem(sys.modules, "executorch.runtime", stub)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: program)
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "0")
    model: nn.Module = Restorer() if kind == "restorer" else Classifier(1 if kind == "gray classifier" else 3)
    network = fixed(prepare(model, image_size=24))
    text = readme(network, format=format, file="file", precision="fp32", difference="no")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert given[0].is_contiguous()
    assert given[0].dtype == torch.float32
    assert os.environ["AOTI_RUNTIME_CHECK_INPUTS"] == ("1" if format == "aoti" else "0")


def test_a_library_is_given_memory_as_it_was_compiled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By zoo itself too, and no other type."""
    given: list[Tensor] = []
    facts = {"shapes": json.dumps({"x": [1, 3, 4, 4]}), "types": json.dumps({"x": "float32"})}

    class Library:
        def get_metadata(self) -> dict[str, str]:
            return facts

        def __call__(self, *tensors: Tensor, **named: Tensor) -> Tensor:
            given.extend((*tensors, *named.values()))
            return torch.zeros(1)

    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: Library())
    (tmp_path / "x.pt2").write_bytes(b"")
    (tmp_path / "model.pt2").write_bytes(b"")
    x = torch.rand(1, 3, 4, 4).to(memory_format=torch.channels_last)
    run = aoti.runner(tmp_path / "x.pt2")
    run({"x": x})
    ENGINES["inductor"].load(tmp_path, None, 1)([x])
    for found in given:
        assert found.is_contiguous()
        assert torch.equal(found, x)
    assert len(given) == 2
    with pytest.raises(ExportError, match=r"takes \{'x': 'float32'\}, got x float64"):
        run({"x": x.double()})
    network = Network(
        module=nn.Identity(), inputs={"x": x}, output="", dynamic_shapes={}, metadata={}, by_position=True
    )
    assert network.arguments[0][0].is_contiguous(), "the example"


def test_half_precision_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    model = Classifier()
    found = write_artefact(model, tmp_path / "half.onnx", format="onnx", precision="fp16")
    graph = onnx.load(found.path).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    weights = [value for value in graph.initializer if len(value.dims) > 1]
    assert {value.data_type for value in weights} == {onnx.TensorProto.FLOAT16}
    assert found.max_error is not None
    assert 0 < found.max_error < 2e-2
    assert next(model.parameters()).dtype == torch.float32, "the model itself stays as it was"
    half = write_artefact(model, tmp_path / "half.pt2", format="torch-export", precision="bf16")
    program = torch.export.load(half.path)
    assert torch.bfloat16 in {value.dtype for value in program.state_dict.values()}
    assert program.module()(image=torch.zeros(2, 3, 32, 32)).dtype == torch.float32


def test_what_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.export.artefact.compare", lambda *args, **kwargs: 0.5)
    with pytest.raises(ExportError, match=r"by 5\.0e-01 of the largest output") as caught:
        write_artefact(Restorer(), tmp_path / "new" / "x.pt2", format="torch-export")
    assert "--no-check" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["classifier", "gray classifier", "restorer"])
def test_int8(kind: str, photos: Path, tmp_path: Path) -> None:
    """First and last layer stay in float; the loss on held-out pictures is told, and stands in the README."""
    model: nn.Module = Restorer() if kind == "restorer" else Classifier(1 if kind == "gray classifier" else 3)
    with_preprocess = kind == "restorer"
    found = write_artefact(
        model, tmp_path / "int8.onnx", format="onnx", precision="int8", data=photos, with_preprocess=with_preprocess
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "int8.onnx.md"]
    graph = onnx.load(found.path).graph
    assert sum(value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1 for value in graph.initializer) >= 1
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    weights = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    assert layers[0].input[1] in weights
    assert layers[-1].input[1] in weights
    assert found.loss["pictures"] == 3
    assert found.loss["lines"][0] in found.readme.read_text()
    if kind != "restorer":
        assert 0 < found.loss["relative_error"] < 0.2
        assert 0 <= found.loss["agreeing_top1"] <= 1
    else:
        assert abs(found.loss["lost_db"]) < 1
    facts = {entry.key: entry.value for entry in onnx.load(found.path).metadata_props}
    assert facts["kind"] == kind.removeprefix("gray ")


def test_what_costs_most_stays_in_float(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all layers lose too much, each is measured alone, and those that cost most are left out, up to a half."""
    monkeypatch.setattr("zoo.export.int8._MAX_LOSS", {"dB": 0.0, "relative": 0.0})
    monkeypatch.setattr("zoo.export.int8._FRACTIONS", (0.0, 0.5))
    found = write_artefact(Classifier(), tmp_path / "int8.onnx", format="onnx", precision="int8", data=photos)
    all_int8, half = found.loss["curve"]
    assert (all_int8["int8"], half["int8"]) == (2, 1)
    assert half["relative_error"] < all_int8["relative_error"]
    assert len(found.loss["layers_in_float"]) == 3


def test_int8_of_what_hardly_varies(photos: Path, tmp_path: Path) -> None:
    """A branch of zeros and tiny numbers, as freshly built networks have, has no histogram."""
    model = Classifier()
    with torch.no_grad():
        model.body.weight *= 1e-43
        model.body.bias.zero_()
    found = write_artefact(model, tmp_path / "int8.onnx", format="onnx", precision="int8", data=photos)
    assert found.loss["agreeing_top1"] == 1


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond a size in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_a_full_disk_leaves_nothing(format: str, suffix: str, tmp_path: Path) -> None:
    model = Restorer()
    model.middle = nn.Conv2d(48, 2048, 1)
    model.last = nn.Conv2d(2048, 48, 1)
    with small_disk(100_000), pytest.raises((OSError, ExportError)) as caught:
        write_artefact(model, tmp_path / "new" / f"model{suffix}", format=format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--format", "onxx"],
            "'onxx' is not a --format. Did you mean onnx? Choices: onnx, torch-export, openvino, aoti, executorch.",
        ),
        (["--format", "onnx", "--precision", "bf16"], "no bf16: ONNX Runtime has no bfloat16 convolutions"),
        (["--format", "openvino", "--precision", "bf16"], "OpenVINO takes bfloat16 when a model is loaded"),
        (["--format", "onnx", "--precision", "int8"], "--precision int8 needs --data DIR"),
        (["--format", "onnx", "--precision", "int8", "--data", "empty"], "under empty"),
        (["--format", "onnx", "--precision", "int8", "--data", "none"], "there is no folder none"),
        (["--format", "onnx", "--data", "empty"], "--data belongs to --precision int8; this is fp32"),
        (["--format", "openvino"], "ends in .xml for openvino, got 'x.onnx'"),
        (["--format", "onnx", "--model-args", "nonsense=1"], "has no argument 'nonsense'"),
        (["--format", "onnx", "--image-size", "31"], "31"),
    ],
)
def test_refusals_leave_nothing(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line before any work, and no empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["export", "repavit_tiny.cifar10", *options, "-o", "new/deep/x.onnx"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_missing_runtime_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "openvino" else real(name, *a))
    out = tmp_path / "new" / "x.xml"
    assert main(["export", "repavit_tiny.cifar10", "--format", "openvino", "-o", str(out)]) != 0
    assert "needs openvino, which is missing: pip install 'ffn-zoo[openvino]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_runtime_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.12 cannot be opened')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    said = r"needs onnxruntime, which is here but cannot be imported \(libcudart.so.12 cannot be opened\): pip install"
    with pytest.raises(ImportError, match=said):
        check_runtime("onnx")
    check_runtime("torch-export")


def test_files_beside_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README and the weights of OpenVINO count as outputs."""
    for name, format in (("x.onnx.md", "onnx"), ("x.bin", "openvino")):
        (tmp_path / name).write_text("mine")
        out = tmp_path / {"onnx": "x.onnx", "openvino": "x.xml"}[format]
        assert main(["export", "repavit_tiny.cifar10", "--format", format, "-o", str(out)]) == 2
        assert f"{name} exists; --force" in capsys.readouterr().err.replace("\n", "")
