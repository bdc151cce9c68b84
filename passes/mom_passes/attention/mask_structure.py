"""The structure of an attention mask, proved from the arithmetic that computes it.

Terms
-----
value       What is known of a node: a function of the element's index, a boolean by its constraints, or a floating mask
            of such a boolean (`mom_passes.attention.affine`).
causal      Query `i` sees key `j` only if `j <= i`.
window w    Query `i` sees key `j` only if `j > i - w`.

    for node that the mask depends on, in graph order:
        value[node] = rule of its operator (mom_passes.attention.mask_operators), or unknown
    statements of value[mask]  ==  {i - j >= 0, j - i + w - 1 >= 0}    ->  MaskForm(causal, window w)

For example, the mask of Hugging Face models without a cache: a check for packed sequences in addition to the causal
mask, on positions that are computed in the graph::

    position  = iota(S)                                             index
    jumps     = position - [-1, position[:-1]] != 1                 false everywhere
    packed    = cumsum(jumps)[i] == cumsum(jumps)[j]                true everywhere
    mask      = packed & (position[j] <= position[i])               i - j >= 0
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

import mom_passes.attention.mask_views  # noqa: F401  registers its rules
from mom_passes.attention.affine import FALSE, TRUE, UNKNOWN, ZERO, Additive, Affine, Flag, Lookup, Truth, Value
from mom_passes.attention.mask_form import MaskForm, mask_form
from mom_passes.attention.mask_operators import FOR_CUDNN, RULES, WIDE, aten, constant
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import all_same
from mom_passes.graph.values import value_of


class MaskAnalysis:
    """Values of a graph's nodes, computed on demand."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Value] = {}

    def form(self, mask: fx.Node, hidden: bool = False) -> MaskForm | None:
        """The proved form of a mask `[.., R, T]`, or None.

        `hidden`: a finite fill hides a key in every row, as -inf does.
        """
        value, meta = self.value(mask), meta_value(mask)
        if isinstance(value, Truth) and meta.dtype == torch.bool:
            return mask_form(value, meta.shape, -math.inf)
        if isinstance(value, Additive) and meta.dtype.is_floating_point:
            return mask_form(value.visible, meta.shape, -math.inf if hidden else value.lowest)
        return None

    def boolean(self, mask: fx.Node) -> fx.Node:
        """The boolean mask that SDPA has filled for cuDNN; any other mask unchanged."""
        return self.condition(mask, FOR_CUDNN.get(value_of(mask).dtype, -math.inf)) or mask

    def condition(self, mask: fx.Node, lowest: float = -math.inf, hidden: bool = False) -> fx.Node | None:
        """The condition of a mask `where(condition, 0, lowest)`, if it has the mask's shape; with `hidden`, of any fill
        that stands for -inf."""
        if mask.target is not aten.where.self:
            return None
        condition, *fills = mask.args
        assert isinstance(condition, fx.Node)
        shown, filled = (self._given(fill) for fill in fills)
        if shown != Additive(TRUE) or not isinstance(filled, Additive) or filled.visible != FALSE:
            return None
        if filled.lowest != lowest and not hidden:
            return None
        return condition if all_same(value_of(condition).shape, value_of(mask).shape) else None

    def value(self, node: fx.Node) -> Value:
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if n not in self._known] if current.target in RULES else []
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if current not in self._known:
                self._known[current] = self._interpret(current)
        return self._known[node]

    def _given(self, argument: Any) -> Value:
        if isinstance(argument, fx.Node):
            return self.value(argument)
        if isinstance(argument, bool):
            return Truth.constant(argument)
        if isinstance(argument, int):
            return Affine.number(argument)
        if not isinstance(argument, float):
            return None
        return Affine.number(1) if argument == 1.0 else constant(argument, torch.float64)

    def _interpret(self, node: fx.Node) -> Value:
        meta = meta_value(node)
        if isinstance(meta, (int, torch.SymInt)) and not isinstance(meta, bool):
            return Affine.number(meta)
        if not isinstance(meta, torch.Tensor):
            return None
        rule = RULES.get(node.target)
        value = rule(node, self._given) if rule is not None else None
        if isinstance(value, Affine):
            return value.fixed(meta.shape) if meta.dtype in WIDE else _itself(node, meta)
        if isinstance(value, Additive):
            return value.on(meta.shape) if meta.dtype.is_floating_point else None
        if isinstance(value, Lookup):
            return value.fixed(meta.shape)
        if value is None or value == UNKNOWN:
            return _itself(node, meta)
        return value.on(meta.shape)


def _itself(node: fx.Node, meta: torch.Tensor) -> Value:
    """A boolean or integer about which nothing is known, as an element of its own tensor."""
    rank = meta.dim()
    position = tuple(Affine(tuple(sympy.Integer(d == k) for d in range(rank)), ZERO) for k in range(rank))
    position = tuple(at.fixed(meta.shape) for at in position)
    if meta.dtype == torch.bool:
        return Truth(frozenset({Flag(node, position)}))
    return Lookup(node, position) if meta.dtype in WIDE else None
