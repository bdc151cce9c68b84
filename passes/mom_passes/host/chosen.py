"""Of what is on the host only what is used arrives: matrices of the experts that were chosen, rows that are looked up.

    a mixture of experts for few tokens     matrices = fetch_chosen(bank, keys)       others are never multiplied with
    index(fetch_weight(table), rows)        fetch_rows(table, rows)

A buffer for chosen matrices is as large as the bank, so that the mixture stays as it is; what is not chosen is left
unset there. Nothing reads it: a region multiplies each row with the matrix of its own key (`tokens.sorted_rows`).

Whole, weights arrive ahead of their use. What is chosen is known only when it is: so much less must be moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import bytes_of, input_node, operands, value_of
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS, FETCH_WEIGHT
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.rules.views import is_view
from mom_passes.tokens.region import Region, regions
from mom_passes.tokens.sorted_rows import SORTS

aten = torch.ops.aten

#: What is used is fetched by itself if it is at most one part in so many.
WORTH = 2


def only_what_is_used(gm: fx.GraphModule) -> int:
    """Decide it for the weights of a graph, in place; of how many only a part arrives."""
    changed = 0
    for call, region in list(regions(gm.graph)):
        keys = operands(call)[_keys_of(region)]
        for bank in _banks(call, region):
            few = count_hint(value_of(keys).shape) * WORTH <= hint(value_of(bank).shape[0])
            if few:
                with gm.graph.inserting_before(call):
                    chosen = emit(gm.graph, FETCH_CHOSEN, (bank.args[0], keys, bank.args[1]))
                _put_in_place(bank, chosen, call)
                changed += 1
    for look_up in list(_look_ups(gm.graph)):
        table, rows = operands(look_up)[0], argument(look_up, "indices")[0]
        if bytes_of(look_up) * WORTH <= bytes_of(table):
            with gm.graph.inserting_before(look_up):
                found = emit(gm.graph, FETCH_ROWS, (table.args[0], rows, table.args[1]))
            look_up.replace_all_uses_with(found)
            gm.graph.erase_node(look_up)
            changed += 1
    return changed


def _keys_of(region: Region) -> int:
    """Which operand of a region the keys are."""
    placeholders = [node for node in region.template.nodes if node.op == "placeholder"]
    sort = next(node for node in region.template.nodes if node.target in SORTS)
    return placeholders.index(operands(sort)[0]) - 1  # the first is the number of rows


def _banks(call: fx.Node, region: Region) -> Iterator[fx.Node]:
    """Weights that a region reads as matrices of its experts, and nobody else reads at all."""
    placeholders = [node for node in region.template.nodes if node.op == "placeholder"][1:]
    for operand, inner, per_row in zip(operands(call), placeholders, region.per_row, strict=True):
        multiplied = all(is_grouped_product(user) and operands(user)[1] is inner for user in inner.users)
        if per_row is None and multiplied:
            weight = _seen_by_expert(operand)
            if weight is not None and _readers(weight) == {call}:
                yield weight


def _seen_by_expert(value: fx.Node) -> fx.Node | None:
    """The weight that a value shows with its experts still in front, or None."""
    while value.target is not FETCH_WEIGHT:
        keeps = value.target in (aten.transpose.int, aten.permute.default) and _keeps_the_first(value)
        if not keeps:
            return None
        value = input_node(value)
    return value


def _keeps_the_first(view: fx.Node) -> bool:
    rank = value_of(view).dim()
    if view.target is aten.permute.default:
        return axis(argument(view, "dims")[0], rank) == 0
    return 0 not in (axis(argument(view, "dim0"), rank), axis(argument(view, "dim1"), rank))


def _readers(weight: fx.Node) -> set[fx.Node]:
    """Who reads it or a view of it."""
    found: set[fx.Node] = set()
    pending = [weight]
    while pending:
        for user in pending.pop().users:
            if is_view(user):
                pending.append(user)
            else:
                found.add(user)
    return found


def _put_in_place(weight: fx.Node, chosen: fx.Node, call: fx.Node) -> None:
    """Views of a weight go behind what arrives of it."""
    pending, views = [weight], list[fx.Node]()
    while pending:
        for user in pending.pop().users:
            if is_view(user):
                views.append(user)
                pending.append(user)
    weight.replace_all_uses_with(chosen)
    for view in sorted(set(views)):
        call.prepend(view)


def _look_ups(graph: fx.Graph) -> Iterator[fx.Node]:
    """Rows of a weight by one index tensor."""
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        indices = argument(node, "indices")
        table = node.args[0]
        plain = len(indices) == 1 and isinstance(indices[0], fx.Node)
        if not plain or not isinstance(table, fx.Node) or table.target is not FETCH_WEIGHT:
            continue
        if value_of(indices[0]).dtype not in (torch.bool, torch.uint8):
            yield node
