"""Every part of PyTorch that is not public and that graphs, sizes or operators are read with, in one place.

schema          What an operator's signature says: names, defaults, what it writes to, what it may return as a view.
symbolic number A `SymInt`, `SymFloat` or `SymBool`: an expression, and its value when the graph was captured, the hint.
shape env       What knows the symbols of a captured graph. Asking it whether sizes are equal adds guards.

What Dynamo, AOTAutograd and Inductor are asked for stands in `mom_compile.torch_compat`.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: FlexAttention: an operator that is called with graphs of its own, in whose place a captured graph reads attributes.
FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention

#: Calls a graph, traced once for all calls with the same identifier: `(graph, identifier, *operands)` to a tuple.
INVOKE_SUBGRAPH: Any = torch.ops.higher_order.invoke_subgraph

#: Numbers that depend on sizes: lengths, scales computed from them, conditions on them.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def schema_of(target: Any) -> Any:
    """The schema of an operator overload (`arguments`, `returns`, `is_mutable`); None for any other callable."""
    return getattr(target, "_schema", None)


def schemas_of(target: Any) -> list[Any]:
    """The schemas of an operator overload, or of all overloads of an operator; none for any other callable."""
    if isinstance(target, OpOverloadPacket):
        packet: Any = target  # `overloads` is not typed
        return [getattr(packet, name)._schema for name in packet.overloads()]
    schema = schema_of(target)
    return [] if schema is None else [schema]


def is_higher_order(target: Any) -> bool:
    """Whether an operator is called with graphs of its own."""
    return isinstance(target, HigherOrderOperator)


def is_from_elsewhere(target: Any) -> bool:
    """Whether an operator overload is neither one of PyTorch's own nor one of this project's."""
    return isinstance(target, OpOverload) and target.namespace not in ("aten", "prims", "prim", "mom")


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that keeps its bytes in other tensors, by which AOTAutograd replaces it."""
    return bool(is_traceable_wrapper_subclass(tensor))


def storage_of(tensor: torch.Tensor) -> int:
    """Equal for tensors whose bytes may be the same, fake ones among them, as long as these live."""
    return int(tensor.untyped_storage()._cdata)


def takes_sizes(argument: Any) -> bool:
    """Whether an argument of a schema may be a symbolic number, or a list of them, where it is given a number."""
    kind = argument.real_type
    while isinstance(kind, (torch._C.OptionalType, torch._C.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, (torch._C.SymIntType, torch._C.NumberType))


def packet_of(target: Any) -> Any:
    """The operator that an overload is one of, `aten.add` for `aten.add.Tensor`; None for any other callable."""
    return getattr(target, "overloadpacket", None)


def expression_of(number: Any) -> sympy.Expr:
    """The expression of a symbolic number."""
    return number.node.expr


def hint_of(number: Any) -> Any:
    """The value a symbolic number had when the graph was captured; None for one that depends on data."""
    return number.node.hint


def has_hint(number: Any) -> bool:
    return bool(number.node.has_hint())


def shape_env_of(number: Any) -> Any:
    return number.node.shape_env


def equalities_of(env: Any) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """What the graph's guards say is equal. Whoever runs the graph has checked them."""
    return [(guard.expr.lhs, guard.expr.rhs) for guard in env.guards if isinstance(guard.expr, sympy.Eq)]


def new_number(env: Any, value: sympy.Basic, kind: type, hint: Any) -> Any:
    """A symbolic number of `kind` (`bool`, `float` or `int`) for an expression in known symbols."""
    if kind is bool:
        return env.create_symboolnode(value)
    make = env.create_symfloatnode if kind is float else env.create_symintnode
    return make(value, hint=hint)


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor, None for anything else."""
    return getattr(value, "fake_mode", None)


def new_fake_mode() -> Any:
    """A mode in which operators compute shapes and dtypes alone."""
    return FakeTensorMode()


def without_guards(mode: Any) -> AbstractContextManager[Any]:
    """While a fake mode is in use, nothing that is asked of its symbols becomes a guard."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
