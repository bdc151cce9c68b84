"""From the statements of a mask to arguments of an attention: causality, a window, conditions on single keys.

Terms
-----
mask        `[.., R, T]`: query `i` of R along the dimension before the last, key `j` of T along the last.
start       Position of query 0 among the keys: the length of the past if there is one.
of a key    A statement about a tensor at the batch entry and the key, independent of the query.
segment     The queries and keys with the same number: sequences that are packed into one row.

    i - j + start >= 0                            causal, from `start`
    j - i - start + window - 1 >= 0               within a window
    flag[b, j]                                    only keys with the flag: no padding
    number[b, i] == number[b, j]                  of the same segment
    number[b, i] >= number[b, j]                  causal by given positions
    number[b, j] - number[b, i] + window - 1 >= 0 within a window of given positions
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
    """A tensor read at batch entry and key: `node[position]`."""

    node: fx.Node
    position: Position
    negated: bool = False


@dataclass(frozen=True)
class MaskForm:
    """The keys that query `i` may attend to.

    causal      only keys `j <= i + start`; with `window`, only the last `window` of these
    keys        only keys for which each of these flags is true
    segments    only keys whose number in this tensor equals the query's
    positions   only keys whose position in this tensor is at most the query's; with `window`, also greater than the
                query's less `window`

    If `exact`, the mask is equivalent. If not, it hides more keys and must be kept, and the last three are empty.
    """

    causal: bool
    window: int | None = None
    exact: bool = True
    start: sympy.Expr = ZERO
    keys: tuple[OfKeys, ...] = ()
    segments: OfKeys | None = None
    positions: OfKeys | None = None


def mask_form(truth: Truth, shape: Sequence[Any], lowest: float) -> MaskForm | None:
    """The form of a mask that is true, or 0, where `truth` holds and `lowest` elsewhere. None if it has none."""
    plain = truth.on(shape).plain()
    if plain is None or plain == FALSE or len(shape) < 2:
        return None
    statements = _Statements(tuple(shape))
    for statement in plain.constraints:
        statements.take(statement)
    form = statements.form()
    shown = not statements.keys and same(form.start, expr(shape[-1]) - expr(shape[-2]))
    # A finite fill hides keys only in rows with other visible keys. Causal rows of a whole sequence see their own key.
    if form.exact and plain.exact and (lowest == -math.inf or shown or not (statements.keys or form.causal)):
        return form
    if not form.causal or lowest > -math.inf:
        return None
    return MaskForm(True, form.window if form.positions is None else None, False, form.start)


@dataclass
class _Statements:
    """The statements of a mask of this shape, by kind. `others`: some statement has no form."""

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
            # Both positions are in one tensor, so query `i` is key `i` there: R must equal T.
            if square and self._of_key(key) and query == tuple(_swapped(at) for at in key):
                self.orders.setdefault(OfKeys(order.node, key), ([], []))[ahead].append(order.offset)
                return
        self.others = True

    def _of_key(self, position: Position) -> bool:
        """Whether a position follows the key in one dimension, the batch entry in at most one, and nothing else."""
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
        """The conjunction of all statements; not exact if some have no form."""
        start, exact = self._start()
        exact = exact and not self.others
        limits = [self._window(constant, start) for constant in self.windows] if start is not None else []
        exact = exact and len([w for w in limits if w is not None]) == len(self.windows)
        window = min((w for w in limits if w is not None), default=None)
        segments, positions, by_number = self._by_number()
        exact = exact and segments is not _UNKNOWN
        # Query `i` has the number of key `start + i`, in this mask of key `i`.
        exact = exact and (not self.orders or start in (None, ZERO))
        exact = exact and (by_number is None or start is None)
        if not exact:
            return MaskForm(start is not None, window, False, start if start is not None else ZERO)
        return MaskForm(
            start is not None, window if by_number is None else by_number, True,
            start if start is not None else ZERO, tuple(self.keys), segments, positions,
        )  # fmt: skip

    def _start(self) -> tuple[sympy.Expr | None, bool]:
        """The position of query 0 (None: not causal), and whether the constraints say no more."""
        least = [d for d in self.delays if all(nonnegative(sympy.expand(other - d)) for other in self.delays)]
        if not least:
            return None, not self.delays
        if nonnegative(least[0]):
            return least[0], True
        # `j <= i - 1`, say: hides all keys after the query, and more.
        return (ZERO, False) if nonnegative(-least[0]) else (None, False)

    @staticmethod
    def _window(constant: sympy.Expr, start: sympy.Expr | None) -> int | None:
        size = sympy.expand(constant + 1 + (start if start is not None else ZERO))
        return int(size) if size.is_Integer and size > 0 else None

    def _by_number(self) -> tuple[OfKeys | None, OfKeys | None, int | None]:
        """Segments, positions and their window; `_UNKNOWN` first if the orders say anything else."""
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
    """The function with query and key exchanged."""
    *batch, query, key = at.coefficients
    return Affine((*batch, key, query), at.constant)


_UNKNOWN: Any = object()
