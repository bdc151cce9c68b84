"""Copy weights from the host to the device in time for the stretch of the graph that reads them.

Terms
-----
weight    An input in host memory that the graph reads through `fetch_weight`.
stretch   The operators between two attentions, or one loop: with one loop per layer, the rest of one layer and the
          projections of the next.
group     The weights that are first read in one stretch; they arrive together. At most two groups are on the device.
          Therefore a group that is larger than a layer (a layer and the head, say) is split.

Before:  a = mm(x, permute(fetch_weight(w0))); ...; b = mm(y, permute(fetch_weight(w1)))
After:   buffer0 = fetch_start(w0); buffer1 = fetch_start(w1)
         arrived0 = fetch_wait(buffer0); arrived1 = fetch_wait(buffer1); a = mm(x, permute(arrived0)); ...
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mom_passes.attention.flex import FlexAttention
from mom_passes.graph.aliasing import is_mutation, view_chain, views_and_readers
from mom_passes.graph.edit import copy_view, emit, fake_value, first_operator, node_after, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import bytes_of, value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import FETCH_START, FETCH_WAIT, FETCH_WEIGHT
from mom_passes.rules.attention import SDPA

aten = torch.ops.aten

ATTENTIONS = SDPA.keys() | {MOM_ATTENTION}


# --- whole weights ---


def whole_weights(gm: fx.GraphModule) -> int:
    """Fetch each weight once, in the host's layout, and apply views of it on the device, in place. Return their number.

    A captured graph fetches a weight for each reader, each time the view that is read.
    """
    graph, fetched, seen_on_host = gm.graph, dict[fx.Node, fx.Node](), list[fx.Node]()
    for node in graph.find_nodes(op="call_function", target=FETCH_WEIGHT):
        base, views = _views_of_an_input(node.args[0])
        if base is None:
            continue
        if base not in fetched:
            with graph.inserting_before(node_after(_last_input(graph))):
                fetched[base] = emit(graph, FETCH_WEIGHT, (base, node.args[1]))
        if node is fetched[base]:
            continue
        seen_on_host += views
        with graph.inserting_before(node):
            seen = fetched[base]
            for view in views:
                seen = copy_view(graph, view, seen)
                seen.meta["val"] = fake_value(seen)
            if strides_differ(meta_value(seen), meta_value(node)):
                seen = emit(graph, aten.clone.default, (seen,), {"memory_format": torch.contiguous_format})
        node.replace_all_uses_with(seen)
        graph.erase_node(node)
    _erase_unread(seen_on_host)
    return len(fetched)


def _last_input(graph: fx.Graph) -> fx.Node:
    last: fx.Node = graph.find_nodes(op="placeholder")[-1]
    return last


def _views_of_an_input(node: object) -> tuple[fx.Node | None, list[fx.Node]]:
    """The input that a value is a view of and the views in between, from the input on; no input otherwise."""
    assert isinstance(node, fx.Node)
    *views, base = view_chain(node)
    return (None if base.op != "placeholder" or any(map(is_mutation, views)) else base), views[::-1]


def _erase_unread(views: Iterable[fx.Node]) -> None:
    """Erase views without readers."""
    for view in sorted(set(views), reverse=True):
        if not view.users:
            view.graph.erase_node(view)


# --- arrivals ---


@dataclass(frozen=True)
class _Weight:
    """A fetched weight, its views, and its first reader."""

    fetch: fx.Node
    views: tuple[fx.Node, ...]
    first: fx.Node

    @property
    def bytes(self) -> int:
        return bytes_of(self.fetch)


def weights_arrive(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Let every weight arrive, with its group, before its stretch. Return the waits in graph order."""
    graph = gm.graph
    fetches = graph.find_nodes(op="call_function", target=FETCH_WEIGHT)
    if not fetches:
        return ()
    waits: list[fx.Node] = []
    for group in _groups(graph, [_weight(node) for node in fetches if node.users]):
        waits += _arrive(graph, group)
    for node in fetches:
        graph.erase_node(node)
    gm.recompile()
    return tuple(waits)


def _weight(fetch: fx.Node) -> _Weight:
    views, readers = views_and_readers(fetch)
    return _Weight(fetch, tuple(views), min(readers))


def _arrive(graph: fx.Graph, group: Sequence[_Weight]) -> list[fx.Node]:
    """Insert a group's waits before its first reader, followed by the views of its weights. Return the waits."""
    anchor = min(weight.first for weight in group)
    waits = []
    for weight in group:
        host, device = weight.fetch.args
        with graph.inserting_before(first_operator(graph)):
            start = emit(graph, FETCH_START, (host, 0, _outermost(host), device))
        with graph.inserting_before(anchor):
            waits.append(emit(graph, FETCH_WAIT, (start, None, _outermost(host))))
        weight.fetch.replace_all_uses_with(waits[-1])
    for weight in group:
        for view in weight.views:
            anchor.prepend(view)
    return waits


def _outermost(host: object) -> int:
    """The dimension that is outermost in storage. A token-major buffer along it has the host's layout."""
    assert isinstance(host, fx.Node)
    strides = value_of(host).stride()
    return max(range(len(strides)), key=lambda dim: (strides[dim], -dim), default=0)


def _groups(graph: fx.Graph, weights: Sequence[_Weight]) -> list[list[_Weight]]:
    """The groups in the order in which they are read."""
    stretch = _stretches(graph)
    by_stretch: dict[int, list[_Weight]] = {}
    for weight in sorted(weights, key=lambda weight: weight.first):
        by_stretch.setdefault(stretch[weight.first], []).append(weight)
    most = _most_at_once(graph, by_stretch.values())
    return [part for group in by_stretch.values() for part in _in_parts(group, most)]


def _stretches(graph: fx.Graph) -> dict[fx.Node, int]:
    """Node -> the number of its stretch."""
    found: dict[fx.Node, int] = {}
    number = 0
    for node in graph.nodes:
        loop = node.op == "call_module"
        number += loop
        found[node] = number
        number += loop or node.target in ATTENTIONS or isinstance(node.target, FlexAttention)
    return found


def _most_at_once(graph: fx.Graph, groups: Iterable[Sequence[_Weight]]) -> int:
    """The most bytes of a group: the median group, or the largest set of weights with one first reader if larger."""
    sizes = [sum(weight.bytes for weight in group) for group in groups]
    inseparable: dict[fx.Node, int] = {}
    for group in groups:
        for weight in group:
            inseparable[weight.first] = inseparable.get(weight.first, 0) + weight.bytes
    return max(max(inseparable.values(), default=0), int(statistics.median_high(sizes)) if sizes else 0)


def _in_parts(group: Sequence[_Weight], most: int) -> list[list[_Weight]]:
    """Split a group into runs of at most `most` bytes. Weights first read by one operator stay together."""
    parts: list[list[_Weight]] = []
    size = 0
    for weight in group:
        together = bool(parts) and parts[-1][-1].first is weight.first
        if not parts or (not together and size + weight.bytes > most):
            parts.append([])
            size = 0
        parts[-1].append(weight)
        size += weight.bytes
    return parts
