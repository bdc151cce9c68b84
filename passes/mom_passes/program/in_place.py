"""Let a loop's output take over the storage of an operand that dies there: the residual stream lives once, not twice.

Terms
-----
take over   The loop writes rows `[a, b)` of an output where rows `[a, b)` of an operand were, after reading them.

    for loop in loops:
        for output in its outputs:
            take over the first sliced operand that
                an earlier loop stored           (storage of our own: never an input, never a view)
                nobody reads after this loop     (nor anything made from it that may share its storage)
                has the same shape, dtype, layout and token dimension
                is not taken by another output

Before:  k1, v1, x1 = stage_1(S, x0, k0, v0, ...)        x0 and x1 both at full length
After:   the same, x1 in the storage of x0               LoopOutput(x1).takes_over == 0
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from mom_passes.graph.aliasing import may_be_a_view
from mom_passes.graph.sizes import same
from mom_passes.loops.loop import LoopOutput, MiniSequence, loop_nodes
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.rules import Dim


def take_over_storage(gm: fx.GraphModule) -> fx.GraphModule:
    """Decide it for every loop of a rewritten graph and note it in the loops' specs, in place."""
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    stored: dict[fx.Node, LoopOutput] = {}
    for node, loop in loop_nodes(gm):
        _decide(node, loop, stored, position)
        stored.update(stored_values(node, loop))
    return gm


def stored_values(node: fx.Node, loop: MiniSequence) -> dict[fx.Node, LoopOutput]:
    """The nodes that stand for what a loop stores."""
    items = [user for user in node.users if user.target is operator.getitem]
    outputs = dict(enumerate(loop.spec.outputs))
    return {user: outputs[user.args[1]] for user in items if user.args[1] in outputs}  # type: ignore[index]


def _decide(node: fx.Node, loop: MiniSequence, stored: dict[fx.Node, LoopOutput], position: dict[fx.Node, int]) -> None:
    spec = loop.spec
    operands = spec.sliced_of(node)
    pieces = next(iter(reversed(loop.body.graph.nodes))).args[0]
    taken: set[int] = set()
    outputs = []
    for output, piece in zip(spec.outputs, pieces, strict=False):  # type: ignore[arg-type]
        for i, (operand, dim) in enumerate(zip(operands, spec.sliced, strict=True)):
            before = stored.get(operand)
            if i in taken or before is None or _relabels_an_input(piece):
                continue
            if _alike(before, output, dim) and dies_in(operand, node, position):
                output = replace(output, takes_over=i)
                taken.add(i)
                break
        outputs.append(output)
    loop.spec = replace(spec, outputs=tuple(outputs))


def _alike(before: LoopOutput, after: LoopOutput, dim: Dim) -> bool:
    return (
        dim.plain
        and before.dim == after.dim == dim
        and before.dtype == after.dtype
        and before.device == after.device
        and before.order == after.order
        and len(before.shape) == len(after.shape)
        and all(same(a, b) for a, b in zip(before.shape, after.shape, strict=True))
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
