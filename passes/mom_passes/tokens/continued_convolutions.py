"""Replace a convolution over a kept state and new rows by one over the new rows that starts from the state.

Before:  full = cat([state, x]); y = silu(causal_conv1d(full, w))[..., K:]; new_state = full[..., -K:]
After:   y = silu(continued_conv1d(x, w, state)[0]);                        new_state = last_rows(state, x)

A prompt that follows a cache has this form. The values between the convolution and the slice are pointwise, and have
the kept rows in addition to the new ones. They get the number of new rows, which is what all other values have.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.edit import emit, fake_value
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.convolution import CAUSAL_CONV1D, CONTINUED_CONV1D, LAST_ROWS, rows_ahead
from mom_passes.rules import All, Dim, Rows, claim_for
from mom_passes.rules.view import TO_THE_END
from mom_passes.tokens.last_rows import MOST_ROWS

TOKENS = 2


@dataclass(frozen=True)
class _Region:
    """A convolution over `cat([state, x])`, the pointwise values that follow it, and the slices that take new rows."""

    convolution: fx.Node
    state: fx.Node
    x: fx.Node
    pointwise: tuple[fx.Node, ...]
    slices: tuple[fx.Node, ...]


def continue_convolutions(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace the convolutions in place. Return the new calls."""
    found = [_find(node) for node in gm.graph.find_nodes(op="call_function", target=CAUSAL_CONV1D)]
    new: list[fx.Node] = []
    for region in found:
        if region is not None:
            new += _replace(region)
    return new


def _find(convolution: fx.Node) -> _Region | None:
    joined = argument(convolution, "x")
    if joined.target is not aten.cat.default or axis(argument(joined, "dim"), 3) != TOKENS:
        return None
    parts: Sequence[fx.Node] = argument(joined, "tensors")
    ahead = rows_ahead(value_of(argument(convolution, "weight")), argument(convolution, "dilation"))
    if len(parts) != 2 or not isinstance(value_of(parts[0]).shape[TOKENS], int):
        return None
    state, x = parts
    if not ahead <= value_of(state).shape[TOKENS] <= MOST_ROWS or value_of(state).dtype != value_of(x).dtype:
        return None
    inside: dict[fx.Node, None] = {convolution: None}
    slices: list[fx.Node] = []
    for node in convolution.graph.nodes:
        if inside.keys().isdisjoint(node.all_input_nodes):
            continue
        if _takes_new_rows(node, value_of(x).shape[TOKENS]):
            slices.append(node)
        elif _is_rowwise(node, inside):
            inside[node] = None
        else:
            return None
    return _Region(convolution, state, x, tuple(inside)[1:], tuple(slices)) if slices else None


def _takes_new_rows(node: fx.Node, count: Any) -> bool:
    """Whether a slice takes the last `count` rows."""
    return takes_last(node) and same(value_of(node).shape[TOKENS], count)


def takes_last(node: fx.Node) -> bool:
    """Whether a node is a slice of a value `[B, C, S]` that ends with its last row."""
    if node.target is not aten.slice.Tensor or axis(argument(node, "dim"), 3) != TOKENS or argument(node, "step") != 1:
        return False
    end = argument(node, "end")
    size = meta_value(end) if isinstance(end, fx.Node) else end
    return size in (None, TO_THE_END) or same(size, value_of(argument(node, "self")).shape[TOKENS])


def _is_rowwise(node: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Whether rows of a value along the tokens need the same rows of values inside, and nothing else with rows."""
    if node.op != "call_function" or not isinstance(meta_value(node), torch.Tensor) or value_of(node).dim() != 3:
        return False
    try:
        claim = claim_for(node, Dim(TOKENS))
    except CannotChunk:
        return False
    needs = zip(operands(node), claim.needs, strict=True)
    wanted = all(need == (Rows(Dim(TOKENS)) if operand in inside else All()) for operand, need in needs)
    return wanted and claim.edit is None and claim.target is None


def _replace(region: _Region) -> list[fx.Node]:
    convolution, graph = region.convolution, region.convolution.graph
    weight, dilation = argument(convolution, "weight"), argument(convolution, "dilation")
    ahead, kept = rows_ahead(value_of(weight), dilation), value_of(region.state).shape[TOKENS]
    joined = argument(convolution, "x")
    states = [node for node in joined.users if takes_last(node) and same(value_of(node).shape[TOKENS], kept)]
    with graph.inserting_before(convolution):
        last = emit(graph, aten.slice.Tensor, (region.state, TOKENS, kept - ahead, TO_THE_END))
        args = (region.x, weight, argument(convolution, "bias"), dilation, argument(convolution, "groups"), last)
        call = emit(graph, CONTINUED_CONV1D, args)
        rows = emit(graph, operator.getitem, (call, 0))
    with graph.inserting_after(joined):
        new_state = emit(graph, LAST_ROWS, (region.state, region.x, TOKENS))
    copies = {convolution: rows}
    for node in region.pointwise:
        with graph.inserting_before(node):
            copies[node] = graph.node_copy(node, lambda operand: copies.get(operand, operand))
            copies[node].meta["val"] = fake_value(copies[node])
    for node in region.slices:
        node.replace_all_uses_with(copies[argument(node, "self")])
    for node in states:
        node.replace_all_uses_with(new_state)
    return [call, rows, new_state, *copies.values()]
