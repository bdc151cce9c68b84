"""Heads: products of hidden states with the matrix of a vocabulary, and the logits that follow.

Terms
-----
head      A product of hidden states with a matrix that has more columns than rows, and its bias.
chain     From the head to its logits: views, conversions, arithmetic with a number, and a gather of the columns of
          several ranks, each the only reader of the previous one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, argument_node, arguments_of, aten, axis, prims
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, hint, same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.collectives import GATHER_COLUMNS
from mom_passes.ops.scored import DTYPES, WITH_NUMBER, WITHOUT

_PRODUCTS: dict[Any, tuple[str, str]] = {aten.mm.default: ("self", "mat2"), aten.addmm.default: ("mat1", "mat2")}
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_CONVERT = prims.convert_element_type.default
_STEPS: dict[Any, str] = {
    **{getattr(getattr(aten, name), kind): name for name in WITH_NUMBER for kind in ("Tensor", "Scalar")},
    **{getattr(aten, name).default: name for name in WITHOUT},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Head:
    """`logits` are `hidden @ matrix + bias` after the views and the arithmetic `steps` of the chain.

    `gather` is the node of the chain that gathers the columns of several ranks, if each has a part of the matrix.
    """

    product: fx.Node
    chain: tuple[fx.Node, ...]
    steps: tuple[tuple[str, float], ...]
    gather: fx.Node | None = None

    @property
    def logits(self) -> fx.Node:
        return self.chain[-1] if self.chain else self.product

    @property
    def hidden(self) -> fx.Node:
        return argument_node(self.product, _PRODUCTS[self.product.target][0])

    @property
    def matrix(self) -> fx.Node:
        return argument_node(self.product, _PRODUCTS[self.product.target][1])

    @property
    def bias(self) -> fx.Node | None:
        return argument(self.product, "self") if self.product.target is aten.addmm.default else None

    @property
    def columns(self) -> Size:
        """The columns of the logits."""
        return self.columns_of(self.logits)

    def columns_of(self, value: fx.Node) -> Size:
        """Return the columns of a value of the chain, or of a wide value."""
        own = value_of(self.matrix).shape[1]
        if self.gather is None or value in (self.product, *self.chain[: self.chain.index(self.gather)]):
            return own
        return own * argument(self.gather, "ranks")


def head_of(node: fx.Node) -> Head | None:
    """Return the head of a product with more columns than matrix rows, with its chain, or None."""
    if node.target not in _PRODUCTS or not value_of(node).is_floating_point():
        return None
    found = Head(node, (), ())
    if not _adds_a_bias(found):
        return None
    chain: list[fx.Node] = []
    steps = []
    while len(readers := readers_of(node)) == 1:
        (node,) = readers
        step = _step(node)
        if node.target is GATHER_COLUMNS and found.gather is None:
            found = replace(found, chain=(*chain, node), gather=node)
        elif step is None and not keeps_columns(node, found.columns):
            break
        chain.append(node)
        steps += [] if step is None else [step]
    found = replace(found, chain=tuple(chain), steps=tuple(steps))
    return found if hint(found.columns) > hint(value_of(found.matrix).shape[0]) else None


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return the readers of a value's elements."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def _adds_a_bias(head: Head) -> bool:
    """Whether a head has no bias, or one with an element per column."""
    if head.bias is None:
        return True
    once = all(argument(head.product, name) == 1 for name in ("alpha", "beta"))
    shape = value_of(head.bias).shape
    return once and len(shape) == 1 and same(shape[0], head.columns)


def _step(node: fx.Node) -> tuple[str, float] | None:
    """Return a pointwise operator with a number as a step of `mom.scored`, None if it is none."""
    if node.target is _CONVERT:
        name = _NAMES.get(argument(node, "dtype"))
        return None if name is None else (name, 0.0)
    name = _STEPS.get(node.target)
    if name in WITHOUT:
        return name, 0.0
    if name is None or len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], (int, float)):
        return None
    return name, float(node.args[1])


def keeps_columns(node: fx.Node, columns: Size) -> bool:
    """Whether a node is a view or copy of its operand that keeps all columns of each row in the last dimension."""
    if node.op != "call_function" or not isinstance(meta_value(node), torch.Tensor):
        return False
    if node.target is aten.clone.default:
        return True
    shape = value_of(node).shape
    if not shape or not same(shape[-1], columns):
        return False
    if node.target in _VIEWS:
        return same(value_of(operands(node)[0]).shape[-1], columns)
    if node.target not in (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim):
        return False
    rank = len(shape) if node.target is aten.unsqueeze.default else len(value_of(operands(node)[0]).shape)
    return axis(argument(node, "dim"), rank) != rank - 1


def with_columns(node: fx.Node, of: fx.Node, columns: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return the call that applies the view `node` of a wide value to `of`, which has `columns`; None for a copy."""
    if node.target is aten.clone.default:
        return None
    kwargs = dict(node.kwargs)
    if node.target in _VIEWS:
        sizes = list(argument(node, "shape" if "shape" in arguments_of(node.target) else "size"))
        return aten.reshape.default, (of, [*sizes[:-1], columns]), {}
    return node.target, (of, *node.args[1:]), kwargs
