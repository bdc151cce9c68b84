"""The ports of a loop as the running program needs them: without removed inputs, and with sizes as plain expressions.

Some inputs of a loop are sizes that its body computes from other sizes. Canonical form removes these inputs from the
body, and the ports are renumbered accordingly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy

from mom_passes.graph.sizes import Size, expr
from mom_passes.loops.loop import Loop
from mom_passes.loops.ports import CarryOut, In, Out, RowsIn, SizeIn, Stored, WholeIn
from mom_passes.rules import Dim


def same_in_every_iteration(loop: Loop, count: int) -> list[bool]:
    """Return for each of the `count` arguments of a loop's body whether it is a whole value.

    The first two arguments are `start` and `count`. The arguments after the loop's inputs are places and carries.
    """
    of_inputs = [isinstance(port, WholeIn) for port in loop.inputs]
    return [False, False, *of_inputs, *[False] * (count - 2 - len(of_inputs))]


def ports_with_inputs(loop: Loop, left: Sequence[bool]) -> tuple[tuple[In, ...], tuple[Out, ...]]:
    """Return the input and output ports of a loop that keeps the inputs where `left` is true."""
    new_index = list(itertools.accumulate(left, initial=0))

    def renumbered(port: Out) -> Out:
        if isinstance(port, CarryOut):
            return replace(port, carry=new_index[port.carry])
        return port if port.over is None else replace(port, over=new_index[port.over])

    inputs = itertools.compress(loop.inputs, left)
    return tuple(map(_in_expressions, inputs)), tuple(_in_expressions(renumbered(port)) for port in loop.outputs)


def _in_expressions(port: Any) -> Any:
    """Return a port with numbers and sympy expressions as sizes: a `SymInt` would keep the graph's ShapeEnv alive."""

    def plain(size: Size) -> Size:
        known = expr(size)
        return int(known) if known.is_Integer else known

    changed: dict[str, Any] = {}
    if isinstance(port, SizeIn):
        changed["value"] = plain(port.value)
    else:
        changed["type"] = replace(port.type, shape=tuple(map(plain, port.type.shape)))
    if isinstance(port, RowsIn | Stored):
        changed["dim"] = Dim(port.dim.index, plain(port.dim.outer), plain(port.dim.inner))
    return replace(port, **changed)


def sizes_at_run_time(loop: Loop) -> list[sympy.Expr]:
    """Return the sizes that a run computes: shapes of new stored values, and the layout of token dimensions."""
    new = [output for output in loop.stored if output.over is None]
    dims = [port.dim for port in loop.inputs if isinstance(port, RowsIn)] + [output.dim for output in new]
    sizes = [size for output in new for size in output.type.shape]
    return list(dict.fromkeys(expr(size) for size in (*sizes, *(s for dim in dims for s in (dim.outer, dim.inner)))))
