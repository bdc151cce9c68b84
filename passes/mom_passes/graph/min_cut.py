"""The cheapest cut of a graph of values, some of which may be recomputed below the cut.

Terms
-----
wanted      Values that are needed below the cut.
made from   The operands of a value that may be recomputed below the cut; None for a value that is computed above, once.

    flow: above -> values that cannot be recomputed -> ... -> wanted -> below
    each value is an edge whose capacity is the cost of cutting there
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import networkx as nx

V = TypeVar("V", bound=Hashable)


def cheapest_cut(
    wanted: Iterable[V], cost: Callable[[V, int], int | None], made_from: Callable[[V], Sequence[V] | None]
) -> set[V]:
    """The values to cut at. `cost(value, position in visiting order)` is None where no cut is allowed."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(["above", "below"])
    # Integers hash faster than values. Edge `2 * n -> 2 * n + 1` is value number `n`.
    number: dict[V, int] = {}
    pending = list(dict.fromkeys(wanted))
    needed = set(pending)
    edges: list[tuple[V, V]] = []
    while pending:
        value = pending.pop()
        if value in number:
            continue
        at = 2 * number.setdefault(value, len(number))
        price = cost(value, len(number))
        flow.add_edge(at, at + 1, **({} if price is None else {"capacity": price}))
        if value in needed:
            flow.add_edge(at + 1, "below")
        sources = made_from(value)
        if sources is None:
            flow.add_edge("above", at)
        else:
            edges += [(source, value) for source in sources]
            pending += sources
    flow.add_edges_from((2 * number[source] + 1, 2 * number[value]) for source, value in edges)
    _, (above, _) = nx.minimum_cut(flow, "above", "below", flow_func=nx.flow.boykov_kolmogorov)
    return {value for value, n in number.items() if 2 * n in above and 2 * n + 1 not in above}
