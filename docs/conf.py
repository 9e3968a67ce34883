"""Sphinx's settings: furo's theme, pages in MyST Markdown, notebooks with the outputs that are stored in them.

Sphinx, because autodoc and napoleon make the reference from the docstrings as they are, and because it builds offline.
Formulas become MathML, which browsers draw without a script from elsewhere.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import diagrams  # noqa: E402
import pages  # noqa: E402

from zoo.version import __version__  # noqa: E402

project, author, copyright = "zoo", "the authors of zoo", "the authors of zoo"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", f"zoo {release}"
html_static_path: list[str] = []
html_show_sourcelink = False
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path: list[str] = []
default_role = "code"  # docstrings write `name`, as Markdown does
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # tables of benchmarks begin with a second heading
nb_execution_mode = "off"  # tests/test_tutorials.py runs them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # those of Lightning and diffusers are theirs to render
autodoc_mock_imports = ["triton"]
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def _plain(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep what docstrings write as text from being read as markup: stars, bars, underscores at a word's end."""
    pieces = re.split(r"(```.*?```|`[^`]+`|^ *(?:>>>|\.\.\.).*$)", "\n".join(lines), flags=re.S | re.M)
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = re.sub(r"(_)(?![^\W_])", r"\\\1", re.sub(r"([\\*|])", r"\\\1", piece))
            if index and re.match(r"\w", piece) and pieces[index - 1].endswith("`"):
                pieces[index] = "\\ " + pieces[index]  # a plural: the end of the name must be seen
        elif piece.startswith("```"):
            body = piece.partition("\n")[2].rpartition("\n")[0]
            pieces[index] = "::\n\n" + textwrap.indent(body, "    ") + "\n"
    lines[:] = "".join(pieces).split("\n")


def _math(self: HTML5Translator, node: nodes.Element) -> None:
    block = isinstance(node, nodes.math_block)
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Write the generated pages, and draw formulas as MathML."""
    pages.write_all(HERE)
    diagrams.write_all(HERE / "diagrams")
    app.connect("autodoc-process-docstring", _plain, priority=100)  # before napoleon
    app.add_node(nodes.math, override=True, html=(_math, None))
    app.add_node(nodes.math_block, override=True, html=(_math, None))
