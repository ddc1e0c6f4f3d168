"""Sphinx configuration."""

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


class MarkdownTable(SphinxDirective):
    """Shows a table that a benchmark wrote: ``.. markdown-table:: ../benchmarks/results/x.md``."""

    required_arguments = 1

    def run(self):
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        lines = Path(path).read_text("utf-8").strip().splitlines()
        # a figure and its deviation stay on one line
        lines = [line.replace(" ± ", "\u00a0±\u00a0") for line in lines]
        header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
        cells = ["   " + ",".join(f'"{cell}"' for cell in row) for row in [header, *rows]]
        table = "\n".join([".. csv-table::", "   :header-rows: 1", "", *cells])
        return self.parse_text_to_nodes(table)


def setup(app):
    app.add_directive("markdown-table", MarkdownTable)
