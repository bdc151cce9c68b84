"""Recompute the strides of views whose recorded strides are wrong.

Inductor's `remove_no_ops` replaces operators such as `x * 1` or `x + 0` by their operand and gives it the recorded
value of the result. A row cut from a larger value then claims to be as dense as the removed copy, and a kernel compiled
for that claim would read the wrong elements.

    for node in graph order:
        a slice, select or expand with other strides than its operand implies
        a result that `laid_out` gives other strides than recorded  (see `real_results`)
        any value computed from such a value                        -> recompute the value

Before:  row = select(x: [2, 4, 3, 16], 2, 0): [2, 4, 16], strides (64, 16, 1)
After:   row = select(x: [2, 4, 3, 16], 2, 0): [2, 4, 16], strides (192, 48, 1)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.edit import fake_value, strides_differ
from mom_passes.graph.sizes import Size, is_one, product, same
from mom_passes.graph.values import is_tensor, tensors_of, value_of
from mom_passes.ops.rows import LAID_OUT


def correct_strides(gm: fx.GraphModule, changed: Iterable[fx.Node] = ()) -> int:
    """Recompute in place the values with wrong strides, and all values computed from these or from `changed` ones.

    Return their number.
    """
    wrong: set[fx.Node] = {*changed}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        if node.target is LAID_OUT and strides_differ(value_of(node), value_of(argument(node, "value"))):
            wrong.add(node)
        elif _claims_otherwise(node) or any(operand in wrong for operand in node.all_input_nodes):
            before = tensors_of(node)
            node.meta["val"] = fake_value(node)
            if any(strides_differ(a, b) for a, b in zip(before, tensors_of(node), strict=True)):
                wrong.add(node)
    return len(wrong.difference(changed))


def _claims_otherwise(node: fx.Node) -> bool:
    """Whether a view that may have gaps has other strides recorded than its operand implies."""
    strides = _strides_of_view(node)
    if strides is None:
        return False
    value = value_of(node)
    claims = zip(value.stride(), strides, value.shape, strict=True)
    return not all(same(claimed, stride) or is_one(size) for claimed, stride, size in claims)


def _strides_of_view(node: fx.Node) -> list[Size] | None:
    """The strides of a slice, select or expand, computed from its operand's. Other views of a dense value are dense."""
    if node.target not in (aten.select.int, aten.slice.Tensor, aten.expand.default):
        return None
    operand = value_of(argument(node, "self"))
    strides: list[Size] = list(operand.stride())
    if node.target is aten.expand.default:
        new = value_of(node).dim() - operand.dim()
        grown = (n for n in value_of(node).shape[new:])
        return [0] * new + [s if same(was, n) else 0 for s, was, n in zip(strides, operand.shape, grown, strict=True)]
    dim = axis(argument(node, "dim"), operand.dim())
    if node.target is aten.select.int:
        return strides[:dim] + strides[dim + 1 :]
    strides[dim] = product([strides[dim], argument(node, "step")])
    return strides
