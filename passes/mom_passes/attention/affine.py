"""The abstract values of mask arithmetic: integers as functions of an element's index, booleans as constraints.

Terms
-----
affine      An integer `constant + sum(coefficient[k] * index[k])` at the element `index` of a tensor. Constants and
            coefficients may contain the graph's symbols (sequence lengths).
lookup      An element of a tensor about which nothing else is known, at a position that is a function of the index.
statement   A constraint: `affine >= 0`; an element of a boolean tensor is true (`Flag`); an order of two elements of
            one integer tensor (`Order`).
truth       A boolean known by the statements that it implies.
additive    A floating mask that is 0 where a truth holds and -inf (or the dtype's smallest number) elsewhere.

Everything derived here holds for all values of the symbols that their assumptions allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
from torch import fx

from mom_passes.graph.sizes import expr, is_one

ZERO = sympy.Integer(0)


@lru_cache(maxsize=65536)
def nonnegative(value: sympy.Expr) -> bool:
    """Whether `value >= 0` is proved for all values of its symbols. False may also mean "not known"."""
    if value.is_number:
        return bool(value >= 0)
    extreme = next(iter(value.atoms(sympy.Max, sympy.Min)), None)
    if extreme is not None:
        # It equals one of its arguments. Where its coefficient is nonnegative, a Max may be replaced by any of them.
        cases = [nonnegative(sympy.expand(value.xreplace({extreme: case}))) for case in extreme.args]
        helps = isinstance(extreme, sympy.Max) and nonnegative(sympy.expand(value.coeff(extreme)))
        return all(cases) or (helps and _linear_in(value, extreme) and any(cases))
    symbols = sorted(value.free_symbols, key=str)
    if not value.is_polynomial(*symbols):
        return False
    counts: list[sympy.Dummy] = []
    shifted = {}
    for symbol in symbols:
        if not symbol.is_nonnegative:
            return False
        # Count a positive symbol from one. Then the signs of the coefficients decide.
        counts.append(sympy.Dummy(nonnegative=True))
        shifted[symbol] = counts[-1] + (1 if symbol.is_positive else 0)
    moved = sympy.Poly(value.xreplace(shifted), *counts)
    return all(bool(factor >= 0) for factor in moved.coeffs())


def _linear_in(value: sympy.Expr, part: sympy.Expr) -> bool:
    return not sympy.expand(value - value.coeff(part) * part).has(part)


@dataclass(frozen=True)
class Affine:
    """`constant + sum(coefficient * index)`, one coefficient for each dimension of the tensor."""

    coefficients: tuple[sympy.Expr, ...]
    constant: sympy.Expr

    @staticmethod
    def number(value: Any) -> Affine:
        return Affine((), expr(value))

    @property
    def is_constant(self) -> bool:
        return all(c == 0 for c in self.coefficients)

    def at_rank(self, rank: int) -> Affine:
        """Broadcast to more dimensions, on the left."""
        return replace(self, coefficients=(ZERO,) * (rank - len(self.coefficients)) + self.coefficients)

    def plus(self, other: Affine, times: Any = 1) -> Affine:
        """`self + times * other`, broadcast."""
        rank = max(len(self.coefficients), len(other.coefficients))
        a, b, factor = self.at_rank(rank), other.at_rank(rank), expr(times)
        coefficients = tuple(sympy.expand(x + factor * y) for x, y in zip(a.coefficients, b.coefficients, strict=True))
        return Affine(coefficients, sympy.expand(a.constant + factor * b.constant))

    def scaled(self, factor: Any) -> Affine:
        return Affine((), ZERO).plus(self, factor)

    def fixed(self, shape: Sequence[Any]) -> Affine:
        """The same function on this shape in normal form: no coefficient for a dimension of size 1."""
        wide = self.at_rank(len(shape))
        coefficients = (ZERO if is_one(size) else c for c, size in zip(wide.coefficients, shape, strict=True))
        return replace(wide, coefficients=tuple(coefficients))

    def always(self, shape: Sequence[Any]) -> bool:
        """Whether `self >= 0` at every element of a tensor of this shape."""
        lowest = self.constant
        for coefficient, size in zip(self.coefficients, shape, strict=True):
            if not nonnegative(coefficient):
                if not nonnegative(-coefficient):
                    return False
                lowest += coefficient * (expr(size) - 1)
        return nonnegative(sympy.expand(lowest))

    def opposite(self) -> Affine:
        """`not (self >= 0)` as a constraint: integers, so `-self - 1 >= 0`."""
        return self.scaled(-1).plus(Affine.number(-1))

    def moved(self, move: Reindex) -> Affine | None:
        """The function of the index of a view, or None if it is not affine."""
        return move(self)


Reindex = Callable[[Affine], Affine | None]

#: The position of an element: a function of the index for each dimension.
Position = tuple[Affine, ...]


def _moved(position: Position, move: Reindex) -> Position | None:
    moved = [move(at) for at in position]
    return None if None in moved else tuple(at for at in moved if at is not None)


def _fixed(position: Position, shape: Sequence[Any]) -> Position:
    return tuple(at.fixed(shape) for at in position)


@dataclass(frozen=True)
class Lookup:
    """The integer `node[position] + offset`."""

    node: fx.Node
    position: Position
    offset: sympy.Expr = ZERO

    def plus(self, number: sympy.Expr) -> Lookup:
        return replace(self, offset=sympy.expand(self.offset + number))

    def moved(self, move: Reindex) -> Lookup | None:
        position = _moved(self.position, move)
        return None if position is None else replace(self, position=position)

    def fixed(self, shape: Sequence[Any]) -> Lookup:
        return replace(self, position=_fixed(self.position, shape))


@dataclass(frozen=True)
class Flag:
    """`node[position]`, an element of a boolean tensor, is true, or false if `negated`."""

    node: fx.Node
    position: Position
    negated: bool = False

    def moved(self, move: Reindex) -> Flag | None:
        position = _moved(self.position, move)
        return None if position is None else replace(self, position=position)

    def fixed(self, shape: Sequence[Any]) -> Flag:
        return replace(self, position=_fixed(self.position, shape))

    def always(self, shape: Sequence[Any]) -> bool:
        return False

    def opposite(self) -> Flag:
        return replace(self, negated=not self.negated)


@dataclass(frozen=True)
class Order:
    """`node[high] - node[low] + offset >= 0` for two elements of one integer tensor."""

    node: fx.Node
    high: Position
    low: Position
    offset: sympy.Expr

    def moved(self, move: Reindex) -> Order | None:
        high, low = _moved(self.high, move), _moved(self.low, move)
        return None if high is None or low is None else replace(self, high=high, low=low)

    def fixed(self, shape: Sequence[Any]) -> Order:
        return replace(self, high=_fixed(self.high, shape), low=_fixed(self.low, shape))

    def always(self, shape: Sequence[Any]) -> bool:
        return self.high == self.low and nonnegative(self.offset)

    def opposite(self) -> Order:
        return replace(self, high=self.low, low=self.high, offset=sympy.expand(-self.offset - 1))


Statement = Affine | Flag | Order


@dataclass(frozen=True)
class Truth:
    """A boolean `X`, or `not X` if `negated`; also as the number 1 or 0.

    `X` implies every constraint. If `exact`, the constraints together imply `X`.
    """

    constraints: frozenset[Statement] = frozenset()
    exact: bool = True
    negated: bool = False

    @staticmethod
    def constant(value: bool) -> Truth:
        return TRUE if value else FALSE

    def inverted(self) -> Truth:
        return replace(self, negated=not self.negated).plain() or replace(self, negated=not self.negated)

    def plain(self) -> Truth | None:
        """The same truth without a negation, or None."""
        if not self.negated:
            return self
        if self.exact and not self.constraints:
            return FALSE
        if self.constraints == FALSE.constraints:
            return TRUE
        if self.exact and len(self.constraints) == 1:
            return Truth(frozenset(c.opposite() for c in self.constraints))
        return None

    def both(self, other: Truth) -> Truth:
        """Conjunction."""
        for one, another in ((self, other), (other, self)):
            if one in (TRUE, FALSE):
                return another if one == TRUE else FALSE
        a, b = self.plain() or UNKNOWN, other.plain() or UNKNOWN
        return Truth(a.constraints | b.constraints, a.exact and b.exact)

    def either(self, other: Truth) -> Truth:
        return self.inverted().both(other.inverted()).inverted()

    def chosen(self, yes: Truth, no: Truth) -> Truth:
        """`where(self, yes, no)`, if one side is constant."""
        for side, other, condition in ((yes, no, self), (no, yes, self.inverted())):
            if side == TRUE:
                return condition.either(other)
            if side == FALSE:
                return condition.inverted().both(other)
        return UNKNOWN

    def reindexed(self, move: Reindex) -> Truth:
        """The truth at the elements of a view. Constraints without an affine form there are dropped."""
        moved = [c.moved(move) for c in self.constraints]
        return Truth(frozenset(m for m in moved if m is not None), self.exact and None not in moved, self.negated)

    def on(self, shape: Sequence[Any]) -> Truth:
        """The truth on a tensor of this shape: without constraints that always hold, false if one never does."""
        kept = set()
        for constraint in (c.fixed(shape) for c in self.constraints):
            if constraint.opposite().always(shape):
                return Truth(FALSE.constraints, True, self.negated).plain() or FALSE
            if not constraint.always(shape):
                kept.add(constraint)
        reduced = Truth(frozenset(kept), self.exact, self.negated)
        return reduced.plain() or reduced

    @property
    def number(self) -> Affine | None:
        """0 or 1 if the truth is constant."""
        return {TRUE: Affine.number(1), FALSE: Affine.number(0)}.get(self)


TRUE = Truth()
FALSE = Truth(frozenset({Affine((), sympy.Integer(-1))}))
#: A boolean about which nothing is known.
UNKNOWN = Truth(exact=False)


@dataclass(frozen=True)
class Additive:
    """0 where `visible`, `lowest` elsewhere. If `visible` is not exact: -inf at least where its constraints fail."""

    visible: Truth
    lowest: float = -math.inf

    def on(self, shape: Sequence[Any]) -> Additive:
        return replace(self, visible=self.visible.on(shape))


Value = Affine | Lookup | Truth | Additive | None


def lowest_of(values: Iterable[Value]) -> float:
    """The fill of a mask made of others. The finite one, which hides less, decides."""
    return max((v.lowest for v in values if isinstance(v, Additive)), default=-math.inf)
