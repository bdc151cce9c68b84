"""The law of chunk rules as a function: computes an operator in pieces and whole, and compares.

    for every output dim, for every uneven cut of its rows into pieces:
        rows     cat(op(edit(slice(operands))) for piece)                   ==  op(operands)
        fold     combine(combine(identity, part 1), part 2), finished       ==  op(operands)
        carry    each piece receives the value that the piece before it handed on; the last one is the final value

A rule may refuse a dim; what it accepts must hold. Composite dims (`outer x tokens x inner`) are tried wherever a size
has such a factorisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, replace
from mom_passes.graph.values import operands
from mom_passes.rules import All, Claim, Dim, Fold, Last, Need, Rows, Window, claim_for, fold_for
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


def needed(operand: torch.Tensor, need: Need, start: int, count: int) -> torch.Tensor:
    """What a mini-sequence is given of an operand. Ahead of the first row there are zeros."""
    if isinstance(need, All):
        return operand
    first = max(0, start - need.before)
    rows = take(operand, need.dim, first, start + count - first)
    missing = need.before - (start - first)
    if missing == 0:
        return rows
    shape = [missing if d == need.dim.index else size for d, size in enumerate(rows.shape)]
    return torch.cat([rows.new_zeros(shape), rows], need.dim.index)


def window(claim: Claim, start: int, count: int) -> Window:
    return Window(start, count, tuple(0 if isinstance(n, All) else start - n.before for n in claim.needs))


def run_rows(node: fx.Node, claim: Claim, start: int, count: int, received: Sequence[Any] = ()) -> list[Any]:
    """The results of a call for rows `[start, start + count)`, joined with the values that the carries hand to it."""
    values = (operand.meta["val"] for operand in operands(node))
    sliced = iter([needed(value, need, start, count) for value, need in zip(values, claim.needs, strict=True)])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(sliced))
    if claim.edit is not None:
        args, kwargs = claim.edit(args, kwargs, window(claim, start, count))
    target: Any = claim.target or node.target
    given = {c.operand: value for c, value in zip(claim.all_carries, received, strict=False) if c.operand is not None}
    args, kwargs = replace(target, args, kwargs, **given)
    results = outputs(target(*args, **kwargs))
    for carry, value in zip(claim.all_carries, received, strict=False):
        if carry.join is not None:
            at = 0 if isinstance(carry.next, Last) else carry.next
            results[at] = carry.join(value, results[at])
    return results


def first_values(node: fx.Node, claim: Claim, dim: Dim) -> list[torch.Tensor]:
    """The values of the carries before the first row."""
    whole, found = outputs(node.meta["val"]), []
    for carry in claim.all_carries:
        given = argument(node, carry.operand) if carry.operand is not None else None
        like = whole[0 if isinstance(carry.next, Last) else carry.next]
        shape = list(like.shape)
        if isinstance(carry.next, Last):
            shape[dim.index] = carry.next.count
        new = torch.full(shape, carry.init, dtype=carry.dtype or like.dtype)
        found.append(new if given is None else given.meta["val"])
    return found


def next_values(claim: Claim, dim: Dim, results: Sequence[torch.Tensor], received: Sequence[Any]) -> list[Any]:
    """What a call hands to the next one."""
    found = []
    for carry, before in zip(claim.all_carries, received, strict=True):
        if not isinstance(carry.next, Last):
            found.append(results[carry.next])
            assert (found[-1].shape, found[-1].dtype) == (before.shape, before.dtype), "a carry keeps its type"
            continue
        rows = torch.cat([before, results[0]], dim.index)
        found.append(rows.narrow(dim.index, rows.shape[dim.index] - carry.next.count, carry.next.count))
    return found


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
    claimed = claim.outputs if claim.outputs is not None else (Rows(dim),)
    assert len(claimed) == len(whole), "one output (or None) per result"
    assert claimed[0] == Rows(dim), "the dim asked for is that of output 0"
    rows = length(whole[0], dim)
    for operand, need in zip(operands(node), claim.needs, strict=True):
        assert isinstance(need, All) or length(operand.meta["val"], need.dim) == rows, f"operand {operand}: other rows"
    for way in cuts(rows):
        start, received = 0, first_values(node, claim, dim)
        for count in way:
            pieces = run_rows(node, claim, start, count, received)
            received = next_values(claim, dim, pieces, received)
            for piece, full, output in zip(pieces, whole, claimed, strict=True):
                if isinstance(output, Rows):
                    compare(node.target, piece, take(full, output.dim, start, count))
            start += count
        check_finals(node, claim, whole, received)


def check_finals(node: fx.Node, claim: Claim, whole: Sequence[Any], received: Sequence[torch.Tensor]) -> None:
    """The carries after the last row are the results that have no rows."""
    for number, output in enumerate(claim.outputs or ()):
        carry = claim.carry_of(number)
        if carry is not None:
            total = finished(output, received[carry])
            torch.testing.assert_close(total.to(whole[number].dtype), whole[number], equal_nan=True)


def finished(output: Any, total: torch.Tensor) -> torch.Tensor:
    """The result that is made of a total: the nodes that `finish` emits, run."""
    if not isinstance(output, Fold) or output.finish is None:
        return total
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        node = graph.placeholder("total")
        node.meta["val"] = mode.from_tensor(total)
        graph.output(output.finish(node))
    return fx.Interpreter(fx.GraphModule({}, graph)).run(total)  # type: ignore[no-any-return]


def check_fold(node: fx.Node, claim: Claim) -> None:
    """The law of a fold, for one node."""
    values = [operand.meta["val"] for operand in operands(node)]
    counts = {length(v, need.dim) for v, need in zip(values, claim.needs, strict=True) if isinstance(need, Rows)}
    assert len(counts) == 1, "its operands have other numbers of rows"
    for way in cuts(counts.pop()):
        start, received = 0, first_values(node, claim, Dim(0))
        for count in way:
            results = run_rows(node, claim, start, count, received)
            received, start = next_values(claim, Dim(0), results, received), start + count
        check_finals(node, claim, outputs(node.meta["val"]), received)


def check_folds(call: Call) -> int:
    """Checks a call with tokens in any dims of its operands; returns how many combinations the rule accepted."""
    node = node_of(call)
    values = [operand.meta["val"] for operand in operands(node)]
    options = [[None, *(d for d in dims(value.shape) if i == 0 or d.plain)] for i, value in enumerate(values)]
    accepted = 0
    for given in itertools.product(*options):
        if len({length(v, d) for v, d in zip(values, given, strict=True) if d is not None}) == 1:
            try:
                claim = fold_for(node, given)
            except CannotChunk:
                continue
            try:
                check_fold(node, claim)
            except Exception as error:
                raise AssertionError(f"{call} with tokens in {given}, claim {claim}: {error}") from error
            accepted += 1
    return accepted


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
            claim = claim_for(node, dim, in_order=True)
        except CannotChunk:
            continue
        try:
            check_rows(node, dim, claim)
        except Exception as error:
            raise AssertionError(f"{call} along {dim}, claim {claim.needs}: {error}") from error
        accepted += 1
    return accepted
