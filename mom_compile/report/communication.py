"""Collectives of a program: how many run in loops, and how many of these another mini-sequence hides.

    two mini-sequences in flight    A0 B0 A1 B1 A2 C0 B2 C1 C2      a collective follows parts 0 and 1 of each letter
    hidden                          those that another letter follows: all but that of C1
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from mom_compile.report.units import counted, in_units
from mom_passes.graph.sizes import expr, hint, product
from mom_passes.loops.loop import Loop, split_rows
from mom_passes.loops.ports import COUNT
from mom_passes.ops.collectives import COLLECTIVES
from mom_passes.program.memory import Memory
from mom_passes.program.program import LoopStep, Program


@dataclass(frozen=True)
class Communication:
    """The collectives of a run of the captured sizes.

    Attributes
    ----------
    in_loops : int
        Calls in loops.
    hidden : int
        Calls in loops while which another mini-sequence computes.
    outside : int
        Calls at full length, or on the few rows that are returned.
    bytes_per_token : int
        Bytes of a token's rows that this rank passes to collectives in loops.
    """

    in_loops: int
    hidden: int
    outside: int
    bytes_per_token: int

    @staticmethod
    def of(program: Program, memory: Memory) -> Communication | None:
        """Return the collectives of a program; None if it has none."""
        calls = hidden = outside = sent = 0
        for step in program.steps:
            if not isinstance(step, LoopStep):
                outside += sum(node.target in COLLECTIVES for node in step.nodes)
                continue
            found = [node for node in step.loop.body.graph.nodes if node.target in COLLECTIVES]
            turns = len(split_rows(hint(step.loop.length), step.loop.rows))
            calls += turns * len(found)
            hidden += turns * len(found) - exposed(step.loop, turns, len(found))
            sent += sum(memory.number(_bytes_of_a_token(node)) for node in found)
        return Communication(calls, hidden, outside, sent) if calls or outside else None

    def __str__(self) -> str:
        outside = f"{self.outside} outside of loops" if self.outside else "none outside of loops"
        return (
            f"{counted(self.in_loops, 'collective')} in loops, {in_units(self.bytes_per_token)} a token; "
            f"during {self.hidden} of them another mini-sequence computes; {outside}"
        )


def exposed(loop: Loop, turns: int, collectives: int) -> int:
    """Return how many collectives of a loop of `turns` mini-sequences no other mini-sequence hides."""
    if loop.in_flight < 2 or turns < 2:
        return turns * collectives
    # Mini-sequences are in flight in pairs. The last one of an odd number is alone after its first part.
    return max(0, collectives - 1) if turns % 2 else 0


def _bytes_of_a_token(collective: fx.Node) -> sympy.Expr:
    type = collective.all_input_nodes[0].meta["type"]
    return expr(product(type.shape)).xreplace({COUNT: sympy.S.One}) * type.dtype.itemsize
