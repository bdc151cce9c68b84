"""Ports of a loop over mini-sequences: the typed inputs of its body and the typed outputs of the loop.

Terms
-----
rows     Each mini-sequence reads its own rows of a value, or returns rows that are stored at full length.
whole    All of a value, the same for every mini-sequence: weights, keys, values.
carry    A value that a mini-sequence passes to the next: the total of a reduction, the last rows of a value, a state.

    body(start, count, *inputs) -> (*stored rows, *next value of each carry)

This is `scan` in JAX, `(consts, carry, xs) -> (carry, ys)`, with slices of rows instead of single elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from mom_passes.graph.sizes import Size, count_hint, expr, product, same
from mom_passes.rules import Dim, Rows

#: First row and number of rows of a mini-sequence, as symbols in the types of a body's values.
START, COUNT = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("start", "count"))


@dataclass(frozen=True)
class TensorType:
    """Shape, dtype and device of a tensor.

    `order` lists the dimensions of a dense tensor from outermost to innermost in storage. None: unknown strides.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...] | None = None

    @staticmethod
    def of(value: torch.Tensor, order: tuple[int, ...] | None = None) -> TensorType:
        return TensorType(tuple(value.shape), value.dtype, value.device, order)

    @property
    def bytes(self) -> int:
        """Size in bytes at the captured sizes."""
        return count_hint(self.shape) * self.dtype.itemsize

    @property
    def dense(self) -> tuple[int, ...]:
        """`order`, which must be known."""
        assert self.order is not None, "the strides are unknown"
        return self.order

    def other_than(self, other: TensorType) -> str | None:
        """Return how `other` differs from this type, or None. Ignores strides. Adds no guards."""
        if (other.dtype, other.device) != (self.dtype, self.device):
            return f"is {other.dtype} on {other.device}, expected {self.dtype} on {self.device}"
        equal = len(other.shape) == len(self.shape) and all(map(same, other.shape, self.shape))
        return None if equal else f"has shape {list(other.shape)}, expected {list(self.shape)}"

    def difference(self, value: Any) -> str | None:
        """Return how a fake value differs from this type, or None."""
        if not isinstance(value, torch.Tensor):
            return f"expected a Tensor, got {type(value).__name__}"
        return self.other_than(TensorType.of(value))


def rows_type(full: TensorType, need: Rows) -> TensorType:
    """Return the type of a mini-sequence's rows of a value."""
    count = expr(product([need.dim.outer, COUNT + need.before, need.dim.inner]))
    shape = tuple(count if d == need.dim.index else size for d, size in enumerate(full.shape))
    return TensorType(shape, full.dtype, full.device)


@dataclass(frozen=True)
class SizeIn:
    """A number that depends on sizes."""

    value: Size


@dataclass(frozen=True)
class RowsIn:
    """The mini-sequence's rows, along `dim`, of a value with this type at full length."""

    type: TensorType
    dim: Dim


@dataclass(frozen=True)
class WholeIn:
    """All of a value."""

    type: TensorType


@dataclass(frozen=True)
class CarryIn:
    """A value from the previous mini-sequence. The first one reads the loop's operand, which is not modified.

    The body returns the next value, of the same type, as output number `out`.
    """

    type: TensorType
    out: int


In = SizeIn | RowsIn | WholeIn | CarryIn


@dataclass(frozen=True)
class Stored:
    """Rows that are stored, along `dim`, in a value with this type.

    With `over`, they overwrite the rows of that input, which is not read later (`mom_passes.program.in_place`).
    """

    name: str
    type: TensorType
    dim: Dim
    over: int | None = None


@dataclass(frozen=True)
class CarryOut:
    """The final value of the carry with input number `carry`. `operator` is the operator that computes the carry."""

    name: str
    type: TensorType
    carry: int
    operator: Any


Out = Stored | CarryOut
