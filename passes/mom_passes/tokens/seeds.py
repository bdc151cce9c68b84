"""Candidates for the token dimension: dimensions of inputs, and dimensions that begin inside a graph. An analysis.

Terms
-----
reach    The matmul work of all values that depend on a value.
begins   A dimension begins at a value if its rows cannot be computed from equally many rows of an operand, and no
         operand has the same size there. A strided convolution begins one; so do pooling, `repeat_interleave` and a
         view that merges patches or frames.

A model front that changes the number of rows runs on the whole input. Loops start after it. A gather at positions that
are counted in the graph, such as those of patches, runs in the loops: its rows are those of the count.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, prims
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import hint, is_one, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import Dim, claim_for, dim_of
from mom_passes.rules.work import matmul_work

#: The least share of the work that carries no tokens yet: one stack of layers of several has less than half of it.
STACK_SHARE = 1 / 8
#: The number of inputs to try as seeds, by reach.
MAX_SEED_INPUTS = 4
#: The number of values inside a graph to try, in graph order: a model front precedes the layers.
MAX_INNER_SEEDS = 24


def activations_of(gm: fx.GraphModule, static: set[fx.Node]) -> set[fx.Node]:
    """Return the values that depend on an input other than a parameter."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node not in static and isinstance(meta_value(node), torch.Tensor):
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def seed_inputs(gm: fx.GraphModule, static: set[fx.Node], among: set[fx.Node]) -> list[fx.Node]:
    """Return user inputs by reach, largest first: the KV cache of a layer reaches less than the token ids.

    Only values `among` count, here and in `inner_seeds`.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and n not in static and n in among]
    inputs = [n for n in inputs if isinstance(meta_value(n), torch.Tensor) and value_of(n).dim() > 0]
    works = {candidate: reach(candidate, among) for candidate in inputs[:64]}
    return sorted((n for n, work in works.items() if work), key=lambda n: -works[n])[:MAX_SEED_INPUTS]


def inner_seeds(
    gm: fx.GraphModule, activations: set[fx.Node], among: set[fx.Node]
) -> list[tuple[fx.Node, list[Dim]]]:
    """Return values at which dimensions begin and that reach enough of the matmul work, with these dimensions."""
    total, activations = sum(map(matmul_work, among)), activations & among
    found: list[tuple[fx.Node, list[Dim]]] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node not in activations or node.target is operator.getitem:
            continue
        counts = _counts(node, activations)
        begun = [(count, [Dim(0)]) for count in counts] or [(node, _beginning(node, activations))]
        found += [(seed, dims) for seed, dims in begun if dims and reach(seed, among) >= STACK_SHARE * total > 0]
        if len(found) >= MAX_INNER_SEEDS:
            break
    return found


def _counts(node: fx.Node, activations: set[fx.Node]) -> list[fx.Node]:
    """Return the counts `[n]` from which a gather of an activation computes its positions along one dimension."""
    if node.target not in (aten.index.Tensor, aten._unsafe_index.Tensor) or argument(node, "self") not in activations:
        return []
    found: dict[fx.Node, None] = {}
    pending = operands(node)[1:]
    while pending:
        position = pending.pop()
        if position in activations or position.op != "call_function" or value_of(position).dim() != 1:
            return []
        if position.target is prims.iota.default:
            found[position] = None
        pending += operands(position)
    return list(found)


def _beginning(node: fx.Node, activations: set[fx.Node]) -> list[Dim]:
    value = meta_value(node)
    if not isinstance(value, torch.Tensor):
        return []
    given = [meta_value(operand) for operand in operands(node) if operand in activations]
    shapes = [one.shape for one in given if isinstance(one, torch.Tensor) and one.dim() == value.dim()]
    new = [i for i, size in enumerate(value.shape) if not any(same(shape[i], size) for shape in shapes)]
    return [Dim(index) for index in new if hint(value.shape[index]) > 1 and _has_no_rows_before(node, Dim(index))]


def _has_no_rows_before(node: fx.Node, dim: Dim) -> bool:
    """Whether rows along a dim need no operand's rows, or several rows each."""
    try:
        claim = claim_for(node, dim, in_order=True)
    except CannotChunk:
        return True
    needed = [dim_of(need) for need in claim.needs]
    return any(along is not None and not is_one(along.inner) for along in needed)


def reach(seed: fx.Node, among: set[fx.Node]) -> int:
    """Return the matmul work of everything that depends on a value."""
    found, pending = {seed}, [seed]
    while pending:
        new = [user for user in pending.pop().users if user not in found and user in among]
        found.update(new)
        pending += new
    return sum(map(matmul_work, found - {seed}))
