"""Side effects of the calls in a Dynamo graph.

Such a graph calls functions, methods and operators as the model does. Only operators have schemas; for other calls this
module relies on PyTorch's naming conventions.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import fx

from mom_passes.graph.writes import written_by_schema
from mom_passes.torch_compat import is_higher_order, schemas_of

#: `x += 1` and the other augmented assignments.
_AUGMENTED = (
    "add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"
)  # fmt: skip
_OPERATORS = frozenset(getattr(operator, name) for name in (*(f"i{name}" for name in _AUGMENTED), "setitem", "delitem"))
#: These change no operand: `and_` is `&`.
_OF_PYTHON = frozenset(getattr(operator, name) for name in operator.__all__) - _OPERATORS
#: These update running statistics.
_NORMS = ("batch_norm", "instance_norm")
_STATE = ("_enter_", "_exit_", "_set_", "set_")


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a call may change."""
    if node.op == "call_method":
        return _nodes_in(node.args[:1]) if _in_place(str(node.target)) else []
    if node.op != "call_function":
        return node.all_input_nodes if node.op == "call_module" else []
    if is_higher_order(node.target):
        return node.all_input_nodes
    schemas = schemas_of(node.target)
    if schemas:
        return [found for schema in schemas for found in written_by_schema(node, schema)]
    if node.target in _OPERATORS:
        return _nodes_in(node.args[:1])
    return [] if node.target in _OF_PYTHON else _by_convention(node)


def changes_state(node: fx.Node) -> bool:
    """Whether a call changes how later ones compute: autocast, gradients, the default dtype."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.startswith(_STATE)


def calls_graphs(node: fx.Node) -> bool:
    """Whether a call takes graphs."""
    return node.op == "call_module" or is_higher_order(node.target)


def _by_convention(node: fx.Node) -> list[fx.Node]:
    """The operands that a function without a schema may change."""
    name = getattr(node.target, "__name__", "")
    given = _given(node)
    if name in _NORMS or given.get("max_norm") is not None:
        return node.all_input_nodes
    written = _nodes_in(given.get("out"))
    if _in_place(name) or given.get("inplace") not in (None, False):
        written += _nodes_in(node.args[:1] or tuple(node.kwargs.values()))
    return written


def _in_place(name: str) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name in ("__setitem__", "__delitem__") or (name.startswith("__i") and name[3:-2] in _AUGMENTED)
    return name.endswith("_")


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by name, where its signature is known."""
    assert callable(node.target)
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # implemented in C, or a signature that does not fit the call
        return dict(node.kwargs)
    return {**bound, **node.kwargs}


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found
