"""What rows of an operator's result need of its operands.

Terms
-----
dim     A dimension that carries tokens, `Dim(index, outer, inner)`. Mostly just an index.
        A `view` may merge it with its neighbours: `[B, S, H] -> [B*S, H]` leaves the tokens
        in dimension 0 with `outer=B`; `[S, K] -> [S*K]` leaves them with `inner=K`.
need    Of one operand: all of it, the same rows along one of its dims, or these and a bounded number before them.
state   What a scan needs beside its operands: what it gave for the row before.
window  Where the rows that are computed stand in the sequence, and where each operand begins.

    attention    query Rows(2), key All(), value All()
    short conv   input Past(1, 3), weight All()             a causal convolution over four tokens
    cumsum       input Rows(1), with a State                the sum so far
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mom_passes.graph.sizes import Size, is_one, same


@dataclass(frozen=True)
class Dim:
    """A dimension that carries tokens, laid out as `outer x tokens x inner`.

    A `view` may merge the token dimension with its neighbours: `[B, S, H] -> [B*S, H]` leaves the tokens in dimension 0
    with `outer=B`.

    Attributes
    ----------
    index : int
        The index of the dimension.
    outer : int or SymInt
        Size of what varies more slowly than tokens in this dimension.
    inner : int or SymInt
        Size of what varies faster than tokens in this dimension.
    """

    index: int
    outer: Size = 1
    inner: Size = 1

    def at(self, index: int) -> Dim:
        """Return the same layout in another dimension.

        Parameters
        ----------
        index : int
            The index of the other dimension.

        Returns
        -------
        Dim
            With `outer` and `inner` of this one.
        """
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


@dataclass(frozen=True)
class All:
    """The operator needs all of an operand, whichever rows of the result are computed."""

    def __str__(self) -> str:
        return "all of it"


@dataclass(frozen=True)
class Rows:
    """The operator needs the same rows of an operand as are computed of the result.

    Attributes
    ----------
    dim : Dim
        The token dimension of the operand.
    """

    dim: Dim

    def __str__(self) -> str:
        return f"rows of {self.dim}"


@dataclass(frozen=True)
class Past:
    """The operator needs the rows that are computed and at most `rows` rows before them.

    There are fewer where the sequence begins.

    Attributes
    ----------
    dim : Dim
        The token dimension of the operand. It holds tokens alone (`dim.plain`).
    rows : int
        The number of rows before, at least 1.
    """

    dim: Dim
    rows: int

    def __str__(self) -> str:
        return f"rows of {self.dim} and {self.rows} before"


Need = All | Rows | Past


def fault_of(need: Need) -> str | None:
    """What is wrong with a need, whatever operator has it, or None."""
    if isinstance(need, Past) and not (need.dim.plain and need.rows > 0):
        return "a past is of at least one row, along a dimension that holds tokens alone"
    return None


def dim_of(need: Need) -> Dim | None:
    """The dim along which a need is for rows; None where it is for all."""
    return None if isinstance(need, All) else need.dim


@dataclass(frozen=True)
class State:
    """What a scan hands from each mini-sequence to the next: its result for the last row; `fill` before the first.

    `combine(scan of own rows, state)` is what the scan of all rows gives for these.
    """

    fill: int | float
    combine: Any

    def __str__(self) -> str:
        return "its last row"


@dataclass(frozen=True)
class Window:
    """Where a body stands in the sequence: values that an operator's arguments may be built from.

    `start` is the index of the first row that is computed and `count` the number of them. `first` says for each tensor
    operand at which row of the sequence it begins: 0 for all of it, `start` for rows, and up to `rows` less with a
    past. All are graph nodes (SymInts) inside a body, plain integers in a test.
    """

    start: Any
    count: Any
    first: tuple[Any, ...]
