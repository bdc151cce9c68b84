"""The first step of a graph with collectives: all ranks run the same loops, with the least rows that any of them has.

The free memory of each rank decides its rows, and its budget may refuse a run. Both must be known to all ranks before
the first collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from mom_compile.memory.choice import Choice
from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.runtime.ranks import Run, agree, announce_failure
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import value_of
from mom_passes.loops.loop import Loop
from mom_passes.ops.collectives import COLLECTIVES, group_of
from mom_passes.program.program import LoopStep, Program
from mom_passes.torch_compat import collective


@dataclass(frozen=True)
class Agreement:
    """The process groups of a graph, and its loops and collectives as text."""

    groups: tuple[str, ...]
    graph: str

    @staticmethod
    def on_program(program: Program, chosen: Sequence[fx.Node]) -> Agreement | None:
        """Return the agreement on a program; None if it has no collectives. Each run chooses the rows of `chosen`."""
        groups: list[str] = []
        steps: list[str] = []
        outside = 0
        for step in program.steps:
            if isinstance(step, LoopStep):
                found = [node for node in step.loop.body.graph.nodes if node.target in COLLECTIVES]
                steps += [_described(step.loop, len(found), step.node in chosen)] if found else []
            else:
                found = [node for node in step.nodes if node.target in COLLECTIVES]
                outside += len(found)
            groups += [group_of(node.args) for node in found]
        if not groups:
            return None
        return Agreement(tuple(dict.fromkeys(groups)), "; ".join([*steps, f"{outside} collectives outside of loops"]))

    @staticmethod
    def on_captured(gm: fx.GraphModule) -> Agreement | None:
        """Return the agreement on a captured graph that stock Inductor compiles; None if it has no collectives, or if
        ranks exchange rows: each then has another number of rows, and the same collectives."""
        found = collectives_of(gm)
        if not found or any(node.target is collective("all_to_all_single") for node in found):
            return None
        shapes = ", ".join(f"{node.target} of {list(value_of(node).shape)}" for node in found)
        return Agreement(groups_of(gm), f"no loops, {shapes}")

    def hold(self, sizes: tuple[int, ...], choice: Choice | None = None, chosen: tuple[int, ...] = ()) -> None:
        """Exchange a run of these sizes with the other ranks. `chosen` are the sizes that `choice` depends on.

        Raises
        ------
        RanksDiffer
            If ranks run different collectives, or one of them cannot run.
        MemoryBudgetError
            If this rank's budget cannot be kept; the other ranks raise `RanksDiffer`.
        """
        try:
            rows = choice.at(chosen).rows if choice is not None else ()
        except MemoryBudgetError as error:
            announce_failure(self.groups, error)
            raise
        agreed = agree(self.groups, Run(self.graph, sizes, rows))
        if choice is not None and agreed.rows != rows:
            choice.settle(chosen, agreed.rows)


@dataclass(frozen=True)
class RanksAgree:
    """The step: its arguments are the sizes that `choice` depends on, `deciding` of them, and all sizes of the run."""

    agreement: Agreement
    choice: Choice | None
    deciding: int

    def __call__(self, arguments: list[int]) -> tuple[()]:
        chosen, sizes = tuple(arguments[: self.deciding]), tuple(arguments[self.deciding :])
        self.agreement.hold(sizes, self.choice, chosen)
        return ()


def has_collectives(program: Program) -> bool:
    """Return whether a program has collectives, in loops or outside."""
    return Agreement.on_program(program, ()) is not None


def collectives_of(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the collectives of a captured graph."""
    begin = {collective(name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")}
    begin |= {collective(name) for name in ("all_to_all_single", "broadcast")}
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in begin - {None}]


def groups_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the process groups of a captured graph."""
    return tuple(dict.fromkeys(str(node.args[-1]) for node in collectives_of(gm)))


def _described(loop: Loop, collectives: int, chosen: bool) -> str:
    rows = "chosen rows" if chosen else f"{loop.rows} tokens"
    turns = f"{rows} at a time, {loop.in_flight} in flight"
    return f"stage {loop.stage}: {expr(loop.length)} tokens, {turns}, {collectives} collectives"
