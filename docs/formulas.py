"""A Sphinx extension that writes formulas as MathML, which browsers draw without a script.

A formula that cannot be converted is a warning with its place, so `nox -s docs` fails on
it. The font for formulas lies in `_static/fonts`; `_static/pages.css` names it.
"""

import html
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

LOG = logging.getLogger(__name__)
CONVERTER = LatexToMathML()


def setup(app: Sphinx) -> dict[str, Any]:
    """Offer the renderer; `html_math_renderer = "mathml"` chooses it."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula that stands in a line of text."""
    translator.body.append(f'<span class="math">{mathml(node, in_a_line=True)}</span>')
    raise nodes.SkipNode


def write_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that stands alone; one that is too wide for the page scrolls by itself."""
    if node["number"]:
        LOG.warning("formulas cannot be numbered; leave out the label", location=node)
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(f"{mathml(node, in_a_line=False)}</div>\n")
    raise nodes.SkipNode


def mathml(node: nodes.Element, *, in_a_line: bool) -> str:
    """Return a formula as a MathML element, or its source, with a warning, if that fails."""
    latex = " ".join(node.astext().split())
    if r"\\" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        return CONVERTER.convert_with_local_state(latex, displaystyle=not in_a_line)
    except LatexError as error:
        LOG.warning("formula must be LaTeX that math-core knows: %s", error, location=node)
        return html.escape(latex)
