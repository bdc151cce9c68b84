"""Let a loop write an output over an operand that dies there, so that the residual stream is stored once.

Terms
-----
take over   The loop writes rows `[a, b)` of an output where rows `[a, b)` of an operand were, after reading them.
may be in   Between loops, a result may share the storage of any operand, whatever the operator: a compiler removes
            operators that compute nothing (`clone`, `x + 0`), and a value that is copied to the host is read until the
            copy ends. Only loops and `copy_rows` are known to store their results elsewhere.

    for loop in program:
        for output in its outputs:
            take over the first operand, read by rows, that
                an earlier loop stored           (never an input or a view)
                dies here                        (no later step reads a value that may be in its storage, and this loop
                                                  reads it once)
                has the same shape, dtype, layout and token dimension
                is not taken over by another output

Before:  k1, v1, x1 = stage_1(S, x0, k0, v0, ...)        x0 and x1 both at full length
After:   the same, x1 in the storage of x0               Stored(x1).over == 0
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from mom_passes.graph.aliasing import base_of
from mom_passes.graph.sizes import all_same, is_one
from mom_passes.graph.values import returned_values
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import Out, RowsIn, Stored
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.program.lives import lives
from mom_passes.program.program import Call, LoopStep, Program, Storage, Why
from mom_passes.program.schedule import schedule
from mom_passes.rules import Dim


def take_over_storage(gm: fx.GraphModule) -> fx.GraphModule:
    """Set `Stored.over` of the outputs of every loop, in place."""
    modules = dict(loop_nodes(gm))
    if not modules:
        return gm
    for module in modules.values():
        module.loop = _without_overwriting(module.loop)
    program = schedule(gm)
    within = _possible_storages(program)
    last_of = lives(program, within).last_of
    stored: dict[fx.Node, Stored] = {}
    for i, step in enumerate(program.steps):
        if isinstance(step, LoopStep):
            given = [storage for operand in step.loop.bind(step.node) for storage in within.get(operand, ())]
            dying = {storage.node for storage in given if last_of[storage] == i and given.count(storage) == 1}
            rows = step.loop.rows_of(step.node).items()
            modules[step.node].loop = _decide(step.loop, {k: stored[value] for k, value in rows if value in dying})
            stored |= _stored_by(step)
    return gm


def _without_overwriting(loop: Loop) -> Loop:
    """The loop with every output in a storage of its own."""
    outputs = (replace(output, over=None) if isinstance(output, Stored) else output for output in loop.outputs)
    return replace(loop, outputs=tuple(outputs))


def _possible_storages(program: Program) -> dict[fx.Node, set[Storage]]:
    """For each value, the storages written by loops that it may be in."""
    found: dict[fx.Node, set[Storage]] = {}
    for step in program.steps:
        if isinstance(step, LoopStep):
            found.update((value, {program.storages[value]}) for value in _stored_by(step))
        elif not (isinstance(step, Call) and step.why is Why.NUMBER):
            for node in step.nodes:
                sources = () if node.target is COPY_ROWS else node.all_input_nodes
                found[node] = set().union(*(found.get(source, ()) for source in sources))
    return found


def _stored_by(step: LoopStep) -> dict[fx.Node, Stored]:
    """The values that a loop stores, with their ports."""
    outputs = zip(step.outs, step.loop.outputs, strict=True)
    return {value: port for value, port in outputs if value is not None and isinstance(port, Stored)}


def _decide(loop: Loop, dying: Mapping[int, Stored]) -> Loop:
    """The loop with its outputs over dying operands. `dying`: an input's index -> the port it was stored through."""
    pieces = returned_values(loop.body.graph)
    taken: set[int] = set()
    outputs: list[Out] = []
    for output, piece in itertools.zip_longest(loop.outputs, pieces[: len(loop.stored)]):
        for i, before in dying.items() if piece is not None else ():
            port = loop.inputs[i]
            if i in taken or _is_view_of_operand(piece):
                continue
            assert isinstance(port, RowsIn) and isinstance(output, Stored)
            if _same_layout(before, output, port.dim):
                output = replace(output, over=i)
                taken.add(i)
                break
        outputs.append(output)
    return replace(loop, outputs=tuple(outputs))


def _same_layout(before: Stored, after: Stored, dim: Dim) -> bool:
    one, other = before.type, after.type
    # Rows of groups of tokens are a slice, too, if the dimension is the slowest.
    grouped = dim.index == 0 and is_one(dim.outer) and one.dense == tuple(range(len(one.shape)))
    return (
        (dim.plain or grouped)
        and before.dim == after.dim == dim
        and (one.dtype, one.device, one.order) == (other.dtype, other.device, other.order)
        and all_same(one.shape, other.shape)
    )


def _is_view_of_operand(piece: fx.Node) -> bool:
    """Whether the rows are a view of an operand's rows: writing another output over these first would change them."""
    return base_of(piece).op == "placeholder"
