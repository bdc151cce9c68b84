"""What the passes make of a captured graph: the graph, its program, and the memory that needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from mom_passes.program.memory import Memory, memory
from mom_passes.program.program import Program
from mom_passes.program.schedule import schedule
from mom_passes.program.traffic import WeightTraffic, weight_traffic


@dataclass(frozen=True, eq=False)
class Rewritten:
    """Whoever lowers a graph, decides by its memory or tells of it reads the same `plan` and `memory`.

    `no_loops` is why nothing runs over mini-sequences, or None; `weights` what arrives of weights on the host,
    in the buffers that `arriving` make.
    """

    gm: fx.GraphModule
    plan: Program
    memory: Memory
    no_loops: str | None = None
    weights: WeightTraffic | None = None
    arriving: frozenset[fx.Node] = frozenset()

    @staticmethod
    def of(gm: fx.GraphModule, no_loops: str | None = None, waits: Collection[fx.Node] = ()) -> Rewritten:
        """`waits` are those for weights."""
        plan = schedule(gm)
        arriving = frozenset(start for wait in waits for start in wait.all_input_nodes)
        weights = weight_traffic(plan, waits)
        return Rewritten(gm, plan, memory(plan), no_loops, weights if weights.bytes else None, arriving)

    @staticmethod
    def planned(gm: fx.GraphModule, plan: Program, no_loops: str | None) -> Rewritten:
        return Rewritten(gm, plan, memory(plan), no_loops)
