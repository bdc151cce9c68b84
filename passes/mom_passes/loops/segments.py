"""Cut long stages between layers. An analysis.

Without a barrier between them, layers run in one loop: those of a state-space model all do. Its body would take long to
compile, and no two layers would share one. A stage with more products than `most` is cut where the rows that cross take
the fewest bytes, which is the residual stream between two layers.

    stage                products of 64 layers
    segments of it       two layers each: identical loops, compiled once
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from mom_passes.graph.meta import meta_value
from mom_passes.loops.instances import DemandGraph, Instance, Kind, bytes_per_token
from mom_passes.rules import Rows

#: A segment has at least this many products (about one layer), and at least 1 / PARTS of the limit for a stage.
FEWEST = 8
PARTS = 6


def find_segments(demands: DemandGraph, stage_of: Mapping[Instance, int], most: int) -> dict[Instance, int]:
    """Return the number of the segment of each instance in its stage. Instances that are not in it are in segment 0."""
    stages: dict[int, list[Instance]] = {}
    for instance in demands.order:
        if demands.kinds[instance] in (Kind.ROWS, Kind.AHEAD):
            stages.setdefault(stage_of[instance], []).append(instance)
    segments: dict[Instance, int] = {}
    for members in stages.values():
        weights = [_is_product(demands, instance) for instance in members]
        if sum(weights) > most:
            segments.update(_cut(members, weights, _widths(demands, members), max(FEWEST, most // PARTS)))
    return segments


def _cut(
    members: Sequence[Instance], weights: Sequence[bool], widths: Sequence[float], fewest: int
) -> dict[Instance, int]:
    """Number the members of a stage. A segment ends at the first narrowest place after `fewest` products."""
    total, before = sum(weights), list(accumulate(weights))
    inner = [width for width, done in zip(widths, before, strict=True) if min(done, total - done) >= fewest]
    narrowest = min(inner, default=math.inf)
    found, number, products = {}, 0, 0
    for instance, weight, width, done in zip(members, weights, widths, before, strict=True):
        found[instance] = number
        products += weight
        if width == narrowest < math.inf and min(products, total - done) >= fewest:
            number, products = number + 1, 0
    return found


def _widths(demands: DemandGraph, members: Sequence[Instance]) -> list[float]:
    """Return the bytes per token that are computed by products up to each member and read after it.

    Infinite where a value without rows of its own is read after it, such as the results of a call.
    """
    index = {instance: i for i, instance in enumerate(members)}
    worked: set[Instance] = set()
    changes, barred = [0] * len(members), [0] * len(members)
    for i, instance in enumerate(members):
        if _is_product(demands, instance) or not worked.isdisjoint(demands.inputs[instance]):
            worked.add(instance)
        last = max((index.get(reader, -1) for reader in demands.readers.get(instance, ())), default=-1)
        if instance in worked and last > i:
            rows = demands.kinds[instance] is Kind.ROWS and isinstance(instance.need, Rows)
            crosses = rows and isinstance(meta_value(instance.node), torch.Tensor)
            counts, amount = (changes, bytes_per_token(instance)) if crosses else (barred, 1)
            counts[i] += amount
            counts[last] -= amount
    live = zip(accumulate(changes), accumulate(barred), strict=True)
    return [math.inf if blocked else width for width, blocked in live]


def _is_product(demands: DemandGraph, instance: Instance) -> bool:
    rows = demands.kinds[instance] is Kind.ROWS and isinstance(instance.need, Rows)
    return rows and instance.node.target is not operator.getitem and not demands.recomputable(instance)
