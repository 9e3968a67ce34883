"""Runs the tutorials in this process, each in an empty folder, and stores what they print: `python docs/notebooks.py`.

One process, because the import of torch would cost more than the tutorials do.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent / "tutorials"


def run(path: Path) -> list[list[dict[str, Any]]]:
    """Run the code cells of a notebook.

    Returns:
        The outputs of each cell, as a notebook stores them.
    """
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    before, outputs = Path.cwd(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, cell in enumerate(cells, 1):
                outputs.append(_cell("".join(cell["source"]), names, number, f"{path.name}, cell {number}"))
        finally:
            os.chdir(before)
    return outputs


def _cell(source: str, names: dict[str, Any], number: int, where: str) -> list[dict[str, Any]]:
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    said, value = io.StringIO(), None
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    found: list[dict[str, Any]] = []
    if said.getvalue():
        lines = [line.rstrip() for line in said.getvalue().splitlines()]
        found.append({"output_type": "stream", "name": "stdout", "text": "\n".join(lines) + "\n"})
    if value is not None:
        data = {"text/plain": repr(value)}
        found.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return found


def store(path: Path) -> None:
    """Run a notebook and store its outputs in it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, found) in enumerate(zip(cells, run(path), strict=True), 1):
        cell["outputs"], cell["execution_count"] = found, number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(each.stem for each in TUTORIALS.glob("*.ipynb")):
        store(TUTORIALS / f"{name}.ipynb")
        print(name)
