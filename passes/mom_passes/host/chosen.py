"""Copy only the used part of weights on the host: matrices of the selected experts, rows that are looked up.

    a mixture of experts for few tokens     matrices = fetch_chosen(bank, keys)       other matrices are not read
    index(fetch_weight(table), rows)        fetch_rows(table, rows)

The buffer for selected matrices has the shape of the whole bank, so that the mixture's operators stay as they are; its
other entries are unset. A region multiplies each row only by the matrix of its own key (`tokens.sorted_rows`).

Whole weights are copied ahead of their use. Selected parts are known only at their use, so they must be much smaller.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from mom_passes.graph.aliasing import views_and_readers
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import bytes_of, input_node, operand_chain, operands, value_of
from mom_passes.ops.transfers import FETCH_CHOSEN, FETCH_ROWS, FETCH_WEIGHT
from mom_passes.rules.matmul import is_grouped_product
from mom_passes.rules.views import is_view
from mom_passes.tokens.region import Region, regions
from mom_passes.tokens.sorted_rows import SORTS

aten = torch.ops.aten

#: A part is fetched by itself if it is at most 1 / WORTH of the whole.
WORTH = 2


def fetch_used_parts(gm: fx.GraphModule) -> int:
    """Fetch used parts only, in place. Return the number of weights of which only a part is fetched."""
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
    """Position of the keys among a region's operands."""
    placeholders = [node for node in region.template.nodes if node.op == "placeholder"]
    sort = next(node for node in region.template.nodes if node.target in SORTS)
    return placeholders.index(operands(sort)[0]) - 1  # the first is the number of rows


def _banks(call: fx.Node, region: Region) -> Iterator[fx.Node]:
    """Weights that only the region reads, and only as the matrices of its experts."""
    placeholders = [node for node in region.template.nodes if node.op == "placeholder"][1:]
    for operand, inner, per_row in zip(operands(call), placeholders, region.per_row, strict=True):
        multiplied = all(is_grouped_product(user) and operands(user)[1] is inner for user in inner.users)
        if per_row is None and multiplied:
            weight = _seen_by_expert(operand)
            if weight is not None and _views_and_readers(weight)[1] == {call}:
                yield weight


def _seen_by_expert(value: fx.Node) -> fx.Node | None:
    """The weight of which a value is a view that keeps dimension 0, the experts; else None."""
    source = operand_chain(value, _keeps_the_first)[-1]
    return source if source.target is FETCH_WEIGHT else None


def _keeps_the_first(view: fx.Node) -> bool:
    if view.target not in (aten.transpose.int, aten.permute.default):
        return False
    rank = value_of(view).dim()
    if view.target is aten.permute.default:
        return axis(argument(view, "dims")[0], rank) == 0
    return 0 not in (axis(argument(view, "dim0"), rank), axis(argument(view, "dim1"), rank))


def _views_and_readers(weight: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
    """The views that show all of a weight, in graph order, and the other readers."""
    return views_and_readers(weight, lambda user: input_node(user) if is_view(user) else None)


def _put_in_place(weight: fx.Node, chosen: fx.Node, call: fx.Node) -> None:
    """Replace a weight by the fetched part and move its views before `call`."""
    views, _ = _views_and_readers(weight)
    weight.replace_all_uses_with(chosen)
    for view in views:
        call.prepend(view)


def _look_ups(graph: fx.Graph) -> Iterator[fx.Node]:
    """Lookups of rows of a weight by one integer tensor."""
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        indices = argument(node, "indices")
        table = node.args[0]
        plain = len(indices) == 1 and isinstance(indices[0], fx.Node)
        if not plain or not isinstance(table, fx.Node) or table.target is not FETCH_WEIGHT:
            continue
        if value_of(indices[0]).dtype not in (torch.bool, torch.uint8):
            yield node
