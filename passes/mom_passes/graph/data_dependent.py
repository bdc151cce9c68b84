"""Numbers and sizes that depend on data: a number read off a tensor (`.item()`), the count of `nonzero`.

Terms
-----
unknown    A symbolic number without a value while the graph is captured.
touches    An operator touches unknown numbers if it takes or returns one, or a tensor with one among its sizes. It runs
           eagerly on whole operands: compiled code takes no such value.

    count = sum(mask).item()            eager
    assert count == 576                 eager
    y = layers(x)                       loops and compiled pieces, which do not depend on `count`
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.torch_compat import SYMBOLIC, has_hint


def touches_unknown_numbers(node: fx.Node) -> bool:
    """Whether an operator takes or returns an unknown number, or a tensor with one among its sizes."""
    return has_unknown_numbers(node) or any(map(has_unknown_numbers, node.all_input_nodes))


def has_unknown_numbers(node: fx.Node) -> bool:
    """Whether a node's value is an unknown number, or a tensor with one among its sizes and strides."""
    value = meta_value(node)
    if isinstance(value, (tuple, list)):
        return any(map(is_unknown, value))
    return is_unknown(value)


def is_unknown(value: Any) -> bool:
    """Whether a value is an unknown number, or a tensor with one among its sizes and strides."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(n, torch.SymInt) and not has_hint(n) for n in (*value.shape, *value.stride()))
    return isinstance(value, SYMBOLIC) and not has_hint(value)


def origin_of_unknown_number(graph: fx.Graph, readers: Collection[fx.Node]) -> fx.Node | None:
    """The first source of an unknown number that an input has or that a node in `readers` depends on; None without."""
    origins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        inherited = next((origins[given] for given in node.all_input_nodes if given in origins), None)
        origin = inherited or (node if has_unknown_numbers(node) else None)
        if origin is None or node.op == "output":
            continue
        if node in readers or node.op == "placeholder":
            return origin
        origins[node] = origin
    return None
