"""Attention to packed sequences inside a loop whose mini-sequences are whole sequences.

Images, frames, windows of an image or documents may be packed into one sequence of T tokens, and each attends to itself
alone. Such an attention is no barrier if no mini-sequence cuts a packed sequence: its keys and values then are rows of
the mini-sequence. This module makes it one by the argument `first`; its chunk rule then needs rows of keys and values
and forbids cuts within the ranges that `mom.spans` finds (`Claim.within`).

Where the sequences begin and end is data. So a program is for calls whose packed sequences are short enough, and
another one, in which these attentions stay barriers, is for the other calls: `PackedRanges` computes the ranges from
the inputs of the graph, before a program is chosen.

    loop                a mini-sequence has whole sequences: attention, MLP and all else of its rows, layer after layer
    longest sequence    at most `most_unbroken(T, rows)` tokens

Before:  a = attention(q, k, v, None, 0, False, scale, segments=numbers, spans=ranges)
After:   a = attention(q, k, v, None, 0, False, scale, segments=numbers, spans=ranges, first=0)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mom_passes.graph.arguments import argument, argument_node, replace
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import is_one, product, same
from mom_passes.graph.values import value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import ARRIVING
from mom_passes.rules.attention import QUERY
from mom_passes.tokens.dims import TokenDims
from mom_passes.torch_compat import graph_module, without_modes

#: A sequence that is longer than a mini-sequence may take 1 / PARTS of all tokens. Its hidden states, queries, keys,
#: values and MLP are then fewer bytes than the keys and values of all tokens, which a barrier stores.
PARTS = 16

#: The most operators that compute ranges from the inputs of a graph. More are not only counting.
MOST_OPERATORS = 64


def most_unbroken(tokens: int, rows: int) -> int:
    """Return how many tokens a packed sequence in a loop may have; `rows` are those of the shortest mini-sequences."""
    return max(rows, tokens // PARTS)


@dataclass(frozen=True, eq=False)
class PackedRanges:
    """How one result of `mom.spans` follows from the inputs of a graph: `module(*inputs[positions])`."""

    positions: tuple[int, ...]
    module: fx.GraphModule

    def fit(self, inputs: Sequence[Any], rows: int) -> bool:
        """Return whether loops may hold the packed sequences of a call; `inputs` are all inputs of the graph."""
        longest, tokens = self.longest(inputs)
        return 0 < longest <= most_unbroken(tokens, rows)

    def longest(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Return the tokens of the longest packed sequence, 0 if a sequence is in several places, and of all."""
        with without_modes(), torch.no_grad():
            found = self.module(*(inputs[i] for i in self.positions))[0]
            if found.shape[0] == 0 or bool((found < 0).any()):
                return 0, found.shape[0]
            return int((found[:, 1] - found[:, 0]).max()), found.shape[0]


def packed_attentions(gm: fx.GraphModule, dims: TokenDims) -> dict[fx.Node, list[fx.Node]]:
    """Return the attentions that may be inside a loop, by the node of their ranges.

    Their weights are on the device: the layers of a loop need their weights at the same time.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    if any(node.target in ARRIVING for node in gm.graph.nodes):
        return found
    for node in gm.graph.find_nodes(op="call_function", target=MOM_ATTENTION):
        if _is_packed(node, dims):
            found.setdefault(argument_node(node, "spans"), []).append(node)
    return found


def _is_packed(node: fx.Node, dims: TokenDims) -> bool:
    """Whether a node is an attention within segments over queries, keys and values that a loop computes."""
    if any(argument(node, name) is None for name in ("segments", "spans")):
        return False
    if any(argument(node, name) is not None for name in ("mask", "window", "first")) or argument(node, "start") != 0:
        return False
    read = [argument_node(node, name) for name in ("query", "key", "value")]
    if not all(n in dims.rowwise and n in dims.worked for n in read):
        return False
    batch, tokens, _ = value_of(argument_node(node, "spans")).shape
    carried = [dims.carriers[n] for n in read]
    if any(one.dim.index != QUERY or not is_one(one.dim.outer) for one in carried):
        return False
    return is_one(batch) and all(same(product([one.length, one.dim.inner]), tokens) for one in carried)


def keep_in_loops(attentions: Collection[fx.Node]) -> None:
    """Mark attentions in place: their mini-sequences are whole packed sequences."""
    for node in attentions:
        node.args, node.kwargs = replace(node.target, node.args, node.kwargs, first=0)


def ranges_of(spans: fx.Node) -> PackedRanges | None:
    """Return how ranges follow from the inputs of their graph; None if that is more than counting."""
    graph = spans.graph
    needed, pending = set[fx.Node](), [spans]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    if len(needed) > MOST_OPERATORS or any(node.op == "get_attr" or _makes_floats(node) for node in needed):
        return None
    copied, values, positions = fx.Graph(), dict[fx.Node, fx.Node](), list[int]()
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if node in needed:
            values[node] = copied.placeholder(node.name)
            positions.append(position)
    for node in graph.nodes:
        if node in needed and node not in values:
            values[node] = copied.node_copy(node, values.__getitem__)
            values[node].meta = {}
    copied.output(values[spans])
    return PackedRanges(tuple(positions), graph_module(nn.Module(), copied, "PackedRanges"))


def _makes_floats(node: fx.Node) -> bool:
    value = meta_value(node)
    return node.op != "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point()
