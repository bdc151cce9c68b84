"""Conditions that a mask puts on single keys, as vectors `[B or 1, T]` in the graph instead of `[B, 1, R, T]`.

    flag[b, j + first]                 ->  slice(flag, 1, first, first + T)
    flag[b, j] of a batch of its own   ->  index_select(flag, 0, arange(B))
    flag[b, 0, 0, j]                   ->  select(select(flag, 2, 0), 1, 0)
    flag[j]                            ->  unsqueeze(flag, 0)

Each vector, and its `mom.spans`, is computed once for all attentions of a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import mom_passes.ops  # noqa: F401  defines mom::spans
from mom_passes.attention.affine import Affine, nonnegative
from mom_passes.attention.mask_form import MaskForm, OfKeys
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.sizes import Size, expr, same
from mom_passes.graph.values import value_of
from mom_passes.ops.spans import SPANS

aten = torch.ops.aten


#: Batch entries and number of keys.
Shape = tuple[Size, Size]


@dataclass
class KeyVectors:
    graph: fx.Graph
    made: dict[Any, fx.Node] = field(default_factory=dict)

    def arguments(self, form: MaskForm, shape: Shape, before: fx.Node) -> dict[str, fx.Node]:
        """Arguments of `mom.attention` for a form, by name, inserted ahead of `before`. `shape` is that of the keys."""
        vectors = {
            "keys": self._all_of(form.keys, shape, before),
            "segments": self._vector(form.segments, shape, before),
            "positions": self._vector(form.positions, shape, before),
        }
        found = {name: node for name, node in vectors.items() if node is not None}
        if found:
            found["spans"] = self._once(tuple(vectors.values()), SPANS, tuple(vectors.values()), before)
        return found

    def _all_of(self, flags: tuple[OfKeys, ...], shape: Shape, before: fx.Node) -> fx.Node | None:
        """The conjunction of several flags."""
        result: fx.Node | None = None
        for flag in sorted(flags, key=lambda flag: flag.node):
            vector = self._vector(flag, shape, before)
            assert vector is not None
            if result is not None:
                vector = self._once((result, vector), aten.logical_and.default, (result, vector), before)
            result = vector
        return result

    def _vector(self, of: OfKeys | None, shape: Shape, before: fx.Node) -> fx.Node | None:
        if of is None:
            return None
        key = (of, *(str(expr(size)) for size in shape))
        if key not in self.made:
            with self.graph.inserting_before(before):
                self.made[key] = self._emit(of, shape, before)
        return self.made[key]

    def _emit(self, of: OfKeys, shape: Shape, before: fx.Node) -> fx.Node:
        value, rank = of.node, len(of.position)
        moving = [d for d in range(rank) if not of.position[d].is_constant]
        for d in reversed(range(rank)):
            if d not in moving:
                at = size_node(self.graph, of.position[d].constant, before)
                value = emit(self.graph, aten.select.int, (value, d, at))
        (key,) = [i for i, d in enumerate(moving) if _follows_key(of.position[d])]
        for i, d in enumerate(moving):
            value = self._range(value, i, of.position[d].constant, shape[i == key], before)
        if len(moving) == 1:
            value = emit(self.graph, aten.unsqueeze.default, (value, 0))
        elif key == 0:
            value = emit(self.graph, aten.permute.default, (value, [1, 0]))
        return emit(self.graph, aten.logical_not.default, (value,)) if of.negated else value

    def _range(self, value: fx.Node, dim: int, first: Any, count: Size, before: fx.Node) -> fx.Node:
        """The entries that the mask looks up. If they may exceed the value, index_select raises as the mask would."""
        size, end = value_of(value).shape[dim], first + expr(count)
        if same(first, 0) and same(size, count):
            return value
        low, high = (size_node(self.graph, bound, before) for bound in (first, end))
        if nonnegative(expr(size) - end):
            return emit(self.graph, aten.slice.Tensor, (value, dim, low, high))
        device = value_of(value).device
        index = emit(self.graph, aten.arange.start, (low, high), {"device": device, "pin_memory": False})
        return emit(self.graph, aten.index_select.default, (value, dim, index))

    def _once(self, key: Any, target: Any, args: tuple[Any, ...], before: fx.Node) -> fx.Node:
        key = (target, key)
        if key not in self.made:
            with self.graph.inserting_before(before):
                self.made[key] = emit(self.graph, target, args)
        return self.made[key]


def _follows_key(at: Affine) -> bool:
    return bool(at.coefficients[-1] == 1)
