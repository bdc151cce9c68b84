"""A graph as text: equal for graphs that compute the same, whatever the names of their nodes.

    def f(x, y): z = add(x, 1); return mul(z, y)   ->   placeholder, placeholder, add (%0, 1), mul (%2, %1), output (%3)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mom_passes.graph.edit import attribute

#: Types whose `repr` identifies the value.
_LITERALS = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Structured:
    """A call target with graphs of its own, which prints as its `structure` and not as its address."""

    structure: str


def lines_of(graph: fx.Graph, gm: fx.GraphModule | None = None) -> list[str]:
    """A line for each node of a graph whose attributes are `gm`'s.

    Other objects than literals are printed by identity, since two may have the same name. A caller that keeps the text
    must keep the graph alive, so that no address is reused.
    """
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        args = fx.node.map_aggregate((node.args, node.kwargs), lambda arg: _printed(arg, numbers))
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{node.op} {_target(node, gm, numbers)} {args!r}")
    return lines


def _target(node: fx.Node, gm: fx.GraphModule | None, numbers: Mapping[fx.Node, str]) -> Any:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "get_attr" and gm is not None:
        return f"@{id(attribute(gm, str(node.target)))}"
    return _printed(node.target, numbers)


def _printed(arg: Any, numbers: Mapping[fx.Node, str]) -> Any:
    """The printed form of an argument or target."""
    if isinstance(arg, fx.Node):
        return _Bare(numbers[arg])
    if isinstance(arg, Structured):
        return _Bare(arg.structure)
    return arg if isinstance(arg, _LITERALS) else _Bare(f"{arg}@{id(arg)}")


class _Bare(str):
    """A string printed without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
