"""Let a loop's output take over the storage of an operand that dies there: the residual stream lives once, not twice.

Terms
-----
take over   The loop writes rows `[a, b)` of an output where rows `[a, b)` of an operand were, after reading them.

    for loop in loops:
        for output in its outputs:
            take over the first operand it has rows of that
                an earlier loop stored           (storage of our own: never an input, never a view)
                nobody reads after this loop     (nor anything made from it that may share its storage)
                has the same shape, dtype, layout and token dimension
                is not taken by another output

Before:  k1, v1, x1 = stage_1(S, x0, k0, v0, ...)        x0 and x1 both at full length
After:   the same, x1 in the storage of x0               Stored(x1).over == 0
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace

from torch import fx

from mom_passes.graph.aliasing import may_be_a_view
from mom_passes.graph.sizes import same
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import Out, RowsIn, Stored
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.rules import Dim


def take_over_storage(gm: fx.GraphModule) -> fx.GraphModule:
    """Decide it for every loop of a rewritten graph and note it in the loops' outputs, in place."""
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    known: dict[fx.Node, Stored] = {}
    for node, module in loop_nodes(gm):
        module.loop = _decide(node, module.loop, known, position)
        known.update(stored_values(node, module.loop))
    return gm


def stored_values(node: fx.Node, loop: Loop) -> dict[fx.Node, Stored]:
    """The nodes that stand for what a loop stores."""
    items = {item: loop.outputs[index] for index, item in loop.results(node).items()}
    return {item: output for item, output in items.items() if isinstance(output, Stored)}


def _decide(node: fx.Node, loop: Loop, known: dict[fx.Node, Stored], position: dict[fx.Node, int]) -> Loop:
    pieces = next(iter(reversed(loop.body.graph.nodes))).args[0]
    taken: set[int] = set()
    outputs: list[Out] = []
    for output, piece in itertools.zip_longest(loop.outputs, pieces[: len(loop.stored)]):  # type: ignore[index]
        for i, operand in loop.rows_of(node).items() if piece is not None else ():
            before, port = known.get(operand), loop.inputs[i]
            if i in taken or before is None or _relabels_an_input(piece):
                continue
            assert isinstance(port, RowsIn) and isinstance(output, Stored)
            if _alike(before, output, port.dim) and dies_in(operand, node, position):
                output = replace(output, over=i)
                taken.add(i)
                break
        outputs.append(output)
    return replace(loop, outputs=tuple(outputs))


def _alike(before: Stored, after: Stored, dim: Dim) -> bool:
    one, other = before.type, after.type
    return (
        dim.plain
        and before.dim == after.dim == dim
        and (one.dtype, one.device, one.order) == (other.dtype, other.device, other.order)
        and len(one.shape) == len(other.shape)
        and all(same(a, b) for a, b in zip(one.shape, other.shape, strict=True))
    )


def _relabels_an_input(piece: fx.Node) -> bool:
    """Rows that are an operand's own rows seen otherwise: writing elsewhere first would change them."""
    while piece.op == "call_function" and (piece.target is operator.getitem or may_be_a_view(piece)):
        piece = piece.args[0]  # type: ignore[assignment]
    return piece.op == "placeholder"


def dies_in(value: fx.Node, reader: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether `reader` is the last to read a value, once, and nothing that may share its storage lives on.

    What an operator between loops makes of the value may be a view of it, whatever the operator is called.
    """
    if list(reader.args).count(value) != 1:
        return False
    seen: set[fx.Node] = set()
    pending = [user for user in value.users if user is not reader]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if position[node] >= position[reader]:
            return False
        if node.op == "call_function" and node.target is not COPY_ROWS:
            pending.extend(node.users)
    return True
