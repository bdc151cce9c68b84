"""The demand graph: which rows of which values are needed, from the outputs of a graph back to its inputs.

Terms
-----
instance   A value as its readers need it: `(node, Rows(dim))` is its rows, `(node, Rows(dim, before=n))` its rows and n
           rows before them, `(node, All())` all of it, `(node, Carried(k))` the final value of carry k of its call,
           `(node, Carried(0, of=Rows(dim, n)))` its last n rows.
barrier    A whole instance of a value that a loop computes: the loop must be complete before a reader starts.

Kinds of instances
------------------
SOURCE     a placeholder or constant, whole or sliced: always available
ROWS       rows computed from rows (and whole values) by the node's own claim, or the carry of such a claim
ENTRY      rows sliced from a whole value, because the operator cannot be run on rows
AHEAD      rows and the n rows before them, which each mini-sequence passes to the next
BARRIER    a complete value whose rows a loop stores, or the final value of a carry: among these the last rows of a
           value that need not exist at full length (see `last_rows`)
WHOLE      an operator run once on the full sequence, between loops
INLINE     a view, a token slice of a whole value, or a one-element constant: free, repeated where it is needed. Also
           a copy larger than its source (repeat_kv): made for one iteration at a time rather than kept
SIZE       a SymInt: arithmetic on sizes, computed outside the loops
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.data_dependent import touches_unknown_numbers
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import is_tensor, operands, returns_nothing, value_of
from mom_passes.loops.instances import Carried, DemandGraph, Instance, Kind, instance_length
from mom_passes.loops.last_rows import last_rows
from mom_passes.loops.shared_views import shared_views
from mom_passes.rules import All, Carry, Claim, Dim, Last, Rows, claim_for, facts, fold_for
from mom_passes.rules.views import is_cut, is_view
from mom_passes.tokens.dims import TokenDims

aten = torch.ops.aten

#: A carry that only a slice of last rows needs has at most 1 / SHARE of the rows: it has two buffers, and each
#: mini-sequence copies it.
SHARE = 4


def build_demands(gm: fx.GraphModule, dims: TokenDims) -> DemandGraph:
    """Build the demand graph from the outputs and the operators with side effects (writes, assertions)."""
    graph = DemandGraph()
    roots, shared = _roots(gm), shared_views(gm)
    graph.outputs = tuple(roots)
    pending, slices = list(roots), dict[Instance, Rows]()
    while pending or slices:
        if not pending:
            pending += _add_slice(graph, *slices.popitem(), slices)
            continue
        instance = pending.pop()
        if instance in graph.kinds:
            continue
        rows = last_rows(instance.node, dims) if isinstance(instance.need, All) else None
        if rows is not None and instance.node not in shared:
            slices[instance] = rows
            continue
        kind, inputs, claim = _classify(instance, dims, shared)
        pending += _add(graph, instance, kind, inputs, claim)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    graph.order = sorted(graph.kinds, key=lambda i: (position[i.node], _whole_last(i, graph)))
    graph.position = {instance: i for i, instance in enumerate(graph.order)}
    return graph


def _add(
    graph: DemandGraph, instance: Instance, kind: Kind, inputs: tuple[Instance, ...], claim: Claim | None = None
) -> tuple[Instance, ...]:
    """Add an instance. Return its operands."""
    graph.kinds[instance] = kind
    graph.inputs[instance] = inputs
    if claim is not None:
        graph.claims[instance] = claim
    for operand in inputs:
        graph.readers.setdefault(operand, []).append(instance)
    return inputs


def _add_slice(
    graph: DemandGraph, instance: Instance, rows: Rows, slices: dict[Instance, Rows]
) -> tuple[Instance, ...]:
    """Add the slice of a value's last rows, when all other readers are known. Return the operands to add.

    The last rows are the final value of a carry if the value would exist at full length for this slice alone, and
    either the carry exists anyway (the rows ahead that an attention in a window reads), or the rows are few and no
    earlier stage stores a value at full length whose storage this one could take over (a residual stream).
    """
    (source,) = operands(instance.node)
    own = Instance(source, Rows(rows.dim))
    if own not in graph.kinds:
        # Which barriers precede the rows is known once they are added, and both outcomes need them.
        slices[instance] = rows
        return (own,)
    whole = Instance(source, All())
    few = SHARE * rows.before <= hint(instance_length(own))
    carried = Instance(source, rows) in graph.kinds or (few and not _follows_a_barrier(own, graph))
    if whole in graph.kinds or not carried:
        return _add(graph, instance, Kind.INLINE, tuple(Instance(n, All()) for n in instance.node.all_input_nodes))
    final = Instance(source, Carried(0, of=rows))
    return _add(graph, instance, Kind.BARRIER, (final,))


def _follows_a_barrier(instance: Instance, graph: DemandGraph) -> bool:
    """Whether an instance is computed from a value that a loop stores."""
    pending, seen = [instance], {instance}
    while pending:
        found = pending.pop()
        if graph.kinds.get(found) is Kind.BARRIER:
            return True
        more = set(graph.inputs.get(found, ())) - seen
        seen |= more
        pending += more
    return False


def _whole_last(instance: Instance, graph: DemandGraph) -> int:
    """Return a key that orders a node's instances: rows, carries, whole value, its slices, rows with `before` and the
    last of these."""
    if isinstance(instance.need, Carried):
        return 1 if instance.need.of is None else 5
    if graph.kinds[instance] in (Kind.ENTRY, Kind.AHEAD):
        return 3 + (graph.kinds[instance] is Kind.AHEAD)
    return 2 if isinstance(instance.need, All) else 0


def _roots(gm: fx.GraphModule) -> list[Instance]:
    roots: dict[Instance, None] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                roots[Instance(value, All())] = None
        elif node.op == "call_function" and (is_mutation(node) or returns_nothing(node)):
            roots[Instance(node, All())] = None
    return list(roots)


def is_inline(node: fx.Node) -> bool:
    """Whether a node is a view or a constant of one element, which is repeated where it is needed rather than kept."""
    if is_view(node):
        return True
    value = meta_value(node)
    if not isinstance(value, torch.Tensor) or node.all_input_nodes:
        return False
    return node.op == "call_function" and count_hint(value.shape) == 1 and facts(node).rule is not None


def repeats(node: fx.Node) -> bool:
    """Whether a node copies an expanded view, as `repeat_kv` does to repeat keys for all query heads."""
    if node.target is not aten.clone.default:
        return False
    (source,) = operands(node)
    while is_view(source):
        (before,) = operands(source)
        if count_hint(value_of(source).shape) > count_hint(value_of(before).shape):
            return True
        source = before
    return False


def _classify(
    instance: Instance, dims: TokenDims, shared: Collection[fx.Node]
) -> tuple[Kind, tuple[Instance, ...], Claim | None]:
    node = instance.node
    if isinstance(instance.need, Rows) and instance.need.before:
        rows = Rows(instance.dim)
        return Kind.AHEAD, (Instance(node, rows),), Claim((rows,), carries=(_ahead(instance.need),))
    if node.op in ("placeholder", "get_attr"):
        return Kind.SOURCE, (), None
    if not is_tensor(node):
        if touches_unknown_numbers(node):
            return Kind.WHOLE, tuple(Instance(n, All()) for n in node.all_input_nodes), None
        if _is_size_of(node):
            return Kind.SIZE, (), None
        whole = tuple(Instance(n, All()) for n in node.all_input_nodes)
        if returns_nothing(node):
            return Kind.WHOLE, whole, None
        return (Kind.WHOLE if any(is_tensor(n) for n in node.all_input_nodes) else Kind.SIZE), whole, None
    if isinstance(instance.need, All):
        return _classify_whole(node, dims, node in shared)
    if isinstance(instance.need, Carried):
        return _classify_carried(instance, instance.need, dims)
    own = dims.carriers.get(node)
    try:
        if own is not None and (node not in dims.rowwise or own.dim != instance.dim):
            raise CannotChunk(node, instance.dim, "its rows are not computed along it")
        claim = claim_for(node, instance.dim, in_order=node in dims.worked)
    except CannotChunk:
        return Kind.ENTRY, (Instance(node, All()),), None
    return Kind.ROWS, _reads(node, claim), claim


def _reads(node: fx.Node, claim: Claim) -> tuple[Instance, ...]:
    """Return the instances that a call on rows reads: operands as the claim needs them, and sizes."""
    inputs = [Instance(n, need) for n, need in zip(operands(node), claim.needs, strict=True)]
    return (*inputs, *_sizes_read(node))


def _ahead(need: Rows) -> Carry:
    """Return the carry of rows with `before`: the last rows of a mini-sequence, zeros before the first one."""
    return Carry(0, Last(need.before))


def _classify_carried(
    instance: Instance, need: Carried, dims: TokenDims
) -> tuple[Kind, tuple[Instance, ...], Claim | None]:
    """Carry 0 of a fold is computed by the fold's claim, any other carry together with carry 0 or with rows."""
    node = instance.node
    if need.of is not None or node in dims.rowwise:
        return Kind.ROWS, (Instance(node, need.of or Rows(dims.carriers[node].dim)),), None
    if need.carry > 0:
        return Kind.ROWS, (Instance(node, Carried(0)),), None
    claim = fold_for(node, _token_dims(node, dims))
    return Kind.ROWS, _reads(node, claim), claim


