"""The law of chunk rules as a function: computes an operator in pieces and whole, and compares.

    for every output dim, for every uneven cut of its rows into pieces:
        op(edit(slice(operands)))  ==  slice(op(operands))

A rule may refuse a dim; what it accepts must hold. Composite dims (`outer x tokens x inner`) are tried
wherever a size has such a factorisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from mom_passes.errors import CannotChunk
from mom_passes.graph.values import operands
from mom_passes.rules import All, Claim, Dim, Need, Past, Window, claim_for
from mom_passes.rules.slicing import length, take

#: Operators whose result has a shape but no defined content.
UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
}


@dataclass
class Call:
    """One call of an operator with real tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        def brief(value: Any) -> Any:
            return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else value

        return f"{self.target}{tree_map(brief, self.args)}{tree_map(brief, self.kwargs) or ''}"


def node_of(call: Call) -> fx.Node:
    """The call as a graph node whose operands are placeholders that know their values."""
    graph = fx.Graph()

    def operand(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        placeholder = graph.placeholder("operand")
        placeholder.meta["val"] = value
        return placeholder

    node = graph.call_function(call.target, tree_map(operand, call.args), tree_map(operand, call.kwargs))
    node.meta["val"] = call.target(*call.args, **call.kwargs)
    return node


def outputs(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def first_row(need: Need, start: int) -> int:
    """Where an operand begins that is given for rows from `start` on."""
    if isinstance(need, All):
        return 0
    return max(0, start - need.rows) if isinstance(need, Past) else start


def needed(operand: torch.Tensor, need: Need, start: int, count: int) -> torch.Tensor:
    assert not isinstance(need, All)
    first = first_row(need, start)
    return take(operand, need.dim, first, start + count - first)


def window(claim: Claim, start: int, count: int) -> Window:
    return Window(start, count, tuple(first_row(need, start) for need in claim.needs))


def run_rows(node: fx.Node, claim: Claim, start: int, count: int) -> Any:
    """What a loop body computes for rows `[start, start + count)`."""
    sliced = iter(
        operand.meta["val"] if isinstance(need, All) else needed(operand.meta["val"], need, start, count)
        for operand, need in zip(operands(node), claim.needs, strict=True)
    )
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(sliced))
    if claim.edit is not None:
        args, kwargs = claim.edit(args, kwargs, window(claim, start, count))
    target: Any = claim.target or node.target
    return target(*args, **kwargs)


def cuts(rows: int) -> list[list[int]]:
    """Uneven ways to cut rows into pieces; a piece of one row is where shapes go wrong."""
    ways = [[1, rows - 1], [rows // 2 + 1, rows - rows // 2 - 1], [2, 1, rows - 3]]
    return [way for way in ways if all(count > 0 for count in way)] or [[rows]]


def dims(shape: torch.Size) -> Iterator[Dim]:
    """Every dim of a shape: plain ones, and composite ones where the size factors."""
    for index, size in enumerate(shape):
        if size > 0:
            yield Dim(index)
        for outer, inner in ((2, 1), (1, 2), (3, 1), (1, 3), (2, 3)):
            if size > outer * inner and size % (outer * inner) == 0:
                yield Dim(index, outer, inner)


def check_rows(node: fx.Node, dim: Dim, claim: Claim) -> None:
    """The law, for one node along one dim."""
    whole = outputs(node.meta["val"])
    output_dims = claim.outputs if claim.outputs is not None else (dim,)
    assert len(output_dims) == len(whole), "one dim (or None) per output"
    assert output_dims[0] == dim, "the dim asked for is that of output 0"
    rows = length(whole[0], dim)
    for operand, need in zip(operands(node), claim.needs, strict=True):
        assert isinstance(need, All) or length(operand.meta["val"], need.dim) == rows, f"operand {operand}: other rows"
    for way in cuts(rows):
        start = 0
        for count in way:
            pieces = outputs(run_rows(node, claim, start, count))
            for piece, full, output_dim in zip(pieces, whole, output_dims, strict=True):
                if output_dim is not None:
                    compare(node.target, piece, take(full, output_dim, start, count))
            start += count


def compare(target: Any, piece: torch.Tensor, expected: torch.Tensor) -> None:
    if target in UNINITIALISED:
        assert (piece.shape, piece.dtype) == (expected.shape, expected.dtype)
    else:
        torch.testing.assert_close(piece, expected, equal_nan=True)


def accepts(node: fx.Node, dim: Dim) -> bool:
    try:
        claim_for(node, dim)
    except CannotChunk:
        return False
    return True


def check_call(call: Call) -> int:
    """Checks every dim of a call; returns how many the rule accepted."""
    node = node_of(call)
    accepted = 0
    if not outputs(node.meta["val"]):
        return 0  # unbinding an empty dimension leaves nothing to cut
    for dim in dims(outputs(node.meta["val"])[0].shape):
        try:
            claim = claim_for(node, dim)
        except CannotChunk:
            continue
        try:
            check_rows(node, dim, claim)
        except Exception as error:
            raise AssertionError(f"{call} along {dim}, claim {claim.needs}: {error}") from error
        accepted += 1
    return accepted
