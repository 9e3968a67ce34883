"""The two wheels: code with everything that the commands need away from a checkout, and the weights that we ship."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import fresh_process
import pytest
from PIL import Image

from zoo.cli import main
from zoo.cli.errors import EXTRAS

ROOT = Path(__file__).parents[1]
FOLDERS = {"zoo": "zoo", "export": "zoo/export", "configs": "zoo/configs", "zoo_command": "zoo_command"}
MIB = 2**20


def built(project: Path, folder: Path) -> Path:
    """Build the wheel of a project, without an environment of its own or the network."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(project)], check=True, timeout=600)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what is built from, as the build leaves folders behind."""
    root = tmp_path_factory.mktemp("checkout")
    names = [*FOLDERS, "model_cards", "docs/benchmarks", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    for file in files or [path for name in names for path in _under(ROOT / name)]:  # the latter without git
        target = root / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.symlink_to(file)
    return root


def _under(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if "__pycache__" not in each.parts]


@pytest.fixture(scope="module")
def code(copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(copies, tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def weights(copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(copies / "model_cards", tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_in_the_wheel(code: Path, folder: str) -> None:
    packed = set(zipfile.ZipFile(code).namelist())
    files = {
        f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert files
    assert files <= packed, sorted(files - packed)


def test_the_wheel_holds_code_only(code: Path) -> None:
    packed = set(zipfile.ZipFile(code).namelist())
    assert "zoo/benchmarks/models.json" in packed
    assert not [path for path in packed if path.startswith(("tests/", "docs/", "zoo/model_cards"))]
    assert code.stat().st_size < 2 * MIB


def test_the_weights_are_whole_and_small(weights: Path) -> None:
    packed = set(zipfile.ZipFile(weights).namelist())
    names = ROOT / "model_cards"
    files = {
        f"ffn_zoo_weights/{path.relative_to(names).as_posix()}"
        for path in names.rglob("*")
        if path.is_file() and path.name != "pyproject.toml" and not {"build", "__pycache__"} & set(path.parts)
        and not any(part.endswith(".egg-info") for part in path.parts)
    }  # fmt: skip
    assert files == {path for path in packed if ".dist-info/" not in path}
    assert weights.stat().st_size < 60 * MIB


def test_versions_agree() -> None:
    projects = (ROOT / "pyproject.toml", ROOT / "model_cards" / "pyproject.toml")
    assert len({tomllib.loads(file.read_text())["project"]["version"] for file in projects}) == 1


def test_extras_that_are_named_exist() -> None:
    """pip only warns of an extra that there is not, and installs nothing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    texts += [path for folder in ("zoo", "docs", "model_cards") for path in (ROOT / folder).rglob("*") if path.suffix in
              (".py", ".md", ".ipynb")]  # fmt: skip
    named = {
        extra
        for path in texts
        for found in re.findall(r"ffn-zoo\[([a-z, ]+)\]", path.read_text(encoding="utf-8"))
        for extra in re.split(r", *", found)
    }
    assert "openvino" in named
    assert named <= set(extras), sorted(named - set(extras))


def test_a_base_installation_does_what_it_can(tmp_path: Path) -> None:
    """Without any extra: models are timed and pictures read; what needs more says what to install."""
    done = fresh_process.run(HIDDEN.format(absent=sorted(EXTRAS)) + BASE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "emov2_1m" in done.stdout
    assert "This needs transformers, which is missing: pip install 'ffn-zoo[diffusion]'. [Z106]" in done.stderr
    assert done.stderr.count("--plot needs matplotlib, which is missing: pip install 'ffn-zoo[demo]'. [Z106]") == 2
    assert "zoo demo needs diffusers, which is missing: pip install 'ffn-zoo[demo]'. [Z106]" in done.stderr
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)


IMPORTED = {
    "train": "zoo.tasks.command, zoo.tasks.finetuning",
    "diffusion": "zoo.caching, zoo.moe, zoo.bench.pipelines, zoo.bench.tuning, zoo.bench.suites",
    "export": "zoo.export.artefact, zoo.export.int8, zoo.data.labelled_images",
    "demo": "zoo.demo, zoo.demo.parts, matplotlib, skimage",
    "app": "zoo.cli.app.page, zoo.cli.app.service, matplotlib, psutil",
}
"""What the commands of an extra import."""


@pytest.mark.slow
@pytest.mark.parametrize("extra", IMPORTED)
def test_an_extra_brings_what_its_commands_import(extra: str, tmp_path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"scikit-image": "skimage"}
    brought: set[str] = set()
    wanted = [extra]
    while wanted:
        for requirement in extras[wanted.pop()]:
            name = re.split(r"[\[<>=!~ ]", requirement)[0]
            brought.add(modules.get(name, name.replace("-", "_")))
            if name == "ffn-zoo":
                wanted += re.split(r", *", requirement.partition("[")[2].partition("]")[0])
    others = {"datasets": {"pyarrow"}, "gradio": {"pandas"}}  # what these bring in turn
    brought = brought.union(*(others.get(name, set()) for name in brought))
    absent = sorted(set(EXTRAS) - brought)
    code = HIDDEN.format(absent=absent) + f"\nimport {IMPORTED[extra]}\nassert not set({absent}) & set(sys.modules)"
    done = fresh_process.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


HIDDEN = """
import sys

class Absent:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, *more)

    def find_distributions(self, context):
        hidden = str(context.name).replace("-", "_") in {absent}
        return () if hidden else getattr(self.finder, "find_distributions", lambda context: ())(context)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Absent, sys.meta_path)
for name in [name for name in sys.modules if name.partition(".")[0] in {absent}]:
    del sys.modules[name]
"""
BASE = """
from PIL import Image
from zoo.cli import main

assert main(["bench", "emov2_1m", "--size", "32", "--batch", "1", "--rounds", "1"]) == 0
for kind in "ab":
    for index in range(2):
        path = __import__("pathlib").Path(kind, f"{index}.png")
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
import timm
from zoo.data.images import draw, images_for
data = images_for(timm.create_model("test_resnet", num_classes=2), ".", 2)
data.setup("fit")
assert len(next(iter(draw(data, "train", 4)))[1]) == 2
assert main(["generate", "--model", "pixeldit.cifar10", "--classes", "cat", "-o", "cat.png"]) == 1
for call in (["bench", "emov2_1m", "--plot", "x.png"], ["tune-cache", "pixeldit.cifar10", "--plot", "x.png"], ["demo"]):
    assert main(call) == 1
"""


def test_the_lock_agrees_with_the_constraints() -> None:
    """The image installs what the tests ran with, each by its hash."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    text = (ROOT / "requirements.lock").read_text()
    locked = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)
    assert len(locked) == len(re.findall(r"^[\w.-]+==", text, re.M)) > 100
    names = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pinned.items()}
    different = {name: version for name, version in locked if names.get(name.replace(".", "-"), version) != version}
    assert not different
    assert "requirements.lock" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    "call",
    [
        ["restore", "photo.png", "-o", "large.png"],
        ["verify", "--all"],
        ["verify", "repavit_tiny.cifar10"],
        ["publish", "repavit_tiny.cifar10", "--repo-id", "me/mine", "--dry-run"],
        ["app"],
        ["demo", "-o", "report"],
    ],
)
def test_code_alone_says_what_to_install(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the wheel of the weights is not installed: no table of nothing, no empty folder."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for module in ("zoo.sources", "zoo.cli.publishing", "zoo.demo"):
        monkeypatch.setattr(f"{module}.cards_dir", lambda: tmp_path / "none")
    monkeypatch.setattr("zoo.pictures.restorers._restorers", list)
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "pip install ffn-zoo-weights" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.slow
def test_quick_start_away_from_the_checkout(code: Path, weights: Path, tmp_path: Path) -> None:
    """Code alone says what to install; with the weights beside it, it names what is in a picture."""
    site = tmp_path / "site"
    zipfile.ZipFile(code).extractall(site)
    start = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path[:] = [each for each in sys.meta_path if "
        "not getattr(each, '__module__', '').startswith('__editable')]\n"
        "from PIL import Image; Image.new('RGB', (40, 30), 'red').save('red.png')\n"
        "from zoo.cli import main; import zoo; print(zoo.__file__)\n"
        "sys.exit(main(['classify', 'red.png', '--model', 'repavit_tiny.cifar10', '-q']))"
    )

    alone = fresh_process.run(start, cwd=tmp_path)
    assert alone.returncode == 2
    assert "repavit_tiny.cifar10 is in a distribution of its own: pip install ffn-zoo-weights." in alone.stderr
    zipfile.ZipFile(weights).extractall(site)
    both = fresh_process.run(start, cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert str(site) in both.stdout
    assert "red.png\t" in both.stdout
