"""Sphinx configuration."""

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
