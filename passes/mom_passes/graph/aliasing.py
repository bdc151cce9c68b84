"""Which nodes share a storage, told by the schemas of their operators."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mom_passes.ops.rows import LAID_OUT
from mom_passes.torch_compat import schema_of

aten = torch.ops.aten

#: Their schemas say that they may return a view. They return a copy where strides do not allow a view.
_MAY_COPY = frozenset({aten.reshape.default, aten.contiguous.default, LAID_OUT})
#: Views whose elements are computed when they are read: their bytes are not their values.
_LAZY = frozenset({aten._conj.default, aten._neg_view.default})


def is_mutation(node: fx.Node) -> bool:
    """Whether the operator writes to what it was given."""
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def may_be_a_view(node: fx.Node) -> bool:
    """Whether the operator's schema says that it may return what it was given, relabelled."""
    schema = schema_of(node.target)
    return schema is not None and any(returned.alias_info is not None for returned in schema.returns)


def seen_from(node: fx.Node) -> fx.Node | None:
    """What a node may share its storage with by being a view of it; None where it has its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is operator.getitem:
        return node.args[0] if seen_from(node.args[0]) is not None else None
    if node.target is aten._unsafe_view.default:  # a view, whatever its schema says
        return node.args[0]
    return node.args[0] if may_be_a_view(node) else None


def is_a_view(node: fx.Node) -> bool:
    """Whether a node certainly shares the storage of its first operand, and is only labelled otherwise."""
    if node.target is operator.getitem:
        source = seen_from(node)
        return source is not None and is_a_view(source)
    return seen_from(node) is not None and not is_mutation(node) and node.target not in _MAY_COPY | _LAZY


def base_of(node: fx.Node) -> fx.Node:
    """The value whose storage a node shares; itself if it has its own."""
    return view_chain(node)[-1]


def views_of(base: fx.Node) -> set[fx.Node]:
    """A value and all that may be views of it."""
    found, pending = {base}, [base]
    while pending:
        for user in pending.pop().users:
            if user not in found and user.op == "call_function" and base_of(user) is base:
                found.add(user)
                pending.append(user)
    return found


def view_chain(node: fx.Node) -> list[fx.Node]:
    """A view, what it is seen from, and so on down to the base."""
    chain = [node]
    while (source := seen_from(chain[-1])) is not None:
        chain.append(source)
    return chain
