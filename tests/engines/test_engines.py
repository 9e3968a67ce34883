"""Engines compute what their models do, are kept on disk, notice changed weights, and refuse in one line."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from registered import build, images, relative
from torch import Tensor, nn
from zoo.export import ExportError, export
from zoo.export.network import prepare

import zoo
from zoo.cli.inputs import ENGINES as CLI_ENGINES
from zoo.engines import ENGINE_NAMES, EngineCall, EngineError, attach, call, check_engine, detach, engine_of
from zoo.engines.runtimes import installed
from zoo.engines.store import engines_dir, fingerprint
from zoo.engines.watch import Watched
from zoo.pictures import plans
from zoo.pictures.engine import engine_if_worthwhile
from zoo.pictures.plans import spans
from zoo.pictures.tiling import restore_tensor

pytestmark = [
    pytest.mark.slow,  # exports: some seconds for each new graph
    pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the export extra"),
]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the openvino extra")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines of these tests go to a folder of their own, and are built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(tmp_path_factory.mktemp("zoo")))
        yield engines_dir()


@pytest.fixture
def restorer() -> tuple[nn.Module, Tensor]:
    return zoo.accelerate(build("cfsr")), images("cfsr")


class Opaque(nn.Module):
    """Takes and returns more than one tensor, by name, with an argument that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, other: Tensor, factor: float = 1.0) -> dict[str, Any]:
        return {"sum": self.linear(x) + other, "rest": (x * factor, None)}


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


