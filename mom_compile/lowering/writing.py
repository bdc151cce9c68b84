"""A loop body writes its results to places that the loop passes in.

place   A view of a stored value's rows. The body writes to it, so that nothing is copied afterwards.

Kernels that Inductor generates store directly to the place. A library call of a matrix product would return a new
tensor, which is then copied. It gets the place as its output instead. The values of a cache are mostly products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.graph.edit import add_input
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import Stored
from mom_passes.ops.products import PRODUCT_INTO
from mom_passes.ops.rows import COPY_ROWS

aten = torch.ops.aten


def writing_body(loop: Loop) -> fx.Graph:
    """Return the loop's body with an additional argument for each new value: the place it writes the rows to.

    A result that replaces an operand is written to the rows of the operand. This is the same argument, so that Inductor
    orders the write after all reads. The next value of a carry has a place of its own, since other operators of the
    body may read the carry in any order.

    Before:  def body(start, count, x_rows, w, total): ...; return (k, y, more)            y goes over x
    After:   def body(start, count, x_rows, w, total, k_place, total_next): ...
                 k_place.copy_(k); total_next.copy_(more); x_rows.copy_(y); return ()
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in loop.body.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node)
    inputs = list(values.values())[2:]
    places = [add_input(graph, f"{o.name}_place") if o.over is None else inputs[o.over] for o in loop.stored]
    places += [add_input(graph, f"{inputs[i].name}_next") for i in loop.carries]
    for node in loop.body.graph.nodes:
        if node.op == "output":
            _write(graph, loop, places, [values[rows] for rows in node.args[0]])
            graph.output(())
        elif node.target is COPY_ROWS:
            values[node] = values[node.args[0]]  # a place has its own layout
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph


def _write(graph: fx.Graph, loop: Loop, places: Sequence[fx.Node], values: Sequence[fx.Node]) -> None:
    """Write all results. Results that replace an input are last, since another result may be a view of the input."""
    stored = loop.stored
    over = [i < len(stored) and stored[i].over is not None for i in range(len(places))]
    for i in sorted(range(len(places)), key=over.__getitem__):
        value = values[i]
        own = values.count(value) == 1
        if own and i < len(stored) and _takes_products(stored[i]) and _written_by_product(graph, value, places[i]):
            continue
        if i < len(stored) and not stored[i].dim.plain and not over[i]:
            shape = _unfolded_shape(graph, stored[i], places[i])
            value = graph.call_function(aten.reshape.default, (value, shape))
        graph.call_function(aten.copy_.default, (places[i], value))


def _unfolded_shape(graph: fx.Graph, output: Stored, place: fx.Node) -> list[Any]:
    """Return the sizes of the place."""
    return [graph.call_function(aten.sym_size.int, (place, i)) for i in range(len(output.type.shape) + 2)]


def _takes_products(output: Stored) -> bool:
    """Return whether the rows of a new value form a row-major matrix of tokens and channels."""
    return output.over is None and output.dim.plain and output.dim.index == 0 and output.type.dense == (0, 1)


def _written_by_product(graph: fx.Graph, value: fx.Node, place: fx.Node) -> bool:
    """Make a matrix product without other readers write to its place. Return False for other values."""
    if value.users or value.target not in (aten.mm.default, aten.addmm.default) or value.kwargs:
        return False
    bias, left, right = (None, *value.args) if value.target is aten.mm.default else value.args
    with graph.inserting_before(value):
        graph.call_function(PRODUCT_INTO, (bias, left, right, place))
    graph.erase_node(value)
    return True
