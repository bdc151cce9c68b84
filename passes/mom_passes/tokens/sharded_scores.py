"""Scores of a vocabulary whose columns are divided among ranks: each rank scores its own, and a few numbers are merged.

    shift       max of the ranks' tops, where it is finite
    total       sum of exp(own shift - shift) * own total
    weighted    sum of exp(own shift - shift) * (own weighted + (own shift - shift) * own total)
    chosen      sum of the own columns that are chosen, 0 for a column of another rank
    greedy      least column among the ranks that have the largest logit

The gathered logits `[.., V]` never exist. Each row takes part in 2 collectives, of at most 3 numbers and its targets,
and in 1 more for "greedy".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten, prims
from mom_passes.graph.edit import emit
from mom_passes.graph.values import value_of
from mom_passes.ops.collectives import ALL_REDUCE, FIRST_COLUMN
from mom_passes.ops.scored import (
    BEST,
    CHOSEN,
    GREEDY,
    LIKELY,
    SCORED,
    SHIFT,
    TOP,
    TOTAL,
    TOTALS,
    WEIGHTED,
    WEIGHTS,
)


def score_in_ranks(graph: fx.Graph, given: Sequence[Any], gather: fx.Node) -> dict[int, fx.Node]:
    """Emit a call of `mom.scored` for this rank's columns, and its results for the columns of all ranks.

    Parameters
    ----------
    given
        The arguments of the call as if this rank had all columns.
    gather
        The `gather_columns` that the results do without.

    Returns
    -------
    The results, by their place. Nodes are emitted at the graph's insertion point.
    """
    return _Ranks(graph, given, str(argument(gather, "group"))).results()


class _Ranks:
    def __init__(self, graph: fx.Graph, given: Sequence[Any], group: str) -> None:
        self.graph, self.group = graph, group
        hidden, self.matrix, bias, self.targets, steps, numbers, wants = given
        self.wants = list(wants)
        if (WEIGHTED in wants or LIKELY in wants) and TOTAL not in wants:
            self.wants.append(TOTAL)  # a weighted sum about another shift needs it
        self.first = self._emit(FIRST_COLUMN, self.matrix, group)
        self.columns = value_of(self.matrix).shape[1]
        local = None if self.targets is None else self._local_targets()
        call = self._emit(SCORED, hidden, self.matrix, bias, local, steps, numbers, self.wants)
        self.own = {item: self._emit(operator.getitem, call, item) for item in range(BEST + 1)}

    def results(self) -> dict[int, fx.Node]:
        own = self.own
        top = self._top()
        finite = self._emit(aten.logical_not.default, self._emit(aten.isinf.default, top))
        shift = self._double(self._where(finite, top, 0.0))
        sums = dict(zip((TOTALS, WEIGHTS, CHOSEN), self._sums(shift), strict=True))
        greedy = self._greedy(top) if GREEDY in self.wants else own[BEST]
        return {TOP: top, SHIFT: shift, **sums, BEST: greedy}

    def _sums(self, shift: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Return totals, weighted sums and chosen columns, which one collective adds up."""
        own, parts = self.own, {}
        # Above 0 only where one of the two is no logit: of a rank without finite logits, whose sums are 0, or beside an
        # infinite one, whose sum is infinite.
        lower = self._emit(aten.clamp.default, self._emit(aten.sub.Tensor, own[SHIFT], shift), None, 0)
        scale = self._emit(aten.exp.default, lower)
        if TOTAL in self.wants:
            parts[TOTALS] = self._emit(aten.mul.Tensor, scale, own[TOTALS])
        if WEIGHTED in self.wants or LIKELY in self.wants:
            moved = self._emit(aten.mul.Tensor, lower, own[TOTALS])
            parts[WEIGHTS] = self._emit(aten.mul.Tensor, scale, self._emit(aten.add.Tensor, own[WEIGHTS], moved))
        if self.targets is not None:
            parts[CHOSEN] = self._double(self._where(self._is_own(), own[CHOSEN], 0.0))
        if not parts:
            return own[TOTALS], own[WEIGHTS], own[CHOSEN]
        several = len(parts) > 1
        joined = self._emit(aten.cat.default, list(parts.values()), -1) if several else next(iter(parts.values()))
        summed, at = self._emit(ALL_REDUCE, joined, "sum", self.group), 0
        found = dict(own)
        for item, part in parts.items():
            width = value_of(part).shape[-1]
            found[item] = self._emit(aten.slice.Tensor, summed, -1, at, at + width) if several else summed
            at += width
        if CHOSEN in parts:
            found[CHOSEN] = self._converted(found[CHOSEN], value_of(own[CHOSEN]).dtype)
        return found[TOTALS], found[WEIGHTS], found[CHOSEN]

    def _top(self) -> fx.Node:
        """Return the largest logit of all ranks, NaN if one of them is: backends reduce NaN in different ways."""
        own = self.own[TOP]
        is_nan = self._emit(aten.isnan.default, own)
        flag = self._converted(is_nan, value_of(own).dtype)
        number = self._where(self._emit(aten.logical_not.default, is_nan), own, -math.inf)
        both = self._emit(ALL_REDUCE, self._emit(aten.cat.default, [number, flag], -1), "max", self.group)
        top, has_nan = (self._emit(aten.slice.Tensor, both, -1, at, at + 1) for at in (0, 1))
        return self._where(self._emit(aten.eq.Scalar, has_nan, 0), top, math.nan)

    def _greedy(self, top: fx.Node) -> fx.Node:
        """Return the first column with the largest logit, or with NaN: of a row with NaN no logit equals the top."""
        column = self._emit(aten.add.Tensor, self.own[BEST], self.first)
        equal = self._emit(aten.eq.Tensor, self.own[TOP], top)
        is_top = self._emit(aten.logical_or.default, equal, self._emit(aten.isnan.default, self.own[TOP]))
        return self._emit(ALL_REDUCE, self._where(is_top, column, torch.iinfo(torch.int64).max), "min", self.group)

    # --- targets ---

    def _local_targets(self) -> fx.Node:
        self.shifted = self._emit(aten.sub.Tensor, self.targets, self.first)
        return self._emit(aten.clamp.default, self.shifted, 0, self.columns - 1)

    def _is_own(self) -> fx.Node:
        low = self._emit(aten.ge.Scalar, self.shifted, 0)
        return self._emit(aten.logical_and.default, low, self._emit(aten.lt.Scalar, self.shifted, self.columns))

    # --- nodes ---

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        return emit(self.graph, target, args)

    def _where(self, condition: fx.Node, value: fx.Node, otherwise: float) -> fx.Node:
        like = value_of(value)
        kwargs = {"dtype": like.dtype, "layout": torch.strided, "device": like.device, "pin_memory": False}
        number = emit(self.graph, aten.full.default, ([], otherwise), kwargs)
        return self._emit(aten.where.self, condition, value, number)

    def _double(self, value: fx.Node) -> fx.Node:
        return self._converted(value, torch.float64)

    def _converted(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return value if value_of(value).dtype == dtype else self._emit(prims.convert_element_type.default, value, dtype)
