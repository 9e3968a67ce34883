"""Every command and snippet of README.md runs, on small pictures made here, with the shipped weights."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from tests.image_sets import parquet_folder

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
SLOW_TARGETS = {"make demo", "make test"}  # the demo has its own test; this suite is the other


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the README's commands name: pictures and a data set."""
    cat = Image.fromarray(data.chelsea()).resize((60, 40))
    cat.save(tmp_path / "cat.jpg")
    cat.save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    cat.save(tmp_path / "photos" / "one.png")
    (tmp_path / "set5").mkdir()
    cat.save(tmp_path / "set5" / "cat.png")
    parquet_folder(tmp_path / "DIR", size=32)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def test_the_readme_has_commands_and_snippets() -> None:
    assert len(COMMANDS) >= 8
    assert sum(language == "python" for language, _ in BLOCKS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [text for language, text in BLOCKS if language == "python"])
def test_snippet(snippet: str, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in SLOW_TARGETS])
def test_command(command: str, place: Path) -> None:
    words = shlex.split(command, comments=True)
    if "pixeldit_moe_cifar10.yaml" in command:  # what the command before it makes
        (place / "runs").mkdir()
        (place / "runs" / "pixeldit_moe").symlink_to(ROOT / "model_cards" / "pixeldit_moe.cifar10")
    if words[0] == "python":
        words[0] = sys.executable
        words += ["--trainer.fast_dev_run=1"]
        words += ["--data.init_args.batch_size=4", "--data.init_args.eval_batch_size=4"]
    else:
        words[0] = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("target", sorted(SLOW_TARGETS))
def test_make_target(target: str) -> None:
    rules = (ROOT / "Makefile").read_text()
    assert f"\n{target.split()[1]}: " in rules
