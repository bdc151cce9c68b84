"""Weights that a run copies from the host, and the computation that hides the copies.

Terms
-----
arrival   Weights that arrive together, for one stretch. Their copies begin before the previous stretch computes, so its
          work hides them; the first arrival is hidden by nothing.

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
    """`names` and `bytes` of the weights, and the multiply-adds of the stretch before."""

    names: tuple[str, ...]
    bytes: int
    work_before: int

    def exposed(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds of the copy that no computation hides. A multiply-add is two FLOPs."""
        return max(0.0, self.bytes / bytes_per_second - 2 * self.work_before / flops_per_second)


@dataclass(frozen=True)
class WeightTraffic:
    """Bytes of weights that a run copies to the device, at the captured sizes: whole weights in `arrivals`, `rows` of
    tables, and at most `chosen` for matrices of selected experts."""

    arrivals: tuple[Arrival, ...]
    rows: int
    chosen: int

    @property
    def bytes(self) -> int:
        return sum(arrival.bytes for arrival in self.arrivals) + self.rows + self.chosen


def weight_traffic(program: Program, waits: Collection[fx.Node]) -> WeightTraffic:
    """The weight traffic of a program. `waits` are the waits for weights."""
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
    """Bytes of the selected experts, each once: at most as many as were selected, or as there are."""
    bank, keys = value_of(node), value_of(input_node(node, 1))
    experts = hint(bank.shape[0])
    return bytes_of(node) // max(1, experts) * min(experts, count_hint(keys.shape))
