"""When copies to the device begin: one layer before they are waited for, so that they run beside its computation.

Terms
-----
layer   Waits with no use of one between them: keys and values that one layer reads.

    for each layer that arrives:
        its waits, and the appends of the same new rows, stand side by side: one piece lies between two layers
        its copies begin before the waits of the layer before it: two layers are on the device at most
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mom_passes.ops.transfers import APPEND, FETCH_START, FETCH_WAIT


def overlap(gm: fx.GraphModule) -> int:
    """Move the copies of a graph, in place; returns how many layers arrive."""
    layers = _waits_by_layer(gm.graph)
    for waits in layers:
        _side_by_side(gm.graph, waits)
    for before, waits in zip([None, *layers], layers, strict=False):
        anchor = before[0] if before is not None else _first_copy(gm.graph)
        for wait in waits:
            buffer = wait.args[0]
            assert isinstance(buffer, fx.Node)
            if buffer is not anchor:
                anchor.prepend(buffer)
    gm.recompile()
    return len(layers)


def _first_copy(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target is FETCH_START)


def _waits_by_layer(graph: fx.Graph) -> list[list[fx.Node]]:
    """Waits in order; those with no use of one between them are one layer's."""
    layers: list[list[fx.Node]] = []
    used: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is FETCH_WAIT:
            if not layers or not used.isdisjoint(layers[-1]):
                layers.append([])
            layers[-1].append(node)
        elif node.target is not APPEND:
            used.update(node.all_input_nodes)
    return layers


def _side_by_side(graph: fx.Graph, waits: Iterable[fx.Node]) -> None:
    """Move the waits and appends of a layer to where the last of them is."""
    *others, last = waits
    copies = [copy for wait in others for copy in (wait, *_appends_of(wait))]
    for copy in copies:
        last.prepend(copy)


def _appends_of(wait: fx.Node) -> list[fx.Node]:
    """The append of the same new rows."""
    new = wait.args[1]
    users = new.users if isinstance(new, fx.Node) else ()
    return [user for user in users if user.target is APPEND and user < _next_reader(wait)]


def _next_reader(wait: fx.Node) -> fx.Node:
    return min(wait.users, default=next(iter(reversed(wait.graph.nodes))))
