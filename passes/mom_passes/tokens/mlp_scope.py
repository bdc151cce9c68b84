"""Restrict loops to MLPs and the LM head and run attention on the whole sequence, as in mini-sequence inference.

Terms
-----
linear     A product of rows of one activation with a weight.
widening   A linear whose result is larger than its input and is read by linears or outputs only, never by an
           attention: gate and up projections, the LM head.

    row-wise:  the operators from a widening linear to the linears that it feeds, both included
               experts, and the operators that reduce their results to one row per token
               reductions of logits (`mom::scored`)
    everything else runs on the full sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import fx

from mom_passes.graph.sizes import count_hint
from mom_passes.graph.values import bytes_of, is_tensor, operands, value_of
from mom_passes.ops.scored import SCORED
from mom_passes.rules import All, claim_for
from mom_passes.rules.work import matmul_work
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.region import Region


def mlp_only(gm: fx.GraphModule, dims: TokenDims) -> TokenDims:
    """Return the token dimensions with fewer row-wise values."""
    kept: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.target is not SCORED and is_linear(node, dims) and _widens(node):
            kept |= _until_the_next_product(node, dims)
        elif node.target is SCORED and node in dims.rowwise:
            kept |= {node, *node.users}
        elif isinstance(node.target, Region) and node in dims.rowwise:
            kept |= _larger_results(node, max(map(bytes_of, _activations(node, dims))), dims)
    return replace(dims, rowwise=dims.rowwise & kept)


def is_linear(node: fx.Node, dims: TokenDims) -> bool:
    """Whether a product needs rows of one activation and no activation whole."""
    if node not in dims.rowwise or not matmul_work(node):
        return False
    needed = zip(operands(node), claim_for(node, dims.carriers[node].dim, in_order=True).needs, strict=True)
    rows = [operand in dims.carriers for operand, need in needed if not isinstance(need, All)]
    return sum(rows) == 1 and not any(n in dims.carriers for n in _whole(node, dims))


def _whole(node: fx.Node, dims: TokenDims) -> list[fx.Node]:
    claim = claim_for(node, dims.carriers[node].dim, in_order=True)
    return [operand for operand, need in zip(operands(node), claim.needs, strict=True) if isinstance(need, All)]


def _widens(node: fx.Node) -> bool:
    sizes = [count_hint(value_of(n).shape) for n in operands(node)]
    activation = sizes[-2]
    return count_hint(value_of(node).shape) > activation


def _until_the_next_product(node: fx.Node, dims: TokenDims) -> set[fx.Node]:
    """Return a node, the linears that it feeds and the operators between; nothing if it feeds any other product."""
    reached = _closure([node], lambda n: [] if n is not node and matmul_work(n) else list(n.users))
    products = [n for n in reached if n is not node and matmul_work(n)]
    if not all(is_linear(product, dims) for product in products):
        return set()
    rows = reached & dims.rowwise
    ends = products or [n for n in rows if any(user not in rows for user in n.users)]
    feeding = _closure(ends, lambda n: list(n.all_input_nodes))
    return {n for n in reached & feeding if n in dims.rowwise} | {node}


def _activations(node: fx.Node, dims: TokenDims) -> list[fx.Node]:
    needs = claim_for(node, dims.carriers[node].dim).needs
    return [n for n, need in zip(operands(node), needs, strict=True) if not isinstance(need, All)]


def _larger_results(node: fx.Node, size: int, dims: TokenDims) -> set[fx.Node]:
    """Return a node and the row-wise operators after it, up to the first results of at most `size` bytes."""
    larger = _closure([node], lambda n: [u for u in n.users if u in dims.rowwise] if bytes_of(n) > size else [])
    return {n for n in larger if n in dims.rowwise and not (matmul_work(n) and n is not node)}


def _closure(roots: Iterable[fx.Node], following: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node not in found and node.op == "call_function" and is_tensor(node):
            found.add(node)
            pending.extend(following(node))
    return found
