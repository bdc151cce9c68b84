"""Express the positions of picked attention queries as a mask.

`mom.attention` takes the position of the first query and assumes consecutive ones. For picked queries, the keys that
each may see (causality, window, segments, positions) become a mask `[B or 1, 1, count, T]`, from their row numbers.

Before:  attention(q, k, v, mask, start, is_causal=True)[:, :, numbers]
After:   attention(q[numbers], k, v, mask[numbers] & (key <= start + numbers), 0, is_causal=False)
"""

from __future__ import annotations

import functools
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

#: The mask has T elements per query. More queries than this stay in the loops, which need no mask.
MOST_QUERIES = 64


def check_maskable(node: fx.Node, dim: Dim, batch: Dim | None, picks: Picks) -> None:
    """Raise `CannotChunk` if an attention cannot run on picked queries."""
    if dim != Dim(QUERY) or batch not in (None, Dim(BATCH)) or (batch is None and picks.entries is not None):
        raise CannotChunk(node, dim, "only queries, per batch entry or the same for all, can be picked")
    if hint(picks.count) > MOST_QUERIES:
        raise CannotChunk(node, dim, f"a mask of more than {MOST_QUERIES} picked queries takes too much memory")


def masked_call(
    node: fx.Node, graph: fx.Graph, values: Sequence[fx.Node], other: Callable[[fx.Node], Any], numbers: fx.Node
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return target, args and kwargs of an attention on picked queries.

    `values` are the new graph's tensor operands, with rows picked, and `numbers` their row numbers, `[B, count]` or
    `[count]`. `other` maps a size to the new graph.
    """
    operands = iter(values)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: next(operands) if is_tensor(arg) else other(arg))
    new = {name: given(MOM_ATTENTION, args, kwargs, name) for name in ("mask", "start", "segments", "positions")}
    placed = argument(node, "is_causal") or new["segments"] is not None or new["positions"] is not None
    if not placed:
        return MOM_ATTENTION, args, kwargs
    build = _MaskBuilder(graph, numbers, new["start"], value_of(argument(node, "key")).shape[2])
    mask = build.combine(new["mask"], build.visible(argument(node, "is_causal"), argument(node, "window"), new))
    changes: dict[str, Any] = {"mask": mask, "start": 0, "is_causal": False, "window": None}
    if new["segments"] is not None or new["positions"] is not None:
        changes |= {"segments": None, "positions": None, "spans": None}
    return MOM_ATTENTION, *replace(MOM_ATTENTION, args, kwargs, **changes)


class _MaskBuilder:
    """Emits the mask of picked queries."""

    def __init__(self, graph: fx.Graph, numbers: fx.Node, start: Any, tokens: Any) -> None:
        self.graph = graph
        rows = numbers if isinstance(start, int) and start == 0 else self._emit(aten.add.Tensor, numbers, start)
        #: Positions of the queries among the keys: `[B or 1, count]`.
        self.queries = rows if value_of(rows).dim() == 2 else self._emit(aten.unsqueeze.default, rows, 0)
        self.tokens = tokens

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs)

    def visible(self, is_causal: bool, window: int | None, vectors: dict[str, Any]) -> fx.Node:
        """Emit the boolean mask of visible keys, `[B or 1, 1, count, T]`."""
        found: list[fx.Node] = []
        if is_causal:
            found += self._causal(self._of_queries(self.queries), self._indices(), window)
        if vectors["segments"] is not None:
            of_queries, of_keys = self._read(vectors["segments"])
            found.append(self._emit(aten.eq.Tensor, of_queries, of_keys))
        if vectors["positions"] is not None:
            found += self._causal(*self._read(vectors["positions"]), None if is_causal else window)
        return functools.reduce(lambda a, b: self._emit(aten.logical_and.default, a, b), found)

    def _causal(self, of_queries: fx.Node, of_keys: fx.Node, window: int | None) -> list[fx.Node]:
        """Emit masks of the keys up to the query and, with `window`, of the last `window` of these."""
        distance = self._emit(aten.sub.Tensor, of_queries, of_keys)
        found = [self._emit(aten.ge.Scalar, distance, 0)]
        return found if window is None else [*found, self._emit(aten.lt.Scalar, distance, window)]

    def _indices(self) -> fx.Node:
        device = value_of(self.queries).device
        options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
        return self._emit(torch.ops.prims.iota.default, size_node(self.graph, self.tokens), **options)

    def _of_queries(self, vector: fx.Node) -> fx.Node:
        """Unsqueeze `[B, count]` to `[B, 1, count, 1]`."""
        return self._emit(aten.unsqueeze.default, self._emit(aten.unsqueeze.default, vector, 1), 3)

    def _read(self, vector: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Emit a vector `[B or 1, T]` at the queries, `[B, 1, count, 1]`, and at the keys, `[B or 1, 1, 1, T]`."""
        at, value = self.queries, vector
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

    def combine(self, mask: fx.Node | None, visible: fx.Node) -> fx.Node:
        """Emit the conjunction of a mask, boolean or additive, with the visible keys."""
        if mask is None:
            return visible
        if value_of(mask).dtype == torch.bool:
            return self._emit(aten.logical_and.default, mask, visible)
        hidden = self._emit(aten.logical_not.default, visible)
        return self._emit(aten.masked_fill.Scalar, mask, hidden, -math.inf)
