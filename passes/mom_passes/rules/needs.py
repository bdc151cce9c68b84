"""Types of chunk rules: what a call on rows needs, what it returns, and what it passes to the call on the next rows.

Terms
-----
dim      The dimension that holds tokens, `Dim(index, outer, inner)`. A `view` may merge it with its neighbours:
         `[B, S, H] -> [B*S, H]` puts the tokens in dimension 0 with `outer=B`, `[S, K] -> [S*K]` with `inner=K`.
need     Of one operand: all of it, or its rows along a dim and a number of rows before them.
output   Of one result: rows, a part of a fold over all rows, or the final value of a carry.
carry    A value that one mini-sequence passes to the next. Rows with a carry are computed in order.
window   The position of the computed rows in the sequence, and the first row of each operand.

    attention               query Rows(2), key All(), value All()           -> Rows
    causal convolution      input Rows(2, before=3), weight All()           -> Rows
    sum over tokens         input Rows(1)                                   -> Fold(add, 0)
    cumsum                  input Rows(1)                                   -> Rows, Carry(0, Last(1), join=add)
    linear recurrence       input Rows(1), state All()                      -> Rows, Final(0), Carry(0, 1, "state")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.graph.sizes import Size, is_one, same

Number = int | float | bool


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
        """Whether the dimension holds tokens only, so that rows are one slice."""
        return is_one(self.outer) and is_one(self.inner)

    def __str__(self) -> str:
        return f"dim {self.index}" if self.plain else f"dim {self.index} ({self.outer} x tokens x {self.inner})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dim):
            return NotImplemented
        return self.index == other.index and same(self.outer, other.outer) and same(self.inner, other.inner)

    def __hash__(self) -> int:
        # Unequal dims mostly have unequal indices, and hashing a sympy expression is slow.
        return self.index


@dataclass(frozen=True)
class All:
    """The operator needs all of an operand, whichever rows of the result are computed."""

    def __str__(self) -> str:
        return "all of it"


@dataclass(frozen=True)
class Rows:
    """The computed rows of an operand along `dim`, and `before` rows ahead of them.

    Ahead of the first row of the sequence there are none: an operator gets zeros there, and `Window.first` is negative.
    A claim with `before` is refused along a folded dimension: rows ahead of others are no range there.

    Attributes
    ----------
    dim : Dim
        The token dimension of the operand.
    before : int
        The number of rows ahead, 0 by default.
    """

    dim: Dim
    before: int = 0

    def __str__(self) -> str:
        return f"rows of {self.dim}" + (f" and {self.before} before them" if self.before else "")


Need = All | Rows


def find_fault(need: Need) -> str | None:
    """Return why a need is invalid for any operator, or None."""
    if isinstance(need, Rows) and need.before < 0:
        return "`before` must not be negative"
    return None


def dim_of(need: Need) -> Dim | None:
    """Return the dim of a need for rows, None for `All`."""
    return None if isinstance(need, All) else need.dim


@dataclass(frozen=True)
class Fold:
    """A result without rows: `combine(total, part)` combines the result for some rows with the total of earlier rows.

    Attributes
    ----------
    combine : OpOverload
        An operator on two tensors.
    identity : int, float or bool
        The total of no rows.
    dtype : torch.dtype, optional
        Dtype of the total, if it differs from the result's: half precision is summed in float32, and rounded once.
    finish : callable, optional
        Takes the node of the total of all rows and emits the result: a mean divides. By default, the total itself.
    """

    combine: Any
    identity: Number
    dtype: torch.dtype | None = None
    finish: Callable[[fx.Node], fx.Node] | None = None


@dataclass(frozen=True)
class Final:
    """A result without rows: the value of a carry after the last row.

    Attributes
    ----------
    carry : int
        The number of the carry in `Claim.carries`.
    """

    carry: int


Output = Rows | Fold | Final | None


@dataclass(frozen=True)
class Last:
    """The last rows of result 0.

    Attributes
    ----------
    count : int
        The number of rows.
    """

    count: int = 1


@dataclass(frozen=True)
class Carry:
    """A value that a call passes to the call for the next rows.

    Attributes
    ----------
    init : int, float or bool
        The value before the first row is a tensor filled with this number, or the argument `operand` of the call in
        the graph, unless that is None.
    next : int or Last
        The value for the next rows: the number of an output, or the last rows of output 0.
    operand : str, optional
        Name of the argument that receives the value.
    join : OpOverload, optional
        Without `operand`, the operator that joins the value with the result. With `Last` the joined value replaces
        output 0; with the number of an output it is the value for the next rows.
    dtype : torch.dtype, optional
        Dtype of the value, if it differs from the result's.
    """

    init: Number
    next: int | Last
    operand: str | None = None
    join: Any = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Window:
    """The rows that a call computes. Edits compute an operator's arguments from it.

    All numbers are graph nodes (SymInts) inside a body and plain integers in tests.

    Attributes
    ----------
    start : int or fx.Node
        Index of the first row in the sequence.
    count : int or fx.Node
        Number of rows.
    first : tuple of int or fx.Node
        For each tensor operand, the row of the sequence at which it begins: 0 for `All`, `start - before` for `Rows`,
        which is negative before the first row of the sequence.
    """

    start: Any
    count: Any
    first: tuple[Any, ...]
