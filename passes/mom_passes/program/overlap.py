"""Begin copies to the device one layer before they are waited for, so that they overlap with computation.

Terms
-----
layer   Waits without a use of one between them: keys and values that one layer reads, or weights of one stretch. Keys
        and values form one queue and weights another, each one layer ahead.

    for each layer that arrives:
        its waits, and the appends of the same new rows, become adjacent: one piece between two layers
        its copies begin before the waits of the layer before it: at most two layers are on the device
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import fx

from mom_passes.graph.values import input_node
from mom_passes.ops.transfers import APPEND, FETCH_START, FETCH_WAIT


def overlap(gm: fx.GraphModule, weights: Collection[fx.Node] = ()) -> int:
    """Move the copies, in place. Return the number of layers that arrive. `weights` are the waits for weights."""
    waits = gm.graph.find_nodes(op="call_function", target=FETCH_WAIT)
    layers = _waits_by_layer(gm.graph, [wait for wait in waits if wait not in weights])
    for of_layer in layers:
        _side_by_side(gm.graph, of_layer)
    _one_ahead(gm.graph, layers)
    of_weights = _waits_by_layer(gm.graph, [wait for wait in waits if wait in weights])
    _one_ahead(gm.graph, of_weights)
    gm.recompile()
    return len(layers) + len(of_weights)


def _one_ahead(graph: fx.Graph, layers: Sequence[Sequence[fx.Node]]) -> None:
    for before, waits in zip([None, *layers], layers, strict=False):
        anchor = before[0] if before is not None else _first_copy(graph)
        for wait in waits:
            if input_node(wait) is not anchor:
                anchor.prepend(input_node(wait))


def _first_copy(graph: fx.Graph) -> fx.Node:
    first: fx.Node = graph.find_nodes(op="call_function", target=FETCH_START)[0]
    return first


def _waits_by_layer(graph: fx.Graph, waits: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Waits in order, grouped by layer: no node between two waits of a group uses one of them."""
    layers: list[list[fx.Node]] = []
    used: set[fx.Node] = set()
    for node in graph.nodes:
        if node in waits:
            if not layers or not used.isdisjoint(layers[-1]):
                layers.append([])
            layers[-1].append(node)
        elif node.target is not APPEND:
            used.update(node.all_input_nodes)
    return layers


def _side_by_side(graph: fx.Graph, waits: Iterable[fx.Node]) -> None:
    """Move the waits and appends of a layer to the last of the waits."""
    *others, last = waits
    copies = [copy for wait in others for copy in (wait, *_appends_of(wait))]
    for copy in copies:
        last.prepend(copy)


def _appends_of(wait: fx.Node) -> list[fx.Node]:
    """The appends of the same new rows."""
    new = wait.args[1]
    users = new.users if isinstance(new, fx.Node) else ()
    return [user for user in users if user.target is APPEND and user < _next_reader(wait)]


def _next_reader(wait: fx.Node) -> fx.Node:
    return min(wait.users, default=wait.graph.output_node())
