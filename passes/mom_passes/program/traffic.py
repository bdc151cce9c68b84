"""What a run of a program brings to the device of weights on the host, and what it computes meanwhile.

Terms
-----
arrival   Weights that arrive together, for one stretch. Their copies begin before the stretch before theirs computes,
          so that is what they are hidden behind; the first has nothing before it.

    seconds that a run waits for weights = sum over arrivals of max(0, bytes / link - multiply-adds before / rate)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import bytes_of, input_node, value_of
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS
from mom_passes.program.program import Compute, LoopStep, Program, Step, Transfer
from mom_passes.rules.work import matmul_work


@dataclass(frozen=True)
class Arrival:
    """`names` of the weights, their `bytes`, and the multiply-adds of the stretch before theirs."""

    names: tuple[str, ...]
    bytes: int
    work_before: int

    def exposed(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds of its copy that no compute hides. A multiply-add is two FLOPs."""
        return max(0.0, self.bytes / bytes_per_second - 2 * self.work_before / flops_per_second)


@dataclass(frozen=True)
class WeightTraffic:
    """Weights that a run brings to the device, in bytes at the captured sizes: whole ones, in `arrivals`; `rows` of
    tables; and matrices of at most so many experts as are chosen."""

    arrivals: tuple[Arrival, ...]
    rows: int
    chosen: int

    @property
    def bytes(self) -> int:
        return sum(arrival.bytes for arrival in self.arrivals) + self.rows + self.chosen


def weight_traffic(program: Program, waits: Collection[fx.Node]) -> WeightTraffic:
    """`waits` are those for weights."""
    arrivals: list[Arrival] = []
    names: list[str] = []
    size = before = work = rows = chosen = 0
    for step in program.steps:
        if isinstance(step, Transfer):
            node = step.node
            if node in waits:
                if not names:
                    before, work = work, 0
                host = _host_of(node)
                names.append(host.name)
                size += bytes_of(host)
            rows += bytes_of(node) if node.target is FETCH_ROWS else 0
            chosen += _of_chosen(node) if node.target is FETCH_CHOSEN else 0
            continue
        done = _work(step)
        if done and names:
            arrivals.append(Arrival(tuple(names), size, before))
            names, size = [], 0
        work += done
    if names:
        arrivals.append(Arrival(tuple(names), size, before))
    return WeightTraffic(tuple(arrivals), rows, chosen)


def _host_of(wait: fx.Node) -> fx.Node:
    return input_node(input_node(wait))


def _work(step: Step) -> int:
    if isinstance(step, LoopStep):
        return step.loop.work
    return sum(map(matmul_work, step.nodes)) if isinstance(step, Compute) else 0


def _of_chosen(node: fx.Node) -> int:
    """Each expert once: at most as many as were chosen, or as there are."""
    bank, keys = value_of(node), value_of(input_node(node, 1))
    experts = hint(bank.shape[0])
    return bytes_of(node) // max(1, experts) * min(experts, count_hint(keys.shape))
