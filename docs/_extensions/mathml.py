"""Formulas as MathML, which browsers draw themselves, without a script and without fonts from another host."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def visit_math(self, node):
    """Write an inline formula."""
    self.body.append(convert(node.astext()))
    raise SkipNode


def visit_math_block(self, node):
    """Write a displayed formula."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True}
