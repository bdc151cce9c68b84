"""HTML for notebooks: the text or the table that a terminal shows for a report, a plan or scores."""

from __future__ import annotations

import html
import io
from typing import Any

from rich.console import Console

#: Columns of a table in a notebook, whose cells are wider than a terminal.
_WIDTH = 140
_STYLE = "white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',consolas,monospace"


def html_of_text(text: str) -> str:
    """A text in a fixed-width font, line by line."""
    return f'<pre style="{_STYLE}">{html.escape(text)}</pre>'


def html_of_table(renderable: Any) -> str:
    """A table or a text of rich, with its colours."""
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=f'<pre style="{_STYLE}">{{code}}</pre>')
