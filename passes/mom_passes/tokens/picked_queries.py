"""An attention of picked queries: what their places in the sequence mean becomes a mask.

`mom.attention` knows where its queries stand by the first of them. Queries that are picked stand anywhere: which keys
each may see, by causality, a window, segments or positions, is computed from their numbers, `[B or 1, 1, count, T]`.

Before:  attention(q, k, v, mask, start, is_causal=True)[:, :, numbers]
After:   attention(q[numbers], k, v, mask[numbers] & (key <= start + numbers), 0, is_causal=False)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, given, replace
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.sizes import hint
from mom_passes.graph.values import is_tensor, value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules import Dim
from mom_passes.rules.attention import BATCH, QUERY
from mom_passes.tokens.picks import Picks

aten = torch.ops.aten

#: Their mask has a row of all keys for each; more queries than these stay in the loops, which need none.
MOST_QUERIES = 64


def may_be_masked(node: fx.Node, dim: Dim, batch: Dim | None, picks: Picks) -> None:
    """Raises `CannotChunk` where an attention cannot be run on picked queries."""
    if dim != Dim(QUERY) or batch not in (None, Dim(BATCH)) or (batch is None and picks.entries is not None):
        raise CannotChunk(node, dim, "only queries of each entry can be picked")
    if hint(picks.count) > MOST_QUERIES:
        raise CannotChunk(node, dim, f"a mask of more than {MOST_QUERIES} picked queries takes too much")


def masked_call(
    node: fx.Node, graph: fx.Graph, values: Sequence[fx.Node], other: Callable[[fx.Node], Any], numbers: fx.Node
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of the attention on picked queries.

    `values` are the new graph's tensor operands, rows already picked, `numbers` `[B, count]` or `[count]`, and `other`
    gives the new graph's node for a size.
    """
    operands = iter(values)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: next(operands) if is_tensor(arg) else other(arg))
    new = {name: given(MOM_ATTENTION, args, kwargs, name) for name in ("mask", "start", "segments", "positions")}
    placed = argument(node, "is_causal") or new["segments"] is not None or new["positions"] is not None
    if not placed:
        return MOM_ATTENTION, args, kwargs
    seen = _Seen(graph, numbers, new["start"], value_of(argument(node, "key")).shape[2])
    mask = seen.on(new["mask"], seen.keys_of(argument(node, "is_causal"), argument(node, "window"), new))
    changes: dict[str, Any] = {"mask": mask, "start": 0, "is_causal": False, "window": None}
    if new["segments"] is not None or new["positions"] is not None:
        changes |= {"segments": None, "positions": None, "spans": None}
    return MOM_ATTENTION, *replace(MOM_ATTENTION, args, kwargs, **changes)


class _Seen:
    """Which keys picked queries may see, as nodes of a graph."""

    def __init__(self, graph: fx.Graph, numbers: fx.Node, start: Any, tokens: Any) -> None:
        self.graph = graph
        places = numbers if isinstance(start, int) and start == 0 else self._emit(aten.add.Tensor, numbers, start)
        #: Where queries stand among the keys: `[B or 1, count]`.
        self.places = places if value_of(places).dim() == 2 else self._emit(aten.unsqueeze.default, places, 0)
        self.tokens = tokens

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs)

    def keys_of(self, is_causal: bool, window: int | None, vectors: dict[str, Any]) -> fx.Node:
        """Boolean `[B or 1, 1, count, T]`."""
        found: list[fx.Node] = []
        if is_causal:
            found += self._behind(self._of_queries(self.places), self._indices(), window)
        if vectors["segments"] is not None:
            of_queries, of_keys = self._read(vectors["segments"])
            found.append(self._emit(aten.eq.Tensor, of_queries, of_keys))
        if vectors["positions"] is not None:
            found += self._behind(*self._read(vectors["positions"]), None if is_causal else window)
        seen = found[0]
        for more in found[1:]:
            seen = self._emit(aten.logical_and.default, seen, more)
        return seen

    def _behind(self, of_queries: fx.Node, of_keys: fx.Node, window: int | None) -> list[fx.Node]:
        """Keys up to the query, and of these the last `window`."""
        ahead = self._emit(aten.sub.Tensor, of_queries, of_keys)
        found = [self._emit(aten.ge.Scalar, ahead, 0)]
        return found if window is None else [*found, self._emit(aten.lt.Scalar, ahead, window)]

    def _indices(self) -> fx.Node:
        device = value_of(self.places).device
        options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
        return self._emit(torch.ops.prims.iota.default, size_node(self.graph, self.tokens), **options)

    def _of_queries(self, vector: fx.Node) -> fx.Node:
        """`[B, count]` as `[B, 1, count, 1]`."""
        return self._emit(aten.unsqueeze.default, self._emit(aten.unsqueeze.default, vector, 1), 3)

    def _read(self, vector: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What `[B or 1, T]` says of the queries, `[B, 1, count, 1]`, and of the keys, `[B or 1, 1, 1, T]`."""
        at, value = self.places, vector
        entries = value_of(at).shape[0], value_of(vector).shape[0]
        if not isinstance(entries[0], int) or entries[0] != 1:
            value = self._expand(vector, entries[0])
        elif not isinstance(entries[1], int) or entries[1] != 1:
            at = self._expand(at, entries[1])
        of_queries = self._emit(aten.gather.default, value, 1, at)
        of_keys = self._emit(aten.unsqueeze.default, self._emit(aten.unsqueeze.default, vector, 1), 1)
        return self._of_queries(of_queries), of_keys

    def _expand(self, vector: fx.Node, entries: Any) -> fx.Node:
        return self._emit(aten.expand.default, vector, [size_node(self.graph, entries), -1])

    def on(self, mask: fx.Node | None, seen: fx.Node) -> fx.Node:
        """Both a mask, boolean or additive, and what may be seen."""
        if mask is None:
            return seen
        if value_of(mask).dtype == torch.bool:
            return self._emit(aten.logical_and.default, mask, seen)
        hidden = self._emit(aten.logical_not.default, seen)
        return self._emit(aten.masked_fill.Scalar, mask, hidden, -math.inf)
