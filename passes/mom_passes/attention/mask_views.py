"""Transfer functions of views, copies and lookups on the values of `affine`: they rewrite the index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.attention.affine import ZERO, Additive, Affine, Lookup, Truth, Value, nonnegative
from mom_passes.attention.mask_operators import WIDE, Given, constant, dtype_of, holds, rule, shape_of, size_of
from mom_passes.graph.arguments import argument
from mom_passes.graph.sizes import all_same, expr, is_one
from mom_passes.graph.values import input_node


@rule("clone alias detach lift_fresh_copy contiguous _to_copy convert_element_type")
def cast(node: fx.Node, given: Given) -> Value:
    """A copy, perhaps in another dtype. Positions must stay exact integers; a flag stays 0 or 1."""
    value, dtype = given(node.args[0]), dtype_of(node)
    if dtype == torch.bool:
        return holds(value)
    if isinstance(value, Affine) and value.is_constant and value.constant.is_number and dtype.is_floating_point:
        return constant(int(value.constant), dtype)
    if isinstance(value, Lookup) and dtype not in (torch.int64, dtype_of(input_node(node))):
        return None
    return value


def _reindexed(value: Value, move: Callable[[Affine], Affine | None]) -> Value:
    if isinstance(value, Affine | Lookup):
        return value.moved(move)
    if isinstance(value, Truth):
        return value.reindexed(move)
    return value if value is None else Additive(value.visible.reindexed(move), value.lowest)


def _pick(node: fx.Node, given: Given, dims: Sequence[int | None]) -> Value:
    """Dimension `k` of the result is dimension `dims[k]` of the operand, or a new one of size 1 (None)."""
    rank = len(shape_of(node.args[0]))

    def move(value: Affine) -> Affine:
        old = value.at_rank(rank).coefficients
        return Affine(tuple(ZERO if d is None else old[d] for d in dims), value.constant)

    return _reindexed(given(node.args[0]), move)


@rule("unsqueeze")
def unsqueeze(node: fx.Node, given: Given) -> Value:
    rank = len(shape_of(node))
    new = argument(node, "dim") % rank
    return _pick(node, given, [None if d == new else d - (d > new) for d in range(rank)])


@rule("permute")
def permute(node: fx.Node, given: Given) -> Value:
    rank = len(shape_of(node))
    return _pick(node, given, [d % rank for d in argument(node, "dims")])


@rule("expand")
def expand(node: fx.Node, given: Given) -> Value:
    old, rank = shape_of(node.args[0]), len(shape_of(node))
    shift = rank - len(old)
    return _pick(node, given, [None if d < shift or is_one(old[d - shift]) else d - shift for d in range(rank)])


@rule("view _unsafe_view reshape squeeze squeeze.dim squeeze.dims")
def reshape(node: fx.Node, given: Given) -> Value:
    """Views that only add or drop dimensions of size 1. Through other views only constants are known."""
    old, new = shape_of(node.args[0]), shape_of(node)
    kept_old, kept_new = ([d for d, size in enumerate(shape) if not is_one(size)] for shape in (old, new))
    sizes_old, sizes_new = [old[d] for d in kept_old], [new[d] for d in kept_new]
    if all_same(sizes_old, sizes_new):
        origin = dict(zip(kept_new, kept_old, strict=True))
        return _pick(node, given, [origin.get(d) for d in range(len(new))])
    return _reindexed(given(node.args[0]), _constant)


def _constant(value: Affine) -> Affine | None:
    return Affine.number(value.constant) if value.is_constant else None


def _from_the_front(index: Any, size: Any) -> sympy.Expr | None:
    """An index without its count from the end; None if its sign is not known or it may be clamped."""
    position = expr(size_of(index))
    if nonnegative(-position - 1):
        position = sympy.expand(position + expr(size))
    return position if nonnegative(position) else None


def _along(value: Affine, dim: int, first: Any, step: int) -> Affine:
    """The function with `first + step * index` for the index along one dimension."""
    old = value.coefficients
    new = tuple(step * c if d == dim else c for d, c in enumerate(old))
    return Affine(new, value.constant).plus(Affine.number(old[dim] * first))


@rule("slice.Tensor")
def slice_(node: fx.Node, given: Given) -> Value:
    dim, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    rank = len(shape_of(node))
    first = _from_the_front(0 if start is None else start, shape_of(node.args[0])[dim])
    if first is None or not isinstance(step, int):
        return None
    return _reindexed(given(node.args[0]), lambda value: _along(value.at_rank(rank), dim % rank, first, step))


@rule("select.int")
def select(node: fx.Node, given: Given) -> Value:
    shape = shape_of(node.args[0])
    dim = argument(node, "dim") % len(shape)
    at = _from_the_front(argument(node, "index"), shape[dim])
    if at is None:
        return None

    def move(value: Affine) -> Affine:
        fixed = _along(value.at_rank(len(shape)), dim, at, 0)
        return Affine(fixed.coefficients[:dim] + fixed.coefficients[dim + 1 :], fixed.constant)

    return _reindexed(given(node.args[0]), move)


@rule("cat")
def cat(node: fx.Node, given: Given) -> Value:
    """Pieces of one function: taken from a piece with several elements, with which all others must agree."""
    pieces = argument(node, "tensors")
    values = [given(piece) for piece in pieces]
    if isinstance(values[0], Truth):
        return values[0] if values[0].number is not None and all(v == values[0] for v in values) else None
    rank = len(shape_of(node))
    dim = argument(node, "dim") % rank
    placed: list[tuple[Affine, sympy.Expr, bool]] = []
    offset = ZERO
    for piece, value in zip(pieces, values, strict=True):
        shape = shape_of(piece)
        if not isinstance(value, Affine) or len(shape) != rank:
            return None
        placed.append((_along(value.fixed(shape), dim, -offset, 1), offset, is_one(shape[dim])))
        offset = offset + expr(shape[dim])
    whole = next((value for value, _, single in placed if not single), None)
    if whole is None:
        return None
    agree = (value == (_along(whole, dim, at, 0) if single else whole) for value, at, single in placed)
    return whole if all(agree) else None


@rule("index.Tensor")
def index(node: fx.Node, given: Given) -> Value:
    """Composition with the positions, if none of them counts from the end."""
    indices, shape = argument(node, "indices"), shape_of(node.args[0])
    if any(at is not None and dtype_of(at) not in WIDE for at in indices):
        return None
    if len(indices) != len(shape) or None in indices:
        return _reindexed(given(node.args[0]), _constant)
    positions = [_position(at, given) for at in indices]

    def compose(function: Affine) -> Affine | None:
        result = Affine.number(function.constant)
        for coefficient, position in zip(function.at_rank(len(shape)).coefficients, positions, strict=True):
            if coefficient == 0:
                continue
            if position is None:
                return None
            result = result.plus(position, coefficient)
        return result

    return _reindexed(given(node.args[0]), compose)


def _position(at: fx.Node, given: Given) -> Affine | None:
    value = given(at)
    if not isinstance(value, Affine):
        return None
    fixed = value.fixed(shape_of(at))
    return fixed if fixed.always(shape_of(at)) else None
