"""Where a graph without loops is cut, so that what its layers have in common is compiled once.

    layer 0 .. attention | layer 0's rest, layer 1 .. attention | ... | the last layer's rest, head
                           one piece, as often as there are layers

An attention is a kernel of its own: nothing is fused across it, so a cut there costs the call of a piece and no more.
A graph that writes to its inputs stays whole: Inductor writes where it computes, pieces would only at the end.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import sympy
from torch import fx

from mom_passes.attention.flex import FlexAttention
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.sizes import Size, expr
from mom_passes.graph.structure import Structured
from mom_passes.graph.values import tensors_of
from mom_passes.program.program import Compute, Program
from mom_passes.program.schedule import schedule
from mom_passes.rules.attention import SDPA


def by_layers(gm: fx.GraphModule) -> Program | None:
    """The program of a graph cut behind its attentions; None where at most half of its pieces would be shared."""
    ends = {node for node in gm.graph.nodes if node.target in SDPA or isinstance(node.target, FlexAttention)}
    if len(ends) < 3 or any(is_mutation(node) for node in gm.graph.nodes):
        return None
    program = schedule(gm, ends)
    pieces = [_likeness(step) for step in program.steps if isinstance(step, Compute)]
    return program if 2 * len(set(pieces)) <= len(pieces) else None


def _likeness(step: Compute) -> Hashable:
    """Equal for pieces that may be the same: operators and sizes, in order, whatever symbols are called."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    ins = tuple(_shapes(node, names) for node in step.ins)
    return ins, tuple((_operator(node.target), _shapes(node, names)) for node in step.nodes)


def _operator(target: Any) -> Hashable:
    """What a call does: every layer's has graphs of its own, which may be the same."""
    return target.structure if isinstance(target, Structured) else target


def _shapes(node: fx.Node, names: dict[sympy.Symbol, sympy.Symbol]) -> Hashable:
    return tuple(tuple(_renamed(size, names) for size in value.shape) for value in tensors_of(node))


def _renamed(size: Size, names: dict[sympy.Symbol, sympy.Symbol]) -> Hashable:
    """A size with its symbols numbered in order of appearance: every past of a cache has a length of its own."""
    if isinstance(size, int):
        return size
    known = expr(size)
    for symbol in sorted(known.free_symbols, key=str):
        names.setdefault(symbol, sympy.Symbol(f"n{len(names)}"))
    return known.xreplace(names)
