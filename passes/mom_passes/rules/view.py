"""Chunk rules of operators that only move elements: views, concatenations, pads.

Most are a list of origins, one per output dimension (see `mom_passes.rules.factories`). Operators with size arguments
need an edit: inside a body, these must not contain the sequence length.

Terms
-----
prefix, suffix   Of a dim in a shape: the product of the sizes before the tokens and of those after them, `outer` and
                 `inner` included. A reshape changes neither, so they locate the tokens in the other shape:

                     [B, S, H], dim 1                 prefix B, suffix H
                     [B*S, H],  dim 0, outer B        prefix B, suffix H
                     [B*S*H],   dim 0, outer B, inner H
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axes, axis, has_argument, overloads, prims, replace
from mom_passes.graph.sizes import is_one, product, quotient, same
from mom_passes.graph.values import operands
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import (
    Origin,
    all_but,
    checked,
    follows,
    origin_claim,
    output_shape,
    outputs_of,
    shape_of,
)
from mom_passes.rules.needs import All, Dim, Rows, Window
from mom_passes.rules.registry import Alias, register
from mom_passes.rules.source import require_static_layout, tokens

#: The `end` of a slice up to the last row.
TO_THE_END = 2**63 - 1


# Reordering dimensions, adding and removing them


@follows(aten.permute.default, alias=Alias.VIEW)
def permute(node: fx.Node) -> list[Origin]:
    dims = argument(node, "dims")
    return list(axes(dims, len(dims)))


@follows(aten.transpose.int, alias=Alias.VIEW)
def transpose(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    first, second = axis(argument(node, "dim0"), rank), axis(argument(node, "dim1"), rank)
    return [{first: second, second: first}.get(index, index) for index in range(rank)]


@follows(aten.t.default, alias=Alias.VIEW)
def t(node: fx.Node) -> list[Origin]:
    return list(reversed(range(len(output_shape(node)))))


@follows(aten.unsqueeze.default, alias=Alias.VIEW)
def unsqueeze(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return _inserted(rank, axis(argument(node, "dim"), rank), "a new dimension of size 1 has no rows")


@follows(aten.stack.default)
def stack(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return _inserted(rank, axis(argument(node, "dim"), rank), "stacks along it")


def _inserted(rank: int, at: int, reason: str) -> list[Origin]:
    return [reason if index == at else index - (index > at) for index in range(rank)]


@follows(aten.unbind.int)
@follows(aten.select.int, alias=Alias.CUT)
def select(node: fx.Node) -> list[Origin]:
    """The selected dimension is not in the output."""
    rank = len(shape_of(operands(node)[0]))
    gone = axis(argument(node, "dim"), rank)
    return [index for index in range(rank) if index != gone]


@register(*overloads(aten, "squeeze squeeze.dim squeeze.dims"), alias=Alias.VIEW)
def squeeze(node: fx.Node, dim: Dim) -> Claim:
    """The edit names the removed dimensions: with a single row, the token dimension has size 1 and must stay."""
    shape = shape_of(operands(node)[0])
    named = range(len(shape)) if node.target is aten.squeeze.default else axes(argument(node, "dim"), len(shape))
    removed = [index for index in named if index < len(shape) and is_one(shape[index])]
    kept: list[Origin] = [index for index in range(len(shape)) if index not in removed]

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0], removed), {}

    return Claim(origin_claim(node, dim, kept).needs, edit=edit, target=aten.squeeze.dims)


@follows(aten.view_as_complex.default, alias=Alias.VIEW)
def view_as_complex(node: fx.Node) -> list[Origin]:
    return list(range(len(output_shape(node))))


@follows(aten.view_as_real.default, alias=Alias.VIEW)
def view_as_real(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return all_but(rank, [rank - 1], "they are the two parts of one number")


# Taking parts, joining, moving within a dimension


@register(aten.slice.Tensor, alias=Alias.CUT, size_arguments=("start", "end"))
def slice_(node: fx.Node, dim: Dim) -> Claim:
    operand = operands(node)[0]
    at = axis(argument(node, "dim"), len(shape_of(operand)))
    if checked(node, dim).index != at:
        return Claim((Rows(dim),))
    if not same(output_shape(node)[at], shape_of(operand)[at]):
        raise CannotChunk(node, dim, "slices along it")

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0], at, 0, TO_THE_END), {}

    return Claim((Rows(dim),), edit=edit)


@follows(*overloads(aten, "split.Tensor split_with_sizes"))
def split(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return all_but(rank, axes(argument(node, "dim"), rank), "splits it")


@register(aten.cat.default)
def cat(node: fx.Node, dim: Dim) -> Claim:
    rank = len(output_shape(node))
    if checked(node, dim).index == axis(argument(node, "dim"), rank):
        raise CannotChunk(node, dim, "concatenates along it")
    # PyTorch concatenates an empty vector with a tensor of any rank. It has no rows to slice.
    return Claim(tuple(Rows(dim) if len(shape_of(operand)) == rank else All() for operand in operands(node)))


@follows(aten.constant_pad_nd.default)
def constant_pad_nd(node: fx.Node) -> list[Origin]:
    rank, pad = len(output_shape(node)), argument(node, "pad")
    sides = [pad[position : position + 2] for position in range(0, len(pad), 2)]
    padded = [rank - 1 - position for position, side in enumerate(sides) if not _is_zero(side)]
    return all_but(rank, padded, "pads it")


def _is_zero(side: Sequence[Any]) -> bool:
    return all(isinstance(amount, int) and amount == 0 for amount in side)


@follows(aten.flip.default, prims.rev.default)
def flip(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return all_but(rank, axes(argument(node, "dims"), rank), "reverses it")


@follows(aten.roll.default)
def roll(node: fx.Node) -> list[Origin]:
    rank, dims = len(output_shape(node)), argument(node, "dims")
    return all_but(rank, axes(dims, rank) if dims else range(rank), "rotates it")


# Operators with size arguments


@register(aten.expand.default, alias=Alias.VIEW, size_arguments=("size",))
def expand(node: fx.Node, dim: Dim) -> Claim:
    return _repeating(node, dim, "size", unchanged=-1)


def repeat_candidates(node: fx.Node, carriers: tuple[Dim | None, ...]) -> list[Dim]:
    """Return the dim of the output in which the n copies of the tokens follow each other."""
    (dim,) = carriers
    assert dim is not None
    index = dim.index + len(output_shape(node)) - len(shape_of(operands(node)[0]))
    return [Dim(index, product([argument(node, "repeats")[index], dim.outer]), dim.inner)]


@register(aten.repeat.default, candidates=repeat_candidates)
def repeat(node: fx.Node, dim: Dim) -> Claim:
    times = argument(node, "repeats")[checked(node, dim).index]
    need = _repeated_need(node, operands(node)[0], dim)
    if isinstance(need, All):
        return _repeating(node, dim, "repeats", unchanged=1)
    outer = quotient(dim.outer, times) if isinstance(times, int) else None
    if outer is None:
        raise CannotChunk(node, dim, "repeats it, and the rows do not include every copy")
    return Claim((Rows(Dim(need.dim.index, outer, dim.inner)),))


def _repeated_need(node: fx.Node, operand: fx.Node, dim: Dim) -> All | Rows:
    """Return the need of an operand that is expanded to the shape of the output."""
    shape = shape_of(operand)
    index = dim.index - (len(output_shape(node)) - len(shape))
    repeated = index < 0 or (is_one(shape[index]) and not is_one(output_shape(node)[dim.index]))
    return All() if repeated else Rows(dim.at(index))


def _repeating(node: fx.Node, dim: Dim, name: str, unchanged: int) -> Claim:
    """Return the claim of an expansion. The operand has the rows, or it is one row, repeated for each row of a body."""
    need = _repeated_need(node, operands(node)[0], checked(node, dim))
    if isinstance(need, All):
        require_static_layout(node, dim)

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes = list(argument(node, name))
        sizes[dim.index] = tokens(node, dim, window) if isinstance(need, All) else unchanged
        return replace(node.target, args, kwargs, **{name: sizes})

    return Claim((need,), edit=edit)


# Reshaping


def locate(dim: Dim, here: Sequence[Any], there: Sequence[Any]) -> Dim | None:
    """Return the dim of shape `there` that holds the tokens of `dim`, a dim of shape `here`, or None."""
    prefix = product([*here[: dim.index], dim.outer])
    suffix = product([dim.inner, *here[dim.index + 1 :]])
    if prefix == 0 or suffix == 0:
        return None  # no elements: any dim would fit
    for index in range(len(there)):
        outer = quotient(prefix, product(there[:index]))
        inner = quotient(suffix, product(there[index + 1 :]))
        if outer is None or inner is None:
            continue
        if same(product([there[index], dim.outer, dim.inner]), product([here[dim.index], outer, inner])):
            return Dim(index, outer, inner)
    return None


def view_candidates(node: fx.Node, dims: tuple[Dim | None, ...]) -> list[Dim]:
    """Return the dim of the output that holds the rows of the operand, if there is one."""
    (dim,) = dims
    if dim is None:
        return []
    found = locate(dim, shape_of(operands(node)[0]), output_shape(node))
    return [] if found is None else [found]


@register(aten.view.default, candidates=view_candidates, alias=Alias.VIEW, size_arguments=("size",))
@register(aten._unsafe_view.default, candidates=view_candidates, alias=Alias.COPY, size_arguments=("size",))
@register(aten.reshape.default, candidates=view_candidates, alias=Alias.COPY, size_arguments=("shape",))
@register(prims.reshape.default, candidates=view_candidates, alias=Alias.COPY, size_arguments=("shape",))
def view(node: fx.Node, dim: Dim) -> Claim:
    """Becomes a `reshape` in a body: rows of a tensor may need a copy where the whole tensor has the view."""
    operand = shape_of(operands(node)[0])
    origin = locate(checked(node, dim), output_shape(node), operand)
    if origin is None:
        shapes = f"{list(operand)} -> {list(output_shape(node))}"
        raise CannotChunk(node, dim, f"the reshape {shapes} mixes rows with other dimensions")
    sizes, inferred = _sizes_without_tokens(node, dim)
    if not inferred:
        require_static_layout(node, dim)

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = list(sizes)
        shape[dim.index] = -1 if inferred else tokens(node, dim, window)
        return (args[0], shape), {}

    return Claim((Rows(origin),), edit=edit, target=aten.reshape.default)


def _sizes_without_tokens(node: fx.Node, dim: Dim) -> tuple[list[Any], bool]:
    """Return the shape argument with static sizes filled in, and whether the token dimension can be -1.

    It cannot be -1 if another size is a -1 with a symbolic value, or if another size is zero, which makes -1 ambiguous.
    """
    sizes = list(argument(node, "shape" if has_argument(node, "shape") else "size"))
    for index, size in enumerate(outputs_of(node)[0].shape):
        if index != dim.index and isinstance(size, int):
            sizes[index] = size
    others = [size for index, size in enumerate(sizes) if index != dim.index]
    return sizes, not any(isinstance(size, int) and size in (-1, 0) for size in others)
