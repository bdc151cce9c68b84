"""Arithmetic on row numbers: graph nodes inside a loop body, plain integers in tests.

An edit may need `start + offset` for an argument. New nodes go to the graph's insertion point. Bodies are built in
order, so this is right before the call that takes the argument.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from mom_passes.graph.meta import meta_value


def add(a: Any, b: Any) -> Any:
    """Return `a + b`. Emit a node if either operand is a node."""
    if _is_number(a, 0):
        return b
    return a if _is_number(b, 0) else _apply(operator.add, a, b)


def mul(a: Any, b: Any) -> Any:
    """Return `a * b`. Emit a node if either operand is a node."""
    if _is_number(a, 1):
        return b
    return a if _is_number(b, 1) else _apply(operator.mul, a, b)


def _is_number(value: Any, number: int) -> bool:
    # Comparing a SymInt would add a guard to the user's graph.
    return isinstance(value, int) and value == number


def _apply(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    anchor = next((value for value in (a, b) if isinstance(value, fx.Node)), None)
    if anchor is None:
        return function(a, b)
    node = anchor.graph.call_function(function, (a, b))
    values = [meta_value(value) if isinstance(value, fx.Node) else value for value in (a, b)]
    if all(value is not None for value in values):
        node.meta["val"] = function(*values)
    return node
