"""A page inside a notebook."""

import html
from dataclasses import dataclass, field

INSTEAD = "A page belongs here: run this cell, or trust the notebook (in JupyterLab: Ctrl-Shift-C, Trust Notebook)."
"""Stands in the frame for programs that take frames away from stored outputs: JupyterLab until it trusts them."""


@dataclass(frozen=True)
class InlinePage:
    """A page that Jupyter, VS Code and nbconvert show where it is a cell's result.

    The frame runs the page's own scripts and shares nothing with the notebook around it.

    Parameters
    ----------
    page
        The page's bytes, as ``viewer_page`` returns them.
    height
        Height of the frame in CSS pixels.
    """

    page: bytes = field(repr=False)
    height: int = 760

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {self.height}px; border: 0"
        content = html.escape(self.page.decode())
        return f'<iframe title="page" sandbox="allow-scripts" style="{style}" srcdoc="{content}">{INSTEAD}</iframe>'
