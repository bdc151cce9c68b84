"""What an operator returns has the strides that the graph says, whatever its fake kernel claims.

A graph has the strides of every value from fake kernels. That of an operator which nobody decomposes may be wrong: the
operator returns other strides than it claims, always or for some inputs. Behind such an operator its result is checked,
and copied where it is laid out otherwise. What reads it is compiled for a layout that is real.

    for each result of an operator that is called as it is:
        order = the order of its dimensions in storage, as claimed
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


def hold_results(gm: fx.GraphModule, is_doubtful: Callable[[Any], bool]) -> int:
    """Insert the checks behind operators whose claims are doubtful, in place; how many there are.

    Values that are computed from results whose claim was not dense keep their old strides: see `claimed_layouts`.
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
    """The tensors that an operator returns: its value, or what is taken from its several values."""
    value = meta_value(node)
    if isinstance(value, torch.Tensor):
        if value.dim() > 0:
            yield node
    elif isinstance(value, (tuple, list)):
        for item in [user for user in node.users if user.target is operator.getitem]:
            yield from _results(item)
