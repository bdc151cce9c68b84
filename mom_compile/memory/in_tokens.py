"""What a program that was captured for a number of tokens would need of fewer, as far as its values tell.

Terms
-----
tokens    The number that the graph was captured with, as a symbol.

    a value one of whose dimensions is that number     -> bytes in proportion to `tokens`
    any other, and what a step holds beside values     -> as captured: never less than fewer tokens need

Nothing is said where a parameter has a dimension of that number: then it does not tell tokens from features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import sympy
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import fixed_sizes, same
from mom_passes.graph.values import tensors_of
from mom_passes.program.memory import Memory, Moment
from mom_passes.program.program import LoopStep, Storage

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)


def captured_tokens(memory: Memory, gm: fx.GraphModule, static: Collection[str]) -> int | None:
    """The number of tokens where it was captured as a number and means tokens alone, else None."""
    lengths = [moment.step.loop.length for moment in memory.moments if isinstance(moment.step, LoopStep)]
    if not lengths or memory.hints or not all(isinstance(length, int) for length in lengths):
        return None
    tokens = max(memory.number(length) for length in lengths)
    parameters = (meta_value(n) for n in gm.graph.nodes if n.op == "placeholder" and n.name in static)
    return None if tokens in fixed_sizes(parameters) else tokens


def in_tokens(memory: Memory, captured: int) -> Memory:
    """A program's memory as a function of `TOKENS`."""
    return Memory(tuple(_moment(moment, captured) for moment in memory.moments), {TOKENS: sympy.Integer(captured)})


def bytes_in_tokens(node: fx.Node, size: sympy.Expr, captured: int) -> sympy.Expr:
    """Bytes of a value as a function of `TOKENS`."""
    values = tensors_of(node)
    grows = bool(values) and all(sum(same(size, captured) for size in value.shape) == 1 for value in values)
    return size / captured * TOKENS if grows else size


def _moment(moment: Moment, captured: int) -> Moment:
    alive = tuple(Storage(s.node, bytes_in_tokens(s.node, s.bytes, captured), s.place) for s in moment.alive)
    step = moment.step
    if isinstance(step, LoopStep) and step.loop.length == captured:
        step = replace(step, loop=replace(step.loop, length=TOKENS))
    return replace(moment, step=step, alive=alive)
