"""The result of the passes: the rewritten graph, its program and the memory it needs."""

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
    """A rewritten graph with its `plan` and `memory`, which lowering, memory policies and reports share.

    `no_loops` is the reason why nothing runs over mini-sequences, or None. `weights` is the traffic of weights on the
    host, `arriving` the nodes that make the buffers they arrive in.
    """

    gm: fx.GraphModule
    plan: Program
    memory: Memory
    no_loops: str | None = None
    weights: WeightTraffic | None = None
    arriving: frozenset[fx.Node] = frozenset()

    @staticmethod
    def of(gm: fx.GraphModule, no_loops: str | None = None, waits: Collection[fx.Node] = ()) -> Rewritten:
        """`waits` are the waits for weights."""
        plan = schedule(gm)
        arriving = frozenset(start for wait in waits for start in wait.all_input_nodes)
        weights = weight_traffic(plan, waits)
        return Rewritten(gm, plan, memory(plan), no_loops, weights if weights.bytes else None, arriving)

    @staticmethod
    def planned(gm: fx.GraphModule, plan: Program, no_loops: str | None) -> Rewritten:
        return Rewritten(gm, plan, memory(plan), no_loops)
