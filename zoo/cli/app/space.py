"""`zoo app --space FOLDER`: the page as a Hugging Face Space, three files to push there."""

from __future__ import annotations

from pathlib import Path

from zoo.cli.output import replacing
from zoo.version import __version__

__all__ = ["space_files", "write_space"]

_README = """---
title: zoo
emoji: 🦓
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
short_description: Classify, restore and generate, fast, on a CPU
tags:
- image-classification
- image-super-resolution
- denoising
- diffusion
---

# zoo

The page of `zoo app`: classify, restore, generate, and look models up, on a CPU, with the weights that come with
`ffn-zoo`. To add a model of yours, put its folder beside `app.py` and name it in `MODELS` there.
"""

_APP = '''"""The page of `zoo app` as a Space."""

import sys

from zoo.cli import main

MODELS: list[str] = []  # folders beside this file, or Hub ids

if __name__ == "__main__":
    sys.exit(main(["app", *MODELS, "--host", "0.0.0.0", "--port", "7860", "--max-pixels", "4M", "--max-queue", "8"]))
'''

_REQUIREMENTS = "ffn-zoo[app]=={version}\n"


def space_files() -> dict[str, str]:
    """Return what is in the Space, by name."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        gradio = "6.31.0"
    return {
        "README.md": _README.format(gradio=gradio),
        "app.py": _APP,
        "requirements.txt": _REQUIREMENTS.format(version=__version__),
    }


def write_space(folder: Path, *, force: bool = False) -> list[Path]:
    """Write the Space.

    Args:
        folder: Made where it is missing.
        force: Replace files that exist.

    Returns:
        The files.

    Raises:
        UsageError: One exists, or the folder cannot be written to.
    """
    from zoo.cli.output import check_target

    files = {folder / name: text for name, text in space_files().items()}
    for path in files:
        check_target(path, force=force)
    for path, text in files.items():
        with replacing(path, force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(files)
