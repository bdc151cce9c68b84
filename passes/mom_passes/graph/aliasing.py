"""Which nodes are views, and which nodes share a storage. Read from the schemas of their operators.

`rules.views` answers another question, by what the chunk rules state: whether a node shows all of its operand, or a
range of its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from mom_passes.graph.values import derived_from, operand_chain
from mom_passes.ops.rows import LAID_OUT
from mom_passes.torch_compat import schema_of

aten = torch.ops.aten

#: A view in another shape, elements in the same order. `reshape` copies where strides do not allow a view.
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
#: Views by their schemas, which return a copy where the strides of the operand do not allow a view.
MAY_COPY = frozenset({aten.reshape.default, aten.contiguous.default, LAID_OUT})
#: Views whose elements are computed when they are read: their bytes are not their values.
_LAZY = frozenset({aten._conj.default, aten._neg_view.default})


def is_mutation(node: fx.Node) -> bool:
    """Whether the operator writes to an operand."""
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def may_be_a_view(node: fx.Node) -> bool:
    """Whether the operator's schema allows its result to alias an operand."""
    schema = schema_of(node.target)
    return schema is not None and any(returned.alias_info is not None for returned in schema.returns)


def aliased_operand(node: fx.Node) -> fx.Node | None:
    """The operand whose storage a node may share, as a view of it or because it writes to it. None if there is none."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:
        aliases = aliased_operand(source) is not None
    else:
        aliases = node.target is aten._unsafe_view.default or may_be_a_view(node)  # the former's schema omits it
    return source if aliases else None


def viewed_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a node may be a view of. None for an operator that writes to its operand."""
    return None if is_mutation(node) else aliased_operand(node)


def is_a_view(node: fx.Node) -> bool:
    """Whether a node is certainly a view of its first operand, with the same bytes."""
    source = viewed_operand(node)
    if node.target is operator.getitem:
        return source is not None and is_a_view(source)
    return source is not None and node.target not in MAY_COPY | _LAZY


def base_of(node: fx.Node) -> fx.Node:
    """The node at the end of the view chain, which owns the storage; the node itself if it is no view."""
    return view_chain(node)[-1]


def views_of(base: fx.Node) -> set[fx.Node]:
    """A node and all nodes that may be views of it."""
    return {base, *derived_from(base, lambda user: base_of(user) is base)}


def views_and_readers(
    base: fx.Node, operand_of_view: Callable[[fx.Node], fx.Node | None] = viewed_operand
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The views of a node, in graph order, and the other nodes that read it or a view of it."""
    views: set[fx.Node] = set()
    readers: set[fx.Node] = set()
    pending = [base]
    while pending:
        value = pending.pop()
        for user in value.users:
            if operand_of_view(user) is not value:
                readers.add(user)
            elif user not in views:
                views.add(user)
                pending.append(user)
    return sorted(views), readers


def view_chain(node: fx.Node) -> list[fx.Node]:
    """A node, its aliased operand, the aliased operand of that, and so on to the base."""
    return operand_chain(node, lambda value: aliased_operand(value) is not None)
