"""How a loop over mini-sequences is connected: what its body is given, and what becomes of what it returns.

Terms
-----
port     One value that goes into a body or comes out of a loop, with its type.
rows     Each mini-sequence is given its own rows of a value, or returns rows that are stored at full length.
whole    All of a value, the same for each mini-sequence: weights, keys, values.
carry    What a mini-sequence hands to the next: the total of a reduction so far, the last rows of a value, a state.

    body(start, count, *inputs) -> (*rows of what is stored, *the next value of each carry)

This is `scan` as JAX has it, `(consts, carry, xs) -> (carry, ys)`, with rows in place of single elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from mom_passes.graph.sizes import Size, count_hint, expr, product, same
from mom_passes.rules import Dim, Rows

#: The row a mini-sequence begins at and how many it has, in the types of its values.
START, COUNT = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("start", "count"))


@dataclass(frozen=True)
class TensorType:
    """Shape, dtype and device; `order` are the dimensions from the outermost in storage to the innermost if the value
    is dense, None where nothing is said of its strides."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...] | None = None

    @staticmethod
    def of(value: torch.Tensor, order: tuple[int, ...] | None = None) -> TensorType:
        return TensorType(tuple(value.shape), value.dtype, value.device, order)

    @property
    def bytes(self) -> int:
        """At the captured sizes."""
        return count_hint(self.shape) * self.dtype.itemsize

    @property
    def dense(self) -> tuple[int, ...]:
        """The order in which it lies in a dense storage of its own."""
        assert self.order is not None, "nothing is said of its strides"
        return self.order

    def other_than(self, other: TensorType) -> str | None:
        """What is wrong with a type that should be this one, strides apart, or None. Adds no guards."""
        if (other.dtype, other.device) != (self.dtype, self.device):
            return f"is {other.dtype} on {other.device} in place of {self.dtype} on {self.device}"
        alike = len(other.shape) == len(self.shape) and all(map(same, other.shape, self.shape))
        return None if alike else f"has shape {list(other.shape)} in place of {list(self.shape)}"

    def difference(self, value: Any) -> str | None:
        """The same of a fake value."""
        if not isinstance(value, torch.Tensor):
            return f"expected a Tensor, got {type(value).__name__}"
        return self.other_than(TensorType.of(value))


def rows_type(full: TensorType, need: Rows) -> TensorType:
    """The type of what one mini-sequence has of a value at full length."""
    count = expr(product([need.dim.outer, COUNT + need.before, need.dim.inner]))
    shape = tuple(count if d == need.dim.index else size for d, size in enumerate(full.shape))
    return TensorType(shape, full.dtype, full.device)


@dataclass(frozen=True)
class SizeIn:
    """A number that depends on sizes."""

    value: Size


@dataclass(frozen=True)
class RowsIn:
    """The mini-sequence's own rows of a value of this type at full length, along `dim`."""

    type: TensorType
    dim: Dim


@dataclass(frozen=True)
class WholeIn:
    type: TensorType


@dataclass(frozen=True)
class CarryIn:
    """What the mini-sequence before has left; the first is given the loop's operand, which stays as it is.

    The body returns the value for the next one, of the same type, as its output number `out`.
    """

    type: TensorType
    out: int


In = SizeIn | RowsIn | WholeIn | CarryIn


@dataclass(frozen=True)
class Stored:
    """Rows that are stored along `dim` of a value of this type.

    With `over`, it is written to where the rows of that input were, which dies there (`mom_passes.program.in_place`).
    """

    name: str
    type: TensorType
    dim: Dim
    over: int | None = None


@dataclass(frozen=True)
class CarryOut:
    """The value of the carry that is input number `carry`, after the last mini-sequence. `operator` made it."""

    name: str
    type: TensorType
    carry: int
    operator: Any


Out = Stored | CarryOut
