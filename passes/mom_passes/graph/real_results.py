"""Give results of operators the strides that the graph records, whatever strides their kernels return.

Recorded strides come from fake kernels. The fake kernel of an operator that is not decomposed may be wrong, always or
for some inputs. After such an operator its result is checked at run time and copied if its strides differ, so that its
readers can be compiled for the recorded layout.

    for each result of an operator with doubtful strides:
        order = the order of its dimensions in storage, as recorded
        laid_out(result, order)                                     -> for all its readers

Before:  y = op(x);                             z = add(y, 1)
After:   y = op(x); own = laid_out(y, [0, 1]);  z = add(own, 1)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from mom_passes.graph.aliasing import aliased_operand
from mom_passes.graph.edit import emit
from mom_passes.graph.meta import meta_value
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import value_of
from mom_passes.ops.rows import LAID_OUT


def check_result_strides(gm: fx.GraphModule, is_doubtful: Callable[[Any], bool]) -> int:
    """Insert the checks, in place, and return their number.

    Values computed from results that were not recorded as dense keep their old strides: see `claimed_layouts`.
    """
    results = [result for node in gm.graph.nodes if _may_differ(node, is_doubtful) for result in _results(node)]
    for result in results:
        _hold(gm.graph, result)
    if results:
        gm.recompile()
    return len(results)


def _hold(graph: fx.Graph, result: fx.Node) -> None:
    with graph.inserting_before(result.next):
        held = emit(graph, LAID_OUT, (result, list(storage_order(value_of(result)))))
    result.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


def _may_differ(node: fx.Node, is_doubtful: Callable[[Any], bool]) -> bool:
    return node.op == "call_function" and is_doubtful(node.target) and aliased_operand(node) is None


def _results(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operator returns: its own value, or the `getitem`s of its values."""
    value = meta_value(node)
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            yield node
    elif isinstance(value, (tuple, list)):
        for item in [user for user in node.users if user.target is operator.getitem]:
            yield from _results(item)
