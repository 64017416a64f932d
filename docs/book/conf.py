"""The book: README, notebooks and pages as a static site, from what is committed (`make book`).

Nothing is executed, and a page loads nothing from the network: formulas are MathML.
"""

from __future__ import annotations

import json
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

project = "FogGen"
author = "The contributors of the FogGen recipe repository"
extensions = ["myst_nb"]
root_doc = "README"
language = "en"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "notebooks/*.ipynb",
    "docs/*.md",
    "tests/README.md",
    "data/*.md",
    "data/results/*.md",
    "data/pocket/*/README.md",
]

# Markdown as GitHub reads it, and the notebooks' own outputs
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # links and formulas in outputs, too
nb_ipywidgets_js: dict[str, Any] = {}  # would come from the network, and need a kernel to move
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets: the next cell shows a still frame

html_theme = "sphinx_book_theme"
html_title = project
html_extra_path = ["index.html"]
html_static_path = ["static"]
html_css_files = ["book.css"]
html_context = {"default_mode": "light"}
html_math_renderer = "mathml"
html_show_sourcelink = html_copy_source = False
html_theme_options = {"show_toc_level": 2, "use_download_button": False}

CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}
:glob:

{pages}
```
"""
CHAPTERS = {
    "Notebooks": "/notebooks/0*\n/notebooks/colab_evaluate",
    "Guides": "/docs/*",
    "Data and models": "/data/*\n/data/results/*\n/data/pocket/*/README",
    "Repository": "/CHANGELOG\n/CONTRIBUTING\n/tests/README",
}


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the contents under the README, the first page, and takes out badges from the network."""
    if page == root_doc:
        source[0] = re.sub(r"^\[?!\[.*badge.*\n", "", source[0], flags=re.MULTILINE)
        chapters = (CONTENTS.format(caption=name, pages=CHAPTERS[name]) for name in CHAPTERS)
        source[0] += "\n".join(chapters)


def fold_cells(app: Sphinx, page: str, source: list[str]) -> None:
    """Folds the cells that JupyterLab folds: machinery and solutions."""
    if not page.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("tags", []).append("hide-input")
    source[0] = json.dumps(notebook)


def write_math(translator: Any, node: nodes.Element) -> None:
    """A formula as MathML; LaTeX that docutils does not know ends the build."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("source-read", fold_cells)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
