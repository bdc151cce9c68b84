"""A loop body with collectives as a `PartedBody`: one compiled piece for each part between two collectives.

    body:      hidden = f(x);  y = all_reduce(hidden, "sum", group);  out.copy_(g(x, y))
    compiled:  part 0 (x) -> (hidden,);  all_reduce_(hidden);  part 1 (x, hidden, out) -> ()

Values that cross a collective are contiguous. Where only the collective reads its operand, it is reduced in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mom_compile.lowering.layouts import LoopLayout, dense_strides
from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import Template, TensorTemplate
from mom_compile.runtime.parted import Collective, PartedBody, RunPart
from mom_passes.graph.edit import add_input
from mom_passes.graph.sizes import expr
from mom_passes.loops.body_parts import BodyParts, Part
from mom_passes.loops.ports import TensorType
from mom_passes.ops.collectives import ALL_GATHER, ALL_REDUCE, BEGINS, GATHER_COLUMNS

aten = torch.ops.aten

#: Compiles a graph with these templates under a name, with an order for each result. Returns the piece, the values of
#: its symbols, and for each input whether the piece takes it.
Compile = Callable[[fx.Graph, Sequence[Template], str, Sequence[tuple[int, ...]]], tuple[Piece, list[Any], list[bool]]]


def compile_parts(
    graph: fx.Graph, templates: Sequence[Template], layout: LoopLayout, in_flight: int, name: str, compile: Compile
) -> tuple[PartedBody, list[Any], list[bool]]:
    """Compile the parts of a body.

    Parameters
    ----------
    graph, templates
        The body, with its writes, and the templates of its inputs: start, count, and the others.
    in_flight
        How many mini-sequences are in flight.

    Returns
    -------
    The body; the values of its symbols, which are its first arguments; and for each input whether the body takes it.
    """
    separate_gathers(graph)
    body, inputs = BodyParts(graph), graph.find_nodes(op="placeholder")
    of_node: dict[fx.Node, Template] = dict(zip(inputs, templates, strict=True))
    compiled: list[tuple[Part, Piece, list[Any], list[fx.Node]] | None] = []
    for number, part in enumerate(body.parts):
        if not part.nodes:
            compiled.append(None)
            continue
        takes = [*inputs[:2], *(value for value in part.inputs if value not in inputs[:2])]
        own = [of_node[value] if value in of_node else template_of(value, layout) for value in takes]
        orders = [tuple(range(len(value.meta["type"].shape))) for value in part.outputs]
        piece, extra, left = compile(_graph_of(part, takes), own, f"{name}_part_{number}", orders)
        compiled.append((part, piece, extra, list(itertools.compress(takes, left))))
    symbols = list(dict.fromkeys(value for one in compiled if one is not None for value in one[2]))
    read = {value for one in compiled if one is not None for value in one[3]}
    read |= {collective.all_input_nodes[0] for collective in body.collectives}
    left = [value in read for value in inputs]
    steps, values = _steps(body, compiled, symbols, list(itertools.compress(inputs, left)))
    return PartedBody(steps, values, in_flight), symbols, left


def separate_gathers(graph: fx.Graph) -> None:
    """Make each gather of columns a gather, which the runtime begins, and a `cat` in the next part, in place."""
    for node in graph.find_nodes(op="call_function", target=GATHER_COLUMNS):
        rows, ranks, group = node.args
        type = rows.meta["type"]
        with graph.inserting_before(node):
            gathered = graph.call_function(ALL_GATHER, (rows, ranks, group))
            gathered.meta["type"] = replace(type, shape=(expr(type.shape[0]) * ranks, *type.shape[1:]), order=None)
            apart = graph.call_function(aten.unflatten.int, (gathered, 0, [ranks, -1]))
            parts = [graph.call_function(aten.select.int, (apart, 0, rank)) for rank in range(ranks)]
            joined = graph.call_function(aten.cat.default, (parts, -1))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def template_of(value: fx.Node, layout: LoopLayout) -> TensorTemplate:
    """Return the template of a value that crosses a collective."""
    type = value.meta["type"]
    assert isinstance(type, TensorType), f"{value.name} crosses a collective and has no type"
    shape = tuple(layout.size_in_body(size) for size in type.shape)
    return TensorTemplate(shape, dense_strides(shape, tuple(range(len(shape)))), type.dtype, type.device)


def _graph_of(part: Part, takes: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {value: add_input(graph, value.name) for value in takes}
    for node in part.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in part.outputs))
    return graph


def _steps(
    body: BodyParts,
    compiled: Sequence[tuple[Part, Piece, list[Any], list[fx.Node]] | None],
    symbols: Sequence[Any],
    inputs: Sequence[fx.Node],
) -> tuple[tuple[RunPart | Collective, ...], int]:
    """Return the steps over numbered values, and the number of values. Symbols and inputs are the first values."""
    at: dict[Any, int] = {value: number for number, value in enumerate((*symbols, *inputs))}

    def number(value: Any) -> int:
        return at.setdefault(value, len(at))

    steps: list[RunPart | Collective] = []
    for i, one in enumerate(compiled):
        if one is not None:
            part, piece, extra, takes = one
            gives = tuple(map(number, part.outputs))
            steps.append(RunPart(piece, tuple(at[value] for value in (*extra, *takes)), gives, ()))
        if i < len(body.collectives):
            node = body.collectives[i]
            name = BEGINS[node.target]
            if node.target is ALL_REDUCE and body.owns_operand(i):
                name += "_"
            operand, *others = node.args
            steps.append(Collective(name, tuple(others), at[operand], number(node), ()))
    return tuple(_with_ends(steps)), len(at)


def _with_ends(steps: Sequence[RunPart | Collective]) -> list[RunPart | Collective]:
    """Return the steps, each with the values that it is the last to read."""
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        reads = step.takes if isinstance(step, RunPart) else (step.takes,)
        last |= dict.fromkeys(reads, number)
    ends: dict[int, list[int]] = {}
    for value, number in last.items():
        ends.setdefault(number, []).append(value)
    return [replace(step, dying=tuple(sorted(ends.get(number, ())))) for number, step in enumerate(steps)]
