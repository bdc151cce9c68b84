"""A graph as text: equal for graphs that compute the same, whatever their nodes are called.

    def f(x, y): z = add(x, 1); return mul(z, y)   ->   placeholder, placeholder, add (%0, 1), mul (%2, %1), output (%3)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mom_passes.graph.edit import attribute

#: What prints as nothing else does.
_LITERALS = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Structured:
    """What has a structure of its own, beside its address: a call's target that holds graphs, say."""

    structure: str


def lines_of(graph: fx.Graph, gm: fx.GraphModule | None = None) -> list[str]:
    """A line for each node. What the graph has as attributes is `gm`'s.

    Objects that are no literals are printed by identity, since two may bear the same name: whoever keeps the text
    holds the graph, so that no other object gets the same address.
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
    """An argument or target as it is shown."""
    if isinstance(arg, fx.Node):
        return _Bare(numbers[arg])
    if isinstance(arg, Structured):
        return _Bare(arg.structure)
    return arg if isinstance(arg, _LITERALS) else _Bare(f"{arg}@{id(arg)}")


class _Bare(str):
    """Printed as it is in a key, where a string has quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
