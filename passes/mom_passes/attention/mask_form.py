"""From what a mask says to what an attention can use of it: causality, a window, and conditions on keys alone.

Terms
-----
mask        `[.., R, T]`: query `i` of R stands in the dimension before the last, key `j` of T in the last.
start       Where query 0 stands among the keys: with keys of a past before them, behind these.
of a key    A statement's tensor is looked at where batch entry and key say, whatever the query.
segment     Queries and keys that have one number in common, as the sequences do that are packed into one row.

    i - j + start >= 0                            causal, from `start`
    j - i - start + window - 1 >= 0               within a window
    flag[b, j]                                    only keys with the flag: no padding
    number[b, i] == number[b, j]                  of the same segment
    number[b, i] >= number[b, j]                  causal by positions that somebody gave
    number[b, j] - number[b, i] + window - 1 >= 0 within a window of those
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from mom_passes.attention.affine import FALSE, ZERO, Affine, Flag, Order, Position, Truth, nonnegative
from mom_passes.graph.sizes import expr, same


@dataclass(frozen=True)
class OfKeys:
    """A tensor looked at by batch entry and key: `node[position]`."""

    node: fx.Node
    position: Position
    negated: bool = False


@dataclass(frozen=True)
class MaskForm:
    """What a mask lets query `i` see.

    causal      at most keys `j <= i + start`; with `window`, at most the last `window` of those
    keys        only keys for which each of these flags is true
    segments    only keys of its own segment: where this tensor has the number that it has at the query
    positions   only keys where this tensor has at most the number that it has at the query; with `window`, and more
                than that less `window`

    `exact`: precisely those; the mask says nothing else. Otherwise it masks more, and must be kept; the last three are
    then empty.
    """

    causal: bool
    window: int | None = None
    exact: bool = True
    start: sympy.Expr = ZERO
    keys: tuple[OfKeys, ...] = ()
    segments: OfKeys | None = None
    positions: OfKeys | None = None


def mask_form(truth: Truth, shape: Sequence[Any], lowest: float) -> MaskForm | None:
    """What can be used of a mask that is true where `truth` holds, `lowest` elsewhere; None if nothing can."""
    plain = truth.on(shape).plain()
    if plain is None or plain == FALSE or len(shape) < 2:
        return None
    said = _Statements(tuple(shape))
    for statement in plain.constraints:
        said.take(statement)
    form = said.form()
    shown = not said.keys and same(form.start, expr(shape[-1]) - expr(shape[-2]))
    # A finite fill hides keys only in a row that sees some. Causal rows of a whole sequence see their own key.
    if form.exact and plain.exact and (lowest == -math.inf or shown or not (said.keys or form.causal)):
        return form
    if not form.causal or lowest > -math.inf:
        return None
    return MaskForm(True, form.window if form.positions is None else None, False, form.start)


@dataclass
class _Statements:
    """The statements of a mask of this shape, sorted by kind; `others` are those of no use."""

    shape: tuple[Any, ...]
    delays: list[sympy.Expr] = field(default_factory=list)
    windows: list[sympy.Expr] = field(default_factory=list)
    keys: list[OfKeys] = field(default_factory=list)
    orders: dict[OfKeys, tuple[list[sympy.Expr], list[sympy.Expr]]] = field(default_factory=dict)
    others: bool = False

    def take(self, statement: Affine | Flag | Order) -> None:
        if isinstance(statement, Affine):
            self._take_index(statement)
        elif isinstance(statement, Flag):
            if self._of_key(statement.position):
                self.keys.append(OfKeys(statement.node, statement.position, statement.negated))
            else:
                self.others = True
        else:
            self._take_order(statement)

    def _take_index(self, statement: Affine) -> None:
        *batch, query, key = statement.coefficients
        by_position = all(c == 0 for c in batch)
        if by_position and (query, key) == (1, -1):
            self.delays.append(statement.constant)
        elif by_position and (query, key) == (-1, 1):
            self.windows.append(statement.constant)
        else:
            self.others = True

    def _take_order(self, order: Order) -> None:
        square = same(self.shape[-2], self.shape[-1])
        for ahead, (key, query) in enumerate(((order.low, order.high), (order.high, order.low))):
            # One tensor for both, so query `i` is where key `i` is: that takes as many queries as keys.
            if square and self._of_key(key) and query == tuple(_swapped(at) for at in key):
                self.orders.setdefault(OfKeys(order.node, key), ([], []))[ahead].append(order.offset)
                return
        self.others = True

    def _of_key(self, position: Position) -> bool:
        """Whether a position follows the key in one dimension, the batch entry in one at most, and nothing else."""
        rank, one = len(self.shape), sympy.Integer(1)
        key, batch = (ZERO,) * (rank - 1) + (one,), (one,) + (ZERO,) * (rank - 1)
        followed = []
        for at in position:
            if at.coefficients == key or (rank == 4 and at == Affine(batch, ZERO)):
                followed.append(at.coefficients)
            elif not at.is_constant:
                return False
        return followed.count(key) == 1 and followed.count(batch) <= 1

    def form(self) -> MaskForm:
        """What all of it says together; not exact where something is of no use."""
        start, exact = self._start()
        exact = exact and not self.others
        limits = [self._window(constant, start) for constant in self.windows] if start is not None else []
        exact = exact and len([w for w in limits if w is not None]) == len(self.windows)
        window = min((w for w in limits if w is not None), default=None)
        segments, positions, by_number = self._by_number()
        exact = exact and segments is not _UNKNOWN
        # Numbers are given per key: with keys of a past, queries would not be at the end of them.
        exact = exact and (not self.orders or start in (None, ZERO))
        exact = exact and (by_number is None or start is None)
        if not exact:
            return MaskForm(start is not None, window, False, start if start is not None else ZERO)
        return MaskForm(
            start is not None, window if by_number is None else by_number, True,
            start if start is not None else ZERO, tuple(self.keys), segments, positions,
        )  # fmt: skip

    def _start(self) -> tuple[sympy.Expr | None, bool]:
        """Where query 0 stands (None: not causal), and whether that says all."""
        least = [d for d in self.delays if all(nonnegative(sympy.expand(other - d)) for other in self.delays)]
        if not least:
            return None, not self.delays
        if nonnegative(least[0]):
            return least[0], True
        # `j <= i - 1`, say: no key behind the query is seen, and less than that.
        return (ZERO, False) if nonnegative(-least[0]) else (None, False)

    @staticmethod
    def _window(constant: sympy.Expr, start: sympy.Expr | None) -> int | None:
        size = sympy.expand(constant + 1 + (start if start is not None else ZERO))
        return int(size) if size.is_Integer and size > 0 else None

    def _by_number(self) -> tuple[OfKeys | None, OfKeys | None, int | None]:
        """Segments, positions and a window of those; `_UNKNOWN` first where the orders say anything else."""
        segments: OfKeys | None = None
        positions: OfKeys | None = None
        window = None
        for tensor, (down, up) in self.orders.items():
            if down == [ZERO] and up == [ZERO] and segments is None:
                segments = tensor
            elif down == [ZERO] and len(up) <= 1 and positions is None:
                positions = tensor
                window = self._window(up[0], None) if up else None
                if up and window is None:
                    return _UNKNOWN, None, None
            else:
                return _UNKNOWN, None, None
        return segments, positions, window


def _swapped(at: Affine) -> Affine:
    """The same function with query and key exchanged."""
    *batch, query, key = at.coefficients
    return Affine((*batch, key, query), at.constant)


_UNKNOWN: Any = object()
