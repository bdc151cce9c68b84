"""Chunk rules: what an operator needs to compute only some rows of its output.

Terms
-----
dim         A dimension that carries tokens, `Dim(index, outer, inner)`. Mostly just an index.
            A `view` may merge it with its neighbours: `[B, S, H] -> [B*S, H]` leaves the tokens
            in dimension 0 with `outer=B`; `[S, K] -> [S*K]` leaves them with `inner=K`.
demand      What is asked of one operand: some rows along one of its dims, or all of it (`FULL`).
claim       A rule's answer for (node, dim): one demand per tensor operand, which dim of every
            output carries the rows, and how the operator's own arguments change in a body.
edit        `(args, kwargs, rows) -> (args, kwargs)`: arguments inside a loop body. Arguments that
            mention the sequence length must not survive into a body.

The law every rule must keep, for any cut of the rows [0, S) into pieces:

    cat([op(edit(slice(operands)))  for piece], dim)  ==  op(operands)

    claim = chunk_rule_for(node.target)(node, Dim(1))      # or raises CannotChunk
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.errors import CannotChunk
from passes.sizes import Size, is_one, same


@dataclass(frozen=True)
class Dim:
    """Dimension `index` of a value, laid out as `outer x tokens x inner`."""

    index: int
    outer: Size = 1
    inner: Size = 1

    def at(self, index: int) -> Dim:
        """The same layout in another dimension."""
        return Dim(index, self.outer, self.inner)

    @property
    def plain(self) -> bool:
        """Whether the dimension holds tokens alone, so that rows are a simple slice."""
        return is_one(self.outer) and is_one(self.inner)

    def __str__(self) -> str:
        return f"dim {self.index}" if self.plain else f"dim {self.index} ({self.outer} x tokens x {self.inner})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dim):
            return NotImplemented
        return self.index == other.index and same(self.outer, other.outer) and same(self.inner, other.inner)

    def __hash__(self) -> int:
        # Layouts that differ mostly differ in the index too, and hashing a sympy expression is slow.
        return self.index


#: Demand for a whole operand.
FULL: None = None
Demand = Dim | None


@dataclass(frozen=True)
class Rows:
    """Where a body stands in the sequence: values that its arguments may be built from.

    `start` is the index of its first row and `count` the number of its rows; both are
    graph nodes (SymInts) inside a body, or plain integers in a test.
    """

    start: Any
    count: Any


Edit = Callable[[tuple[Any, ...], dict[str, Any], Rows], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """A rule's answer. `demands` follows `operands(node)`, duplicates included."""

    demands: tuple[Demand, ...]
    #: For an operator with several outputs: the dim of each (None: that output carries no rows and must not be used).
    outputs: tuple[Dim | None, ...] | None = None
    edit: Edit | None = None
    #: Another operator to call in the body, e.g. one that takes a row offset.
    target: Any = None


Rule = Callable[[fx.Node, Dim], Claim]
#: Guesses for the token dim of the output, given those of the operands. Only `view` needs its own.
Candidates = Callable[[fx.Node, tuple[Demand, ...]], list[Dim]]


@dataclass(frozen=True)
class ChunkRule:
    """One operator's facts: its rule, and whether the planner may run it twice.

    `recompute`: cheap enough to run again in another loop instead of keeping its result
    at full length (pointwise work, norms, rope, masks; never a matmul, an attention, a sort).
    """

    rule: Rule
    recompute: bool = True
    candidates: Candidates | None = None

    def __call__(self, node: fx.Node, dim: Dim) -> Claim:
        claim = self.rule(node, dim)
        count = len(operands(node))
        assert len(claim.demands) == count, f"{node.target}: {len(claim.demands)} demands for {count} operands"
        return claim


_RULES: dict[Any, ChunkRule] = {}


def register(*targets: Any, recompute: bool = True, candidates: Candidates | None = None) -> Callable[[Rule], Rule]:
    """Decorator: the chunk rule of one or more operator overloads.

    Public, for custom operators::

        @register(torch.ops.mylib.scale_rows.default)
        def scale_rows(node, dim):
            if dim.index != 0:
                raise CannotChunk(node, dim, "only rows are independent")
            return Claim((dim, FULL))
    """

    def decorate(rule: Rule) -> Rule:
        for target in targets:
            _RULES[target] = ChunkRule(rule, recompute, candidates)
        return rule

    return decorate


def registered() -> dict[Any, ChunkRule]:
    """A copy of the table: operator overload -> rule."""
    return dict(_RULES)


def chunk_rule_for(target: Any) -> ChunkRule | None:
    return _RULES.get(target)


def claim_for(node: fx.Node, dim: Dim) -> Claim:
    """The claim of the node's rule. Raises `CannotChunk`, also for an operator without one."""
    rule = chunk_rule_for(node.target)
    if rule is None:
        raise CannotChunk(node, dim, "no chunk rule is registered for this operator")
    return rule(node, dim)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in order of appearance in args, then kwargs, duplicates included."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if is_tensor(arg):
            found.append(arg)
        return arg

    fx.map_arg((node.args, node.kwargs), visit)
    return found


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a tuple of tensors (not a size or a number)."""
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, tuple, list))


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor a node stands for."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} is not a single tensor"
    return value
