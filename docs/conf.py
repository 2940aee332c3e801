"""Sphinx settings. `uv run nox -s docs` builds with warnings as errors."""

from importlib import metadata

project = "regrad"
author = "The regrad founders"
project_copyright = "The regrad founders, MIT licence"
release = version = metadata.version("regrad")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"regrad {release}"