def _token_dims(node: fx.Node, dims: TokenDims) -> tuple[Dim | None, ...]:
    carriers = (dims.carriers.get(operand) for operand in operands(node))
    return tuple(None if carrier is None else carrier.dim for carrier in carriers)


def _classify_whole(node: fx.Node, dims: TokenDims, shared: bool) -> tuple[Kind, tuple[Instance, ...], Claim | None]:
    whole = tuple(Instance(n, All()) for n in node.all_input_nodes)
    if is_mutation(node):
        return Kind.WHOLE, whole, None
    carrier = dims.carriers.get(node)
    slices_tokens = node in dims.mixing and is_cut(node)
    free = is_inline(node) or slices_tokens or repeats(node)
    if shared or (free and all(_plain(n, dims) for n in operands(node))):
        return Kind.INLINE, whole, None
    # Values computed without a product, attention or look-up need no loop of their own.
    if carrier is not None and node in dims.rowwise and node in dims.worked:
        return Kind.BARRIER, (Instance(node, Rows(carrier.dim)),), None
    final = _final_carry(node, dims)
    return (Kind.WHOLE, whole, None) if final is None else (Kind.BARRIER, (final,), None)


def _final_carry(node: fx.Node, dims: TokenDims) -> Instance | None:
    """Return the carry whose final value is this value: the total of a fold or the final state of a scan; or None."""
    call, output = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, 0)
    assert isinstance(call, fx.Node) and isinstance(output, int)
    try:
        if call in dims.rowwise & dims.worked:
            claim = claim_for(call, dims.carriers[call].dim, in_order=True)
        elif call in dims.mixing and any(n in dims.rowwise & dims.worked for n in operands(call)):
            claim = fold_for(call, _token_dims(call, dims))
        else:
            return None
    except CannotChunk:
        return None
    carry = claim.carry_of(output)
    return None if carry is None else Instance(call, Carried(carry))


def _plain(node: fx.Node, dims: TokenDims) -> bool:
    carrier = dims.carriers.get(node)
    return carrier is None or carrier.dim.plain


def _sizes_read(node: fx.Node) -> list[Instance]:
    return [Instance(n, All()) for n in node.all_input_nodes if not is_tensor(n)]


def _is_size_of(node: fx.Node) -> bool:
    """Whether a node is `sym_size(tensor, i)`, which reads metadata only and does not need the tensor."""
    return "sym_" in str(node.target)
