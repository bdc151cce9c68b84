"""The line of the user's code that a node of a graph comes from.

Dynamo writes the Python stack of each operator to `meta["stack_trace"]`, as `traceback` formats it. AOTAutograd and
the passes keep it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import fx

#: Frames of these packages are not the user's.
_PACKAGES = ("torch", "mom_compile", "mom_passes")
_FRAME = re.compile(r'^\s*File "(?P<file>[^"\n]+)", line (?P<line>\d+), in .*\n?(?P<code>.*)', re.MULTILINE)
#: Longer lines of code are cut.
_MOST_CODE = 80


def source_line(node: fx.Node) -> str | None:
    """Return `file:line: code` of the innermost frame outside of PyTorch and this package; None if there is none.

    A model of a library such as transformers has its line in the library: that line names the operator. Files are
    relative to the working directory, or to the entry of `sys.path` that contains them.
    """
    for frame in reversed(list(_FRAME.finditer(node.meta.get("stack_trace") or ""))):
        file = frame["file"]
        if not file.startswith(_own_folders()):
            code = (frame["code"] or "").strip()
            code = code if len(code) <= _MOST_CODE else f"{code[: _MOST_CODE - 3]}..."
            return f"{_shortened(file)}:{frame['line']}" + (f": {code}" if code else "")
    return None


def source_lines(nodes: Mapping[str, fx.Node]) -> dict[str, str]:
    """Return the source lines of nodes by name, of those whose line is known."""
    lines = {name: source_line(node) for name, node in nodes.items()}
    return {name: line for name, line in lines.items() if line is not None}


def source_range(graph: fx.Graph) -> str | None:
    """Return the source lines of a graph's first and last operator; None if no line is known."""
    lines = [line for line in map(source_line, graph.nodes) if line is not None]
    if not lines:
        return None
    return lines[0] if lines[0] == lines[-1] else f"{lines[0]} to {lines[-1]}"


def with_source_line(text: str, node: fx.Node) -> str:
    """Append the source line of a node to a message, if it is known."""
    line = source_line(node)
    return text if line is None else f"{text}, at {line}"


def _own_folders() -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES)
    return tuple(f"{Path(file).parent}/" for file in files if file)


def _shortened(file: str) -> str:
    path = Path(file)
    folders = [Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    relative = [str(path.relative_to(folder)) for folder in folders if path.is_relative_to(folder)]
    return min(relative, key=len, default=file)