@torch.no_grad()
def test_onnxruntime_is_the_model_with_another_forward(
    restorer: tuple[nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size from one artefact; all else of the model stays; copies and pickles run too."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))  # of its own: other tests build in that of the module
    folder, (model, x) = engines_dir(), restorer
    twin = copy.deepcopy(model)
    assert zoo.accelerate(model, engine="onnxruntime") is model
    assert model.zoo_report.steps[-1].name == "engine"
    for image in (x, x[:1], x[..., :13, :], torch.rand(3, 3, 5, 40)):
        assert relative(model(image), twin(image)) < 1e-4
    artefacts = [path for path in folder.iterdir() if path.is_dir()]
    assert len(artefacts) == 1
    assert sorted(path.name for path in artefacts[0].iterdir()) == ["facts.json", "model.onnx"]
    assert "ONNX Runtime: built in" in str(model.zoo_report)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert (model.scale, model.receptive_field) == (twin.scale, twin.receptive_field)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert engine_of(again) is not None
        assert engine_of(again).model is again
        assert relative(again(x), twin(x)) < 1e-4
    zoo.accelerate(model, engine="eager")
    assert engine_of(model) is None
    assert torch.equal(model(x), twin(x))


@needs_openvino
@torch.no_grad()
def test_openvino_reads_the_same_file(restorer: tuple[nn.Module, Tensor], folder: Path) -> None:
    model, x = restorer
    expected = model(x)
    attach(model, "onnxruntime")(x)
    before = {path.name for path in folder.iterdir()}
    attach(model, "openvino")
    assert relative(model(x), expected) < 1e-4
    assert {path.name for path in folder.iterdir()} == before
    attach(model, "openvino", dynamic=True)
    assert relative(model(x[:1]), expected[:1]) < 1e-4


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")), reason="needs a C++ compiler"
)
@pytest.mark.timeout(900)  # of the compiler, where others use the processor
def test_inductor(tmp_path: Path) -> None:
    """In a process of its own: what the compiler loads stays out of the other tests'."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths}; import test_engines; test_engines.check_inductor()"
    env = {**os.environ, "ZOO_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def check_inductor() -> None:
    """Compiled for a shape at its first call, loaded from disk after that; structured results as they are."""
    torch.manual_seed(0)
    model, x, other = Opaque().eval(), torch.rand(2, 3), torch.rand(3)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    zoo.accelerate(model, engine="inductor", threads=1)
    found, expected = model(x, other=other, factor=2.0), twin(x, other=other, factor=2.0)
    assert relative(found["sum"], expected["sum"]) < 1e-4
    assert relative(found["rest"][0], expected["rest"][0]) < 1e-4
    assert found["rest"][1] is None
    assert "PyTorch's inductor: built in" in str(model.zoo_report)
    zoo.accelerate(twin, engine="inductor", threads=1)
    assert relative(twin(x, other=other, factor=2.0)["sum"], expected["sum"]) < 1e-4
    assert "built in" not in str(twin.zoo_report)

    def build(*args: object) -> None:
        raise EngineError("built anew")

    call.ENGINES["inductor"] = dataclasses.replace(call.ENGINES["inductor"], build=build)
    call.instructions = lambda: ("others",)  # of another processor, with the same folder of engines
    zoo.accelerate(third, engine="inductor", threads=1)
    with pytest.raises(EngineError, match="built anew"):
        third(x, other=other, factor=2.0)


@torch.no_grad()
def test_auto_takes_the_fastest_and_remembers(
    restorer: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine does: what is said to be fastest is taken, eager unless another is clearly faster."""
    model, x = restorer
    expected = model(x)
    said: list[str] = []
    attach(model, "auto", candidates=["onnxruntime"], told=said.append)
    monkeypatch.setattr(call, "_in_turns", lambda calls: {name: 1.0 if name == "eager" else 0.99 for name in calls})
    assert torch.equal(model(x), expected)
    assert "auto takes eager for 2x3x16x16" in said[-1]
    monkeypatch.setattr(call, "_in_turns", lambda calls: {name: 1.0 if name == "eager" else 0.5 for name in calls})
    assert relative(model(x[:1]), expected[:1]) < 1e-4
    assert "auto takes onnxruntime for 1x3x16x16" in said[-1]
    monkeypatch.setattr(call, "_in_turns", lambda calls: pytest.fail("timed again"))
    attach(model, "auto", candidates=["onnxruntime"], told=said.append)
    model(x[:1])
    assert "auto takes onnxruntime" in said[-1]
    assert "as timed before" in said[-1]


@torch.no_grad()
def test_timing_is_in_turns() -> None:
    order: list[str] = []
    times = call._in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[:6] == ["a", "b"] * 3
    assert times.keys() == {"a", "b"}


@torch.no_grad()
def test_any_call_of_any_module() -> None:
    """Tensors by name, structured results, arguments that are no tensors; weights changed later are noticed."""
    torch.manual_seed(0)
    model = Opaque().eval()
    twin = copy.deepcopy(model)
    x, other = torch.rand(2, 3), torch.rand(3)
    zoo.accelerate(model, engine="onnxruntime")
    for _ in range(2):
        found, expected = model(x, other=other, factor=2.0), twin(x, other=other, factor=2.0)
        assert relative(found["sum"], expected["sum"]) < 1e-4
        assert relative(found["rest"][0], expected["rest"][0]) < 1e-4
        assert found["rest"][1] is None
    for each in (model, twin):
        each.linear.weight.mul_(2.0)
    assert relative(model(x, other=other, factor=2.0)["sum"], twin(x, other=other, factor=2.0)["sum"]) < 1e-4


@torch.no_grad()
def test_a_wrong_engine_is_not_used(
    restorer: tuple[nn.Module, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is refused, by name or by auto; a damaged artefact is built anew."""
    model, x = restorer
    attach(model, "onnxruntime")(x)
    for path in folder.glob("*/facts.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "checked": {}}))
    runtime = call.ENGINES["onnxruntime"]
    load = runtime.load

    def wrong(*args: Any) -> Any:
        run = load(*args)
        return lambda inputs: [1.01 * output for output in run(inputs)]

    object.__setattr__(runtime, "load", wrong)
    try:
        with pytest.raises(EngineError, match=r"differs from CFSR itself by 1\.\de-02 .*: not used"):
            attach(model, "onnxruntime")(x)
        said: list[str] = []
        attach(model, "auto", candidates=["onnxruntime"], told=said.append)
        model(x[..., :7])
        assert "auto takes eager" in said[-1]
        assert "not used" in said[-1]
    finally:
        object.__setattr__(runtime, "load", load)
    built: list[str] = []
    for path in folder.glob("*/model.onnx"):
        path.write_bytes(path.read_bytes()[:-100])
    attach(model, "onnxruntime", told=built.append)(x)
    assert "built in" in built[0]


@torch.no_grad()
def test_auto_does_not_remember_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays eager for now, and times anew once there is space."""

    def full(*args: Any) -> Any:
        raise call._not_kept(folder, OSError(28, "No space left on device")) from OSError(28)

    model, x, said = nn.Linear(5, 5).eval(), torch.rand(1, 5), list[str]()
    attach(model, "auto", candidates=["onnxruntime"], told=said.append)
    monkeypatch.setattr(EngineCall, "_build", full)
    assert torch.equal(model(x), nn.functional.linear(x, model.weight, model.bias))
    assert "auto takes eager for 1x5" in said[-1]
    assert "No space left on device" in said[-1]
    attach(model, "auto", candidates=["onnxruntime"], told=said.append)(x)
    assert "as timed before" not in said[-1]


class _PadsInside(nn.Module):
    """A user's own restorer of any size, which says nothing of what it pads to."""

    scale = 1

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 8, 8), nn.ConvTranspose2d(4, 3, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        y = nn.functional.pad(x, (0, -width % 8, 0, -height % 8), mode="reflect")
        return x + self.up(self.down(y))[..., :height, :width]


@torch.no_grad()
def test_a_network_that_cannot_be_open_gets_a_graph_for_each_size(tmp_path: Path) -> None:
    """Engines fall back to it, and look for it first; a file says how one size is asked for."""
    torch.manual_seed(0)
    model, x = _PadsInside().eval(), torch.rand(1, 3, 12, 20)
    twin, built = copy.deepcopy(model), list[str]()
    assert relative(attach(model, "onnxruntime", told=built.append)(x), twin(x)) < 1e-4
    attach(model, "onnxruntime", told=built.append)(x)
    assert sum("built in" in words for words in built) == 1
    with pytest.raises(ExportError, match=r"Height and width were open; images of one size it may take"):
        export(model, tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_cannot_be_copied() -> None:
    model = nn.Linear(3, 3).eval()
    model.helper = sys  # as offloading leaves modules and locks
    attach(model, "onnxruntime")
    with pytest.raises(EngineError, match=r"A copy of Linear cannot be made \(.+\): take off what was put on it"):
        model(torch.ones(1, 3))
    attach(model, "auto", candidates=["onnxruntime"])
    model(torch.ones(1, 3))


def test_operators_that_are_lacking(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    model = Untraceable().eval()
    attach(model, "onnxruntime")
    with pytest.raises(EngineError, match="ONNX Runtime cannot run Untraceable") as caught, torch.no_grad():
        model(torch.ones(1, 3))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing half-written"
    assert capfd.readouterr() == ("", ""), "the exporter's graph is kept out of the way"


def test_inference_only() -> None:
    model = attach(Opaque().eval(), "onnxruntime").model
    with pytest.raises(RuntimeError, match="has no gradients"):
        model(torch.rand(1, 3, requires_grad=True), other=torch.rand(3))
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode: call eval\(\)"):
        model(torch.rand(1, 3), other=torch.rand(3))


def test_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CLI_ENGINES) == set(ENGINE_NAMES)
    with pytest.raises(ValueError, match=r"got 'onxruntime'\. Did you mean onnxruntime\?"):
        zoo.accelerate(nn.Linear(2, 2), engine="onxruntime")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"runs float32; this Linear is bfloat16"):
        attach(nn.Linear(2, 2).eval().bfloat16(), "onnxruntime")
    with pytest.raises(ValueError, match="training mode"):
        attach(nn.Linear(2, 2), "onnxruntime")
    with pytest.raises(ValueError, match="runs float32, not bfloat16"):
        zoo.accelerate(nn.Linear(2, 2), engine="onnxruntime", dtype="bfloat16")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(ImportError, match=r"openvino is missing: pip install 'ffn-zoo\[openvino\]'"):
        check_engine("openvino")


def test_a_damaged_runtime_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.12 cannot be opened')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(ImportError, match=r"onnxruntime is here but cannot be imported \(libcudart.so.12 cannot be op"):
        check_engine("onnxruntime")
    assert "onnxruntime" not in installed()
    assert "eager" in installed()


def test_fingerprint_sees_more_than_weights() -> None:
    """An attribute, a module in place of another, a buffer that is in no state dict."""
    first, second = build("cfsr"), build("cfsr")
    assert fingerprint(first) == fingerprint(second)
    second.layers[0].blocks[0].ffn.halo = 2
    assert fingerprint(first) != fingerprint(second)
    second = build("cfsr")
    second.mean.add_(0.1)
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.Sequential(nn.GELU()))


@torch.no_grad()
def test_tiles_side_by_side_are_the_same(restorer: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, all of one shape, with the result of the whole map."""
    model, x = restorer[0], torch.rand(1, 3, 70, 90)
    expected = model(x)
    attach(model, "onnxruntime")
    threads = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    found = restore_tensor(model, x, tile=50, exact=True, progress=lambda done, total: seen.append((done, total)))
    assert relative(found, expected) < 1e-4
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    assert len(seen) > 4
    assert torch.get_num_threads() == threads
    ready: list[int] = []  # shapes, each time that memory is counted: what builds an engine stays in memory
    monkeypatch.setattr(plans, "held_bytes", lambda device: ready.append(len(engine_of(model)._ready)) or 10**8)
    attach(model, "onnxruntime")
    restore_tensor(model, x, budget="8GB")
    assert ready
    assert min(ready) > 0
    detach(model)
    lengths = {span.seen[1] - span.seen[0] for span in spans((0, 20, 41, 62, 70), 9, False, alike=True)}
    assert len(lengths) == 1
    assert all(0 <= span.seen[0] <= span.kept[0] for span in spans((0, 20, 41, 62, 70), 9, False, alike=True))


def test_worthwhile_only_where_it_takes_long(restorer: tuple[nn.Module, Tensor]) -> None:
    model = restorer[0]
    assert engine_if_worthwhile(model, (64, 64), worthwhile=1e9) == ""
    assert engine_of(model) is None
    assert "minutes in eager mode" in engine_if_worthwhile(model, (64, 64), worthwhile=0.0)
    assert engine_of(model) is not None
    assert engine_if_worthwhile(build("restormer"), (64, 64), worthwhile=0.0) == "", "it streams"


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.config, self._gain, self.table = {"factor": 1.0}, 1.0, torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.config["factor"] * self._gain * self.table


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Sequential(_Part(), nn.Sequential(nn.Linear(4, 4))))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


_CHANGES: dict[str, Any] = {
    "in place through .data": lambda m: m.layers[0].weight.data.mul_(2),
    "other data": lambda m: setattr(m.layers[1][1][0].weight, "data", torch.rand(4, 4)),
    "another parameter": lambda m: setattr(m.layers[1][1][0], "weight", nn.Parameter(torch.rand(4, 4))),
    "assigned": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "in place after that": lambda m: m.layers[1][0].linear.bias.mul_(2),
    "a part deep inside": lambda m: m.layers[1].__setitem__(1, nn.Sequential(nn.Linear(4, 4))),
    "in a dictionary": lambda m: m.layers[1][0].config.update(factor=3.0),
    "a private attribute": lambda m: setattr(m.layers[1][0], "_gain", 5.0),
    "a tensor that is no buffer": lambda m: m.layers[1][0].table.mul_(2),
    "another one": lambda m: setattr(m.layers[1][0], "table", torch.rand(4)),
    "a hook inside": lambda m: m.layers[1][0].linear.register_forward_hook(lambda module, args, out: out * 2),
    "a hook of its own": lambda m: m.register_forward_hook(lambda module, args, out: out * 3),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.layers[0]),
}


@torch.no_grad()
def test_every_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is made, and in the digest too; the engine that is made then computes what the model does."""
    torch.manual_seed(0)
    model, x = _Deep().eval(), torch.rand(2, 4)
    zoo.accelerate(model, engine="onnxruntime")
    known = {fingerprint(model)}
    with monkeypatch.context() as patch:
        made: list[int] = []
        patch.setattr(EngineCall, "_obtain", lambda *args: made.append(1) or (None, None))
        model(x)
        for done, (change, make) in enumerate(_CHANGES.items(), 2):
            make(model)
            assert fingerprint(model) not in known, change
            known.add(fingerprint(model))
            model(x)
            model(x)
            assert len(made) == done, change
    eager = copy.deepcopy(model)
    detach(eager)
    zoo.accelerate(model, engine="onnxruntime")
    assert relative(model(x), eager(x)) < 1e-4


@torch.no_grad()
def test_code_that_no_digest_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a notebook or of a helper changes, the weights do not: what was kept is built anew."""
    torch.manual_seed(0)
    x = torch.rand(2, 3)

    class Told(Opaque):
        helper = staticmethod(lambda value: value)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.helper(self.linear(x))

    first, second = Told().eval(), Told().eval()
    second.load_state_dict(first.state_dict())
    zoo.accelerate(first, engine="onnxruntime")(x)
    monkeypatch.setattr(Told, "helper", staticmethod(lambda value: 2 * value))
    zoo.accelerate(second, engine="onnxruntime")
    assert relative(second(x), 2 * second.linear(x)) < 1e-4
    assert "built in" in str(second.zoo_report)


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class _Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is None:
            self.table = torch.arange(4.0)
        return self.linear(x) + self.table, torch.arange(4)


@torch.no_grad()
def test_calls_that_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count is refused and left as it was, auto stays eager; a table that is kept for the next call is none of it."""
    x, model = torch.rand(2, 4), _Counts().eval()
    zoo.accelerate(model, engine="onnxruntime")
    with pytest.raises(EngineError, match="_Counts changes its own buffers or attributes in each call"):
        model(x)
    assert model.calls == 0
    zoo.accelerate(model, engine="auto")
    for calls in (1, 2, 3):
        assert torch.equal(model(x), model.linear(x) * calls)
    keeps = _Keeps().eval()
    zoo.accelerate(keeps, engine="onnxruntime")
    assert relative(keeps(x)[0], keeps.linear(x) + torch.arange(4.0)) < 1e-4
    monkeypatch.setattr(EngineCall, "_forget", lambda self: pytest.fail("nothing changed"))
    assert torch.equal(keeps(x)[1], torch.arange(4))


class _WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.sub_(0.5).div_(2))


@torch.no_grad()
def test_calls_that_change_their_input() -> None:
    """Refused by name, eager in auto; the comparison itself leaves the input as it was."""
    model, x = _WritesInput().eval(), torch.rand(2, 4)
    twin, given = copy.deepcopy(model), x.clone()
    zoo.accelerate(model, engine="onnxruntime")
    with pytest.raises(EngineError, match="_WritesInput changes its input in each call"):
        model(given)
    assert torch.equal(given, x)
    attach(model, "auto", candidates=["onnxruntime"])
    with torch.inference_mode():
        for _ in range(2):
            given = x.clone()
            assert torch.equal(model(given), twin(x.clone()))
            assert torch.equal(given, (x - 0.5) / 2)


@torch.no_grad()
def test_a_forward_that_was_set_on_a_module() -> None:
    """It is what the engine runs, on the model and on its parts, sooner or later; it comes back after the engine."""
    torch.manual_seed(0)
    x, model = torch.rand(2, 4), nn.Sequential(nn.Linear(4, 4)).eval()
    plain = model(x)
    inner = model.forward
    model.forward = own = lambda x: 3 * inner(x)  # as wrappers of models do
    zoo.accelerate(model, engine="onnxruntime")
    assert relative(model(x), 3 * plain) < 1e-4
    assert relative(copy.deepcopy(model)(x), 3 * plain) < 1e-4
    zoo.accelerate(model, engine="eager")
    assert model.forward is own
    model.forward = model[0].forward
    zoo.accelerate(model, engine="onnxruntime")
    inner = model.forward
    model.forward = lambda x: 7 * inner(x)  # around the engine
    assert relative(model(x), 7 * plain) < 1e-4
    detach(model)
    del model.forward
    part = model[0]
    part.forward = lambda x: 2 * nn.Linear.forward(part, x)
    watched = Watched(model)
    part.forward = lambda x: 5 * nn.Linear.forward(part, x)
    assert watched.changed()
    zoo.accelerate(model, engine="onnxruntime")
    assert relative(model(x), 5 * plain) < 1e-4


@torch.no_grad()
def test_one_line_for_what_is_no_longer_float32_or_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.accelerate(nn.Linear(4, 4).eval(), engine="onnxruntime")
    with pytest.raises(EngineError, match="runs float32; an input of Linear is float16"):
        model(torch.rand(1, 4).half())
    model.half()
    with pytest.raises(EngineError, match="runs float32; this Linear is float16"):
        model(torch.rand(1, 4))
    model.float()
    model.is_cache_enabled = True  # as diffusers' models say it
    with pytest.raises(EngineError, match="A cache skips blocks of Linear, and the engine 'onnxruntime' runs"):
        model(torch.rand(1, 4))
    del model.is_cache_enabled
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be written \(.+\): set ZOO_CACHE to a folder"):
        model(torch.rand(1, 4))


class _Pads(nn.Module):
    """A classifier that pads its images to multiples of 32, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.num_classes = nn.Conv2d(3, 4, 32, 32), nn.Linear(4, 3), 3
        self.pretrained_cfg = {"input_size": (3, 100, 100), "fixed_input_size": False}

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return self.forward_head(self.conv(nn.functional.pad(x, (0, -width % 32, 0, -height % 32))))


@torch.no_grad()
def test_sizes_between_the_steps(tmp_path: Path) -> None:
    """A graph for multiples of 32 has no padding: other sizes get one of their own, in engines and in files."""
    torch.manual_seed(0)
    model = _Pads().eval()
    model.register_forward_hook(lambda module, args, output: 2 * output)  # of its own: runs around the engine
    twin = copy.deepcopy(model)
    attach(model, "onnxruntime")
    for size in (64, 100):
        x = torch.rand(2, 3, size, size)
        assert relative(model(x), twin(x)) < 1e-4, size
    network = prepare(twin)
    assert {side for shape in network.dynamic_shapes.values() for side in shape} == {0}
    assert tuple(network.inputs["image"].shape[-2:]) == (100, 100)
