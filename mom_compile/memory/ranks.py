"""The first step of a graph with collectives: all ranks run the same loops, with the least rows that any of them has.

The free memory of each rank decides its rows, and its budget may refuse a run. Both must be known to all ranks before
the first collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from mom_compile.memory.choice import Choice
from mom_compile.memory.refuse import MemoryBudgetError
from mom_compile.runtime.ranks import Run, agree, announce_failure
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import value_of
from mom_passes.loops.loop import Loop
from mom_passes.ops.collectives import COLLECTIVES, group_of
from mom_passes.program.program import LoopStep, Program
from mom_passes.torch_compat import SYMBOLIC, collective


@dataclass(frozen=True)
class Agreement:
    """The process groups of a graph, and its loops and collectives as text.

    `symbols` are those of the graph's sizes that the text has. Ranks may differ in others: a rank that gathers weights
    has a prompt of its own length.
    """

    groups: tuple[str, ...]
    graph: str
    symbols: tuple[sympy.Symbol, ...] = ()

    @staticmethod
    def on_program(program: Program, chosen: Sequence[fx.Node]) -> Agreement | None:
        """Return the agreement on a program; None if it has no collectives. Each run chooses the rows of `chosen`."""
        text: list[str] = []
        sizes: list[Any] = []
        outside: list[fx.Node] = []
        groups: list[str] = []
        for step in program.steps:
            nodes = step.loop.body.graph.nodes if isinstance(step, LoopStep) else step.nodes
            found = [node for node in nodes if node.target in COLLECTIVES]
            groups += [group_of(node.args) for node in found]
            if not isinstance(step, LoopStep):
                outside += found
            elif found:
                text.append(_described(step.loop, len(found), step.node in chosen))
                sizes.append(step.loop.length)
        return _agreement(groups, text, sizes, outside)

    @staticmethod
    def on_captured(gm: fx.GraphModule) -> Agreement | None:
        """Return the agreement on a captured graph that stock Inductor compiles; None if it has no collectives, or if
        ranks exchange rows: each then has another number of rows, and the same collectives."""
        found = collectives_of(gm)
        if any(node.target is collective("all_to_all_single") for node in found):
            return None
        return _agreement(groups_of(gm), ["no loops"], [], found)

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


def _agreement(
    groups: Sequence[str], text: Sequence[str], sizes: Sequence[Any], outside: Sequence[fx.Node]
) -> Agreement | None:
    """Return the agreement on loops, as text with their sizes, and on collectives outside of them."""
    if not groups:
        return None
    shapes = [tuple(expr(size) for size in value_of(node.all_input_nodes[0]).shape) for node in outside]
    counts = Counter(f"{node.target} of {list(shape)}" for node, shape in zip(outside, shapes, strict=True))
    known = [expr(size) for size in sizes] + [size for shape in shapes for size in shape]
    symbols = sorted({symbol for size in known for symbol in size.free_symbols}, key=str)
    graph = "; ".join([*text, *(f"{count} x {name}" for name, count in counts.items())])
    return Agreement(tuple(dict.fromkeys(groups)), graph, tuple(symbols))


def collectives_of(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the collectives of a captured graph."""
    begin = {collective(name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")}
    begin |= {collective(name) for name in ("all_to_all_single", "broadcast")}
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in begin - {None}]


def sizes_at(gm: fx.GraphModule, agreement: Agreement | None) -> tuple[int, ...]:
    """Return the positions of a captured graph's inputs with the sizes of an agreement."""
    if agreement is None:
        return ()
    values = [meta_value(node) for node in gm.graph.find_nodes(op="placeholder")]
    return tuple(i for i, v in enumerate(values) if isinstance(v, SYMBOLIC) and expr(v) in agreement.symbols)


def groups_of(gm: fx.GraphModule) -> tuple[str, ...]:
    """Return the names of the process groups of a captured graph."""
    return tuple(dict.fromkeys(str(node.args[-1]) for node in collectives_of(gm)))


def _described(loop: Loop, collectives: int, chosen: bool) -> str:
    rows = "chosen rows" if chosen else f"{loop.rows} tokens"
    turns = f"{rows} at a time, {loop.in_flight} in flight"
    return f"stage {loop.stage}: {expr(loop.length)} tokens, {turns}, {collectives} collectives"
