"""Sphinx settings. `uv run nox -s docs` builds with warnings as errors."""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "regrad"
author = "The regrad founders"
project_copyright = "The regrad founders, MIT licence"
sys.path.insert(0, str(Path(__file__).parent))  # where the extension for formulas lies
release = version = metadata.version("regrad")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "formulas",
]
exclude_patterns = ["_build", "examples/workload_plugin"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"regrad {release}"


def setup(app: Sphinx) -> None:
    """Let cards of the repository link to pages here, and docstrings write shapes as they do."""
    app.connect("include-read", link_within_the_documentation)
    app.connect("autodoc-process-docstring", take_stars_of_shapes_as_they_are)


def link_within_the_documentation(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Point a card's links to the README at the first page, to other cards at theirs, and link papers."""
    text = content[0].replace("](../../README.md)", "](../index.md)")
    text = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](\1.md", text)
    content[0] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def take_stars_of_shapes_as_they_are(*event: object) -> None:
    """Keep the star of a shape like [O, *] from opening an emphasis."""
    lines: Any = event[-1]
    lines[:] = [re.sub(r"\[([^\]`]*, )\*(?=[\],])", r"[\1\\*", line) for line in lines]
