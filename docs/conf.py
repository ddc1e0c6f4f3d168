"""Sphinx configuration."""

import sys
from pathlib import Path

from pood_plugins import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for results_page

project = "pood-plugins"
copyright = "the pood-plugins developers"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "results_page",
]
exclude_patterns = ["_build", "example_plugin"]
default_role = None
smartquotes_action = "qe"  # quotes and ellipses, and no dashes out of options

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = True
add_module_names = False

# references that lead nowhere are errors, but those to
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchvision|pytorch_ood|pandas)\..*"),  # what other packages document
    ("py:exc", "RequiresFittingException|ModelNotSetException"),  # which docstrings inherit
    ("py:class", r"pood_plugins\..*\._\w+"),  # base classes that are nobody's business
]

html_theme = "furo"
html_title = "pood-plugins"

rst_prolog = ".. role:: greyed"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
