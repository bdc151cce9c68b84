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

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk, RuleError
from mom_passes.graph.sizes import Size, is_one, same
from mom_passes.graph.values import operands


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
        """The rule's claim, checked. Raises `CannotChunk`, and `RuleError` for a rule that answers otherwise."""
        try:
            claim = self.rule(node, dim)
        except (CannotChunk, RuleError):
            raise
        except Exception as error:
            raise RuleError(node, dim, f"raised {type(error).__name__}: {error}") from error
        fault = _fault(claim, len(operands(node)))
        if fault is not None:
            raise RuleError(node, dim, fault)
        return claim


def _fault(claim: Any, operand_count: int) -> str | None:
    """What is wrong with a rule's answer, or None."""
    if not isinstance(claim, Claim):
        return f"returned {claim!r}; return a Claim, or raise CannotChunk"
    demands = claim.demands
    if not isinstance(demands, tuple) or not all(demand is FULL or isinstance(demand, Dim) for demand in demands):
        return f"demands {demands!r}; a tuple of Dim and FULL is wanted, one for each tensor operand"
    if len(demands) != operand_count:
        return f"has {len(demands)} demands for {operand_count} tensor operands"
    return None


_RULES: dict[Any, ChunkRule] = {}

_OVERLOAD = type(torch.ops.aten.add.Tensor)
_PACKET = type(torch.ops.aten.add)
_EXAMPLE = "pass torch.ops.mylib.scale_rows.default, say, for an operator mylib::scale_rows"


def register(*targets: Any, recompute: bool = True, candidates: Candidates | None = None) -> Callable[[Rule], Rule]:
    """Decorator: the chunk rule of one or more operator overloads. Raises `TypeError` for anything else.

    Public, for custom operators::

        @register(torch.ops.mylib.scale_rows.default)
        def scale_rows(node, dim):
            if dim.index != 0:
                raise CannotChunk(node, dim, "only rows are independent")
            return Claim((dim, FULL))
    """

    if not targets:
        raise TypeError(f"a chunk rule is for at least one operator overload; {_EXAMPLE}")
    for target in targets:
        _check_target(target)

    def decorate(rule: Rule) -> Rule:
        _check_rule(rule)
        for target in targets:
            _RULES[target] = ChunkRule(rule, recompute, candidates)
        return rule

    return decorate


def _check_target(target: Any) -> None:
    if isinstance(target, _OVERLOAD) or target is operator.getitem:
        return
    if isinstance(target, _PACKET):
        names = ", ".join(f"torch.ops.{target}.{name}" for name in target.overloads())
        raise TypeError(f"torch.ops.{target} is a packet of overloads; a chunk rule is for one or more of {names}")
    raise TypeError(f"a chunk rule is for operator overloads, and {target!r} is none; {_EXAMPLE}")


def _check_rule(rule: Any) -> None:
    """A rule is called with a node and a dim; what it returns can only be seen when it is asked."""
    if not callable(rule):
        raise TypeError(f"a chunk rule is a function of a node and a dim, and {rule!r} cannot be called")
    try:
        signature = inspect.signature(rule)
    except ValueError:  # some built-in functions have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"a chunk rule is called with a node and a dim; {rule!r} takes {signature}") from error


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






