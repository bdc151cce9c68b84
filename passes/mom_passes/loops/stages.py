"""Split a graph at its barriers into stages, and choose the values that cross between stages. An analysis.

Terms
-----
barrier    A whole operand that a loop computes (keys and values of an attention): it must be complete first.
stage      Everything between two barriers: operators run once on the full sequence, then loops over rows.
earliest   The first stage in which a value can be computed: that of its operands, plus one across a barrier.
latest     The last stage in which it can be computed: that of its readers, minus one across a barrier.
segment    A part of a long stage, cut between layers (`loops.segments`): a stage of its own from then on.
late       At boundary `k` (after stage `k`): only computed after it.
crossing   A value kept at full length from the stage that computes it to a later stage that reads it.

    number the stages by the barriers before them
    compute matrix products and attentions once, as late as their readers allow
    at each boundary: min-cut between what is computed before and what is needed after
        capacity of a value = its bytes per token; 0 if it is kept in any case (a barrier, an output)
        cheap operators (norms, rope, masks) may be repeated after the boundary
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.meta import meta_value
from mom_passes.graph.min_cut import cheapest_cut
from mom_passes.graph.values import returns_nothing
from mom_passes.loops.instances import Carried, DemandGraph, Instance, Kind, bytes_per_token
from mom_passes.loops.segments import find_segments
from mom_passes.rules import All, Rows

#: Capacities are bytes per token in units of 1/FINE, so that ties can be broken below one byte.
FINE = 1 << 20
#: The most products, attentions and recurrences in a loop body by default: about four layers.
MOST_PRODUCTS = 48


@dataclass(frozen=True)
class StagePlan:
    """One stage: `whole` operators run first, then loops store the rows of `stored`.

    `available` are the row instances that earlier stages have stored and this stage may read.
    """

    index: int
    whole: tuple[Instance, ...]
    stored: tuple[Instance, ...]
    available: frozenset[Instance]


@dataclass(frozen=True)
class Stages:
    """The stages of a demand graph, in order."""

    demands: DemandGraph
    plans: tuple[StagePlan, ...]

    @property
    def last_is_largest(self) -> bool:
        """Whether no other stage stores as many bytes per token at full length as the last one with a loop.

        Values that the graph returns do not count: the later a stage, the more of a cache is there.
        """
        sizes = [self._bytes_per_token(plan) for plan in self.plans if plan.stored]
        return bool(sizes) and all(size < sizes[-1] for size in sizes[:-1])

    def _bytes_per_token(self, plan: StagePlan) -> int:
        returned = {instance.node for instance in self.demands.outputs}
        rows = [i for i in plan.stored if isinstance(i.need, Rows) and i.node not in returned]
        return sum(map(bytes_per_token, rows))


def plan_stages(demands: DemandGraph, most_products: int = MOST_PRODUCTS) -> Stages:
    """Assign every instance to a stage and choose the crossings.

    A stage with more than `most_products` products is cut between layers.
    """
    planner = _Planner(demands, most_products)
    return Stages(demands, planner.plans())


class _Planner:
    def __init__(self, demands: DemandGraph, most_products: int) -> None:
        self.demands = demands
        self.barriers = {demands.inputs[i][0] for i in demands.order if demands.kinds[i] is Kind.BARRIER}
        self.earliest = self._earliest({})
        self.segments = find_segments(demands, self.earliest, most_products)
        if self.segments:
            self.earliest = self._earliest(self._segments_as_stages())
        self.last = max(self.earliest.values(), default=0)
        self.latest = self._latest(self._latest())
        self.ready = self._ready()
        self.late_until = self._late_until()
        self.needed = self._needed()

    def _earliest(self, placed: Mapping[Instance, int]) -> dict[Instance, int]:
        earliest: dict[Instance, int] = {}
        effects = 0
        for instance in self.demands.order:
            below = max((earliest[i] for i in self.demands.inputs[instance]), default=0)
            below += self.demands.kinds[instance] is Kind.BARRIER
            earliest[instance] = placed.get(instance, below)
            if returns_nothing(instance.node):
                # Assertions run in graph order.
                effects = earliest[instance] = max(effects, earliest[instance])
        return earliest

    def _segments_as_stages(self) -> dict[Instance, int]:
        """Return the stage of each instance of a segment, if segments count as stages."""
        after: dict[int, int] = {}
        for instance, segment in self.segments.items():
            after[self.earliest[instance]] = max(after.get(self.earliest[instance], 0), segment)
        before = list(accumulate((after.get(stage, 0) for stage in range(max(after, default=0))), initial=0))
        own = ((instance, self.earliest[instance], segment) for instance, segment in self.segments.items())
        return {instance: stage + before[stage] + segment for instance, stage, segment in own}

    def _latest(self, placed: Mapping[Instance, int] | None = None) -> dict[Instance, int]:
        latest: dict[Instance, int] = {}
        outputs = set(self.demands.outputs)
        for instance in reversed(self.demands.order):
            # An output is kept once it is computed, so computing it early costs no memory.
            limit = self.earliest[instance] if instance in outputs and not is_mutation(instance.node) else self.last
            for reader in self.demands.readers.get(instance, ()):
                limit = min(limit, latest[reader] - (self.demands.kinds[reader] is Kind.BARRIER))
                if self.segments.get(reader) and self.earliest[instance] < self.earliest[reader]:
                    limit = min(limit, self.earliest[reader] - 1)  # not moved into the segment that reads it
            if placed is not None and limit > self.earliest[instance] and self._is_narrower(instance, placed, latest):
                limit = self.earliest[instance]
            latest[instance] = limit
        for instance in self.demands.order:
            # One call computes all its results and carries. Its tuple cannot be stored, the items can.
            item = instance.node.target is operator.getitem and self.demands.kinds[instance] is Kind.ROWS
            if item or (isinstance(instance.need, Carried) and instance not in self.demands.claims):
                latest[instance] = latest[self.demands.inputs[instance][0]]
        return latest

    def _is_narrower(self, instance: Instance, placed: Mapping[Instance, int], latest: Mapping[Instance, int]) -> bool:
        """Whether a product takes fewer bytes than the values that must cross a boundary to compute it later.

        `placed` are the latest stages without this rule. A value with another reader after the boundary crosses anyway.
        """
        if not self._is_fixed_tensor(instance):
            return False
        after, crossing, pending = self.earliest[instance], 0, list(self.demands.inputs[instance])
        seen = {instance}
        while pending:
            operand = pending.pop()
            if operand in seen or isinstance(operand.need, All) or self.demands.kinds[operand] is not Kind.ROWS:
                continue
            seen.add(operand)
            if any(latest.get(reader, 0) > after for reader in self.demands.readers[operand] if reader not in seen):
                continue
            if self._is_fixed_tensor(operand) and placed[operand] <= after:
                crossing += bytes_per_token(operand)
            else:
                pending.extend(self.demands.inputs[operand])
        return bytes_per_token(instance) < crossing

    def _is_fixed_tensor(self, instance: Instance) -> bool:
        rows = self.demands.kinds[instance] is Kind.ROWS and isinstance(instance.need, Rows)
        value = meta_value(instance.node)
        return rows and not self.demands.recomputable(instance) and isinstance(value, torch.Tensor)

    def _ready(self) -> dict[Instance, int]:
        """Return the first stage that may read each whole value."""
        ready: dict[Instance, int] = {}
        for instance in self.demands.order:
            kind = self.demands.kinds[instance]
            if kind in (Kind.WHOLE, Kind.BARRIER):
                ready[instance] = self.latest[instance]
            elif kind in (Kind.INLINE, Kind.ENTRY):
                ready[instance] = max((ready.get(i, 0) for i in self.demands.inputs[instance]), default=0)
        return ready

    def fixed(self, instance: Instance) -> bool:
        """Whether an instance is computed once, in its latest stage: products, attentions, rows of a barrier."""
        return not self.demands.recomputable(instance) or instance in self.barriers

    def _late_until(self) -> dict[Instance, int]:
        """Return the first stage in which each row instance is available: at earlier boundaries it is late."""
        until: dict[Instance, int] = {}
        for instance in self.demands.order:
            kind = self.demands.kinds[instance]
            if kind is Kind.ENTRY:
                until[instance] = self.ready[instance]
            elif kind in (Kind.ROWS, Kind.AHEAD):
                inputs = self.demands.inputs[instance]
                own = self.latest[instance] if self.fixed(instance) else self.earliest[instance]
                until[instance] = max(own, *(until.get(i, self.ready.get(i, 0)) for i in inputs), 0)
        return until

    def _needed(self) -> list[set[Instance]]:
        """Return, for each boundary, the row instances that are not late there and are read by late ones."""
        needed: list[set[Instance]] = [set() for _ in range(self.last)]
        for reader, last in self.late_until.items():
            for operand in self.demands.inputs[reader]:
                if not isinstance(operand.need, All):
                    for k in range(self.late_until.get(operand, 0), last):
                        needed[k].add(operand)
        return needed

    def crossing(self, k: int) -> set[Instance]:
        """Return the row instances that cross from stage `k` to `k + 1`, by min-cut."""
        needed = self._ordered(self.needed[k])
        return cheapest_cut(
            self._computed(needed),
            lambda instance, _: self._cost(instance, k),
            lambda instance: self._made_from(instance, k),
        )

    def _made_from(self, instance: Instance, k: int) -> list[Instance] | None:
        """Return the instances to recompute this one from, None if recomputing cannot be cheaper than keeping.

        A residual stream is computed from the previous one and a product of the same width with no other reader.
        Without this bound, the min-cut of every boundary would include all earlier layers.
        """
        if not self.demands.recomputable(instance):
            return None
        inputs, own = self._computed(self.demands.inputs[instance]), self._cost(instance, k)
        return inputs if own is None or self._exclusive_cost(inputs, k) < own else None

    def _exclusive_cost(self, inputs: Iterable[Instance], k: int) -> float:
        """Return a lower bound of the cost of those inputs that have no other reader."""
        return sum(self._least_cost(i, k) for i in dict.fromkeys(inputs) if len(set(self.demands.readers[i])) == 1)

    def _least_cost(self, instance: Instance, k: int) -> float:
        cost = self._cost(instance, k)
        kept = math.inf if cost is None else cost
        if not self.demands.recomputable(instance):
            return kept
        return min(kept, self._exclusive_cost(self._computed(self.demands.inputs[instance]), k))

    def _computed(self, instances: Iterable[Instance]) -> list[Instance]:
        """Return the instances that are computed from rows: neither whole values nor inputs of the graph."""
        return [i for i in instances if not isinstance(i.need, All) and self.demands.kinds[i] is not Kind.SOURCE]

    def _cost(self, instance: Instance, k: int) -> int | None:
        """Return bytes per token in 1/FINE, 0 for a value kept after stage `k` in any case, None if it cannot cross."""
        value = meta_value(instance.node)
        # Rows with `before` are computed from rows. If both could cross, one storage would be counted twice.
        if not isinstance(value, torch.Tensor) or self.demands.kinds[instance] is Kind.AHEAD:
            return None
        if self.kept(instance, k):
            return 0
        # Ties: prefer plain dims to composite ones, then the value nearest to its readers.
        composite = 0 if instance.dim.plain else FINE // 2
        depth = len(self.demands.order) - self.demands.position[instance]
        return bytes_per_token(instance) * FINE + composite + depth

    def kept(self, instance: Instance, k: int) -> bool:
        """Whether the value is at full length after stage `k` in any case."""
        whole = Instance(instance.node, All())
        kind = self.demands.kinds.get(whole)
        if kind is Kind.SOURCE:
            return True
        if kind is None or self.latest[whole] - (kind is Kind.BARRIER) > k:
            return False
        readers = self.demands.readers.get(whole, ())
        return whole in self.demands.outputs or any(self._reaches(reader, k) for reader in readers)

    def _reaches(self, reader: Instance, k: int) -> bool:
        if self.demands.kinds[reader] is Kind.INLINE:
            return any(self._reaches(r, k) for r in self.demands.readers.get(reader, ()))
        if self.demands.kinds[reader] is Kind.ENTRY:
            return False
        return self.latest[reader] > k

    def plans(self) -> tuple[StagePlan, ...]:
        crossing = [self.crossing(k) for k in range(self.last)]
        stored: list[set[Instance]] = []
        available: list[set[Instance]] = []
        kept_so_far: set[Instance] = set()
        for k in range(self.last + 1):
            here = {i for i in kept_so_far if i in crossing[k - 1] or self.kept(i, k - 1)} if k else set()
            due = {i for i in self.barriers if self.latest[i] == k}
            crosses = crossing[k] if k < self.last else set()
            available.append(here)
            stored.append((due | {i for i in crosses if self.demands.kinds[i] is Kind.ROWS}) - here)
            kept_so_far |= stored[k]
        self._complete(stored, available)
        whole: list[list[Instance]] = [[] for _ in range(self.last + 1)]
        for instance in self._wholes():
            whole[self.latest[instance]].append(instance)
        return tuple(
            StagePlan(k, tuple(whole[k]), self._ordered(stored[k]), frozenset(available[k]))
            for k in range(self.last + 1)
        )

    def _complete(self, stored: list[set[Instance]], available: list[set[Instance]]) -> None:
        """Store fixed instances of earlier stages (matrix products) that a loop would otherwise have to repeat.

        Of a call with several results, the items are stored: a tuple cannot be.
        """
        for k in reversed(range(len(stored))):
            for instance in body_instances(self.demands, stored[k], available[k]):
                made = self.latest[instance]
                rows = self.demands.kinds[instance] is Kind.ROWS and isinstance(meta_value(instance.node), torch.Tensor)
                if rows and self.fixed(instance) and made < k:
                    stored[made].add(instance)
                    for later in range(made + 1, k + 1):
                        available[later].add(instance)

    def _wholes(self) -> list[Instance]:
        return [i for i in self.demands.order if self.demands.kinds[i] is Kind.WHOLE]

    def _ordered(self, instances: Iterable[Instance]) -> tuple[Instance, ...]:
        return tuple(sorted(instances, key=self.demands.position.__getitem__))


def body_instances(demands: DemandGraph, stored: Iterable[Instance], available: Iterable[Instance]) -> list[Instance]:
    """Return every instance that a loop storing `stored` computes or reads, in graph order.

    The walk ends at `available` instances, at whole values and at rows sliced from them.
    """
    ends = set(available)
    found: set[Instance] = set()
    pending = list(stored)
    while pending:
        instance = pending.pop()
        if instance in found:
            continue
        found.add(instance)
        if instance not in ends and demands.kinds[instance] in (Kind.ROWS, Kind.AHEAD, Kind.INLINE):
            pending.extend(demands.inputs[instance])
    return sorted(found, key=demands.position.__getitem__)
