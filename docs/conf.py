"""Sphinx configuration."""

import re
from pathlib import Path

from sphinx.util.docutils import SphinxDirective

from pood_plugins import __version__

project = "pood-plugins"
copyright = "the pood-plugins developers"
release = version = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "example_plugin"]
default_role = None

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = True
add_module_names = False

html_theme = "furo"
html_title = "pood-plugins"


GREYED = re.compile(r"^(\(.*\) †)$")
rst_prolog = ".. role:: greyed"
html_static_path = ["_static"]
html_css_files = ["tables.css"]


class MarkdownTable(SphinxDirective):
    """
    Shows a table that a benchmark wrote: ``.. markdown-table:: ../benchmarks/results/x.md``.
    Cells such as ``(88.1 / 41.4) †``, which are not to be compared, are greyed. Lines below the
    table are paragraphs.
    """

    required_arguments = 1

    def run(self):
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        lines = Path(path).read_text("utf-8").strip().splitlines()
        # a figure and its deviation stay on one line
        lines = [line.replace(" ± ", "\u00a0±\u00a0") for line in lines]
        of_table = [line for line in lines if line.startswith("|")]
        header, _, *rows = [
            [cell.strip() for cell in line[1:-1].split(" | ")] for line in of_table
        ]
        rows = [[GREYED.sub(r":greyed:`\1`", cell) for cell in row] for row in rows]
        cells = ["   " + ",".join(f'"{cell}"' for cell in row) for row in [header, *rows]]
        table = [".. csv-table::", "   :header-rows: 1", "   :class: results", "", *cells, ""]
        remarks = [line for line in lines if line not in of_table]
        return self.parse_text_to_nodes("\n".join([*table, *remarks]))


def setup(app):
    app.add_directive("markdown-table", MarkdownTable)
