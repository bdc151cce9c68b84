"""What the passes make of a captured graph: the graph, its program, and the memory that needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mom_passes.program.memory import Memory, memory
from mom_passes.program.program import Program
from mom_passes.program.schedule import schedule


@dataclass(frozen=True, eq=False)
class Rewritten:
    """Whoever lowers a graph, decides by its memory or tells of it reads the same `plan` and `memory`.

    `no_loops` is why nothing runs over mini-sequences, or None.
    """

    gm: fx.GraphModule
    plan: Program
    memory: Memory
    no_loops: str | None = None

    @staticmethod
    def of(gm: fx.GraphModule, no_loops: str | None = None) -> Rewritten:
        return Rewritten.planned(gm, schedule(gm), no_loops)

    @staticmethod
    def planned(gm: fx.GraphModule, plan: Program, no_loops: str | None) -> Rewritten:
        return Rewritten(gm, plan, memory(plan), no_loops)
